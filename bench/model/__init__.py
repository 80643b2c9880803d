"""Predicts the time of a launch from its machine code and its sizes: `python -m bench static --model`."""
