"""`python -m tribp`: back-propagation done and checked by this library, on worked examples and on real digits."""

import argparse
import functools
import importlib
import io
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import dispatch
from .demo.methods import BATCH_SIZE, COMPARED, METHODS
from .demo.models import HIDDEN, MODELS, SIZES, SIZES3

EXTRAS = ("matplotlib", "mlxtend.data", "rich")  # what pip install -e '.[demo]' brings
PICTURES = (".pdf", ".png", ".svg")
PAGES = (".htm", ".html")
LARGEST = 1e6  # for --lr and --epsilon: far beyond sense, and far from overflow

DESCRIPTION = """\
Shows back-propagation done by tribp, and checks it. First the gradients: against central differences in float64, and
against examples small enough to follow by hand. Then a network learns 4,000 real handwritten digits of MNIST by
gradient descent (w <- w - lr * dE/dw, with an optimizer choosing the size of each step), beside the same network and
optimizer in plain torch: one of 784 inputs, 128 hidden and 10 output units, sigmoid after both layers, or with --model
cnn a convolutional one. It is judged on 1,000 digits that it never saw, and its loss is drawn step by step, with the
moving averages that make the trend visible; below it stands what was learned. --html writes a page of all that, with
the network of the worked examples, value by value. --compare draws the losses of all optimizers instead, and those of
gradient descent with batches of all digits, one, and a few. Takes well under a minute on two CPU cores, --compare
about one; on a CUDA GPU the same program runs tribp's Triton kernels."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 0, or 1 where something is missing or wrong, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # no ε in the terminal's encoding is no reason to stop
    threads = torch.get_num_threads()
    # A step of 16 digits gains nothing from a second one, and is 10 times slower on busy cores; with convolutions too:
    # an epoch of the CNN took 0.6 s of CPU time, and 4.4 with two.
    torch.set_num_threads(1)
    try:
        status = _run(_options(argv))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:
        print(f"stopped {stop}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads has enough; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _failed(str(error))
    finally:
        torch.set_num_threads(threads)


def _run(options: dict[str, Any]) -> int:
    if missing := [name.partition(".")[0] for name in EXTRAS if not _importable(name)]:
        return _failed(f"{', '.join(missing)} cannot be imported; this installs it: pip install -e '.[demo]'")
    try:
        if dispatch.backend_of(torch.empty(0, device=options["device"])) == "triton":
            importlib.import_module("tribp.launch.autotune")
    except (RuntimeError, ValueError) as error:  # TRIBP_BACKEND=triton where no kernel can run; TRIBP_AUTOTUNE=yes
        return _failed(str(error))
    from .demo import report

    if not report.checks(options["device"], options["model"]):
        return _failed("these gradients are wrong (✗ above), so nothing is trained with them")
    if options.pop("compare"):
        del options["model"]
        report.comparison(**options)
    else:
        report.training(**options)
    return 0


def _failed(sentence: str) -> int:
    print(f"python -m tribp: {sentence}", file=sys.stderr)
    return 1


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one sentence; the usage is what --help is for


def _options(argv: Sequence[str] | None) -> dict[str, Any]:
    """The arguments of `report.training`, or of `report.comparison`, with `compare` to say which."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    if given["compare"]:
        for name in ("optimizer", "batch_size", "lr"):
            if name in given:
                option = "--" + name.replace("_", "-")
                parser.error(f"argument {option}: not allowed with --compare, where every method has its own")
        if "html" in given:
            parser.error("argument --html: not allowed with --compare, which writes a picture alone")
        if "fused_step" in given:
            parser.error("argument --fused-step: not allowed with --compare, whose times are of separate steps")
        if given["model"] != "mlp":
            parser.error("argument --model: only mlp is allowed with --compare, whose learning rates are for it")
    model = MODELS[given["model"]]
    given = {"epsilon": model.epsilon} | given
    if given["compare"]:
        return given
    optimizer = given.setdefault("optimizer", "adam")
    return {"batch_size": BATCH_SIZE, "lr": model.rates[optimizer]} | given


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m tribp", description=DESCRIPTION)
    add = parser.add_argument
    add(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N; on cpu torch's own operations stand in for the kernels "
        "(default: cuda where there is one, else cpu)",
    )
    add(
        "--model",
        choices=MODELS,
        default="mlp",
        help=f"network to train: mlp ({'-'.join(map(str, SIZES))}) joins every pixel to every hidden unit; mlp3 "
        f"({'-'.join(map(str, SIZES3))}) has ReLU between three layers, whose backward pass crosses them; cnn slides "
        "3×3 windows over the image with the same few weights everywhere, so that a stroke is found wherever it is, "
        f"halves what they find by pooling, does both again, and ends in {HIDDEN} hidden units (default: %(default)s)",
    )
    add(
        "--optimizer",
        choices=METHODS,
        default=argparse.SUPPRESS,
        help="rule that makes a step out of a gradient (default: adam)",
    )
    add(
        "--compare",
        action="store_true",
        help=f"train once with each of {len(COMPARED)} methods, the optimizers and batch, stochastic and mini-batch "
        "gradient descent, and draw their losses in one picture; without plain torch",
    )
    add(
        "--fused-step",
        action="store_true",
        default=argparse.SUPPRESS,
        help="train by tribp.train_step: an MLP's forward and backward in two launches, where Triton's kernels run",
    )
    add(
        "--batch-size",
        type=_batch_size,
        default=argparse.SUPPRESS,
        metavar="N",
        help="digits per step, or full: all 4,000 make one smooth but slow step per epoch (batch gradient descent), 1 "
        "makes 4,000 quick and noisy ones (stochastic), 16, 32, 64 … lie between (mini-batch) "
        f"(default: {BATCH_SIZE})",
    )
    add(
        "--epochs",
        type=_whole,
        default=15,
        metavar="N",
        help="times every digit is used; with more of them the training digits are learned by heart, and the others no "
        "better (default: %(default)s)",
    )
    add(
        "--lr",
        type=_real,
        default=argparse.SUPPRESS,
        metavar="RATE",
        help="learning rate of the first step; it falls linearly to 0. Too small learns slowly, too large jumps over "
        f"the minimum (default: {'; '.join(f'{name}: {_named(model.rates)}' for name, model in MODELS.items())})",
    )
    add(
        "--epsilon",
        type=_real,
        default=argparse.SUPPRESS,
        metavar="E",
        help="weights and biases start uniform in [-E, E]: almost 0 leaves the hidden units alike, far from 0 the "
        "sigmoid is flat and its gradient vanishes; the more layers, the less of it reaches the first from almost 0 "
        f"(default: {_named({name: model.epsilon for name, model in MODELS.items()})})",
    )
    add(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="fixes the first weights, the order of the digits and which are held out: the same seed gives the same "
        "numbers on a CPU (default: %(default)s)",
    )
    add(
        "--output",
        type=functools.partial(_writable, suffixes=PICTURES),
        default="tribp-demo.png",
        metavar="PATH",
        help="picture of loss, accuracy and what was learned, .png, .svg or .pdf (default: %(default)s)",
    )
    add(
        "--html",
        type=functools.partial(_writable, suffixes=PAGES),
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="page to write, with everything in one file: the worked examples, the computation graph of the network "
        "2-2-1 with every value and gradient, the curves, and what was learned",
    )
    return parser


def _named(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if text != "cpu" and device.type != "cuda":
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"torch sees {count} CUDA devices here, got {text!r}")
    return device


def _batch_size(text: str) -> int | None:
    return None if text == "full" else _whole(text, "a positive whole number or full")


def _whole(text: str, what: str = "a positive whole number") -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:  # what torch's generator takes
        raise argparse.ArgumentTypeError(f"must be a whole number of at most 18 digits, got {text!r}")
    return int(text)


def _real(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most {LARGEST:g}, got {text!r}")
    return value


def _writable(text: str, suffixes: Sequence[str]) -> Path:
    path = Path(text)
    if path.suffix not in suffixes:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(suffixes)}, got {text!r}")
    try:
        if path.exists():
            path.open("ab").close()
        else:  # permissions do not tell everything; a file that leaves no trace does
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from None
    return path


if __name__ == "__main__":
    sys.exit(main())
