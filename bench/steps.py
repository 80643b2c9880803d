"""What `python -m bench all` does, in which order: the most valuable first, for it may be cut off at any time."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import registry
from .registry import KernelTests

# Seconds. All of them are estimates, derived from what a measurement repeats and what a kernel takes to compile: none
# has been measured on a GPU yet.
CASES = 45.0  # to import torch, measure the ceilings, and have the first cases
MINUTE = 60.0


@dataclass(frozen=True)
class Step:
    """A command, as words, that is run in the root of the checkout.

    needs: seconds, about, without which it is not begun: all that it takes or, if it `resumes`, what brings some
    results. limit: seconds after which it is stopped. Where it resumes, it then goes on in the next call; anything else
    hangs, and has failed.
    """

    name: str
    command: Sequence[str]
    needs: float
    limit: float
    resumes: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    lacks: str = ""  # why it cannot be run here


LARGE = ["tests/test_conv3x3_extremes.py", "tests/test_linear_kernels.py"]  # their GPU tests: huge, and many shapes
KERNELS = ["tests/test_linear_kernels.py", "tests/test_conv3x3_kernels.py", "tests/test_optim.py"]  # all types, forms
TOOLS = {"memcheck": "memory", "racecheck": "races"}
FOUND = 99  # compute-sanitizer's exit code for what it finds: pytest has others


def plan(out: Path, smoke: bool) -> list[Step]:
    """All steps; `out` is where they leave their results. smoke: tiny, for a CPU."""
    every = registry.names()
    tests = {operation.name: operation.tests for operation in registry.find([])}
    measured = Measuring(out, smoke)
    return [
        *(_tests(f"tests {name}", ["-m", "gpu", *of.gpu], of, smoke) for name, of in tests.items()),
        # What has targets, beside eager torch. Every result is checked against float64 before it is timed.
        measured.step("optim: 1e8", "optim", "--dtype float32 --first 4 --no-compile"),
        measured.step("linear: bfloat16", "linear", "--dtype bfloat16 --no-compile"),
        measured.step("conv: bfloat16 NHWC", "conv", "--dtype bfloat16 --first 14 --no-compile"),
        measured.step("optim: 1000 tensors", "optim", "--case 1000x --no-compile"),
        measured.step("linear: float32", "linear", "--dtype float32 --first 3 --no-compile"),
        measured.step("conv: bfloat16 NCHW", "conv", "--dtype bfloat16 --case NCHW --first 14 --no-compile"),
        *(_sanitized(tool, name, of, smoke) for tool in TOOLS for name, of in tests.items()),
        # torch.compile takes minutes to tune a case, hence the shares.
        measured.step("linear: bfloat16, compile", "linear", "--dtype bfloat16", 15 * MINUTE),
        measured.step("optim: 1e8, compile", "optim", "--dtype float32 --first 4", 5 * MINUTE),
        *(_sweep(name, out, smoke) for name in every),
        _host(out, smoke),
        _tests("tests large", ["-m", "gpu", *LARGE], tests["conv"], smoke, needs=5 * MINUTE),
        *(measured.step(f"{name}: the rest", name, "--no-compile", 30 * MINUTE) for name in every),
        _tests("tests kernels", KERNELS, tests["linear"], smoke, needs=10 * MINUTE),
        measured.step("conv: compile", "conv", "--dtype bfloat16 --first 28", 30 * MINUTE),
        *(measured.step(f"{name}: the rest, compile", name, "", 60 * MINUTE) for name in every),
    ]


def report(out: Path) -> Step:
    """The last of every call, out of a reserve: the pages and pictures of what there is."""
    return Step("report", _bench("report", str(out)), 0, 30)


@dataclass(frozen=True)
class Measuring:
    """Steps of `bench run`. They go on where they were cut off, and measure nothing twice."""

    out: Path
    smoke: bool

    def step(self, name: str, operation: str, options: str, limit: float = 4 * MINUTE) -> Step:
        chosen = ["--smoke", "--first", "1"] if self.smoke else options.split()  # smoke has cases of its own
        command = _bench("run", operation, *chosen, "--missing", "--no-picture", "--out", str(self.out))
        return Step(name, command, 1 if self.smoke else CASES, limit, resumes=True, environment=_quiet(self.smoke))


def _bench(*words: str) -> list[str]:
    return [sys.executable, "-m", "bench", *words]


def _quiet(smoke: bool) -> dict[str, str]:
    """smoke: the kernels by the interpreter, on the CPU even where there is a GPU."""
    return {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if smoke else {}


def _pytest(selection: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]


def _tests(name: str, selection: Sequence[str], tests: KernelTests, smoke: bool, needs: float = MINUTE) -> Step:
    command = _pytest(tests.smoke if smoke else selection)
    return Step(name, command, 1 if smoke else needs, 3 * needs, environment=_quiet(smoke))


def _sanitized(tool: str, name: str, tests: KernelTests, smoke: bool) -> Step:
    """One operation's kernels under one of compute-sanitizer's tools."""
    program = sanitizer()
    checked = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    # Without torch's cache every tensor is an allocation of its own, whose edges memcheck sees.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | _quiet(smoke)
    return Step(
        f"{TOOLS[tool]} {name}",
        [*checked, *_pytest(tests.smoke if smoke else tests.checked)],
        1 if smoke else 1.5 * MINUTE,
        5 * MINUTE,
        environment=environment,
        lacks="" if program else "compute-sanitizer is not installed",
    )


def sanitizer() -> str | None:
    """compute-sanitizer, which is on no PATH where CUDA's own folder is not."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in [*homes, "/usr/local/cuda"]]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def _sweep(name: str, out: Path, smoke: bool) -> Step:
    minutes = 1 if smoke else 3
    chosen = ["--smoke"] if smoke else ["--dtype", "float32" if name == "optim" else "bfloat16"]
    command = _bench("sweep", name, *chosen, "--budget", str(minutes), "--out", str(out))
    return Step(
        f"{name}: sweep", command, 1 if smoke else minutes * MINUTE + 20, 2 * minutes * MINUTE,
        environment=_quiet(smoke),
    )  # fmt: skip


def _host(out: Path, smoke: bool) -> Step:
    command = _bench("host", *(["--smoke"] if smoke else []), "--json", str(out / "host.json"))
    return Step("host", command, 1 if smoke else 2 * MINUTE, 6 * MINUTE, environment=_quiet(smoke))


def named(steps: Sequence[Step], parts: Sequence[str]) -> list[Step]:
    """Those whose names contain one of the parts; all if there are none. Raises ValueError, naming those that exist."""
    found = [step for step in steps if not parts or any(part in step.name for part in parts)]
    if not found:
        raise ValueError(f"there is no such step; there are: {', '.join(step.name for step in steps)}")
    return found
