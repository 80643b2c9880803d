"""Functions on tensors, as in `torch.nn.functional`."""

from .ops import flops
from .ops.conv3x3.op import conv3x3
from .ops.linear.op import linear, linear_sigmoid

__all__ = ["conv3x3", "linear", "linear_sigmoid"]

flops.register_when_imported()
