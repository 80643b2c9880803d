"""The notes of a release: `python tools/release_notes.py TAG` prints the changelog's section of it.

It fails unless the tag is `v` and the version in pyproject.toml, and the changelog has a section of that version, with
its date and something in it, directly below [Unreleased].
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str, project: str, changelog: str) -> str:
    """The section of `tag` in the text of CHANGELOG.md; `project` is that of pyproject.toml. ValueError as above."""
    (version,) = re.findall(r'^version = "(.*)"$', project, re.MULTILINE)
    if tag != f"v{version}":
        raise ValueError(f"the tag must be v{version}, as pyproject.toml has it, got {tag}")
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    heading, _, body = sections[1].partition("\n") if len(sections) > 1 else ("", "", "")
    if not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", heading) or not body.strip():
        raise ValueError(f"below [Unreleased], CHANGELOG.md must have a section [{version}] - DATE, got {heading!r}")
    return body.strip() + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    texts = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CHANGELOG.md"))
    try:
        sys.stdout.write(notes(sys.argv[1], *texts))
    except ValueError as error:
        sys.exit(f"release_notes.py: {error}")
