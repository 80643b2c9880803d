"""What the first training step costs the host, when no kernel has been compiled yet: a part of `python -m bench host`.

`python -m bench.host_first mlp` is such a step, forward and backward of the demo's model, in a process of its own:
Triton keeps what it has compiled, in the process and in a folder. Kernels are compiled for an H100 and not launched.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tribp.demo import models
from tribp.kernels.launch import ARCHS

from .no_gpu import pretending

BATCH = 64


@dataclass(frozen=True)
class FirstStep:
    model: str
    targets: Sequence[object] = ()  # nobody set any

    @property
    def name(self) -> str:
        return f"first step, the demo's {models.MODELS[self.model].name}"

    @contextlib.contextmanager
    def start(self) -> "Iterator[Mapping[str, Measured]]":
        """Measured once: a sample takes seconds."""
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "bench.host_first", self.model]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            kernels = len(list(Path(cache).rglob("*.cubin")))
        yield {f"tribp, {kernels} kernels compiled": Measured(float(json.loads(done.stdout)))}


@dataclass(frozen=True)
class Measured:
    us: float

    def sample(self) -> float:
        return self.us


def processor_time() -> float:
    """Seconds of this process and of the assembler it has called, on any core."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def first_step(name: str) -> float:
    """µs of processor time."""
    layers = models.MODELS[name].layers()
    images, grad = torch.rand(BATCH, models.SIZES[0]), torch.rand(BATCH, models.CLASSES)
    for operation in ("conv3x3", "linear_sigmoid"):  # what is imported with the first call is not compiled
        importlib.import_module(f"tribp.ops.{operation}_triton")
    with pretending(ARCHS["sm_90"]):
        started = processor_time()
        layers(images).backward(grad)
        return 1e6 * (processor_time() - started)


if __name__ == "__main__":
    print(json.dumps(first_step(sys.argv[1])))
