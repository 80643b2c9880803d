"""The linear layer with an activation: `op.py` the registered operators, `plan.py` their launches."""
