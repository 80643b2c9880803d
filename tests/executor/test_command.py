"""`python -m tests.executor` and `pytest --execute`, in processes that compile kernels; and their errors."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..processes import forked
from . import __main__ as command
from .machine import Options
from .run import Report

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="nothing compiles without triton")


@needs_triton
def test_small_kernels_are_executed() -> None:
    done = forked("-m", "pytest", "--execute", "sm_90", "-n", "0", "-q", "tests/executor/test_compiled.py")
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 30


KERNEL = """
import sys
import torch
import triton
import triton.language as tl

@triton.jit
def copied(x, y, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < N), mask=i < N)

x, y = torch.arange(8.0), torch.zeros(8)

def copy(n):
    copied[(1,)](x, y, n, 16)
    assert torch.equal(x, y)
"""


@needs_triton
@pytest.mark.parametrize(("n", "ending", "status"), [(8, "sys.exit(3)", 3), (9, "", 1)])
def test_a_script(tmp_path: Path, n: int, ending: str, status: int) -> None:
    (tmp_path / "script.py").write_text(
        f"{KERNEL}\ncopy(int(sys.argv[1]))\nprint('argument', sys.argv[1:])\n{ending}\n"
    )
    options = ["--target", "sm_90", "--copies", "early", "--schedule", "random", "--order", "random"]
    done = forked("-m", "tests.executor", *options, str(tmp_path / "script.py"), str(n), "--target")
    assert done.returncode == status, done.stderr
    assert f"argument ['{n}', '--target']" in done.stdout
    assert "\ncopied " in done.stdout
    assert done.stdout.count("PROBLEM out of bounds in copied") == 2 * (n > 8)


@needs_triton
def test_a_test_fails_for_what_its_kernels_do(tmp_path: Path) -> None:
    tests = "def test_right():\n    copy(8)\n\ndef test_wrong():\n    copy(9)\n"
    (tmp_path / "test_copies.py").write_text(KERNEL + "\n" + tests)
    plugin = ["-p", "tests.executor.plugin", "--execute", "sm_80", "-p", "no:cacheprovider"]
    done = forked("-m", "pytest", *plugin, str(tmp_path / "test_copies.py"))
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "AssertionError: out of bounds in copied" in done.stdout
    assert "executed 2 launches" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "sm_70", __file__], "invalid choice: 'sm_70'"),
        (["--target", "sm_90", "nowhere.py"], "no such script: nowhere.py"),
        ([__file__], "--target"),
    ],
)
def test_what_is_given_is_checked(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--target", "sm_90", __file__]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "pip install triton" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise SystemExit('no data')", 1, "no data\n"),
        ("raise SystemExit", 0, ""),
    ],
)
def test_how_a_script_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: str,
    status: int,
    said: str,
) -> None:
    @contextlib.contextmanager
    def nothing_is_executed(target: str, **settings: Any) -> Iterator[Report]:
        yield Report(target, Options(**settings))

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(command, "executed", nothing_is_executed)
    (tmp_path / "script.py").write_text(code)
    assert command.main(["--target", "sm_90", str(tmp_path / "script.py")]) == status
    assert capsys.readouterr().err == said
