"""Registered torch operators, one folder an operation; the choice between Triton and torch is made inside each."""
