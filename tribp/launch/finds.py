"""Where `TRIBP_AUTOTUNE=1` keeps what it found: a JSON file for each GPU, set of versions and state of the sources.

A file that can't be read or written costs a warning, never a call: the rules answer then.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from ..kernels import common
from . import tuning

log = logging.getLogger("tribp.autotune")


def cache_folder() -> Path:
    """TRIBP_CACHE_DIR, or `tribp` where the system keeps a user's caches.

    Raises OSError where neither the environment nor an account names a home, as in containers run under any number.
    """
    if given := os.environ.get("TRIBP_CACHE_DIR"):
        return Path(given)
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "tribp" / "Cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "tribp"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tribp"
    except RuntimeError as error:
        raise OSError("there is no home to keep launch settings in: set TRIBP_CACHE_DIR") from error


@cache
def sources() -> str:
    """A digest of what decides how fast settings are and which are valid: kernels, rules, and how they are launched."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for folder in (Path(common.__file__).parent, here, here.parent / "ops"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def conditions(gpu: str) -> dict[str, str]:
    """What finds hold for: for this and nothing else."""
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "sources": sources()}


class Store:
    """The finds for one GPU, in `folder`: read by `load`, added to by `add`."""

    def __init__(self, folder: Path, gpu: str) -> None:
        self.conditions = conditions(gpu)
        digest = hashlib.sha256(json.dumps(self.conditions).encode()).hexdigest()[:16]
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        self.path = folder / f"{slug}-{digest}.json"

    def load(self) -> dict[str, Any]:
        """Settings by the key of the question that they answer."""
        try:
            return self._read()
        except (OSError, ValueError) as error:
            log.warning("tribp: %s is no file of launch settings, and is ignored: %s", self.path, error)
            return {}

    def add(self, finds: Mapping[str, Any]) -> None:
        """Write these besides what the file holds by now; of two for one key the first stays, for all processes."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                try:
                    before = self._read()
                except ValueError:
                    before = {}  # `load` has said so
                found = sorted((dict(finds) | before).items())
                encoded = {key: tuning.encode(settings) for key, settings in found}
                self._replace(json.dumps(self.conditions | {"finds": encoded}, indent=1))
        except OSError as error:
            log.warning("tribp: launch settings that were found cannot be kept for the next run: %s", error)

    def _read(self) -> dict[str, Any]:
        """Raises ValueError for a file that is none of this store's."""
        if not self.path.exists():
            return {}
        content = json.loads(self.path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("finds"), dict):
            raise ValueError("it holds no finds")
        if any(content.get(name) != value for name, value in self.conditions.items()):
            raise ValueError("it was written under other conditions")
        return {key: tuning.decode(key, fields) for key, fields in content["finds"].items()}

    def _replace(self, text: str) -> None:
        """A reader sees the old file or the new one, whole."""
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Other processes wait to add; the system ends the lock with the process. Without one the last wins."""
        try:
            import fcntl
        except ImportError:
            yield
            return
        with open(self.path.with_suffix(".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
