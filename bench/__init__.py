"""Measuring tribp: `python -m bench --help`. Run from a checkout; no part of the installed package."""

import os

os.environ.pop("TRIBP_AUTOTUNE", None)  # before tribp reads it: what is measured are the library's own configs
