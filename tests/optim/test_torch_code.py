"""What torch's own code updates: sparse and differentiable steps; hooks and closures around them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
import tribp.optim

from .cases import (
    LIVELY,
    NUMBERS,
    Options,
    Twins,
    each_class,
    genuine,
    ours,
    values,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what only torch's own code takes


def sparse_grad(size: int, *rows: int) -> Tensor:
    indices = torch.tensor([rows])
    return torch.sparse_coo_tensor(
        indices, values((len(rows), 3), torch.float64, 9, rows), (size, 3), check_invariants=True
    )


@pytest.mark.parametrize("name", ["SGD", "Momentum", "Adagrad"])
@pytest.mark.parametrize("plain_sgd", [True, False], ids=["", "momentum"])
def test_sparse_beside_dense_gradients(name: str, plain_sgd: bool, device: str) -> None:
    """Two embeddings and a dense tensor in one step, hooks firing once; then the embeddings get dense gradients."""
    own: Options = {"momentum": 0.0 if plain_sgd else 0.5} if name == "SGD" else {}
    twins = Twins(name, [(6, 3), (5,), (4, 3)], device, **own)
    calls: list[str] = []
    twins.ours.register_step_pre_hook(lambda *_: calls.append("before"))
    twins.ours.register_step_post_hook(lambda *_: calls.append("after"))
    for t, rows in enumerate([(0, 2), (2, 2, 5), (1,)]):  # (2, 2): not coalesced
        dense = values((5,), torch.float64, 3, t)
        grads = [sparse_grad(6, *rows), dense, sparse_grad(4, 0, 3)]
        twins.give(grads, lambda g: g.clone())
        twins.each(lambda optimizer: optimizer.step())
        twins_check_dense(twins)
        assert calls == ["before", "after"] * (t + 1)
    if name == "Adagrad" or own == {"momentum": 0.0}:  # torch can't add a dense gradient to a sparse buffer
        twins.step()


def twins_check_dense(twins: Twins) -> None:
    """`check`, for buffers that are sparse too: those that torch's SGD makes of sparse first gradients."""
    for optimizer, _ in twins.both:
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.is_sparse:
                    state[key] = value.coalesce()
    for p, twin in zip(twins.params, twins.twins, strict=True):
        torch.testing.assert_close(p.cpu(), twin, rtol=1e-12, atol=1e-13)
    for p, twin in zip(twins.params, twins.twins, strict=True):
        state, other = twins.ours.state.get(p, {}), twins.genuine.state.get(twin, {})
        for key in other:
            if isinstance(other[key], Tensor):
                torch.testing.assert_close(state[key].cpu(), other[key], rtol=1e-12, atol=1e-13)


def test_a_dense_gradient_after_sparse_ones_is_the_kernels_again(kernels: str, launched: list[str]) -> None:
    p = torch.ones(6, 3, dtype=torch.float64, device=kernels)
    optimizer = tribp.optim.Adagrad([p])
    for _ in range(2):
        p.grad = sparse_grad(6, 1).to(kernels)
        optimizer.step()
    assert launched == []
    for t in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert launched == ["multi_tensor_step"] * (t + 1)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "NAdam"])
def test_sparse_gradients_that_torch_refuses(name: str, device: str) -> None:
    errors = []
    for make in (ours, genuine):
        p = torch.ones(6, 3, dtype=torch.float64, device=device)
        p.grad = sparse_grad(6, 1).to(device)
        with pytest.raises(RuntimeError, match="sparse") as error:
            make(name, [p]).step()
        errors.append(str(error.value))
        assert torch.equal(p, torch.ones_like(p))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 1.0}, {"state_dtype": torch.float32}, {"stochastic_rounding": True}, {"eps_inside_sqrt": True}],
    ids=str,
)
def test_sparse_gradients_and_options_beyond_torch(options: Options, device: str) -> None:
    """No silent difference: the option can't be had, and the error names both."""
    p = torch.ones(6, 3, dtype=torch.bfloat16, device=device)
    optimizer = tribp.optim.Adagrad([p], **options)
    p.grad = sparse_grad(6, 1).to(device, p.dtype)
    with pytest.raises(RuntimeError, match=f"{next(iter(options))}.*sparse"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


def test_what_is_refused_makes_no_state(device: str) -> None:
    """Nor does the parameter before it, which could be updated: the next step begins anew."""
    params = [torch.ones(shape, device=device) for shape in ((3,), (6, 3))]
    optimizer = tribp.optim.SGD(params, momentum=0.9, state_dtype=torch.float64)
    params[0].grad, params[1].grad = torch.ones(3, device=device), sparse_grad(6, 1).to(device, torch.float32)
    with pytest.raises(RuntimeError, match="state_dtype"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(params[0], torch.ones_like(params[0]))


def test_sparse_gradients_and_options_that_ask_nothing(device: str) -> None:
    """float64 is rounded to nearest and keeps its states in float64 anyway."""
    params = [torch.ones(6, 3, dtype=torch.float64, device=device) for _ in range(2)]
    nothing: list[Options] = [{"stochastic_rounding": True, "state_dtype": torch.float64}, {}]
    for p, options in zip(params, nothing, strict=True):
        optimizer = tribp.optim.Adagrad([p], **options)
        p.grad = sparse_grad(6, 1).to(device)
        optimizer.step()
    assert torch.equal(*params)


def test_an_average_of_a_sparsely_updated_embedding(device: str) -> None:
    p = torch.ones(6, 3, dtype=torch.float64, device=device)
    optimizer = tribp.optim.SGD([p], lr=0.5, ema_decay=0.5)
    average = None
    for rows in [(1, 2), (2, 3)]:
        p.grad = sparse_grad(6, *rows).to(device)
        optimizer.step()
        average = p.clone() if average is None else 0.5 * average + 0.5 * p
    torch.testing.assert_close(optimizer.state[p]["ema"], average)


@pytest.mark.parametrize("maximize", [False, True])
@each_class
def test_differentiable(name: str, maximize: bool, device: str) -> None:
    """Derivatives of what two steps lead to: by the start, the gradients and, in Adam, the learning rate."""
    steps = 1 if name in ("Adamax", "Rprop") else 2  # torch's own overwrite what the derivatives of two need

    def derivatives(make: Callable[..., Any]) -> tuple[Tensor | None, ...]:
        lr: Any = torch.tensor(0.1, dtype=torch.float64, requires_grad=True) if name in ("Adam", "AdamW") else 0.1
        start = values((5,), torch.float64, 1).requires_grad_()
        gradients = [values((5,), torch.float64, 2 + t).requires_grad_() for t in range(steps)]
        p = start.clone()
        own = {key: value for key, value in LIVELY[name].items() if key not in ("amsgrad", "centered")}  # not in torch
        own |= {"lr": lr, "maximize": maximize}
        optimizer = make(name, [p], **(NUMBERS[name] | own), differentiable=True)
        if name == "Adagrad":
            optimizer.state[p]["sum"] = torch.full_like(p, 0.2)
        for g in gradients:
            p.grad = g
            optimizer.step()
        inputs = [start, *gradients, *([lr] if name in ("Adam", "AdamW") else [])]
        return p.detach(), *torch.autograd.grad(p.square().sum(), inputs, allow_unused=True)

    found, expected = derivatives(ours), derivatives(genuine)
    assert [t is None for t in found] == [t is None for t in expected]  # torch's SGD detaches its first buffer
    assert sum(t is not None for t in found) > steps
    for a, b in zip(found, expected, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@each_class
def test_hooks_and_closures(name: str, device: str) -> None:
    p = torch.ones(3, device=device, requires_grad=True)
    optimizer = ours(name, [p])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        calls.append("closure")
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 3
    assert calls == ["before", "closure", "after"]
    assert optimizer.step() is None
    assert bool((p < 1).all())
