"""tribp: Triton kernels for back-propagation behind PyTorch's interfaces."""

from importlib.metadata import PackageNotFoundError, version

from . import _checkout as _checkout
from . import functional, nn, optim
from .dispatch import use_backend
from .export import decompositions
from .functional import conv3x3, linear, linear_sigmoid, mlp
from .fusion import fuse, unfuse
from .training import train_step

try:
    __version__ = version("tribp")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

__all__ = [
    "conv3x3",
    "decompositions",
    "functional",
    "fuse",
    "linear",
    "linear_sigmoid",
    "mlp",
    "nn",
    "optim",
    "train_step",
    "unfuse",
    "use_backend",
]
