"""What every test needs: the interpreter, or the executor, without a GPU; the kernels' device; poisoned memory."""

import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .interpreting import hasten

pytest_plugins = ["tests.executor.plugin"]  # --execute TARGET

HAS_GPU = torch.cuda.is_available()
for variable in ("TRIBP_BACKEND", "TRIBP_AUTOTUNE"):
    os.environ.pop(variable, None)  # the tests choose

NEED_TRITON = [
    "activations/test_kernels.py", "bench/test_model.py", "bench/test_operation.py", "bench/test_static.py",
    "bench/test_static_conv.py", "bench/test_static_wgmma.py", "bench/test_tune.py", "conv3x3/test_addresses.py",
    "conv3x3/test_kernels.py", "conv3x3/test_operands.py", "launch/test_autotune.py", "launch/test_configs.py",
    "launch/test_tf32.py", "linear/test_kernels.py",
]  # fmt: skip
collect_ignore = [] if importlib.util.find_spec("triton") else NEED_TRITON


def pytest_configure(config: pytest.Config) -> None:
    if not (HAS_GPU or config.option.execute):
        # Triton looks at the variable when it decorates a kernel, so it must be set before tribp.kernels is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        hasten()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite in two processes where pytest-xdist is installed: 14 minutes on two slow cores.

    Not on a GPU, which they would share, nor for a few files, nor where the command line says otherwise (`-n 0`).
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not whole or HAS_GPU or "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist"):
        return
    option = config.option
    if option.numprocesses is None and not (option.usepdb or option.collectonly):
        option.numprocesses, option.dist = 2, "loadfile"
        # Each has as many threads as there are cores. To wait by spinning took a tenth of their time on two cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays: a full collection, which many a test asks for, need not look at it, which takes 0.1 s.

    The executor does look: for tensors.
    """
    if not session.config.option.execute:
        gc.freeze()


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the Triton kernels: compiled, by the interpreter, or executed; the value is the device to put tensors on."""
    pytest.importorskip("triton")
    import tribp

    with tribp.use_backend("triton"):
        yield "cuda" if HAS_GPU and not request.config.option.execute else "cpu"


@pytest.fixture
def interpreter(kernels: str) -> None:
    """Run the Triton kernels on CPU tensors: for tests whose subject does so itself, or that know the tiles it has."""
    if kernels != "cpu":
        pytest.skip("Triton's interpreter is not on where there is a GPU")


@pytest.fixture(params=["torch", "triton"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to run an operation: the fallback on the CPU, and the kernels. The value is the tensors' device."""
    if request.param == "triton":
        yield request.getfixturevalue("kernels")
        return
    import tribp

    with tribp.use_backend("torch"):
        yield "cpu"


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """No test repeats the calls of another."""
    if "tribp.launch.plan" in sys.modules:
        sys.modules["tribp.launch.plan"].forget()


@pytest.fixture
def every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launch is repeated without Triton's looking at it: for tests that watch `Launch.run`."""
    from tribp.launch.launches import CachedLaunch

    monkeypatch.setattr(CachedLaunch, "__call__", lambda launch, memory: launch.on(memory).run())


@pytest.fixture
def launched(kernels: str, every_launch: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched in this test, in order; each still runs."""
    from tribp.launch.launches import Launch

    names: list[str] = []
    run = Launch.run

    def record(launch: Launch) -> None:
        names.append(launch.kernel.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", record)
    return names


@pytest.fixture
def process_group() -> Iterator[None]:
    """This process alone, for what asks for one."""
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: on a busy machine waking a second thread costs a thousand times what it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo() -> SimpleNamespace:
    """The modules that need the extras; a test that needs them is skipped where they are missing."""
    from tribp import __main__ as program

    for extra in program.EXTRAS:
        pytest.importorskip(extra)
    names = ("digits", "learned", "models", "page", "picture", "report", "training")
    return SimpleNamespace(**{name: importlib.import_module(f"tribp.demo.{name}") for name in names})


@pytest.fixture(scope="module")
def mnist(demo: SimpleNamespace) -> Any:
    return demo.digits.mnist_data()


@pytest.fixture
def few(demo: SimpleNamespace, mnist: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_few(demo, mnist, monkeypatch)


def use_few(demo: SimpleNamespace, mnist: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 digits to train on and 50 held out, of the 5,000: for tests that look at everything but the accuracy."""
    images, labels = mnist
    some = [i for digit in range(10) for i in (labels == digit).nonzero()[0][:15]]
    monkeypatch.setattr(demo.digits, "mnist_data", lambda: (images[some], labels[some]))
    monkeypatch.setattr(demo.digits, "HELD_OUT", 5)


@pytest.fixture(autouse=True)
def _seeded_and_poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fixed seed, and NaN in every `torch.empty`: what a kernel forgot to write is seen.

    After an illegal memory access nothing runs on the GPU any more: the session ends with the test that made it.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Importing torch.testing forbids, in the whole process, what users do: to set cuDNN's flags.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"{request.node.nodeid} broke the CUDA context, so no later test can run: {error}", 1)
    torch.use_deterministic_algorithms(False)
