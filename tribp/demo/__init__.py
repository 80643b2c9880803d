"""What `python -m tribp` shows: checks, digits, models, losses, training, averages, picture, and the report of them."""
