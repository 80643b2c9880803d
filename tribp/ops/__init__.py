"""Registered torch operators, one file an operation; the choice between Triton and torch is made inside each."""
