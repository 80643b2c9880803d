"""Kernel launches, compiled for a GPU that need not be there, and what their machine code says. Imports triton."""

import contextlib
import io
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from tribp.launch.arch import Arch
from tribp.launch.layout import Launch

from . import machine_code, registry, wgmma
from .machine_code import Instruction, Loop


@dataclass(frozen=True)
class Compiled:
    """What the checks and the table need to know of one compiled kernel."""

    target: str
    kernel: str
    settings: str
    constants: Mapping[str, object]  # as strings and numbers, so that it can be stored
    shared_limit: int
    registers: int = 0
    spilled: int = 0  # bytes a thread that go to local memory (NVIDIA: stores; AMD: scratch memory)
    shared_memory: int = 0
    instructions: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    loops: tuple[Loop, ...] = ()  # the innermost ones around matrix instructions
    wgmma: Mapping[str, str] = field(default_factory=dict)  # what is wrong with asynchronous products: `wgmma.faults`
    error: str = ""  # what the compiler said, if it gave up


def target_of(arch: Arch) -> GPUTarget:
    if arch.backend == "cuda":
        return GPUTarget("cuda", arch.capability, 32)
    return GPUTarget("hip", arch.name, 64)


def source_of(launch: Launch, arch: Arch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for this launch, and with which options.

    Asks Triton's own binder which arguments it specializes (aligned pointers, ones, multiples of 16): it needs a
    target, but no GPU, and it accepts `meta` tensors.
    """
    backend = make_backend(target_of(arch))
    options: dict[str, Any] = dict(launch.constants, **launch.options)
    bind = jit.create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, rest = bind(*launch.arguments, **options)
    parsed, signature, constants, attributes = launch.kernel._pack_args(backend, options, bound, specialization, rest)
    return ASTSource(launch.kernel, signature, constants, attributes), dict(parsed.__dict__)


def key_of(launch: Launch, arch: Arch) -> str:
    """Equal for launches that share one compiled kernel."""
    source, _ = source_of(launch, arch)
    return f"{arch.name} {launch.kernel.__name__} {source.signature} {source.constants} {source.attrs} {launch.options}"


def describe(launch: Launch) -> str:
    """The settings in a few characters: an optimizer's rule and states, tile, warps, stages, what is switched on.

    Of a convolution besides: its box of pixels, its steps where they are not 1, taps and groups that share a program,
    and which way a relayout goes.
    """
    given = launch.named
    sizes = [size for name, size in launch.settings.items() if name.startswith("BLOCK") and name[-1].isalpha()]
    tile = "×".join(map(str, sizes))
    rule = getattr(given.get("RULE"), "__name__", "")
    states = [str(given[name]) for name in ("STATE0", "STATE1", "STATE2") if given.get(name) is not None]
    on = [name.lower() for name in registry.switches() if isinstance(given.get(name), torch.Tensor) or given.get(name)]
    parts = [rule, ",".join(states), tile, f"w{launch.num_warps}", f"s{launch.num_stages}", *_window(given), *on]
    return " ".join(part for part in parts if part)


def _window(given: Mapping[str, Any]) -> Iterator[str]:
    if "BOX_N" in given:
        yield "box" + "×".join(str(given[f"BOX_{side}"]) for side in "NHW")
    if max(steps := [given.get(f"STEP_{side}", given.get(f"step_{side.lower()}", 1)) for side in "HW"]) > 1:
        yield "step{}×{}".format(*steps)
    for name in ("TAPS", "BUNDLE", "ROWS"):
        if given.get(name, 1) > 1:
            yield f"{name.lower()}{given[name]}"
    if "PIXELS" in given:
        yield f"{_contiguous(given, '')}→channels"
    if "SRC_PIXELS" in given:
        yield "→".join(_contiguous(given, side) for side in ("SRC_", "DST_")[: 1 + given["WRITE_DST"]])


def _contiguous(given: Mapping[str, Any], side: str) -> str:
    return "pixels" if given[f"{side}PIXELS"] else "channels" if given[f"{side}CHANNELS"] else "neither"


def compile_launches(launches: Sequence[Launch], arch: Arch) -> list[Compiled]:
    """Compile each kernel as its launch would, and read them. Triton's cache makes the second time fast."""
    return [compiled for compiled, _ in read_launches(launches, arch)]


def read_launches(launches: Sequence[Launch], arch: Arch) -> list[tuple[Compiled, list[Instruction]]]:
    """The same, with their instructions; none if the compiler gave up."""
    compiled = [_compile(launch, arch) for launch in launches]
    built = [kernel for kernel, _ in compiled if kernel is not None]
    if arch.backend == "cuda":
        codes = iter(_disassemble([kernel.asm["cubin"] for kernel in built], arch) if built else [])
    else:
        codes = iter([machine_code.parse_amd(kernel.asm["amdgcn"]) for kernel in built])
    found: list[tuple[Compiled, list[Instruction]]] = []
    for launch, (kernel, said) in zip(launches, compiled, strict=True):
        if kernel is None:
            found.append((Compiled(**_identity(launch, arch), error=said), []))
        else:
            code = next(codes)
            found.append((Compiled(**_identity(launch, arch), **_findings(launch, kernel, said, code, arch)), code))
    return found


def _compile(launch: Launch, arch: Arch) -> tuple[Any, str]:
    """The compiled kernel and what ptxas said of its wgmma; or None and what the compiler said.

    One that does not compile must not hide the others.
    """
    source, options = source_of(launch, arch)
    target = target_of(arch)
    try:
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as said:
            triton.knobs.nvidia.dump_ptxas_log = True
            kernel = triton.compile(source, target=target, options=options)
            if not said.getvalue() and wgmma.PRODUCT in kernel.asm.get("ptx", ""):
                # Triton had it in its cache, which keeps no log: ptxas once more, as Triton runs it.
                backend = make_backend(target)
                backend.make_cubin(kernel.asm["ptx"], {}, backend.parse_options(options), arch.capability)
        return kernel, said.getvalue()
    except Exception as error:  # the compiler raises whatever it likes
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return None, f"{type(cause).__name__}: {' '.join(str(cause).split())[-300:]}"


def _identity(launch: Launch, arch: Arch) -> dict[str, Any]:
    return dict(
        target=arch.name,
        kernel=launch.kernel.__name__,
        settings=describe(launch),
        constants={k: v if isinstance(v, (bool, int, str)) else str(v) for k, v in launch.settings.items()},
        shared_limit=arch.shared_memory,
    )


def _findings(launch: Launch, kernel: Any, said: str, code: Sequence[Instruction], arch: Arch) -> dict[str, Any]:
    formed = any(launch.named.get(switch) for switch in ("FUSE_DZ", "DIAGONAL", "PREFETCH"))  # operands
    as_loaded = launch.kernel.__name__ in ("forward", "dgrad", "wgrad") and not formed
    if arch.backend == "cuda":
        usage = _cubin_tool("cuobjdump", kernel.asm["cubin"], "--dump-resource-usage")
        registers = _number(usage, "REG")
        spilled = sum(i.bytes for i in code if i.name == "STL") or _number(usage, "STACK")
    else:
        text = kernel.asm["amdgcn"]
        registers = _number(text, r"\.vgpr_count") + _number(text, r"\.agpr_count")
        # Bytes of scratch memory. Scalar registers that are spilled go to lanes of vector registers: no memory.
        spilled = _number(text, r"\.private_segment_fixed_size")
    return dict(
        registers=registers,
        spilled=spilled,
        shared_memory=int(kernel.metadata.shared),
        instructions=len(code),
        counts=machine_code.count(code),
        loops=tuple(machine_code.matrix_loops(code)),
        wgmma=wgmma.faults(code, kernel.asm.get("ptx", ""), kernel.asm["ttgir"], said, as_loaded=as_loaded),
    )


def _disassemble(cubins: Sequence[bytes], arch: Arch) -> list[list[Instruction]]:
    """The instructions of each kernel. The disassembler takes 0.3 s to start, so it is given them all at once."""
    sections = [_text_section(cubin) for cubin in cubins]
    suffix = "a" if arch.capability >= 90 else ""  # what Triton compiles for: with wgmma, with tcgen05
    binary = b"".join(sections)
    text = _cubin_tool("nvdisasm", binary, "--binary", f"SM{arch.capability}{suffix}")
    ends = list(itertools.accumulate(len(section) for section in sections))
    return machine_code.parse_sass(text, ends, binary)


def _text_section(cubin: bytes) -> bytes:
    """The instructions in a cubin, an ELF file with one kernel."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names = struct.unpack_from("<HH", cubin, 0x3C)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + 64 * i) for i in range(count)]
    for name, _, _, _, offset, size in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            return cubin[offset : offset + size]
    raise RuntimeError("a cubin without a .text section")


def _cubin_tool(tool: str, content: bytes, *options: str) -> str:
    """What `nvdisasm` or `cuobjdump`, which come with triton, print for a file of this content."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        path = getattr(triton.knobs.nvidia, tool).path
        done = subprocess.run([path, *options, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout


def _number(text: str, name: str) -> int:
    found = re.search(name + r":\s*(\d+)", text)
    return int(found[1]) if found else 0
