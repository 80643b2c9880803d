"""float64 results to compare with, and how far from them a result may be."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Relative Frobenius error against float64, and never more than twice torch's own (`assert_close`). Each is what one
# rounding to the type costs (half a unit in the last place: 6e-8, 5e-4, 4e-3), with room for rounding twice, not for
# a lost term: one product of a hundred left out is 1e-1 / √100 = 1e-2.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
TF32_TOLERANCE = 1e-3


def error(result: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """‖result − exact‖ / ‖exact‖, or relative to `scale`, the size of the terms of a sum that can cancel, if more."""
    assert result.shape == exact.shape
    size = exact.norm() if scale is None else torch.maximum(exact.norm(), scale.norm())
    return float((result.detach().double().cpu() - exact).norm() / size.clamp_min(1e-300))


def assert_close(
    result: Tensor,
    exact: Tensor,
    torchs: Tensor | None = None,
    scale: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """`result` is within its type's tolerance of `exact`, and not more than twice as far as torch's own result.

    Half a unit in the last place is granted on top: where torch happens to be exact, twice its error is nothing. In
    float64 the exact value is torch's own, so there is nothing to compare.
    """
    bound = tolerance or TOLERANCE[result.dtype]
    ours = error(result, exact, scale)
    assert ours <= bound, f"error {ours:.2e} is over {bound:.0e}"
    if torchs is not None and result.dtype != torch.float64:
        allowed = 2 * error(torchs, exact, scale) + torch.finfo(result.dtype).eps / 2
        assert ours <= allowed, f"error {ours:.2e} is over twice torch's: {allowed:.2e}"


class LinearSigmoid:
    """y = σ(x·wᵀ + b) and its gradients in float64, each from the inputs the library's own kernel has."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None) -> None:
        self.x, self.w = x.detach().double().cpu(), w.detach().double().cpu()
        z = self.x @ self.w.t()
        self.y = torch.sigmoid(z if b is None else z + b.detach().double().cpu())

    def gradients(self, dy: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dx, dw, db and the size of db's terms, for the output `y` as it was rounded: backward has no other."""
        y = y.detach().double().cpu()
        dz = dy.detach().double().cpu() * y * (1 - y)
        rows = dz.reshape(-1, dz.shape[-1])
        return dz @ self.w, rows.t() @ self.x.reshape(-1, self.x.shape[-1]), rows.sum(0), rows.norm(dim=0)


def grads(y: Tensor, inputs: Sequence[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, dy, retain_graph=True)
