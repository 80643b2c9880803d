"""Which backend runs what; and that importing tribp asks nothing of a GPU and nothing of triton."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tribp
from tribp import dispatch

from .conftest import HAS_GPU
from .processes import forked


def test_auto_sends_cpu_tensors_to_torch() -> None:
    assert dispatch.backend_of(torch.ones(1)) == "torch"
    assert dispatch.backend_of(torch.ones(1, device="meta")) == "torch"


def test_meta_tensors_never_reach_a_kernel(kernels: str) -> None:
    x, w = torch.empty(6, 5, device="meta", requires_grad=True), torch.empty(4, 5, device="meta")
    y = tribp.linear_sigmoid(x, w)
    (grad,) = torch.autograd.grad(y.sum(), x)
    image = tribp.conv3x3(torch.empty(2, 3, 4, 5, device="meta"), torch.empty(7, 3, 3, 3, device="meta"))
    assert (y.shape, grad.shape, image.shape) == ((6, 4), (6, 5), (2, 7, 2, 3))


@pytest.mark.gpu
def test_auto_sends_cuda_tensors_to_triton() -> None:
    assert dispatch.backend_of(torch.ones(1, device="cuda")) == "triton"


def test_use_backend_nests_and_restores() -> None:
    with tribp.use_backend("torch"):
        with pytest.raises(ZeroDivisionError), tribp.use_backend("auto"):
            raise ZeroDivisionError
        assert dispatch._backend == "torch"
    assert dispatch._backend == "auto"


def test_use_backend_within_a_compiled_function(kernels: str, launched: list[str]) -> None:
    """It holds for the calls in its block, as without the compiler."""
    x, w = torch.randn(3, 4, device=kernels), torch.randn(2, 4, device=kernels)

    def asked(backend: str) -> torch.Tensor:
        with tribp.use_backend(backend):
            return tribp.linear(x, w)

    compiled = torch.compile(asked, backend="eager")
    for _ in range(2):
        for backend, launches in (("triton", ["forward"]), ("torch", [])):
            launched.clear()
            torch.testing.assert_close(compiled(backend), torch.nn.functional.linear(x, w))
            assert launched == launches


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="'auto', 'triton', 'torch', got 'cuda'"), tribp.use_backend("cuda"):
        pass


def test_backward_uses_the_backend_of_forward(kernels: str, launched: list[str]) -> None:
    x = torch.randn(3, 4, device=kernels, requires_grad=True)
    y = tribp.linear_sigmoid(x, torch.randn(2, 4, device=kernels))
    with tribp.use_backend("torch"):
        y.sum().backward()
    assert "dgrad" in launched


def test_unknown_backend_in_the_environment() -> None:
    run = forked("-c", "import tribp", TRIBP_BACKEND="fast")
    assert run.returncode != 0
    assert "TRIBP_BACKEND must be one of 'auto', 'triton', 'torch', got 'fast'" in run.stderr.splitlines()[-1]


@pytest.mark.skipif(HAS_GPU, reason="about machines without a GPU")
def test_triton_on_cpu_tensors_without_the_interpreter() -> None:
    pytest.importorskip("triton")
    code = """
        import torch, tribp
        try:
            tribp.linear_sigmoid(torch.ones(2, 3), torch.ones(4, 3))
        except RuntimeError as error:
            print(error)
    """
    run = forked("-c", code, TRIBP_BACKEND="triton")
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 1
    assert "TRITON_INTERPRET=1" in run.stdout
    run = forked("-c", code + "    print('ran')", TRIBP_BACKEND="triton", TRITON_INTERPRET="1")
    assert run.stdout == "" or "TRITON_INTERPRET" not in run.stdout, run.stdout


WITHOUT_TRITON = """
    import sys
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    import importlib.util
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
    sys.meta_path.insert(0, Missing())
"""


def test_works_without_triton() -> None:
    run = forked(
        "-c",
        WITHOUT_TRITON
        + """
    import torch, tribp
    x = torch.ones(2, 3, requires_grad=True)
    tribp.nn.LinearSigmoid(3, 4)(x).sum().backward()
    assert x.grad is not None and "triton" not in sys.modules
    try:
        with tribp.use_backend("triton"):
            tribp.linear_sigmoid(x, torch.ones(4, 3))
    except RuntimeError as error:
        print(error)
    """,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "the Triton backend was asked for, but triton is not installed: pip install triton"


@pytest.mark.parametrize(
    ("capability", "driver", "early"),
    [
        ((9, 0), 13000, True),
        ((10, 0), 12030, True),
        ((9, 0), 12020, False),
        ((9, 0), None, False),
        ((8, 0), 13000, False),
    ],
)
def test_launches_begin_early_where_gpu_and_driver_can(
    capability: tuple[int, int], driver: int | None, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def __init__(self, name: str) -> None:
            if driver is None:
                raise OSError(name)

        def cuDriverGetVersion(self, version: object) -> None:
            version._obj.value = driver  # type: ignore[attr-defined]

    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=132, shared_memory_per_block_optin=9)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    arch = dispatch._arch_of.__wrapped__(0)
    assert (arch.name, arch.early_launches) == (f"sm_{10 * major + minor}", early)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("gfx942:sramecc+:xnack-", "triton"), ("gfx90a:sramecc+:xnack-", "triton"), ("gfx950", "triton"),
        ("gfx1100", "torch"), ("gfx1201", "torch"), ("gfx906:sramecc+:xnack-", "torch"), ("gfx9", "torch"),
        ("sm_80", "triton"), ("sm_121", "triton"), ("sm_75", "torch"), ("sm_70", "torch"), ("interpreted", "triton"),
    ],
)  # fmt: skip
def test_which_gpus_run_kernels_by_themselves(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, Triton runs on the others too."""
    pytest.importorskip("triton")
    capability = int(name[3:]) if name.startswith("sm_") else 0
    properties = SimpleNamespace(
        major=capability // 10, minor=capability % 10, multi_processor_count=8, gcnArchName=name
    )  # fmt: skip
    monkeypatch.setattr(torch.version, "hip", None if capability else "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(dispatch, "_arch_of", dispatch._arch_of.__wrapped__)
    monkeypatch.setattr(dispatch, "interpreting", lambda: name == "interpreted")
    tensor: Any = SimpleNamespace(is_cuda=True, is_meta=False, device=torch.device("cuda", 0))
    assert dispatch.backend_of(tensor) == backend
    with tribp.use_backend("triton"):
        assert dispatch.backend_of(tensor) == "triton"


def test_importing_queries_no_gpu() -> None:
    """Neither CUDA's initialization nor any query of a device; triton itself stays unimported too."""
    run = forked(
        "-c",
        """
        import sys, torch
        def refuse(*args, **kwargs):
            raise AssertionError("a GPU was queried")
        for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_properties",
                     "get_device_capability", "get_device_name"):
            setattr(torch.cuda, name, refuse)
        torch._C._cuda_getDeviceCount = refuse
        import tribp, tribp.nn, tribp.functional, tribp.ops.linear.op
        tribp.nn.LinearSigmoid(3, 4)(torch.ones(2, 3))
        assert "tribp.kernels.common" not in sys.modules
        """,
    )
    assert run.returncode == 0, run.stderr
