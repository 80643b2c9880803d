"""Optimizers in place of torch.optim's: the same arguments, numbers and checkpoints, one kernel launch a step.

    from tribp.optim import SGD, Momentum, RMSprop, Adagrad, Adam, AdamW

`RMSProp` and `AdaGrad` are other spellings of the same classes. What they offer beyond torch's is in `ExtraOptions`.
"""

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .asgd import ASGD
from .nadam import NAdam
from .options import ExtraOptions
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD, Momentum

RMSProp = RMSprop
AdaGrad = Adagrad
Beyond = ExtraOptions  # deprecated

__all__ = [
    "ASGD", "SGD", "AdaGrad", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Beyond", "ExtraOptions", "Momentum",
    "NAdam", "RAdam", "RMSProp", "RMSprop", "Rprop",
]  # fmt: skip
