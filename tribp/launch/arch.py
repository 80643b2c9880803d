"""GPUs, types and limits, as heuristics know them. Imports nothing but the standard library."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """What heuristics need to know of a GPU."""

    backend: str  # "cuda", "hip" or "interpreter"
    capability: int  # 90 for sm_90, 942 for gfx942
    processors: int  # multiprocessors or compute units
    shared_memory: int  # bytes one program may use
    name: str
    early_launches: bool = False  # whether a launch can begin while the one before ends

    @property
    def has_tma(self) -> bool:
        """Whether descriptors feed tensor cores that read shared memory: Hopper and data-centre Blackwell.

        sm_120 has descriptors too, but multiplies from registers as sm_80 does, with 99 KB of shared memory. Compiled:
        with descriptors it spills and takes 131 KB; with sm_80's configs neither.
        """
        return self.backend == "interpreter" or (self.backend == "cuda" and 90 <= self.capability < 120)

    @property
    def has_wgmma(self) -> bool:
        """Whether tensor cores work beside the program, on tiles in shared memory: Hopper alone."""
        return self.backend == "cuda" and 90 <= self.capability < 100


# The machines the static checks compile for; on a real one `tribp.dispatch.arch_of` reads the numbers off the device.
ARCHS = {
    "sm_80": Arch("cuda", 80, 108, 163 * 1024, "sm_80"),
    "sm_90": Arch("cuda", 90, 132, 227 * 1024, "sm_90", early_launches=True),
    "sm_100": Arch("cuda", 100, 148, 227 * 1024, "sm_100", early_launches=True),
    "gfx942": Arch("hip", 942, 304, 64 * 1024, "gfx942"),
}
INTERPRETER = Arch("interpreter", 0, 4, 1 << 30, "interpreter")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def precision_of(dtype: str, tf32: bool, arch: Arch) -> str:
    """How a product takes its operands: Triton's `input_precision`.

    float32 at torch's default keeps float32 accuracy: three TF32 products on NVIDIA's tensor cores (`ieee` would
    compile to 2,048 FFMA a 128×128×32 tile and no tensor core), `ieee` where that is on the matrix units anyway
    (gfx942) or where there are none (the interpreter, which yet rounds as TF32 does where that is allowed).
    """
    if dtype != "float32" or arch.backend == "hip":
        return "ieee"
    return "tf32" if tf32 else "tf32x3" if arch.backend == "cuda" else "ieee"
