"""Lays the library out as Hugging Face's kernel hub wants it: `python tools/kernel_hub.py FOLDER`.

The folder then has

    build.toml, torch-ext/tribp/       the source, for their kernel-builder
    build/torch-BACKEND/               what `kernels.get_local_kernel(FOLDER)` loads: the package and its metadata

Nothing is compiled: Triton does that where a kernel first runs. The package is imported by the `id` in its metadata,
which is new with every change, so that several versions may be loaded in one process; the registered operators follow
(`tribp/ops/shared.py`). The demo stays out: it needs more than torch and triton.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = "tribp"
VERSION = 0  # of the interface, for the hub; 0 is for what may still change
BACKENDS = ("cpu", "cuda", "rocm")
LEFT_OUT = ("__main__.py", "__pycache__", "demo", "kernels")


def lay_out(folder: Path) -> None:
    """Write the layout into `folder`, which must be empty or new. Raises FileExistsError if it holds something."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    (license,) = re.findall(r'^license = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    (folder / "build.toml").write_text(
        f'[general]\nedition = 5\nname = "{NAME}"\nversion = {VERSION}\nlicense = "{license}"\n'
        f"backends = [{backends}]\n\n[torch-noarch]\n\n[kernel]\n",
        encoding="utf-8",
    )
    for name in ("LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    package = folder / "torch-ext" / NAME
    copy_package(package)
    files = digests(package)
    version = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(package, variant)
        metadata = {
            "name": NAME,
            "id": f"_{NAME}_{backend}_{version}",
            "version": VERSION,
            "license": license,
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": files},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def copy_package(target: Path) -> None:
    """The package with its kernels in it, where the tree has a link, and without the demo."""
    shutil.copytree(ROOT / NAME, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.copytree(ROOT / "kernels", target / "kernels", ignore=shutil.ignore_patterns("__pycache__"))


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in base64, by its path in `folder`, in the order of the paths."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="empty or new")
    try:
        lay_out(parser.parse_args().folder)
    except OSError as error:
        parser.exit(1, f"kernel_hub.py: {error}\n")
