"""Where the formula updates CPU tensors of any size: small ones side by side, large ones in pieces."""

from types import ModuleType

import pytest
import torch

import tribp.optim
from tribp.optim import packed_bucket, torch_buckets

from .cases import LIVELY, TORCHS, Twins, channels_last

BY_FORMULA = [name for name in TORCHS if name not in ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW")]
by_formula = pytest.mark.parametrize("name", BY_FORMULA)
DTYPES = [torch.float64, torch.complex128]


def kinds(twins: Twins) -> list[type]:
    """Of what the only bucket consists of."""
    (bucket,) = twins.ours._plan.buckets
    assert isinstance(bucket, packed_bucket.PackedBucket)
    return [type(pack) for pack in bucket._of_everyone]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@by_formula
def test_a_large_tensor_in_pieces(
    name: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Whole pieces and a rest, dense in two layouts."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(getattr(tribp.optim, name)._rule, "piece", 40)
    for module in (packed_bucket, torch_buckets):
        monkeypatch.setattr(module, "GRAIN", 100)  # larger ones are not packed
    try:
        twins = Twins(name, shapes=((3, 5, 7, 2), (401,)), dtype=dtype, **LIVELY[name])
        twins.params[0].data = channels_last(twins.params[0])
        for _ in range(3):
            grads = twins.grads()
            twins.give(grads)
            assert grads[0] is not None
            twins.params[0].grad = channels_last(grads[0])
            twins.each(lambda optimizer: optimizer.step())
            twins.check()
        assert kinds(twins) == [packed_bucket.Pieces] * 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [899, 900, 901, 1100, 1349, 1351, 2000, 2300, 10_001])
def test_no_piece_is_short(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs 15 to 20 µs besides: a rest of a few elements made a step slower than torch's."""
    monkeypatch.setattr(tribp.optim.Adamax._rule, "piece", 900 // torch.get_num_threads())
    twins = Twins("Adamax", shapes=[(count,)])
    monkeypatch.setattr(packed_bucket, "GRAIN", 100)
    twins.step()
    (bucket,) = twins.ours._plan.buckets
    sizes = [len(p) for p, _ in bucket._of_everyone[0]._pieces]
    assert sum(sizes) == count
    size = 900 // torch.get_num_threads() * torch.get_num_threads()
    assert len(sizes) == max(1, (2 * count + size) // (2 * size)), "to the nearest"
    assert max(sizes) <= 1350 + 16
    assert len(sizes) == 1 or min(sizes) >= 600 - 16 * len(sizes)


def test_counters_in_another_order_count_for_themselves() -> None:
    """Two optimizers of the same states: what one gathered lies in the other's order of parameters."""

    def trained(library: ModuleType) -> list[torch.Tensor]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
        one, other = library.Adamax(params), library.Adamax(params[::-1])
        for count in (1, 2, 3):  # steps of the first, the first two, all
            for p in params[:count]:
                p.grad = torch.randn(5)
            one.step()
        other.state = one.state
        other.step()
        return [*params, *(one.state[p]["step"] for p in params)]

    for ours, theirs in zip(trained(tribp.optim), trained(torch.optim), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shapes", [[(8,)] * 5, [(8,), (3, 2), (), (0,), (2, 3, 2)]], ids=["of one dimension", "any"])
@pytest.mark.parametrize("dtype", DTYPES)
@by_formula
def test_small_tensors_side_by_side(name: str, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    """All of them, some, and some that are a step behind."""
    twins = Twins(name, shapes=shapes, dtype=dtype, **LIVELY[name])
    for present in ((), (), (0, 2), (), (1, 2, 3, 4), ()):
        twins.step(*present)
    assert kinds(twins) == [packed_bucket.Pack]


@by_formula
def test_infinities_stay_where_they_are(name: str) -> None:
    """Elements are copied by arithmetic, in which 0·∞ is no number: neither copies nor gradients may show it."""
    twins = Twins(name, shapes=[(8,), (2, 2), (5,)], **LIVELY[name])
    twins.step()
    grads = twins.grads()
    infinite = grads[1]
    assert infinite is not None
    infinite[0, 0] = torch.inf
    for _ in range(2):
        twins.give(grads)
        twins.each(lambda optimizer: optimizer.step())
        twins.check()
        given = twins.params[1].grad
        assert given is not None
        assert torch.equal(given, infinite)


def test_the_formula_leaves_the_gradients_alone() -> None:
    for name in BY_FORMULA:
        twins = Twins(name, shapes=[(8,)], **LIVELY[name])
        grad = torch.linspace(-1, 1, 8, dtype=torch.float64)
        twins.params[0].grad = grad.clone()
        twins.ours.step()
        assert torch.equal(twins.params[0].grad, grad), name
