"""Whole models: what tribp's kernels can run of torch's modules, found in place, and the way back."""

from .fusing import fuse
from .report import Replaced, Report, Skipped
from .rows import FusedConv2d, FusedSequential
from .unfusing import unfuse

__all__ = [
    "FusedConv2d",
    "FusedSequential",
    "Replaced",
    "Report",
    "Skipped",
    "fuse",
    "unfuse",
]
