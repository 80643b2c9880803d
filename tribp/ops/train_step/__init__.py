"""A small perceptron's training step: `tribp/training.py` is the function, `plan.py` its launches."""
