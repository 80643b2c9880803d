"""Measuring tribp: `python -m bench --help`. Run from a checkout; no part of the installed package."""
