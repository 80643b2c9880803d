"""What the processes of test_optim_distributed.py run, and how these processes are kept between tests."""

import copy
import io
import itertools
import queue
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import tribp
import tribp.optim

from ..processes import with_torch

Spec = tuple[str, dict[str, Any]]  # class and options


class Processes:
    """Python processes that wait for work: importing torch takes each of them seconds, a process group none."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._numbers = itertools.count()
        self._start()

    def _start(self) -> None:
        context = with_torch()
        self._tasks = [context.Queue() for _ in range(self._size)]
        self._results = context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(rank, self._tasks[rank], self._results), daemon=True)
            for rank in range(self._size)
        ]
        for process in self._processes:
            process.start()

    def run(self, work: Callable[..., Any], world: int, directory: Path, *args: Any) -> list[Any]:
        """work(rank, world, *args) in `world` processes that form a group; what each of them returned."""
        meeting = f"file://{directory}/meeting{next(self._numbers)}"
        for rank in range(world):
            self._tasks[rank].put((work, world, meeting, args))
        found: dict[int, Any] = {}
        errors: list[str] = []
        for _ in range(world):
            try:
                rank, error, value = self._results.get(timeout=10 if errors else 120)
            except queue.Empty:  # one died, or waits for one that failed
                self.stop()
                self._start()
                raise AssertionError("\n".join([*errors, "not all processes answered"])) from None
            if error:
                errors.append(f"process {rank} of {world}: {error}")
            else:
                found[rank] = torch.load(io.BytesIO(value), weights_only=False)
        assert not errors, "\n".join(errors)
        return [found[rank] for rank in range(world)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    while True:
        work, world, meeting, args = tasks.get()
        try:
            dist.init_process_group(
                "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60)
            )
            try:
                file = io.BytesIO()
                torch.save(work(rank, world, *args), file)
                results.put((rank, "", file.getvalue()))
            finally:
                dist.destroy_process_group()
        except BaseException:
            results.put((rank, traceback.format_exc(), b""))


# A model whose parameters do not divide evenly: 5 rows among 2 are 3 and 2, and one of 1 row leaves the second nothing.


def network(seed: int = 0, dtype: torch.dtype = torch.float64, hidden: int = 5) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(3, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1)]
    return torch.nn.Sequential(*layers).to(dtype)


def loss_of(
    model: torch.nn.Module, step: int, rank: int = 0, world: int = 1, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The mean over this process's equal part of the batch: what the processes average is the mean over all of it."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    return model(x.chunk(world)[rank]).square().mean() * 3  # type: ignore[no-any-return]


def optimizer_of(spec: Spec, params: Any, library: Any = tribp.optim) -> torch.optim.Optimizer:
    name, options = spec
    return getattr(library, name)(params, **options)  # type: ignore[no-any-return]


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int], rank: int = 0, world: int = 1,
    dtype: torch.dtype = torch.float64,
) -> list[float]:  # fmt: skip
    """Returns the norm of each step's gradients, where the optimizer knows it."""
    norms = []
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, rank, world, dtype).backward()
        optimizer.step()
        if isinstance(norm := getattr(optimizer, "grad_norm", None), Tensor):
            norms.append(float(norm))
    return norms


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def full_states(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Those of a checkpoint, whole."""
    return [{key: full(value) for key, value in state.items()} for state in optimizer.state_dict()["state"].values()]


def full_parameters(model: torch.nn.Module) -> list[Tensor]:
    return [full(p) for p in model.parameters()]


def sharded(
    world: int, seed: int = 0, dtype: torch.dtype = torch.float64, shape: Sequence[int] = ()
) -> torch.nn.Sequential:
    """fully_shard of each layer that has parameters, and of the whole."""
    model = network(seed, dtype)
    names = ("replicate", "shard")[-len(shape or (1,)) :]
    mesh = init_device_mesh("cpu", tuple(shape or (world,)), mesh_dim_names=names)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


# What is run.


def ddp(rank: int, world: int, spec: Spec, steps: Sequence[int], options: dict[str, Any]) -> list[Tensor]:
    model = DistributedDataParallel(network(seed=rank), **options)  # DDP begins with rank 0's parameters
    optimizer = optimizer_of(spec, model.parameters())
    train(model, optimizer, steps, rank, world)
    return full_parameters(model)


def fsdp(
    rank: int, world: int, spec: Spec, steps: Sequence[int], backend: str = "torch",
    dtype: torch.dtype = torch.float64, shape: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    model = sharded(world, dtype=dtype, shape=shape)
    optimizer: Any = optimizer_of(spec, model.parameters())
    parts = rank, world
    with tribp.use_backend(backend):
        norms = train(model, optimizer, steps, *parts, dtype)
    states = [{k: full(v) for k, v in optimizer.state[p].items()} for p in model.parameters()]
    found: dict[str, Any] = dict(parameters=full_parameters(model), norms=norms, states=states)
    found["saved"] = full_states(optimizer)
    found["local"] = [
        {key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()}
        for state in map(dict, optimizer.state.values())
    ]
    found["shards"] = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    found["launched"] = [type(bucket).__name__ for bucket in optimizer._plan.buckets]
    if "ema_decay" in spec[1]:
        with optimizer.swap_ema(model):
            found["averages"] = full_parameters(model)
        found["back"] = full_parameters(model)
    return found


def evaluations(model: torch.nn.Module, optimizer: Any, swapped: Sequence[Any], steps: Sequence[int]) -> list[Tensor]:
    """What each step, then the weights and their averages compute. swapped: the arguments of swap_ema."""
    found: list[Tensor] = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            found += [loss.detach(), loss_of(model, 0)]
            with optimizer.swap_ema(*swapped):
                found.append(loss_of(model, 0))
    return found


def fsdp_averages(rank: int, world: int, spec: Spec, steps: Sequence[int]) -> tuple[list[Tensor], str]:
    """The root's own parameters, which FSDP2 keeps gathered after a forward pass until there is a backward pass."""
    model = network()
    fully_shard(model)
    optimizer: Any = optimizer_of(spec, model.parameters())
    found = evaluations(model, optimizer, (model,), steps)
    try:
        with optimizer.swap_ema():
            return found, "nothing is refused"
    except RuntimeError as error:
        return found, str(error)


def fsdp_in_part(rank: int, world: int, spec: Spec, steps: Sequence[int]) -> dict[str, Any]:
    """Only the first layer is sharded: DTensors and plain tensors in one optimizer."""
    model = network()
    fully_shard(model[0])
    optimizer = optimizer_of(spec, model.parameters())
    norms = train(model, optimizer, steps)  # every process the whole batch: nothing averages the second layer
    return dict(parameters=full_parameters(model), norms=norms)


def tensor_parallel(rank: int, world: int, spec: Spec, steps: Sequence[int], backend: str = "torch") -> dict[str, Any]:
    layout = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(network(hidden=6), init_device_mesh("cpu", (world,)), layout)
    optimizer = optimizer_of(spec, model.parameters())
    with tribp.use_backend(backend):
        norms = train(model, optimizer, steps)
    return dict(parameters=full_parameters(model), norms=norms)


def grad_scaler(rank: int, world: int, spec: Spec, library: str, init_scale: float) -> dict[str, Any]:
    """FSDP2 and GradScaler together: an infinity on one process must stop all of them."""
    model = sharded(world)
    optimizer = optimizer_of(spec, model.parameters(), tribp.optim if library == "tribp" else torch.optim)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    scales = []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, rank, world)).backward()
        if step == 1 and rank == 0:
            for p in model.parameters():
                assert isinstance(p.grad, DTensor)
                p.grad.to_local().view(-1)[:1] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return dict(parameters=full_parameters(model), scales=scales)


def state_dicts(rank: int, world: int, spec: Spec) -> list[dict[str, Any]]:
    """The whole checkpoint of a sharded run, ours and torch's, in each of the forms torch has for it."""
    found = []
    for library in (tribp.optim, torch.optim):
        model = sharded(world)
        optimizer = optimizer_of(spec, model.parameters(), library)
        train(model, optimizer, range(2), rank, world)
        forms: dict[str, Any] = {}
        for flat in (False, True):
            options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=flat)
            forms["flat" if flat else "nested"] = get_optimizer_state_dict(model, optimizer, options=options)
        local = optimizer.state_dict()
        forms["sharded"] = [
            {key: (type(v).__name__, getattr(v, "placements", None) is not None) for key, v in state.items()}
            for state in local["state"].values()
        ]
        found.append(forms)
    return found


def saved(
    rank: int, world: int, spec: Spec, library: str, steps: Sequence[int], directory: str,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:  # fmt: skip
    model = sharded(world, dtype=dtype)
    optimizer = optimizer_of(spec, model.parameters(), tribp.optim if library == "tribp" else torch.optim)
    train(model, optimizer, steps, rank, world, dtype)
    state = dict(model=get_model_state_dict(model), optim=get_optimizer_state_dict(model, optimizer))
    save(state, checkpoint_id=directory)
    return full_parameters(model)


def resumed(
    rank: int, world: int, spec: Spec, library: str, steps: Sequence[int], directory: str, shards: bool, backend: str,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:  # fmt: skip
    """A new model with other weights, and an optimizer that has not stepped: all they know is the checkpoint."""
    model = sharded(world, seed=1, dtype=dtype) if shards else network(seed=1, dtype=dtype)
    optimizer = optimizer_of(spec, model.parameters(), tribp.optim if library == "tribp" else torch.optim)
    with tribp.use_backend(backend):
        state: dict[str, Any] = dict(
            model=get_model_state_dict(model), optim=get_optimizer_state_dict(model, optimizer)
        )
        load(state, checkpoint_id=directory)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optim"])
        begun, loaded = full_parameters(model), full_states(optimizer)
        train(model, optimizer, steps, *((rank, world) if shards else (0, 1)), dtype)
    return dict(
        parameters=full_parameters(model),
        begun=begun,
        loaded=loaded,
        saved=full_states(optimizer),
        states=[{k: full(v) for k, v in optimizer.state[p].items()} for p in model.parameters()],
    )


def live_checkpoint(rank: int, world: int, spec: Spec) -> list[list[Tensor]]:
    """Two sharded runs, the second from the first one's live state_dict; both go on, the second one first."""
    first, second = sharded(world), sharded(world)
    a, b = (optimizer_of(spec, model.parameters()) for model in (first, second))
    train(first, a, range(2), rank, world)
    second.load_state_dict(first.state_dict())
    b.load_state_dict(a.state_dict())
    for model, optimizer in ((second, b), (first, a)):
        train(model, optimizer, range(2, 4), rank, world)
    return [full_parameters(first), full_parameters(second)]


def placed(rank: int, world: int, spec: Spec, backend: str, late: bool) -> list[list[Tensor]]:
    """Gradients placed unlike their parameters: sums still to be formed, whole ones of shards. Ours, then torch's.

    late: from the second step on, and only such as have the same memory.
    """
    mesh = init_device_mesh("cpu", (world,))
    placements: list[tuple[Placement, Placement]] = [(Replicate(), Partial()), (Shard(0), Replicate())][: 2 - late]
    found = []
    for library in (tribp.optim, torch.optim):
        params = []
        for placement, _ in placements:
            whole = torch.arange(4, dtype=torch.float64)
            params.append(torch.nn.Parameter(distribute_tensor(whole, mesh, [placement])))
        optimizer = optimizer_of(spec, params, library)
        for step in range(2):
            for p, (like, unlike) in zip(params, placements, strict=True):
                if late and step == 0:
                    p.grad = distribute_tensor(torch.ones(4, dtype=torch.float64), mesh, [like])
                    continue
                placement = unlike
                local = torch.ones(4, dtype=torch.float64) * (1 + step + (rank if placement.is_partial() else 0))
                p.grad = DTensor.from_local(local, mesh, [placement])
            with tribp.use_backend(backend):
                optimizer.step()
        found.append([full(p) for p in params])
    return found


def zero(rank: int, world: int, spec: Spec, steps: Sequence[int], backend: str = "torch") -> dict[str, Any]:
    """Trains, gathers the state on the first process, and goes on for one step with an optimizer that loaded it."""
    model = DistributedDataParallel(network())
    name, options = spec
    kind = getattr(tribp.optim, name)
    with tribp.use_backend(backend):
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, **options)
        train(model, optimizer, steps, rank, world)
        optimizer.consolidate_state_dict(to=0)
        gathered = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
        dist.broadcast_object_list(gathered, src=0)
        resumed = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, **options)
        resumed.load_state_dict(copy.deepcopy(gathered[0]))  # type: ignore[arg-type]
        train(model, resumed, [len(steps)], rank, world)
    return dict(parameters=full_parameters(model), state_dict=gathered[0], mine=len(optimizer.optim.state))
