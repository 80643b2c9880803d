"""Linear layers with activations, one on top of another: `op.py` the function, `plan.py` its launches."""
