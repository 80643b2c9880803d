"""`python -m bench static`: compile every kernel for every target and check the machine code; no GPU needed.

Prints registers, spills, shared memory and instruction counts of every kernel, and what breaks an expectation: spills,
missing matrix instructions, loads that are not pipelined, narrow stores, and on sm_90 products whose registers are
overwritten while they run, or that wait for one another. Exits with 1 if anything does.
"""

import contextlib
import dataclasses
import io
import itertools
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from tribp.launch.arch import ARCHS, Arch
from tribp.launch.launches import Launch

from . import sass, wgmma
from .expectations import Compiled, Expectation, always, broken
from .operation import Operation, describe
from .options import Options
from .results import markdown, write_json
from .sass import MATRIX, Instruction

# -- a launch, compiled -----------------------------------------------------------------------------------------------


def target_of(arch: Arch) -> GPUTarget:
    return GPUTarget("cuda", arch.capability, 32) if arch.backend == "cuda" else GPUTarget("hip", arch.name, 64)


def source_of(launch: Launch, arch: Arch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for this launch, and with which options.

    Asks Triton's own binder which arguments it specializes (aligned pointers, ones, multiples of 16): it needs a
    target, but no GPU, and it accepts `meta` tensors.
    """
    backend = make_backend(target_of(arch))
    options: dict[str, Any] = dict(launch.constants, **launch.options)
    bind = jit.create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, excess = bind(*launch.arguments, **options)
    parsed, signature, constants, attributes = launch.kernel._pack_args(backend, options, bound, specialization, excess)
    return ASTSource(launch.kernel, signature, constants, attributes), dict(parsed.__dict__)


def key_of(operation: Operation, launch: Launch, arch: Arch) -> str:
    """Equal for launches of an operation that share one compiled kernel."""
    source, _ = source_of(launch, arch)
    compiled = (launch.kernel.__name__, source.signature, source.constants, source.attrs, launch.options)
    return f"{operation.name} {arch.name} {compiled}"


Code = tuple[Compiled, list[Instruction]]


def read_launches(launches: Sequence[Launch], arch: Arch) -> list[Code]:
    """Compile each kernel as its launch would, and read it; no instructions if the compiler gave up.

    Triton's cache makes the second time fast.
    """
    compiled = [_compile(launch, arch) for launch in launches]
    built = [kernel for kernel, _ in compiled if kernel is not None]
    if arch.backend == "cuda":
        codes = iter(_disassemble([kernel.asm["cubin"] for kernel in built], arch) if built else [])
    else:
        codes = iter([sass.parse_amd(kernel.asm["amdgcn"]) for kernel in built])
    return [
        _read(launch, arch, kernel, said, next(codes))
        if kernel is not None
        else (Compiled(arch.shared_memory, error=said), [])
        for launch, (kernel, said) in zip(launches, compiled, strict=True)
    ]


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


def _read(launch: Launch, arch: Arch, kernel: Any, said: str, code: list[Instruction]) -> Code:
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
    faults = wgmma.faults(code, kernel.asm.get("ptx", ""), said, as_loaded=as_loaded)
    return Compiled(
        arch.shared_memory, registers, spilled, int(kernel.metadata.shared), len(code), sass.count(code),
        tuple(sass.matrix_loops(code)), faults, sass.unawaited(code) if launch.early else "",
    ), code  # fmt: skip


def _disassemble(cubins: Sequence[bytes], arch: Arch) -> list[list[Instruction]]:
    """The instructions of each kernel. The disassembler takes 0.3 s to start, so it is given them all at once."""
    sections = [_text_section(cubin) for cubin in cubins]
    suffix = "a" if arch.capability >= 90 else ""  # what Triton compiles for: with wgmma, with tcgen05
    binary = b"".join(sections)
    text = _cubin_tool("nvdisasm", binary, "--binary", f"SM{arch.capability}{suffix}")
    ends = list(itertools.accumulate(len(section) for section in sections))
    return sass.parse_sass(text, ends, binary)


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
    match = re.search(name + r":\s*(\d+)", text)
    return int(match[1]) if match else 0


# -- every kernel -----------------------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """A kernel that one or several cases launch, and everything that is expected of it."""

    operation: str
    arch: Arch
    launch: Launch  # the first case's
    dtype: str
    expectations: dict[str, Expectation]
    cases: list[str] = field(default_factory=list)


Kernels = dict[str, Kernel]


def read_all(kernels: Kernels) -> Iterator[tuple[str, Code]]:
    """Each kernel's key, and what it was compiled to."""
    for arch, some in itertools.groupby(kernels, lambda key: kernels[key].arch):
        keys = list(some)
        yield from zip(keys, read_launches([kernels[key].launch for key in keys], arch), strict=True)


def collect(calls: Iterable[tuple[Arch, Operation, Any, str]]) -> Kernels:
    """The different kernels of an operation on a target."""
    kernels: Kernels = {}
    for arch, operation, case, direction in calls:
        for launch in operation.launches(case, direction, arch):
            new = Kernel(operation.name, arch, launch, case.dtype_name, {e.name: e for e in always(arch)})
            kernel = kernels.setdefault(key_of(operation, launch, arch), new)
            kernel.cases.append(f"{case.name} {direction}".removesuffix(" step"))
            kernel.expectations |= {e.name: e for e in operation.expectations(launch, case, arch)}
    return kernels


def calls(options: Options) -> Iterator[tuple[Arch, Operation, Any, str]]:
    """What to compile. Raises ValueError if nothing is asked for."""
    everything = [
        (ARCHS[target], operation, case, directions)
        for operation, target in itertools.product(options.operations, options.target or ARCHS)
        for case, directions in operation.compiled(options.all)
    ]
    if not any(options.selects(case) for _, _, case, _ in everything):
        types, names = ({getattr(case, of): None for _, _, case, _ in everything} for of in ("dtype_name", "name"))
        hint = "" if options.all else "; --all has more"
        raise ValueError(f"there is no such case; there are types {', '.join(types)}, and {'; '.join(names)}{hint}")
    for arch, operation, case, directions in everything:
        # gfx942 has no TF32: the same code again.
        if options.selects(case) and not (case.tf32 and arch.backend == "hip"):
            yield from ((arch, operation, case, direction) for direction in directions)


def row(kernel: Kernel, code: Compiled) -> dict[str, Any]:
    launch = kernel.launch
    return {
        "operation": kernel.operation,
        "cases": list(dict.fromkeys(kernel.cases)),
        "dtype": kernel.dtype,
        "target": kernel.arch.name,
        "kernel": launch.kernel.__name__,
        "settings": describe(launch),
        "constants": {k: v if isinstance(v, (bool, int, str)) else str(v) for k, v in launch.settings.items()},
        **dataclasses.asdict(code),
        "expected": {e.name: e.reason for e in kernel.expectations.values()},
        "broken": broken(code, kernel.expectations.values()),
    }


HEADER = (
    "target", "kernel", "dtype", "settings", "regs", "spill", "shared KB", "matrix", "load", "16 B", "async", "store",
    "16 B", "exp2", "instrs", "first case", "ok",
)  # fmt: skip


def line(r: dict[str, Any]) -> list[object]:
    counts, cases = r["counts"], r["cases"]

    def count(*names: str) -> int:
        return sum(counts.get(name, 0) for name in names)

    matrix = " ".join(f"{counts[name]} {name}" for name in sorted(MATRIX & counts.keys()))
    return [
        r["target"], r["kernel"], r["dtype"], r["settings"], r["registers"], r["spilled"],
        f"{r['shared_memory'] / 1024:.0f}", matrix, count("LDG", "load"), count("LDG.128", "load.128"),
        count("UTMALDG", "LDGSTS", "load_lds"), count("STG", "store", "UTMASTG"), count("STG.128", "store.128"),
        count("MUFU.EX2", "v_exp"), r["instructions"], f"{cases[0]}{f' +{len(cases) - 1}' if cases[1:] else ''}",
        "no" if r["broken"] else "yes",
    ]  # fmt: skip


def main(options: Options) -> int:
    """Compile, print the table and what is broken, write the JSON; 1 if anything is broken."""
    started = time.perf_counter()
    kernels = collect(calls(options))
    rows = [row(kernels[key], code) for key, (code, _) in read_all(kernels)]
    print(markdown(HEADER, map(line, rows)))
    failures = [(r, sentence) for r in rows for sentence in r["broken"]]
    seconds = time.perf_counter() - started
    print(f"\n{len(rows)} kernels compiled in {seconds:.0f} s, {len(failures)} broken expectations")
    for r, sentence in failures:
        place = f"{r['target']} {r['kernel']} {r['settings']} [{r['cases'][0]}]"
        print(f"- {place}: {r['registers']} registers; {sentence}")
    if options.json:
        write_json(options.json, rows)
    return int(bool(failures))
