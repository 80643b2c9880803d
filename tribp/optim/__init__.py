"""Optimizers in place of torch.optim's: the same arguments, numbers and checkpoints, one kernel launch a step.

    from tribp.optim import SGD, Momentum, RMSprop, Adagrad, Adam, AdamW

`RMSProp` and `AdaGrad` are other spellings of the same classes. What they offer beyond torch's is in `ExtraOptions`.
"""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .options import ExtraOptions
from .rmsprop import RMSprop
from .sgd import SGD, Momentum

RMSProp = RMSprop
AdaGrad = Adagrad
Beyond = ExtraOptions  # deprecated

__all__ = ["SGD", "AdaGrad", "Adagrad", "Adam", "AdamW", "Beyond", "ExtraOptions", "Momentum", "RMSProp", "RMSprop"]
