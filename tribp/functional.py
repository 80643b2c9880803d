"""Functions on tensors, as in `torch.nn.functional`."""

from .ops import flops
from .ops.conv3x3.op import conv3x3
from .ops.linear.op import linear, linear_sigmoid
from .ops.mlp.op import mlp

__all__ = ["conv3x3", "linear", "linear_sigmoid", "mlp"]

flops.register_when_imported()
