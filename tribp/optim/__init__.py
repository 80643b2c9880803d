"""Optimizers in place of torch.optim's: the same arguments, numbers and checkpoints, one kernel launch a step.

    import tribp.optim as optim  # in place of: import torch.optim as optim

`RMSProp` and `AdaGrad` are other spellings of `RMSprop` and `Adagrad`. What tribp's classes offer beyond torch's is in
`ExtraOptions`. What does not update element by element, and what is no optimizer, is torch's own, by the same name:
LBFGS, SparseAdam, Adafactor, Optimizer, lr_scheduler, swa_utils, and every other name in the `torch.optim.__all__` of
the torch that is installed (Muon, swap_in_optimizer_params_and_state).
"""

import sys

import torch.optim
from torch.optim import LBFGS, Adafactor, Optimizer, SparseAdam, lr_scheduler, swa_utils

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .asgd import ASGD
from .nadam import NAdam
from .options import ExtraOptions
from .radam import RAdam
from .replacing import patch, unpatch
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD, Momentum

RMSProp = RMSprop
AdaGrad = Adagrad
Beyond = ExtraOptions  # deprecated

__all__ = [
    "ASGD", "LBFGS", "SGD", "AdaGrad", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Beyond",
    "ExtraOptions", "Momentum", "NAdam", "Optimizer", "RAdam", "RMSProp", "RMSprop", "Rprop", "SparseAdam",
    "lr_scheduler", "patch", "swa_utils", "unpatch",
]  # fmt: skip

for _module in (lr_scheduler, swa_utils):  # for `from tribp.optim.lr_scheduler import StepLR`
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module

for _name in torch.optim.__all__:  # those that not every supported torch has
    if _name not in __all__:
        globals()[_name] = getattr(torch.optim, _name)
        __all__ += [_name]
