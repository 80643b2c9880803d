"""From tensors to kernel launches: what every operation's Triton side shares. Imports triton."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import versions
from ..kernels import common
from .arch import Arch, cdiv, power_of_2
from .calls import scratch
from .matmul import choose_sum

versions.warn_if_untested()
if common.INTERPRETED:
    versions.mend_interpreter()


class Launch(NamedTuple):
    """One kernel launch, complete: `run` performs it, `bench static` compiles it for a GPU that is not there.

    constants: the kernel's `constexpr` parameters; of a layer's kernel CONFIG alone, a NamedTuple.
    """

    kernel: "triton.JITFunction[Any]"
    grid: tuple[int, ...]
    arguments: tuple[object, ...]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Arguments by the names of the kernel's parameters, and `settings`."""
        return dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.settings

    @property
    def settings(self) -> dict[str, Any]:
        """The constants by name; in place of a config its fields, SRC_VEC for its SRC.VEC."""
        settings: dict[str, Any] = {}
        for name, value in self.constants.items():
            settings |= _fields(value, "") if _is_config(value) else {name: value}
        return settings

    def with_settings(self, **changes: object) -> "Launch":
        """The launch with other constants, or other fields of its CONFIG. Raises ValueError for a name it has not."""
        constants = dict(self.constants)
        for name, value in changes.items():
            if name in constants:
                constants[name] = value
            else:
                constants["CONFIG"] = cast(Any, constants.get("CONFIG", ()))._replace(**{name: value})
        return self._replace(constants=constants)

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told besides the kernel's own arguments."""
        # Triton 3.9 warns that a · b + c will be two roundings by default from 3.10 on.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers  # CUDA only: on AMD it is no option
        return options

    def run(self) -> object:
        """Returns the compiled kernel, or None where it was interpreted."""
        return self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


def _is_config(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _fields(config: Any, prefix: str) -> dict[str, Any]:
    """A config's fields by name, and those of a config within it."""
    fields: dict[str, Any] = {}
    for name, value in config._asdict().items():
        fields |= _fields(value, f"{prefix}{name}_") if _is_config(value) else {prefix + name: value}
    return fields


class Operand(NamedTuple):
    """A matrix as a product reads it: row-major, or column-major (`transposed`), with `ld` elements between lines."""

    tensor: Tensor
    transposed: bool
    ld: int
    vec: int  # elements, 16 bytes at most, that divide ld, the contiguous length and the address
    tma: bool  # whether a tensor descriptor can describe it

    def argument(self, use_tma: bool, block_rows: int, block_cols: int, precision: str = "ieee") -> object:
        """The kernel argument: the tensor itself, or a descriptor of its tiles. precision: see `descriptor`."""
        if not use_tma:
            return self.tensor
        rows, cols = self.tensor.shape
        if self.transposed:
            return descriptor(self.tensor, [cols, rows], [self.ld, 1], [block_cols, block_rows], precision)
        return descriptor(self.tensor, [rows, cols], [self.ld, 1], [block_rows, block_cols], precision)


def descriptor(
    tensor: Tensor, shape: list[int], strides: list[int], block: list[int], precision: str = "ieee"
) -> TensorDescriptor:
    """A descriptor of tiles. precision: of the product whose operand it loads as it is; "tf32_rounded" has it round."""
    rounding = {"round_f32_to_tf32": True} if precision == "tf32_rounded" else {}
    return TensorDescriptor(tensor, shape, strides, block, **rounding)


def precision_in_kernel(precision: str, tma: bool) -> str:
    """The kernels' PRECISION, of a product that the rules call `precision`.

    TF32 operands are to be rounded: by the descriptors that load them, which costs nothing, or else in registers.
    """
    return "tf32_rounded" if precision == "tf32" and tma and versions.descriptors_round_to_tf32() else precision


def operand(matrix: Tensor) -> Operand:
    """`matrix` as an operand. One whose rows and columns are both strided is copied, as torch does for its products."""
    if matrix.stride(1) != 1 and matrix.stride(0) != 1:
        matrix = matrix.contiguous()
    transposed = matrix.stride(1) != 1
    contiguous, lines = (0, 1) if transposed else (1, 0)
    ld = matrix.stride(lines) if matrix.shape[lines] > 1 else matrix.shape[contiguous]
    length, itemsize = matrix.shape[contiguous], matrix.element_size()
    aligned = matrix.data_ptr() % 16 == 0
    return Operand(
        matrix,
        transposed,
        ld,
        vec=vector_length(itemsize, ld, length) if aligned else 1,
        tma=aligned and ld >= length and ld % versions.descriptor_unit(itemsize, bool(common.INTERPRETED)) == 0,
    )


def vector_length(itemsize: int, *lengths: int) -> int:
    """The largest number of elements, 16 bytes at most, that divides every length."""
    vec = 16 // itemsize
    while any(length % vec for length in lengths):
        vec //= 2
    return vec


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, object]:
    """The type that sums of `dtype` are formed in, for torch and for Triton."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def partials_of(
    out: Tensor | None, parts: int, dtype: torch.dtype, shape: tuple[int, ...] | None = None
) -> Tensor | None:
    """Room for `parts` partial results of `out`, in its shape or in another; `out` itself if there is only one."""
    if out is None or parts == 1:
        return out
    return scratch((parts, *(shape or out.shape)), dtype, out.device)


class Partials(NamedTuple):
    """A result to come: the sum of partial results, which `partials_of` made room for."""

    partials: Tensor | None
    out: Tensor | None
    transposed: tuple[int, int] | None = None  # (rows, cols) of the matrices whose transposes `out` consists of

    @property
    def pending(self) -> bool:
        return self.partials is not None and self.out is not None and self.partials is not self.out


def second_pass(arch: Arch, *results: Partials) -> Iterator[Launch]:
    """The sums of those of two partial results that are not `out` themselves, in one launch."""
    if pending := [result for result in results if result.pending]:
        yield sum_partials(arch, *pending)


def sum_partials(arch: Arch, result: Partials, other: Partials | None = None) -> Launch:
    """out = partials.sum(0), in a fixed order. partials: (parts, …), contiguous, in the accumulator's type.

    Two results have one type. The first one is the longer, and only it may be transposed.
    """
    partials, out, transposed = result
    partials2, out2, _ = other or Partials(None, None)
    assert partials is not None
    assert out is not None
    parts, length = partials.shape[0], out.numel()
    rows, cols = transposed or (1, length)
    matrices = length // (rows * cols)
    size, length2 = partials.element_size(), 0 if out2 is None else out2.numel()
    vec, vec2 = vector_length(size, cols), vector_length(size, length2)
    chosen = choose_sum(parts, length, arch, rows=rows, vec=min(vec, vec2))
    block_rows = power_of_2(rows)
    programs = matrices * cdiv(cols, chosen.block // block_rows) + cdiv(length2, chosen.block)
    return Launch(
        common.sum_partials,
        (programs,),
        (
            partials, out, parts, matrices, rows, cols,
            partials2, out2, 0 if partials2 is None else partials2.shape[0], length2,
        ),
        dict(
            ACC=accumulator(out.dtype)[1], VEC=vec, VEC2=vec2,
            BLOCK_PARTS=chosen.block_parts, BLOCK_ROWS=block_rows, BLOCK=chosen.block,
        ),
        chosen.num_warps,
        # Compiled: rounded down to a step of occupancy, float64 of odd length spills 8 bytes with Triton 3.5 and 3.6.
        max_registers=255 if arch.backend == "cuda" else None,
    )  # fmt: skip
