"""FSDP2: two processes train together and save a checkpoint; one process goes on from it.

Each process holds a shard of every parameter and of the optimizer's states, and its step updates these shards. With two
GPUs the processes use NCCL, otherwise gloo on the CPU. Printed: the losses of steps 1 to 3 by two processes, of 4 to 6
by one, and the largest difference of a parameter from six steps by one process: the order of a sum, a few 1e-8.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import tribp.optim

WORLD = 2
DEVICE = "cuda" if torch.cuda.device_count() >= WORLD else "cpu"


def network():
    torch.manual_seed(0)  # the same weights in every process
    return torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 4)).to(DEVICE)


def optimizer_of(model):
    return tribp.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps, rank=0, world=1):
    """Each process takes its rows of every batch; FSDP2 averages the gradients. Returns the losses of these rows."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, target = (torch.randn(8, size, generator=generator)[rank::world].to(DEVICE) for size in (16, 4))
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def worker(rank, folder):
    """Steps 1 to 3, in one of two processes."""
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    mesh = init_device_mesh(DEVICE, (WORLD,))
    model = network()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = optimizer_of(model)  # of the sharded parameters
    losses = train(model, optimizer, range(1, 4), rank, WORLD)
    dist.all_reduce(losses)
    if rank == 0:
        shape = tuple(model[0].weight.to_local().shape)
        print(f"shard of process 0 of the first weight: {shape} of {tuple(model[0].weight.shape)}")
        print("2 processes:", *(f"{loss:.6f}" for loss in (losses / WORLD).tolist()), flush=True)
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/checkpoint")
    dist.barrier()  # no process leaves while the other still talks to it
    dist.destroy_process_group()


def resume(folder):
    """Steps 4 to 6 in this process, from the shards that two wrote."""
    model = network()
    optimizer = optimizer_of(model)
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    print("1 process:", *(f"{loss:.6f}" for loss in train(model, optimizer, range(4, 7)).tolist()))
    return model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=WORLD)
        resumed = resume(folder)
    alone = network()
    train(alone, optimizer_of(alone), range(1, 7))
    pairs = zip(resumed.parameters(), alone.parameters(), strict=True)
    print(f"largest difference of a parameter: {max((p - q).abs().max() for p, q in pairs):.1e}")
