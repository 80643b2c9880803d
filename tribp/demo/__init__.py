"""What `python -m tribp` shows: checks, digits, training, averages, picture, and the report that prints them."""
