"""Activations: their values and derivatives, in every layer that has them."""
