"""The optimizers among several processes: DDP, FSDP2, tensor parallelism, ZeRO, checkpoints of another world."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

import tribp.optim
from tribp.optim import codes

from ..conftest import HAS_GPU
from . import distributed_workers as workers
from .distributed_workers import Processes, Spec

ADAM: Spec = ("Adam", dict(lr=0.1))
MOMENTUM: Spec = ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True))
RMSPROP: Spec = ("RMSprop", dict(lr=0.01, centered=True, momentum=0.5))
ADAGRAD: Spec = ("Adagrad", dict(lr=0.1, initial_accumulator_value=0.1))
EVERYTHING: Spec = ("AdamW", dict(lr=0.1, amsgrad=True, ema_decay=0.75, max_grad_norm=0.3))
NEWER: list[Spec] = [  # that no fused kernel of torch's takes; NAdam and ASGD have states of one number
    ("Adadelta", dict(lr=1.0)),
    ("Adamax", dict(lr=0.05)),
    ("NAdam", dict(lr=0.05)),
    ("RAdam", dict(lr=0.05)),
    ("Rprop", dict(lr=0.05)),
    ("ASGD", dict(lr=0.05, lambd=0.1, t0=2.0)),
]
AVERAGED: Spec = ("Adagrad", dict(lr=0.1, initial_accumulator_value=0.1, ema_decay=0.75))
STEPS = range(4)
interpreted = pytest.mark.skipif(HAS_GPU, reason="gloo runs CPU tensors, which only the interpreter takes")


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    found = Processes(3)
    yield found
    found.stop()


def alone(
    spec: Spec, steps: Any = STEPS, library: Any = torch.optim, hidden: int = 5
) -> tuple[list[torch.Tensor], Any, list[float]]:
    """The same training in this one process, by torch's own class unless told otherwise."""
    model = workers.network(hidden=hidden)
    optimizer = workers.optimizer_of(spec, model.parameters(), library)
    norms = workers.train(model, optimizer, steps)
    return workers.full_parameters(model), optimizer, norms


def close(found: Any, expected: Any) -> None:
    assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", [ADAM, MOMENTUM], ids=["Adam", "SGD"])
@pytest.mark.parametrize("view", [False, True], ids=["", "bucket view"])
def test_ddp(spec: Spec, view: bool, processes: Processes, tmp_path: Path) -> None:
    """Gradients that are views of buckets move when DDP rebuilds the buckets after the first step."""
    expected, _, _ = alone(spec)
    for found in processes.run(workers.ddp, 2, tmp_path, spec, STEPS, dict(gradient_as_bucket_view=view)):
        close(found, expected)


def each_newer(*marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(spec, marks=marks, id=spec[0]) for spec in NEWER]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("spec", [ADAM, MOMENTUM, RMSPROP, ADAGRAD, *NEWER], ids=lambda spec: spec[0])
def test_fsdp(spec: Spec, world: int, processes: Processes, tmp_path: Path) -> None:
    """Uneven shards, an empty one among them: parameters and states are those of torch's class in one process."""
    expected, optimizer, _ = alone(spec)
    states = list(optimizer.state_dict()["state"].values())
    found = processes.run(workers.fsdp, world, tmp_path, spec, STEPS)
    assert min(min(result["shards"]) for result in found) == 0
    for result in found:
        close(result["parameters"], expected)
        assert [list(state) for state in result["states"]] == [list(state) for state in states]
        close(result["states"], states)
        if spec in (ADAM, ADAGRAD):
            assert result["launched"] == ["FusedBucket"], "the local shards are plain memory"
        if spec in NEWER:
            assert result["launched"] == ["PackedBucket"]


BY_THE_KERNELS = [
    pytest.param(ADAM, id="Adam"), pytest.param(MOMENTUM, id="SGD"), pytest.param(EVERYTHING, id="everything"),
]  # fmt: skip


@interpreted
@pytest.mark.parametrize("spec", [*BY_THE_KERNELS, *each_newer(pytest.mark.slow)])
def test_fsdp_by_the_kernels(spec: Spec, processes: Processes, tmp_path: Path) -> None:
    expected, optimizer, norms = alone(spec, range(3), tribp.optim)
    for result in processes.run(workers.fsdp, 2, tmp_path, spec, range(3), "triton"):
        assert result["launched"] == ["TritonBucket"]
        close(result["parameters"], expected)
        close(result["norms"], norms)
        close(result["states"], list(optimizer.state_dict()["state"].values()))


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2)], ids=["shard", "replicate", "both"])
def test_the_norm_is_that_of_all_shards(shape: tuple[int, ...], processes: Processes, tmp_path: Path) -> None:
    """… counted once where parameters are replicated too; averages are shard by shard, and swap in and out."""
    expected, optimizer, norms = alone(EVERYTHING, library=tribp.optim)
    genuine = workers.network()
    reference = torch.optim.AdamW(genuine.parameters(), lr=0.1, amsgrad=True)
    for step in STEPS:
        reference.zero_grad()
        workers.loss_of(genuine, step).backward()
        norm = torch.nn.utils.clip_grad_norm_(genuine.parameters(), 0.3)
        close(float(norm), norms[step])
        reference.step()
    close(expected, workers.full_parameters(genuine))
    assert max(norms) > 0.3
    with optimizer.swap_ema():
        averages = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for result in processes.run(workers.fsdp, 2, tmp_path, EVERYTHING, STEPS, "torch", torch.float64, shape):
        close(result["norms"], norms)
        close(result["parameters"], expected)
        close(result["averages"], averages)
        assert_close(result["back"], result["parameters"], rtol=0, atol=0)


def test_averages_are_what_fsdp_computes_with(processes: Processes, tmp_path: Path) -> None:
    """… within swap_ema(model), and the weights again behind it: nothing gathered before goes on being used."""
    model = workers.network()
    optimizer = workers.optimizer_of(EVERYTHING, model.parameters(), tribp.optim)
    expected = workers.evaluations(model, optimizer, (), STEPS)
    for found, refused in processes.run(workers.fsdp_averages, 2, tmp_path, EVERYTHING, STEPS):
        close(found, expected)
        assert "swap_ema(model)" in refused


def test_norm_of_one_type(processes: Processes, tmp_path: Path) -> None:
    """Each process must clip by the same norm, to the bit: else replicas drift apart."""
    first, second = processes.run(workers.fsdp, 2, tmp_path, EVERYTHING, STEPS, "torch", torch.float32)
    assert first["norms"] == second["norms"]
    assert_close(first["parameters"], second["parameters"], rtol=0, atol=0)


def test_options_by_the_reference(processes: Processes, tmp_path: Path) -> None:
    """bfloat16 shards with float32 moments, stochastically rounded: close to the unrounded run in one process."""
    spec: Spec = ("Adam", dict(lr=0.01, state_dtype=torch.float32, stochastic_rounding=True, seed=3))
    expected, _, _ = alone(("Adam", dict(lr=0.01)))
    for result in processes.run(workers.fsdp, 2, tmp_path, spec, STEPS, "torch", torch.bfloat16):
        assert result["launched"] == ["ReferenceBucket"]
        assert {state["exp_avg"].dtype for state in result["states"]} == {torch.float32}
        assert {p.dtype for p in result["parameters"]} == {torch.bfloat16}
        for p, exact in zip(result["parameters"], expected, strict=True):
            assert_close(p.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("spec", [ADAM, MOMENTUM], ids=["Adam", "SGD"])
def test_sharded_and_plain_parameters_together(spec: Spec, processes: Processes, tmp_path: Path) -> None:
    expected, _, _ = alone(spec)
    for result in processes.run(workers.fsdp_in_part, 2, tmp_path, spec, STEPS):
        close(result["parameters"], expected)


def test_norm_over_sharded_and_plain_parameters(processes: Processes, tmp_path: Path) -> None:
    spec: Spec = ("Adam", dict(lr=0.1, max_grad_norm=0.3))
    expected, _, norms = alone(spec, library=tribp.optim)
    for result in processes.run(workers.fsdp_in_part, 2, tmp_path, spec, STEPS):
        close(result["norms"], norms)
        close(result["parameters"], expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_tensor_parallel(backend: str, processes: Processes, tmp_path: Path) -> None:
    """Shards along either dimension, and parameters that are replicated."""
    for spec in (ADAM, ("SGD", dict(lr=0.1, momentum=0.9, max_grad_norm=0.3))):
        expected, _, norms = alone(spec, range(3), tribp.optim, hidden=6)
        for result in processes.run(workers.tensor_parallel, 2, tmp_path, spec, range(3), backend):
            close(result["parameters"], expected)
            close(result["norms"], norms)


@pytest.mark.parametrize("fused", [False, True])
def test_fsdp_with_grad_scaler(fused: bool, processes: Processes, tmp_path: Path) -> None:
    """As torch's class does it: all processes skip where one finds an infinity, or none is told."""
    spec: Spec = ("Adam", dict(lr=0.1, fused=fused))
    genuine = processes.run(workers.grad_scaler, 2, tmp_path, spec, "torch", 4.0)
    found = processes.run(workers.grad_scaler, 2, tmp_path, spec, "tribp", 4.0)
    for result, expected in zip(found, genuine, strict=True):
        assert result["scales"] == expected["scales"]
        assert_close(result["parameters"], expected["parameters"], rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("spec", [ADAM, MOMENTUM, RMSPROP], ids=lambda spec: spec[0])
def test_sharded_checkpoints_are_torchs(spec: Spec, processes: Processes, tmp_path: Path) -> None:
    """Gathered whole, nested and flat, and what each process holds: key for key."""
    for found, genuine in processes.run(workers.state_dicts, 2, tmp_path, spec):
        assert found["sharded"] == genuine["sharded"]
        for form in ("nested", "flat"):
            ours, torchs = (_leaves(d[form]) for d in (found, genuine))
            extra = {key for key in ours if key.endswith("fused")} if spec is RMSPROP else set()
            assert list(ours) == list(torchs) or ours.keys() - extra == torchs.keys()
            for key, value in torchs.items():
                assert type(ours[key]) is type(value)
                close(ours[key], value) if isinstance(value, torch.Tensor) else None
                assert isinstance(value, torch.Tensor) or ours[key] == value


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _leaves(value, f"{path}.{key}").items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return {k: v for i, value in enumerate(tree) for k, v in _leaves(value, f"{path}.{i}").items()}
    return {path: tree}


@pytest.mark.parametrize("spec", [*BY_THE_KERNELS, pytest.param(AVERAGED, id="Adagrad"), *each_newer()])
def test_resumed_by_another_number_of_processes(spec: Spec, processes: Processes, tmp_path: Path) -> None:
    """Two save through torch.distributed.checkpoint; two, one and three go on, sharded and whole, as if nothing was."""
    at_saving = processes.run(workers.saved, 2, tmp_path, spec, "tribp", range(3), str(tmp_path / "saved"))
    expected, optimizer, _ = alone(spec, range(5), tribp.optim)
    close(at_saving[0], alone(spec, range(3), tribp.optim)[0])
    for world, shards in ((1, False), (3, True)) if spec in NEWER else ((2, True), (1, True), (1, False), (3, True)):
        arguments = (spec, "tribp", range(3, 5), str(tmp_path / "saved"), shards, "torch")
        for result in processes.run(workers.resumed, world, tmp_path, *arguments):
            close(result["begun"], at_saving[0])
            close(result["parameters"], expected)
            close(result["states"], list(optimizer.state_dict()["state"].values()))


def test_a_live_sharded_checkpoint_is_not_shared(processes: Processes, tmp_path: Path) -> None:
    expected, _, _ = alone(ADAM, range(4))
    for first, second in processes.run(workers.live_checkpoint, 2, tmp_path, ADAM):
        close(first, expected)
        close(second, expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("late", [False, True])
def test_gradients_placed_unlike_their_parameters(
    backend: str, late: bool, processes: Processes, tmp_path: Path
) -> None:
    """Their local parts do not belong together: adding them element by element would be wrong without a word."""
    spec: Spec = ("SGD", dict(lr=0.1, momentum=0.9))
    for ours, theirs in processes.run(workers.placed, 2, tmp_path, spec, backend, late):
        close(ours, theirs)


@pytest.mark.parametrize("direction", ["torch to tribp", "tribp to torch"])
def test_resumed_by_the_other_class(direction: str, processes: Processes, tmp_path: Path) -> None:
    first, second = direction.split(" to ")
    expected, _, _ = alone(ADAM, range(5))
    processes.run(workers.saved, 2, tmp_path, ADAM, first, range(3), str(tmp_path / "saved"))
    arguments = (ADAM, second, range(3, 5), str(tmp_path / "saved"), True, "torch")
    for result in processes.run(workers.resumed, 3, tmp_path, *arguments):
        close(result["parameters"], expected)


@interpreted
def test_resumed_by_the_kernels(processes: Processes, tmp_path: Path) -> None:
    """Counters that the kernel keeps and moments it writes are those that were loaded."""
    expected, _, _ = alone(ADAM, range(4))
    processes.run(workers.saved, 2, tmp_path, ADAM, "tribp", range(2), str(tmp_path / "saved"))
    arguments = (ADAM, "tribp", range(2, 4), str(tmp_path / "saved"), True, "triton")
    for result in processes.run(workers.resumed, 1, tmp_path, *arguments):
        close(result["parameters"], expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_zero_redundancy_optimizer(backend: str, processes: Processes, tmp_path: Path) -> None:
    """Each process steps its part of the parameters; gathered, the state is torch's; and it loads again."""
    expected, _, _ = alone(ADAM, range(4))
    _, optimizer, _ = alone(ADAM, range(3))
    found = processes.run(workers.zero, 2, tmp_path, ADAM, range(3), backend)
    assert all(0 < result["mine"] < 4 for result in found)
    for result in found:
        close(result["parameters"], expected)
    close(found[0]["state_dict"]["state"], optimizer.state_dict()["state"])


# ---- states in 8 bits, parameters in 24


def shards_in_one_process(spec: Spec, world: int, steps: Any) -> tuple[list[torch.Tensor], list[Any]]:
    """What every process of an FSDP run does to its rows, by plain tensors in an optimizer for each of them."""

    def rows(t: torch.Tensor) -> list[torch.Tensor]:
        chunks = list(t.detach().chunk(world))
        return [chunk.clone() for chunk in chunks] + [t.detach()[:0].clone()] * (world - len(chunks))

    model = workers.network()
    shards = [rows(p) for p in model.parameters()]
    optimizers: list[Any] = [workers.optimizer_of(spec, [own[rank] for own in shards]) for rank in range(world)]
    for step in steps:
        model.zero_grad()
        workers.loss_of(model, step).backward()
        for p, own in zip(model.parameters(), shards, strict=True):
            assert p.grad is not None
            for shard, grad in zip(own, rows(p.grad), strict=True):
                shard.grad = grad
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for p, own in zip(model.parameters(), shards, strict=True):
                p.copy_(torch.cat(own))
    return workers.full_parameters(model), optimizers


@pytest.mark.parametrize(
    ("backend", "world"), [("torch", 2), ("torch", 3), pytest.param("triton", 3, marks=interpreted)]
)
@pytest.mark.parametrize("spec", [ADAM, MOMENTUM], ids=["Adam", "SGD"])
def test_codes_of_shards(spec: Spec, backend: str, world: int, processes: Processes, tmp_path: Path) -> None:
    """Codes and scales are those of the shard as a tensor of its own, whatever the other processes have."""
    name, options = spec
    coded: Spec = (name, {**options, "state_bits": 8, "seed": 5})
    expected, optimizers = shards_in_one_process(coded, world, STEPS)
    results = processes.run(workers.fsdp, world, tmp_path, coded, STEPS, backend)
    assert min(min(result["shards"]) for result in results) == 0
    for rank, result in enumerate(results):
        assert result["launched"] == ["TritonBucket" if backend == "triton" else "ReferenceBucket"]
        assert_close(result["parameters"], expected, rtol=1e-6, atol=1e-7)  # decoded moments are float32 numbers
        states = list(optimizers[rank].state.values())
        for local, state in zip(result["local"], states, strict=True):
            assert list(local) == list(state)
            for key, value in state.items():
                if value.dtype in codes.CODES:
                    assert torch.equal(local[key], value), f"{key} of process {rank}"
                else:
                    assert_close(local[key], value, rtol=1e-6, atol=0)
        for key in ("exp_avg", "exp_avg_sq") if name == "Adam" else ("momentum_buffer",):
            for number, saved in enumerate(result["saved"]):
                parts = [codes.decoded(dict(each.state[each.param_groups[0]["params"][number]]), key)
                         for each in optimizers]  # fmt: skip
                assert saved[key].dtype == torch.float32
                assert_close(saved[key], torch.cat(parts), rtol=1e-6, atol=0)


def code_of(largest: torch.Tensor) -> torch.Tensor:
    """The widest step of a signed state's codes, beside its block's largest number s: (s + |x|)²/(254·s) at |x| = s."""
    return 4 * largest / 254


@pytest.mark.parametrize("world", [2, 3])
def test_codes_of_shards_train_as_float_states_do(world: int, processes: Processes, tmp_path: Path) -> None:
    """A buffer is off by a code with each step, of which μ stays for the next. To first order, and three times that."""
    name, options = MOMENTUM
    expected, optimizer, _ = alone(MOMENTUM)
    sizes = [state["momentum_buffer"].abs().max() for state in optimizer.state.values()]
    coded: Spec = (name, {**options, "state_bits": 8})
    first, again = (processes.run(workers.fsdp, world, tmp_path, coded, STEPS) for _ in range(2))
    off = used = 0.0
    for _ in STEPS:
        used += 0.9 * off  # nesterov: the gradient itself takes no part
        off = 0.9 * off + 1
    for result, same in zip(first, again, strict=True):
        for p, exact, size in zip(result["parameters"], expected, sizes, strict=True):
            assert_close(p, exact, rtol=0, atol=3 * 0.1 * 0.9 * used * float(code_of(size)))
            assert not torch.equal(p, exact)
        assert_close(result["parameters"], same["parameters"], rtol=0, atol=0)
        assert_close(result["local"], same["local"], rtol=0, atol=0)


# And the states that are codes: whether each is a square.
CODED: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "Adam": ({}, {"exp_avg": False, "exp_avg_sq": True}),
    "SGD": (dict(momentum=0.9), {"momentum_buffer": False}),
    "RMSprop": (dict(momentum=0.5), {"square_avg": True, "momentum_buffer": False}),
    "Adagrad": (dict(initial_accumulator_value=0.1), {"sum": True}),
}
RESUMING = [
    pytest.param(name, dtype, world, shards, id=f"{name}-{dtype}-{world}-{shards}",
                 marks=[] if name == "Adam" or (dtype == torch.bfloat16 and world == 2) else pytest.mark.slow)
    for name in CODED for dtype in (torch.float64, torch.bfloat16)
    for world, shards in ((2, True), (1, True), (1, False), (3, True))
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "world", "shards"), RESUMING)
def test_codes_resumed_by_another_number_of_processes(
    name: str, dtype: torch.dtype, world: int, shards: bool, processes: Processes, tmp_path: Path
) -> None:
    """What is loaded is to the bit what was saved. Two go on as if nothing was; others have blocks of other shards."""
    options, squares = CODED[name]
    spec: Spec = (name, dict(lr=0.01, state_bits=8, master_bits=24, seed=5, **options))
    (before, _), (after, _) = (
        processes.run(workers.fsdp, 2, tmp_path, spec, range(n), "torch", dtype) for n in (3, 4)
    )  # fmt: skip
    processes.run(workers.saved, 2, tmp_path, spec, "tribp", range(3), str(tmp_path / "saved"), dtype)
    arguments = (spec, "tribp", range(3, 4), str(tmp_path / "saved"), shards, "torch", dtype)
    keys = {"step", *squares} | ({"residual"} if dtype == torch.bfloat16 else set())
    for result in processes.run(workers.resumed, world, tmp_path, *arguments):
        assert_close(result["begun"], before["parameters"], rtol=0, atol=0)
        for loaded, saved in zip(result["loaded"], before["saved"], strict=True):
            assert loaded.keys() == saved.keys() == keys
            for key, value in saved.items():
                assert loaded[key].dtype == value.dtype
                assert torch.equal(loaded[key], value), key
        for key, root in squares.items():
            assert {state[key].dtype for state in result["states"]} == {torch.uint8 if root else torch.int8}
        if world == 2:
            assert_close(result["parameters"], after["parameters"], rtol=0, atol=0)
            assert_close(result["saved"], after["saved"], rtol=0, atol=0)
            continue
        for state, uncut in zip(result["saved"], after["saved"], strict=True):
            # Half a code when loaded, and one more with the step, of this run and of the one that went on: of numbers
            # of whole tensors, which are wider than those of shards.
            for key, root in squares.items():
                largest = torch.maximum(state[key].abs().max(), uncut[key].abs().max())
                mine, theirs = (x[key].sqrt() if root else x[key] for x in (state, uncut))
                code = largest.sqrt() / 255 if root else code_of(largest)
                assert_close(mine, theirs, rtol=1e-5, atol=2.5 * float(code))
        for p, exact in zip(result["parameters"], after["parameters"], strict=True):
            assert_close(p, exact, rtol=float(torch.finfo(dtype).eps), atol=0.01 * 0.1)
