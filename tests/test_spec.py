"""The worked examples of the subject matter, number by number."""

import pytest
import torch
from torch import Tensor, nn

import tribp


def test_one_neuron(device: str) -> None:
    """x = 1, w = 0.5, b = 0.5: y = σ(1), dy/dw = dy/db = σ(1)(1 − σ(1))."""
    x = torch.ones(1, 1, device=device)
    w, b = (torch.full(shape, 0.5, device=device, requires_grad=True) for shape in ((1, 1), (1,)))
    y = tribp.linear_sigmoid(x, w, b)
    dw, db = torch.autograd.grad(y, (w, b))
    assert y.item() == pytest.approx(0.731059, abs=5e-7)
    assert dw.item() == pytest.approx(0.196612, abs=5e-7)
    assert db.item() == pytest.approx(0.196612, abs=5e-7)


class Network(nn.Module):
    """2-2-1, sigmoid after both layers."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.hidden = tribp.nn.LinearSigmoid(2, 2, device=device)
        self.out = tribp.nn.LinearSigmoid(2, 1, device=device)
        self.hidden.weight.data = torch.tensor([[1.0, 2.0], [0.0, 1.0]], device=device)
        self.out.weight.data = torch.tensor([[3.0, 3.0]], device=device)
        for layer in (self.hidden, self.out):
            assert layer.bias is not None
            layer.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(self.hidden(x))
        return output


def test_worked_network(device: str) -> None:
    network = Network(device)
    x, target = torch.tensor([[0.1, 0.8]], device=device), torch.tensor([[0.5]], device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    output = network(x)
    loss = (output - target).square().sum() / 2
    loss.backward()
    assert output.item() == pytest.approx(0.990112, abs=5e-7)
    assert loss.item() == pytest.approx(0.120105, abs=5e-7)
    hidden = torch.tensor([[0.000187999, 0.00150399], [0.000307910, 0.00246328]])
    torch.testing.assert_close(network.hidden.weight.grad, hidden.to(device), rtol=1e-5, atol=0)
    out = torch.tensor([[0.00405699, 0.00331059]])
    torch.testing.assert_close(network.out.weight.grad, out.to(device), rtol=1e-5, atol=0)

    optimizer.step()
    torch.testing.assert_close(
        network.out.weight.detach().cpu(), torch.tensor([[3.0, 3.0]]) - 0.01 * out, rtol=0, atol=5e-7
    )


def test_the_tutorials_own_weight_is_refused(device: str) -> None:
    network = Network(device)
    network.out.weight.data = torch.tensor([[3.0]], device=device)  # .data skips the check that assignment would make
    with pytest.raises(ValueError, match=r"weight must have shape \(1, 2\).*got \(1, 1\)"):
        network(torch.tensor([[0.1, 0.8]], device=device))
