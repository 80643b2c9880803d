"""The entry of `conv3x3`: y = act(x ⋆ w + b), x (N, C, H, W), w (O, C / groups, 3, 3), padding 1."""

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import tribp

from .autograd import PARTS, DifferentiableProblem
from .conv_cases import PADDING, ConvCase, cases, smoke_cases, targets, work
from .conv_kernels import launches, static_cases
from .registry import KernelTests, KernelWork, Operation

# Elements of input and output that are convolved in float64 at a time. torch keeps some four copies of them for the
# gradients, and cuDNN a workspace; the largest output, 256×64×224², would take 6.6 GB for each.
AT_A_TIME = 1 << 26


def eager(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, stride: int, padding: int, groups: int, activation: str | None
) -> Tensor:
    y = F.conv2d(x, w, b, stride, padding, 1, groups)
    return torch.sigmoid(y) if activation else y


def problem(case: ConvCase, device: torch.device) -> DifferentiableProblem:
    """Fresh inputs, scaled as a trained layer's are: z has a standard deviation near 1, so σ does not saturate."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        layout = case.memory_format if len(shape) == 4 else torch.contiguous_format
        return (scale * torch.randn(shape, device=device)).to(case.dtype, memory_format=layout)

    o, c, *_ = case.weight_size
    arguments = {"input": normal(*case.input_size), "weight": normal(o, c, 3, 3, scale=(9 * c) ** -0.5)}
    if case.bias:
        arguments["bias"] = normal(o)
    output_grad = normal(*case.output_size)
    activation = "sigmoid" if case.sigmoid else None
    options = dict(stride=case.stride, padding=PADDING, groups=case.groups, activation=activation)
    found = partial(scales, options=options)
    return DifferentiableProblem(arguments, output_grad, eager, found, case.tf32, options, images_at_a_time(case))


def images_at_a_time(case: ConvCase) -> int:
    return max(1, AT_A_TIME // (math.prod(case.input_size[1:]) + math.prod(case.output_size[1:])))


def scales(arguments: Mapping[str, Tensor], output_grad: Tensor, options: Mapping[str, object]) -> dict[str, float]:
    """The bias's gradient sums pixels of either sign, and can be as small as it likes."""
    if "bias" not in arguments:
        return {}
    if options["activation"]:
        y = eager(*arguments.values(), **options)  # type: ignore[arg-type]
        output_grad = output_grad * y * (1 - y)
    return {"bias": float(output_grad.norm())}


def kernel_work() -> KernelWork:
    from .work import CONV

    return CONV


OPERATION = Operation(
    name="conv",
    summary="tribp.conv3x3 against conv2d(…), and sigmoid(conv2d(…)), of cuDNN",
    cases=cases(),
    smoke_cases=smoke_cases(),
    directions=PARTS,
    contenders={"tribp": tribp.conv3x3, "eager": eager},
    problem=problem,
    work=work,
    targets=targets,
    launches=launches,
    static_cases=static_cases,
    tests=KernelTests(
        ["tests/test_conv3x3_integration.py", "tests/test_conv3x3_module.py"],
        ["tests/test_conv3x3_kernels.py", "-k",
         "(bfloat16 or few_input or one_channel or relayout or nan or infinity) and not gpu"],
        ["tests/test_conv3x3_kernels.py", "-k", "relayout and copy and NCHW"],
    ),
    switches=("TMA", "FUSE_DZ", "FLAT", "DIAGONAL", "CHANNELS_LAST", "TAPS_LAST", "SIGMOID", "src3"),
    kernel_work=kernel_work,
    legend=f"Shapes are N×C-O×H×W, /stride, :groups; padding {PADDING}. dgrad is the input's gradient alone, wgrad the "
    "weight's and the bias's, both: forward, and backward with all of them. Eager torch has cuDNN's benchmark mode on. "
    f"{Operation.legend}",
)  # fmt: skip
