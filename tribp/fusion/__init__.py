"""Whole models: torch's layers exchanged for tribp's in place, and back."""

from .layers import fuse, unfuse
from .modules import FoldedBatchNorm, FusedActivation, FusedSigmoid
from .report import Left, Replaced, Report
from .sequential import FusedSequential

__all__ = [
    "FoldedBatchNorm",
    "FusedActivation",
    "FusedSequential",
    "FusedSigmoid",
    "Left",
    "Replaced",
    "Report",
    "fuse",
    "unfuse",
]
