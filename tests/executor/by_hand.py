"""Kernels in PTX by hand, for the executor's own tests."""

import struct
from typing import Any

import numpy as np
import torch

from .arrays import Array
from .findings import Counts, Problem, Problems
from .global_memory import GlobalMemory
from .machine import Options, launch
from .tensor_copies import TensorMap

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
REGISTERS = ".reg .pred %p<20>;\n.reg .b16 %rs<20>;\n.reg .b32 %r<99>;\n.reg .b64 %rd<60>;\n"
THREAD = "mov.u32 %r1, %tid.x;\nmul.wide.u32 %rd50, %r1, 4;\n"


def run(
    body: str, *arguments: "torch.Tensor | TensorMap", threads: int = 32, grid: int = 1, shared: int = 0, **options: Any
) -> tuple[Counts, list[Problem]]:
    """Execute a kernel of this body.

    %rd1, %rd2 … are the arguments' addresses, %r1 the thread, %rd50 4 times that.
    """
    maps = {}
    params, packed, loads = [], b"", ""
    for n, argument in enumerate(arguments):
        if isinstance(argument, TensorMap):
            packed = packed.ljust(-(-len(packed) // 64) * 64, b"\0")
            maps[len(packed)] = argument
            params.append(f".param .align 64 .b8 p{n}[128]")
            packed += bytes(128)
            loads += f"mov.b32 %r98, p{n};\ncvt.u64.u32 %rd59, %r98;\ncvta.param.u64 %rd{n + 1}, %rd59;\n"
        else:
            params.append(f".param .u64 p{n}")
            packed += struct.pack("<Q", argument.data_ptr())
            loads += f"ld.param.b64 %rd{n + 1}, [p{n}];\n"
    entry = ".visible .entry k(\n" + ",\n".join(params) + f"\n)\n.reqntid {threads}\n"
    memory = GlobalMemory()
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            memory.allow(argument)
    problems = Problems()
    text = f"{HEAD}{entry}{{\n{REGISTERS}{loads}{THREAD}{body}\nret;\n}}\n"
    counts = launch(text, (grid, 1, 1), packed, shared, memory, problems, Options(**options), maps)
    return counts, problems


def result_of(code: str, *inputs: Array, out: torch.dtype = torch.int32) -> Array:
    """What 32 threads compute: inputs are in %r10, %r11 … (of 8 bytes: %rd10 …), the result in %r20 (%rd20)."""
    tensors = [torch.as_tensor(x) for x in inputs]
    result = torch.zeros(32, dtype=out)

    def access(n: int, tensor: torch.Tensor, form: str, register: int) -> str:
        wide = tensor.element_size() == 8
        place = f"mul.wide.u32 %rd51, %r1, {tensor.element_size()};\nadd.s64 %rd52, %rd{n + 1}, %rd51;\n"
        bits, value = ("b64", f"%rd{register}") if wide else ("b32", f"%r{register}")
        return place + form.format(bits=bits, value=value)

    loads = [access(n, t, "ld.global.{bits} {value}, [%rd52];\n", 10 + n) for n, t in enumerate(tensors)]
    store = access(len(tensors), result, "st.global.{bits} [%rd52], {value};\n", 20)
    _, problems = run("".join(loads) + code + "\n" + store, *tensors, result)
    assert not problems
    return np.asarray(result.numpy())
