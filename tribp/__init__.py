"""tribp: Triton kernels for back-propagation behind PyTorch's interfaces."""

from importlib.metadata import PackageNotFoundError, version

from . import functional, nn, optim
from .functional import linear_sigmoid
from .runtime import use_backend

try:
    __version__ = version("tribp")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

__all__ = ["functional", "linear_sigmoid", "nn", "optim", "use_backend"]
