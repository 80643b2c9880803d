"""States in 8 bits a number and parameters in 24: what `kernels/optim_codes.py` computes, and who has them when.

A state is then two tensors: its codes, in the parameter's shape, and under `<name>_scale` a float32 number for every
BLOCK of them, as they lie in memory. A parameter of 24 bits is the bfloat16 one that the model has, and an int8
`residual` in its state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layouts import fits_storage, is_dtensor, local
from .options import compresses, keeps_residual
from .rule import Group, Rule
from .tracked_state import WatchedState, peek

BLOCK = 32
SMALLEST = 2.0**-110  # scale, of which 255² times the reciprocal is finite
CODES = (torch.int8, torch.uint8)
RESIDUAL = "residual"


def scale_of(name: str) -> str:
    """The key of a state's scales."""
    return f"{name}_scale"


# The formulas.


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """x = s·q/(254 − |q|), or of codes without a sign s·(q/255)²; float32, in the codes' layout."""
    q = _blocks(codes).float()
    if codes.dtype == torch.int8:
        x = scale[:, None] * (q / (254 - q.abs()))
    else:
        part = q * (1 / 255)
        x = scale[:, None] * (part * part)
    return x.view(-1)[: codes.numel()].as_strided(codes.shape, codes.stride())


def encode(x: Tensor, codes: Tensor, scale: Tensor, random: Tensor | None = None) -> None:
    """Writes codes and scales. random: 15 bits for every element as it lies in memory; rounds to nearest without.

    What was decoded is then encoded as it was. A block that holds NaN or a number from 1e36 on becomes NaN; one whose
    numbers are all below 2⁻¹¹⁰ has the steps of that scale.
    """
    positive = _blocks(torch.empty_like(codes, dtype=torch.bool).copy_(x > 0))  # float32 may make 0 of it
    x = _blocks(torch.empty_like(codes, dtype=torch.float32).copy_(x))
    largest = x.abs().amax(1)  # NaN where one is
    scale.copy_(torch.where(largest < 1e36, largest.clamp_min(SMALLEST), torch.nan))
    part = x / scale[:, None]
    # Half a step more, as the kernel's sum rounds: with 0 the least number below a code would fall to the next one.
    dither: Tensor | float = 0.5 if random is None else ((_blocks(random) & 0x7FFF).float() + 0.5) / 0x8000
    if codes.dtype == torch.int8:
        q = (254 * part / (1 + part.abs())).clamp(-127, 127)
    else:
        q = torch.where(positive, (255 * part.sqrt()).clamp(1, 255), 0)
    q = (q + dither).floor().nan_to_num(0)
    codes.copy_(q.view(-1)[: codes.numel()].as_strided(codes.shape, codes.stride()))


def join(p: Tensor, residual: Tensor) -> Tensor:
    """bfloat16 parameters and the 8 bits below them: float32.

    Of a parameter that somebody has set: 0 becomes no negative number, and an infinity stays one.
    """
    high, low = p.view(torch.int16).int(), residual.int()
    low = torch.where(high & 0x7FFF == 0, low.clamp_min(0), low)
    low = torch.where(high & 0x7F80 == 0x7F80, 0, low)
    return ((high << 16) + (low << 8)).view(torch.float32)


def split(x: Tensor, dither: Tensor | int) -> tuple[Tensor, Tensor]:
    """float32 → the nearest bfloat16 and the 8 bits below it; `dither`, in [0, 255], is added to the bits cut off."""
    bits = (x.view(torch.int32).long() & 0xFFFFFFFF) + dither >> 8
    bits = torch.where(x == x, bits, 0x7FC000)
    high = bits + 128 >> 8
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 8)).to(torch.int8)


def _blocks(t: Tensor) -> Tensor:
    """A dense tensor's elements as they lie in memory, a block a row, the last one filled up with 0."""
    flat = t.as_strided((t.numel(),), (1,))
    return torch.nn.functional.pad(flat, (0, -t.numel() % BLOCK)).view(-1, BLOCK)


# The states.


def code_type(rule: Rule, group: Group, p: Tensor, name: str) -> torch.dtype | None:
    """The type of a state's codes; None if the state is kept as numbers."""
    if not compresses(group, p) or name in rule.uncoded(group):
        return None
    return torch.uint8 if name in (rule.squares or ()) else torch.int8


def extra_keys(rule: Rule, group: Group) -> list[str]:
    """What a group's states may hold besides the rule's own."""
    scales = [scale_of(name) for name in filter(None, rule.states(group))] if group.get("state_bits") else []
    return [*scales, *([RESIDUAL] if group.get("master_bits") else [])]


def store_codes(state: dict[str, Any], name: str, x: Tensor, p: Tensor, dtype: torch.dtype) -> None:
    """Gives a state its codes, of a parameter p's layout.

    In an order that leaves the state's numbers there if it is interrupted: codes never stand beside others' scales.
    """
    codes = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
    scale = torch.empty(-(-local(p).numel() // BLOCK), dtype=torch.float32, device=local(p).device)
    encode(local(x), local(codes), scale)
    _set(state, name, x)
    _set(state, scale_of(name), scale)
    _set(state, name, codes)


def _set(state: dict[str, Any], name: str, value: Tensor | None) -> None:
    """Gives a state another entry, or with None none: a change of which nobody else has the tensor."""
    if value is None:
        dict.__delitem__(state, name)
    else:
        dict.__setitem__(state, name, value)
    if isinstance(state, WatchedState):
        state.notes.changed = True  # whatever plan there is; `accessed` would have each step look at all states


def decoded(state: dict[str, Any], name: str) -> Tensor:
    """A state that is kept as codes, as float32 numbers."""
    codes: Tensor = peek(state, name)
    x = torch.empty_like(codes, dtype=torch.float32, memory_format=torch.preserve_format)
    local(x).copy_(decode(local(codes), peek(state, scale_of(name))))
    return x


def decode_states(state: dict[str, Any]) -> None:
    """Puts float32 numbers in the place of all states that are codes."""
    for name in coded_entries(state) - {RESIDUAL}:
        state[name] = decoded(state, name)
        del state[scale_of(name)]


def conform_all(rule: Rule, optimizer: torch.optim.Optimizer, is_unused: Callable[[object], bool]) -> None:
    """Brings the states that are there into the form that their groups ask for; what does not fit stays as it is.

    is_unused: of a momentum buffer that no step has used yet: it goes, or another form of it would count as begun.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if state := optimizer.state.get(p):
                scale = scale_of("momentum_buffer")
                if (scale in state or group.get("state_bits")) and is_unused(peek(state, "momentum_buffer")):
                    _set(state, "momentum_buffer", None)
                if scale in state and peek(state, "momentum_buffer") is None:
                    _set(state, scale, None)
                conform(rule, group, p, state)


def conform(rule: Rule, group: Group, p: Tensor, state: dict[str, Any]) -> None:
    """As `conform_all`, for one parameter."""

    def fits(value: object) -> bool:
        return isinstance(value, Tensor) and value.shape == p.shape and is_dtensor(value) == is_dtensor(p)

    def is_as_made(value: Tensor, dtype: torch.dtype) -> bool:
        return value.dtype == dtype and local(value).stride() == torch.empty_like(local(p), dtype=dtype).stride()

    are_codes = coded_entries(state)
    for name in filter(None, rule.states(group)):
        value, code_dtype = peek(state, name), code_type(rule, group, p, name)
        if not fits(value):
            continue
        if name in are_codes:
            if code_dtype is not None and is_as_made(value, code_dtype):
                continue
            value = decoded(state, name)
        if code_dtype is not None and value.is_floating_point():
            store_codes(state, name, value, p, code_dtype)
        elif name in are_codes:
            _set(state, name, value.to(group.get("state_dtype") or p.dtype))
        if code_dtype is None and scale_of(name) in state and peek(state, name).dtype not in CODES:
            _set(state, scale_of(name), None)
    residual = peek(state, RESIDUAL)
    if not keeps_residual(group, p):
        if residual is not None:
            _set(state, RESIDUAL, None)  # or the bits below what the parameter was would be added to what it has become
    elif fits(residual) and not is_as_made(residual, torch.int8):  # torch's class makes bfloat16 numbers of them
        _set(state, RESIDUAL, _as_made(residual, p, torch.int8))
    names = [*filter(None, rule.states(group))]
    if group.get("ema_decay"):
        names.append("ema")
    if keeps_residual(group, p):
        names.append(RESIDUAL)
    there = {name: value for name in names if fits(value := peek(state, name))}
    if there and (len(there) < len(names) or len({local(value).stride() for value in there.values()}) > 1):
        # Those of a checkpoint lie as its parameter did, new ones and codes as this one: no kernel takes both.
        for name, value in there.items():
            if not is_as_made(value, value.dtype):
                _set(state, name, _as_made(value, p, value.dtype))


def _as_made(value: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """A state in the layout of a new one."""
    as_made = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
    local(as_made).copy_(local(value))
    return as_made


def coded_entries(state: dict[str, Any]) -> set[str]:
    """The entries that are codes: states that have their scales, and the residual."""

    def has_scale(codes: Tensor, scale: object) -> bool:
        return (
            isinstance(scale, Tensor) and scale.shape == (-(-codes.numel() // BLOCK),) and scale.dtype == torch.float32
            and scale.device == codes.device and scale.is_contiguous() and fits_storage(scale)
        )  # fmt: skip

    tensors = {name: local(t) for name, t in dict.items(state) if isinstance(t, Tensor) and t.dtype in CODES}
    return {
        name for name, codes in tensors.items()
        if (name == RESIDUAL and codes.dtype == torch.int8) or has_scale(codes, peek(state, scale_of(name)))
    }  # fmt: skip
