"""Test that files are written whole, and that writing them touches no other file."""

import io
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from alexnet_repro import files
from alexnet_repro.errors import UserError, printable
from alexnet_repro.files import one_process_at_a_time, parse_json, read_json, written_whole


def test_file_has_the_permissions_and_the_content_of_a_plain_one(tmp_path: Path) -> None:
    with written_whole(tmp_path / "a.json") as file:
        file.write(b"content")
        assert not (tmp_path / "a.json").exists()
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "plain")]
    assert modes[0] == modes[1]
    assert (tmp_path / "a.json").read_bytes() == b"content"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "plain"]


def test_files_and_links_of_others_beside_the_file_are_left_alone(tmp_path: Path) -> None:
    victim, own = tmp_path / "victim", tmp_path / "b.json.tmp"
    victim.write_text("precious")
    own.write_text("mine")
    (tmp_path / "a.json.tmp").symlink_to(victim)
    for name in ("a.json", "b.json"):
        with written_whole(tmp_path / name) as file:
            file.write(b"content")
    assert (victim.read_text(), own.read_text()) == ("precious", "mine")


def test_existing_temporary_file_or_link_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a name that was guessed is not opened."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0" * 16)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f"a.json.tmp.{'0' * 16}.alexnet_repro").symlink_to(victim)
    with pytest.raises(FileExistsError), written_whole(tmp_path / "a.json") as file:
        file.write(b"content")
    assert victim.read_text() == "precious"


def _write_and_wait(path: Path) -> None:
    with written_whole(path) as file:
        file.write(b"half")
        file.flush()
        time.sleep(60)


def test_temporary_files_of_killed_processes_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_and_wait, args=(path,)) for _ in range(2)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + 20
        while sum(p.stat().st_size == 4 for p in tmp_path.iterdir()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed = processes[0].pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        processes[0].join()
        (tmp_path / f"linked.tmp.{'1' * 16}.alexnet_repro").symlink_to(tmp_path / "elsewhere")
        files._searched.clear()
        with written_whole(path) as file:
            file.write(b"whole")
        names = sorted(p.name for p in tmp_path.iterdir())
        assert len([name for name in names if name.startswith("last.ckpt.tmp.")]) == 1  # of the living process
        assert f"linked.tmp.{'1' * 16}.alexnet_repro" in names
    finally:
        processes[1].kill()
        processes[1].join()


def test_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="not a lock"), one_process_at_a_time(tmp_path / "store", "", ""):
        pass
    assert not (tmp_path / "victim").exists()


def test_json_that_is_nested_deeply_or_is_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")
    monkeypatch.setattr(files, "LARGEST_JSON", 10)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        parse_json(io.BytesIO(b'{"a": "long text"}').read())


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[2Jcat\x07", r"\x1b[2Jcat\x07"),
        ("a\nb\r", r"a\nb\r"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\x9b31m", r"\x9b31m"),
        ("caf\u00e9 \U0001f469\u200d\U0001f52c", "caf\u00e9 \U0001f469\u200d\U0001f52c"),
        (os.fsdecode(b"\xff\xfe.jpg"), r"\xff\xfe.jpg"),
    ],
)
def test_names_reach_a_terminal_without_control_characters(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert str(UserError(f"{name} is damaged".replace("\n", "\x1b"), name.replace("\n", ""))).count("\x1b") == 0
