"""The process that executes ends with the one that started it."""

import contextlib
import multiprocessing
import os
import select
import signal
import time
from typing import Any

import pytest

from .process import _end_with_parent


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_children_of_a_process_that_was_killed_end() -> None:
    read, write = os.pipe()
    fork: Any = multiprocessing.get_context("fork")
    parent = fork.Process(target=start_a_child, args=(fork, write))
    parent.start()
    os.close(write)
    child = int(os.read(read, 20))
    parent.kill()
    try:
        assert select.select([read], [], [], 10)[0], "the child still has its end of the pipe"
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def start_a_child(context: Any, write: int) -> None:
    child = context.Process(target=wait_long)
    child.start()
    os.write(write, str(child.pid).encode())
    time.sleep(60)


def wait_long() -> None:
    _end_with_parent()
    time.sleep(60)
