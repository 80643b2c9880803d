"""Whole models: torch's layers exchanged for tribp's in place, and back."""

from .layers import fuse, unfuse
from .modules import FoldedBatchNorm, FusedActivation, FusedSigmoid
from .report import Left, Replaced, Report

__all__ = ["FoldedBatchNorm", "FusedActivation", "FusedSigmoid", "Left", "Replaced", "Report", "fuse", "unfuse"]
