"""Which versions of torch and triton are taken, and what is said of those that no test was run with."""

import contextlib
import re

import pytest
from packaging.requirements import Requirement

from tribp import versions

from .processes import ROOT, forked

PYPROJECT = (ROOT / "pyproject.toml").read_text()  # Python 3.10 has no tomllib
CI = (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_parse() -> None:
    assert versions.parse("2.11.0+cpu") == (2, 11)
    assert versions.parse("2.16.0a0+git1234567") == (2, 16)
    with pytest.raises(ValueError, match="unknown"):
        versions.parse("unknown")


@pytest.mark.parametrize(
    ("name", "tested"),
    [
        ("torch", ["2.9.0", "2.10.0", "2.11.0", "2.12.1", "2.13.0+cpu", "2.14.0", "2.15.0", "2.16.0", "3.0.0"]),
        ("triton", ["3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0", "3.10.0", "4.0.0"]),
    ],
)
def test_no_version_from_the_oldest_on_is_refused(name: str, tested: list[str]) -> None:
    block = re.search(r"^dependencies = \[(.*?)^\]", PYPROJECT, re.DOTALL | re.MULTILINE)
    assert block is not None
    found = {r.name: r for r in map(Requirement, re.findall(r'"([^"]+)"', block[1]))}
    assert [version for version in tested if not found[name].specifier.contains(version)] == []


def test_ci_runs_the_newest_that_is_called_tested() -> None:
    jobs = re.findall(r'python: "3.(\d+)", torch: "(\S+)\.\*", triton: "(\S+)\.\*"', CI)
    tested = {(versions.parse(torch), versions.parse(triton)) for _, torch, triton in jobs}
    assert max(tested) == (versions.NEWEST_TORCH, versions.NEWEST_TRITON)
    pythons = sorted(int(minor) for minor, _, _ in jobs)
    assert pythons == sorted(map(int, re.findall(r"Python :: 3\.(\d+)", PYPROJECT)))


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [((3, 5), "2.2.6", True), ((3, 6), "2.3.9", True), ((3, 6), "2.4.0", False), ((3, 7), "2.5.1", True)],
)
def test_an_interpreter_that_cannot_work_says_why(
    triton: tuple[int, int], numpy: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "triton_version", lambda: triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    refused = pytest.raises(RuntimeError, match=re.escape(f"and {numpy} is installed: pip install 'numpy<2.4'"))
    with contextlib.nullcontext() if works else refused:
        versions.check_interpreter()


KERNELS = """
import torch, triton
torch.__version__, triton.__version__ = {!r}, {!r}
import tribp, tribp.ops.linear.plan, tribp.ops.conv3x3.plan, tribp.optim.triton_bucket
"""


@pytest.mark.parametrize(
    ("torch", "triton", "said"),
    [
        ("2.15.9", "3.9.9", []),
        ("2.16.0+cu140", "3.10.0", ["torch 2.16 (newest tested: 2.15) and triton 3.10 (newest tested: 3.9)"]),
    ],
)
def test_untested_versions_are_named_once(torch: str, triton: str, said: list[str]) -> None:
    pytest.importorskip("triton")
    code = KERNELS.format(torch, triton)
    run = forked("-c", code)
    assert run.returncode == 0, run.stderr
    found = [line for line in run.stderr.splitlines() if "arn" in line or "untested" in line]
    assert [line.partition("UserWarning: ")[2] for line in found] == [
        f"tribp's kernels are untested with {what}" for what in said
    ]


def test_fused_multiply_adds_do_not_hang_on_the_version() -> None:
    """Triton 3.9 says that 3.10 will not form them unless it is asked to."""
    pytest.importorskip("triton")
    from tribp.launch.launches import Launch

    launch = Launch(None, (1,), (), {}, 4)
    assert launch.options["enable_fp_fusion"] is True
