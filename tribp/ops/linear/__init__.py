"""The linear layer with a sigmoid: `op.py` the registered operators, `plan.py` their launches."""
