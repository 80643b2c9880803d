"""Other processes of Python, without the interpreter that the tests run kernels with.

`python` starts one as a shell does. `forked` copies one that has imported torch, which takes seconds each time.
"""

import atexit
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Done = subprocess.CompletedProcess[str]


def python(*words: str, env: dict[str, str] | None = None, **options: Any) -> Done:
    """What Python does with these words of a command line. env: beside a shell's; options: of `subprocess.run`."""
    settings: Any = dict(cwd=ROOT, env=environment(**env or {}), capture_output=True, text=True, timeout=600) | options
    return subprocess.run([sys.executable, *map(textwrap.dedent, words)], **settings)


def forked(*words: str, **env: str) -> Done:
    """What `python -c code …` or `python -m module …` does and prints behind `import torch`.

    Not for what Python asks the environment when it starts (PYTHONHASHSEED, say), nor for signals that end a process.
    """
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in printed:
            path.touch()  # a child that dies early says nothing
        process = with_torch().Process(target=_run, args=(words, environment(**env), printed))
        process.start()
        try:
            process.join(timeout=600)
            status = process.exitcode
        finally:
            process.kill()
        out, err = (path.read_text("utf-8") for path in printed)
        if status is None:
            raise subprocess.TimeoutExpired(words, 600, out, err)
        return subprocess.CompletedProcess(words, status, out, err)


def called(function: Callable[..., Any], *args: object) -> Any:
    """What a function of a test's module returns in another process."""
    name = function.__name__
    done = forked("-c", f"import json; from {function.__module__} import {name}; print(json.dumps({name}(*{args})))")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def with_torch() -> Any:
    """The `multiprocessing` context whose processes begin with torch imported, where the system has it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def environment(**variables: str) -> dict[str, str]:
    """A shell's: not what the tests have set for themselves."""
    own = ("TRITON_INTERPRET", "TRIBP_BACKEND")
    return {name: value for name, value in os.environ.items() if name not in own} | variables


def _run(words: tuple[str, ...], variables: dict[str, str], printed: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    # By lines, so that a crash keeps them.
    sys.stdout, sys.stderr = (open(n, "w", 1, "utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
    sys.path.insert(0, "")
    how, what, *_ = words
    sys.argv = [how, *words[2:]]
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(textwrap.dedent(what), "<string>", "exec"), vars(main))
    finally:
        atexit._run_exitfuncs()  # which multiprocessing does not call
