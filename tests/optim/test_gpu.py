"""What only a GPU shows of the optimizers: launches, streams, graphs, synchronization, size."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tribp
from tribp.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Momentum,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
)

pytestmark = pytest.mark.gpu

CLASSES: list[tuple[Any, dict[str, Any]]] = [
    (SGD, dict(momentum=0.9)),
    (Momentum, {}),
    (RMSprop, dict(momentum=0.9, centered=True)),
    (Adagrad, dict(lr_decay=0.01)),
    (Adam, dict(amsgrad=True)),
    (AdamW, {}),
    (Adadelta, {}),
    (Adamax, {}),
    (NAdam, {}),
    (RAdam, {}),
    (Rprop, {}),
    (ASGD, dict(t0=1.0)),
]


def parameters(count: int = 7, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(), (1,), (7,), (1025,), (64, 65), (4, 3, 3, 3), (5000,)]
    return [torch.randn(shapes[i % 7], device="cuda", dtype=dtype).requires_grad_() for i in range(count)]


def give_gradients(params: list[Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn_like(p)


def kernels_of(action: Any) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        action()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if str(e.device_type).endswith("CUDA") and "mem" not in e.name.lower()]


@pytest.mark.parametrize(("kind", "options"), CLASSES)
def test_one_kernel_a_step(kind: Any, options: dict[str, Any]) -> None:
    params = parameters(50)
    optimizer = kind([{"params": params[:20]}, {"params": params[20:], "lr": 0.5}], **options)
    for seed in range(2):  # the second time everything is compiled, and the tables are there
        give_gradients(params, seed)
        names = kernels_of(optimizer.step)
    assert names == ["multi_tensor_step"]


@pytest.mark.parametrize(("kind", "options"), CLASSES)
def test_nothing_waits_for_the_device(kind: Any, options: dict[str, Any]) -> None:
    params = parameters()
    optimizer = kind(params, max_grad_norm=1.0, **options)
    for seed in range(3):
        give_gradients(params, seed)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if seed else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("kind", "options"), CLASSES)
def test_a_captured_step_replays_with_a_changing_lr(kind: Any, options: dict[str, Any]) -> None:
    """Also after eager steps in between have used other gradients, and other tables."""
    start = parameters()
    captured = [p.detach().clone().requires_grad_() for p in start]
    eager = [p.detach().clone().requires_grad_() for p in start]
    lr = torch.tensor(1e-2, device="cuda")
    one, other = kind(captured, lr=lr, capturable=True, **options), kind(eager, lr=1e-2, **options)
    static = [torch.zeros_like(p) for p in captured]

    def fill(seed: int) -> None:
        give_gradients(eager, seed)
        for target, p in zip(static, eager, strict=True):
            assert p.grad is not None
            target.copy_(p.grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for seed in range(2):
            fill(seed)
            for p, g in zip(captured, static, strict=True):
                p.grad = g
            one.step()
            other.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.step()
    for seed in range(2, 8):
        lr.fill_(1e-2 / seed)
        other.param_groups[0]["lr"] = 1e-2 / seed
        fill(seed)
        if seed == 5:  # an eager step, on gradients elsewhere
            for p, g in zip(captured, static, strict=True):
                p.grad = g.clone()
            one.step()
        else:
            graph.replay()
        other.step()
    for p, q in zip(captured, eager, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)


def test_capture_without_capturable_is_refused() -> None:
    params = parameters()
    optimizer = SGD(params)
    give_gradients(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_uploads_never_overtake_each_other() -> None:
    """The host runs far ahead of a device that is kept busy, with new gradients' addresses every step."""
    params, twins = parameters(), []
    twins = [p.detach().clone().requires_grad_() for p in params]
    optimizer, genuine = Adam(params), torch.optim.Adam(twins, fused=True)
    busy = torch.randn(4096, 4096, device="cuda")
    keep = []
    for seed in range(50):
        busy = busy @ busy.clamp(-1e-3, 1e-3)
        give_gradients(params, seed)
        keep += [p.grad for p in params]
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad
        optimizer.step()
        genuine.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 2**20 + 3
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n + 2**30:
        pytest.skip("needs 14 GB")
    p = torch.zeros(n, device="cuda", dtype=torch.bfloat16).requires_grad_()
    p.grad = torch.ones_like(p)
    SGD([p], lr=1.0).step()
    with torch.no_grad():
        assert bool((p == -1).all())


def test_gradscaler() -> None:
    params, twins = parameters(), []
    twins = [p.detach().clone().requires_grad_() for p in params]
    optimizer, genuine = Adam(params, fused=True), torch.optim.Adam(twins, fused=True)
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**16, growth_interval=2) for _ in range(2)]
    for seed in range(6):
        for scaler, kind, ps in zip(scalers, (optimizer, genuine), (params, twins), strict=True):
            kind.zero_grad()
            torch.manual_seed(seed)
            loss = torch.stack([(p * torch.randn_like(p)).sum() for p in ps]).sum()
            loss = loss * (float("inf") if seed == 3 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(kind)
            scaler.update()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"] == genuine.state[q]["step"]


def test_every_device_gets_one_launch() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    params = [torch.randn(100, device=f"cuda:{i % 2}").requires_grad_() for i in range(6)]
    optimizer = Adam(params, max_grad_norm=1.0)
    for seed in range(2):
        give_gradients(params, seed)
        names = kernels_of(optimizer.step)
    assert names.count("multi_tensor_step") == 2


def test_the_other_backend_takes_over() -> None:
    """Counters that a kernel kept on the device go where torch has them, and come back."""
    params = parameters()
    twins = [p.detach().clone().requires_grad_() for p in params]
    optimizer, genuine = Adam(params), torch.optim.Adam(twins)
    for seed, backend in enumerate(["triton", "torch", "triton"]):
        give_gradients(params, seed)
        for p, q in zip(params, twins, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        with tribp.use_backend(backend):
            optimizer.step()
        genuine.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
