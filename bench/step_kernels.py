"""The optimizer kernels for GPUs that are not there: launches the library itself makes, on tensors without memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

from tribp import dispatch, optim
from tribp.dispatch import dtype_name
from tribp.launch.arch import Arch

from .registry import StaticCase

if TYPE_CHECKING:
    from tribp.launch.plan import Launch

    from .expectations import Expectation

LENGTHS = (1000, 1 << 22)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Variant:
    """One way to call an optimizer."""

    name: str
    optimizer: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    scaler: bool = False  # under a GradScaler
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    everything: bool = False  # besides: strided tensors, groups with and without a state, hyperparameters on the device


ALL_ON = dict(amsgrad=True, fused=True, max_grad_norm=1.0, ema_decay=0.9, eps_inside_sqrt=True)
WIDE = dict(stochastic_rounding=True, state_dtype=torch.float32)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
VARIANTS = [  # for every target
    Variant("adam", optim.Adam, dtypes=DTYPES),
    Variant("sgd", optim.SGD),
    Variant("momentum", optim.Momentum),
    Variant("rmsprop", optim.RMSprop),
    Variant("adagrad", optim.Adagrad),
    Variant("adam clip", optim.Adam, dict(max_grad_norm=1.0)),
    Variant("adam wide states", optim.Adam, dict(state_dtype=FP32), dtypes=(BF16,)),
    Variant("adam everything", optim.Adam, ALL_ON | WIDE, scaler=True, dtypes=(BF16,), everything=True),
]
MORE = [  # for one target, to save time: the machine code differs little between them
    Variant("momentum", optim.Momentum, dtypes=(BF16,)),
    Variant("rmsprop", optim.RMSprop, dtypes=(BF16,)),
    Variant("adagrad", optim.Adagrad, dtypes=(BF16,)),
    Variant("rmsprop centered momentum", optim.RMSprop, dict(centered=True, momentum=0.9)),
    Variant("adam amsgrad", optim.Adam, dict(amsgrad=True)),
    Variant("adam scaler", optim.Adam, dict(fused=True), scaler=True),
    Variant("adam clip", optim.Adam, dict(max_grad_norm=1.0), dtypes=(FP64,)),
]
RARE = [  # for --all
    Variant("adam clip", optim.Adam, dict(max_grad_norm=1.0), dtypes=(BF16,)),
    Variant("adam ema", optim.Adam, dict(ema_decay=0.9)),
    Variant("adam stochastic", optim.Adam, dict(stochastic_rounding=True), dtypes=(BF16,)),
    Variant("adam wide states", optim.Adam, dict(state_dtype=FP32), dtypes=(FP16,)),
    Variant("adam everything", optim.Adam, ALL_ON, scaler=True, everything=True),
]
THOROUGH = "sm_90"


def launches(
    variant: Variant, dtype: torch.dtype, arch: Arch, lengths: Sequence[int] = LENGTHS, grouped: bool = True
) -> "list[Launch]":
    """What one step launches on this machine. grouped: all tensors in one parameter group, or each in its own."""
    from tribp.launch.plan import Launch

    found: list[Launch] = []

    def record(launch: Launch) -> None:
        found.append(launch)

    with (
        mock.patch.object(dispatch, "backend_of", return_value="triton"),
        mock.patch.object(dispatch, "arch_of", return_value=arch),
        mock.patch.object(Launch, "run", record),
    ):
        params = [Parameter(torch.empty(n, dtype=dtype, device="meta")) for n in lengths]
        groups: list[dict[str, Any]] = [{"params": params}] if grouped else [{"params": [p]} for p in params]
        if variant.everything:
            sliced = Parameter(torch.empty(64, 64, dtype=dtype, device="meta")[:, 1:])
            groups.append({"params": [sliced], "amsgrad": False})
        for p in (p for group in groups for p in group["params"]):
            p.grad = torch.empty_like(p)
        optimizer: Any = variant.optimizer(groups, **variant.options)
        if variant.scaler:
            optimizer.grad_scale = optimizer.found_inf = torch.empty((), device="meta")
        optimizer.step()
    if variant.everything:  # an lr on the device is one where its address can be read, which `meta` has none of
        found = [x.with_settings(ON_DEVICE=True) if "ON_DEVICE" in x.settings else x for x in found]
    return found


def static_cases(arch: Arch, everything: bool) -> Iterator[StaticCase]:
    """A case is called after its rule, its type, and what is switched on."""
    more = [*MORE, *RARE] if everything else MORE if arch.name == THOROUGH else []
    for variant in [*VARIANTS, *more]:
        rule, _, switches = variant.name.partition(" ")
        for dtype in DTYPES if everything and "stochastic" not in variant.options else variant.dtypes:
            for launch in launches(variant, dtype, arch):
                name = f"{rule} {dtype_name(dtype)} {switches}".strip()
                yield StaticCase(name, launch, expectations(launch, arch))


def expectations(launch: "Launch", arch: Arch) -> "Sequence[Expectation]":
    """Every operand of a full, aligned block is read, and if it changes written, 16 bytes at a time."""
    from .expectations import vectors

    threads = launch.num_warps * (64 if arch.backend == "hip" else 32)
    block = launch.named["BLOCK"]
    assert isinstance(block, int)

    def count(types: Sequence[Any]) -> int:
        """16-byte accesses a thread; the smaller block of strided tensors makes do with narrower ones."""
        return sum(max(least, block * kind.primitive_bitwidth // (128 * threads)) for kind in types if kind is not None)

    least = 0 if launch.named["STRIDED"] else 1
    constants, grad = launch.named, [launch.named["GRAD_TYPE"]]
    if launch.kernel.__name__ == "gradient_norm":
        return [vectors(count(grad), 0, "a gradient is read in whole vectors")]
    written = [constants[name] for name in ("PARAM_TYPE", "STATE0", "STATE1", "STATE2", "EMA_TYPE")]
    scaled = grad if isinstance(named(launch, "grad_scale"), Tensor) else []
    return [vectors(count(grad + written), count(scaled + written), "full, aligned blocks go in whole vectors")]


def named(launch: "Launch", argument: str) -> object:
    return launch.named[argument]
