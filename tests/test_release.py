"""What a tag sets off: the workflows, the changelog and the notes of a release."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RELEASE = (ROOT / ".github" / "workflows" / "release.yml").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


# Workflows


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(workflow: Path) -> None:
    """By the hash of a commit, which nobody can move, beside the version that it is; one commit for each action."""
    uses = re.findall(r"uses: +(.+)", workflow.read_text())
    assert uses
    for line in uses:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    everywhere = {line for path in WORKFLOWS for line in re.findall(r"uses: +(.+)", path.read_text())}
    assert len({line.partition("@")[0] for line in everywhere}) == len(everywhere)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_read_alone(workflow: Path) -> None:
    """Unless a job asks for more."""
    assert re.search(r"^permissions:\n  contents: read$", workflow.read_text(), re.MULTILINE)


def job(name: str) -> str:
    (body,) = re.findall(rf"^  {name}:\n((?:    .*\n|\n)+)", RELEASE, re.MULTILINE)
    return str(body)


def test_only_what_was_tested_is_published() -> None:
    assert "needs: [build, test, install]" in job("publish")
    assert "attestations: true" in job("publish")
    for name in ("build", "test", "install", "announce"):
        assert ("id-token" in job(name)) == ("pypi-publish" in job(name)) == (name == "publish")
    assert "id-token: write" in job("publish")
    assert "password" not in RELEASE
    assert "secrets." not in RELEASE


def test_releases_are_installed_on_each_python() -> None:
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert len(pythons) > 3
    assert f"python: [{', '.join(f'{python!r}' for python in pythons)}]".replace("'", '"') in job("install")
    ci = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert sorted(re.findall(r'python: "(3\.\d+)", torch', ci)) == sorted(pythons)


# The changelog


def test_changelog_is_in_order() -> None:
    headings = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    versions = []
    for heading in headings[1:]:
        match = re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", heading)
        assert match, heading
        versions.append(tuple(map(int, match.groups())))
    assert versions == sorted(set(versions), reverse=True)
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for section in re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]:
        found = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert found == [kind for kind in kinds if kind in found], found


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_notes", ROOT / "tools" / "release_notes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOG = (
    "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-12-01\n\n### Added\n\n- A thing.\n\n"
    "## [1.1.0] - 2026-01-01\n\n### Added\n\n- Another.\n"
)


def test_release_notes(tool: ModuleType) -> None:
    assert tool.notes("v1.2.0", '[project]\nversion = "1.2.0"\n', LOG) == "### Added\n\n- A thing.\n"


@pytest.mark.parametrize(
    ("tag", "version", "changelog", "sentence"),
    [
        ("v1.2.1", "1.2.0", LOG, "the tag must be v1.2.0"),
        ("1.2.0", "1.2.0", LOG, "the tag must be v1.2.0"),
        ("v1.1.0", "1.1.0", LOG, r"must have a section \[1.1.0\]"),  # it is not the newest
        ("v1.3.0", "1.3.0", LOG, r"must have a section \[1.3.0\]"),
        ("v1.2.0", "1.2.0", LOG.replace(" - 2026-12-01", ""), r"must have a section \[1.2.0\]"),
        ("v1.2.0", "1.2.0", LOG.replace("### Added\n\n- A thing.\n", ""), r"must have a section \[1.2.0\]"),
        ("v1.2.0", "1.2.0", "## [Unreleased]\n", "must have a section"),
    ],
)
def test_release_notes_are_refused(tool: ModuleType, tag: str, version: str, changelog: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tool.notes(tag, f'version = "{version}"\n', changelog)


def test_this_version_has_notes_once_it_is_dated(tool: ModuleType) -> None:
    """The very files: a release is a date in the changelog and a tag."""
    (version,) = re.findall(r'^version = "(.*)"$', PROJECT, re.MULTILINE)
    released = [heading for heading in re.findall(r"^## \[(.*?)\]", CHANGELOG, re.MULTILINE) if heading == version]
    dated = CHANGELOG if released else CHANGELOG.replace("[Unreleased]", f"[Unreleased]\n\n## [{version}] - 2026-12-01")
    assert tool.notes(f"v{version}", PROJECT, dated).startswith("### ")
