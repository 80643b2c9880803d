"""Where finds are kept: what a file holds for, what becomes of a broken one, and that writers lose nothing."""

import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tribp.launch import finds
from tribp.launch.arch import INTERPRETER
from tribp.launch.finds import Store, cache_folder
from tribp.launch.linear_sigmoid import choose_forward
from tribp.launch.matmul import choose_sum

GPU = "Some GPU 80GB"


def test_sources_are_those_of_kernels_rules_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_bytes = Path.read_bytes

    def recorded(path: Path) -> bytes:
        read.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", recorded)
    finds.sources.cache_clear()
    finds.sources()
    assert {
        "linear_sigmoid.py",
        "matmul.py",
        "conv3x3_few_channels.py",
        "common.py",
        "layout.py",
        "plan.py",
    } <= set(read)


def broken(text: str, content: dict[str, Any]) -> str:
    """Either the text itself, or the content changed as it says."""
    (key,) = content["finds"]
    fields = content["finds"][key]
    if text == "another GPU":
        content["gpu"] = text
    elif text == "no field":
        del fields["block_i"]
    elif text == "no rule":
        content["finds"]["choose_nothing(m=1)"] = fields
    elif text == "no number":
        fields["block_i"] = "wide"
    else:
        return text
    return json.dumps(content)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"finds": 1}', "another GPU", "no field", "no rule", "no number", "\x00"]
)
def test_a_broken_file_is_told_of_and_replaced(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    question, settings = (
        "choose_forward(m=1)",
        choose_forward(40, 16, 64, "float32", "ieee", INTERPRETER, vec=4, tma=True),
    )
    store = Store(tmp_path, GPU)
    store.add({question: settings})
    assert Store(tmp_path, GPU).load() == {question: settings}
    store.path.write_text(broken(text, json.loads(store.path.read_text())))
    assert Store(tmp_path, GPU).load() == {}
    (told,) = [record.message for record in caplog.records]
    assert str(store.path) in told
    assert "ignored" in told
    store.add({question: settings})
    assert Store(tmp_path, GPU).load() == {question: settings}
    assert len(caplog.records) == 1


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    """Each has the file open by itself, as processes do."""
    settings = choose_sum(5, 5, INTERPRETER)
    failed: list[BaseException] = []

    def write(writer: int) -> None:
        try:
            for n in range(10):
                Store(tmp_path, GPU).add({f"choose_sum(writer={writer}, n={n})": settings})
                Store(tmp_path, GPU).load()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(Store(tmp_path, GPU).load()) == 60
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".lock"}, "nothing is left behind"


def test_a_writer_that_is_cut_off_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new one takes the old one's place whole, at once or not at all."""

    def cut_off(source: str, target: Path) -> None:
        raise OSError("cut off")

    settings = choose_sum(5, 5, INTERPRETER)
    store = Store(tmp_path, GPU)
    store.add({"choose_sum(parts=5)": settings})
    monkeypatch.setattr(os, "replace", cut_off)
    store.add({"choose_sum(parts=6)": settings})
    assert "cut off" in caplog.text
    assert Store(tmp_path, GPU).load() == {"choose_sum(parts=5)": settings}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".lock"}


def test_of_two_finds_the_first_written_stays(tmp_path: Path) -> None:
    first = choose_sum(5, 5, INTERPRETER)
    Store(tmp_path, GPU).add({"choose_sum(parts=5)": first})
    Store(tmp_path, GPU).add({"choose_sum(parts=5)": replace(first, block=32)})
    assert Store(tmp_path, GPU).load() == {"choose_sum(parts=5)": first}


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRIBP_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    found = {}
    for platform in ("linux", "darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        found[platform] = cache_folder().as_posix()
    assert found == {
        "linux": "/home/me/.cache/tribp",
        "darwin": "/home/me/Library/Caches/tribp",
        "win32": "/home/me/AppData/Local/tribp/Cache",
    }
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/tribp")
    monkeypatch.setenv("TRIBP_CACHE_DIR", "/here")
    assert cache_folder() == Path("/here")


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_without_a_home_the_folder_must_be_given(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number that is no account's."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TRIBP_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(OSError, match="set TRIBP_CACHE_DIR"):
        cache_folder()
    monkeypatch.setenv("TRIBP_CACHE_DIR", "/here")
    assert cache_folder() == Path("/here")
