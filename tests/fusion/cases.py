"""Models that `tribp.fuse` is tried on, and what tests ask of them."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tribp
from tribp.fusion import Report
from tribp.versions import parse


class BasicBlock(nn.Module):
    """ResNet's: what follows the convolutions stands in the code."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 7, 2, 3, bias=False)
        self.layer1 = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
        self.layer2 = nn.Sequential(BasicBlock(4, 8, 2), BasicBlock(8, 8, 1))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Gate(nn.Module):
    """Children in a list and in a dictionary, and one sigmoid for several places."""

    def __init__(self, act: nn.Sigmoid) -> None:
        super().__init__()
        self.act = act
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, (1, 3), padding=(0, 1))])
        self.heads = nn.ModuleDict(
            {
                "a": nn.Sequential(nn.Linear(4, 4), act, nn.Sequential(nn.Linear(4, 4, bias=False), act)),
                "b": nn.Sequential(OrderedDict(first=nn.Linear(4, 4), drop=nn.Dropout(0.0), sigmoid=act)),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.act(conv(x))
        return self.heads["a"](x.mean((2, 3))) + self.heads["b"](x.amax((2, 3)))  # type: ignore[no-any-return]


class Nested(nn.Module):
    """A block used twice under two names, a convolution used with and without a sigmoid, one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.Sigmoid()
        self.gate = self.again = Gate(act)
        self.conv = nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular")
        self.body = nn.Sequential(self.conv, act)
        self.tail = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, padding="valid"), act, nn.Conv2d(4, 4, 3, 2, 1), act)
        self.head = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), nn.Sigmoid())
        self.head[2].weight = self.head[0].weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) + self.conv(x)
        features = self.gate(y) * self.again(y.square()) + self.tail(x).mean((2, 3))
        return self.head(features)  # type: ignore[no-any-return]


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.Sigmoid(), nn.AvgPool2d(2),
            nn.Conv2d(4, 4, 3), nn.Sigmoid(), nn.AvgPool2d(2),
            nn.Conv2d(4, 4, 5, padding=2), nn.Sigmoid(),
        ),
        nn.Flatten(),
        nn.Sequential(nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 3)),
    )  # fmt: skip


def vgg() -> nn.Module:
    """torchvision's VGG-16: all of it in Sequentials, under a forward that has no layer of its own."""
    features: list[nn.Module] = []
    channels = 2
    for out in (2, 2, "M", 4, 4, "M", 4, 4, 4, "M", 8, 8, 8, 8, 8, 8):
        if isinstance(out, int):
            features += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(inplace=True)]
            channels = out
        else:
            features.append(nn.MaxPool2d(2, 2))
    return VGG(features)


class VGG(nn.Module):
    def __init__(self, features: list[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(32, 16), nn.ReLU(True), nn.Dropout(0.0), nn.Linear(16, 16), nn.ReLU(True), nn.Linear(16, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


class TorchvisionBlock(nn.Module):
    """ResNet's as torchvision writes it: one ReLU for two places."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out  # type: ignore[no-any-return]


class ResNet18(nn.Module):
    """torchvision's, with few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(TorchvisionBlock(4, 4, 1), TorchvisionBlock(4, 4, 1))
        self.layer2 = nn.Sequential(TorchvisionBlock(4, 6, 2), TorchvisionBlock(6, 6, 1))
        self.layer3 = nn.Sequential(TorchvisionBlock(6, 6, 2), TorchvisionBlock(6, 6, 1))
        self.layer4 = nn.Sequential(TorchvisionBlock(6, 8, 2), TorchvisionBlock(8, 8, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.fc(x)

        return x


class FunctionalLeNet(nn.Module):
    """The activations are functions in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.drop = nn.Dropout(0.0)
        self.fc1 = nn.Linear(16, 8)
        self.fc2 = nn.Linear(8, 8, bias=False)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = self.conv2(x)
        x = F.max_pool2d(torch.tanh(x), 2)
        x = F.leaky_relu(self.fc1(x.flatten(1)), 0.2, inplace=True)
        x = F.dropout(self.drop(x), 0.0, training=self.training)
        x = self.fc2(x).sigmoid()
        return self.fc3(x)  # type: ignore[no-any-return]


class DoubleConv(nn.Module):
    """UNet's: one module and one function, and batch norm behind the activation."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.norm = nn.BatchNorm2d(out)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.conv2(F.relu6(self.conv1(x)))))  # type: ignore[no-any-return]


class Up(nn.Module):
    """A level of UNet's way up."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, out, 2, 2)
        self.conv = DoubleConv(2 * out, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        dy, dx = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([skip, x], dim=1))  # type: ignore[no-any-return]


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(2, 4)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(4, 6))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(6, 8))
        self.up1, self.up2 = Up(8, 6), Up(6, 4)
        self.outc = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x = self.down2(x2)
        x = self.up1(x, x2)
        x = self.up2(x, x1)
        return self.outc(x)  # type: ignore[no-any-return]


MODELS = {
    "lenet": lenet, "resnet": ResNet, "nested": Nested,
    "vgg": vgg, "resnet18": ResNet18, "functional_lenet": FunctionalLeNet, "unet": UNet,
}  # fmt: skip


def image() -> Tensor:
    """What all of them take."""
    return torch.randn(3, 2, 12, 12)


def compile_anew() -> None:
    """torch.compile in torch 2.9 does not see that a Sequential has another class."""
    if parse(torch.__version__) < (2, 11):
        torch.compiler.reset()


def done_to_both(change: Callable[[Any], object], model: nn.Module, **options: bool) -> nn.Module:
    """Fuse the model and change it, and a copy of it that is not fused alike; returns the copy."""
    plain = copy.deepcopy(model)
    tribp.fuse(model, **options)
    with torch.random.fork_rng():
        change(model)
    change(plain)
    return plain


class Called:
    """Which of tribp's functions modules call, and with which activations."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.activations: list[object] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Called":
        for name in ("linear", "conv3x3", "mlp"):
            self._patch.setattr(f"tribp.fusion.rows.{name}", functools.partial(self._call, name, getattr(tribp, name)))
        return self

    def _call(self, name: str, function: Callable[..., Tensor], *args: object) -> Tensor:
        self.names.append(name)
        self.activations += args[3:] if name != "conv3x3" else args[6:]
        return function(*args)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def sigmoid_after(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(module, nn.Sigmoid())


def reasons(report: Report) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in report.skipped}


def kinds(model: nn.Module) -> list[str]:
    return [type(child).__name__ for child in model.children()]


def changed(module: nn.Module, **values: object) -> nn.Module:
    for name, value in values.items():
        setattr(module, name, value)
    return module


def hooked(module: nn.Module, kind: str = "forward_hook") -> nn.Module:
    getattr(module, f"register_{kind}")(lambda *_: None)
    return module


def frozen(module: nn.Module, name: str = "weight") -> nn.Module:
    """The module with a parameter that has become a buffer."""
    parameter = module._parameters.pop(name)
    assert parameter is not None
    module.register_buffer(name, parameter.detach())
    return module


# What torch makes of a model, called with such an input.
WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "script": lambda model, x: torch.jit.script(model),
    "trace": lambda model, x: torch.jit.trace(model, x),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "compile": lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager"),
}
