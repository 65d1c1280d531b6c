"""Atomic writes, and what two runs into one folder are told."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from untrigger.errors import InputError
from untrigger.files import LOCK, check_free, check_idle, file_lock, folder_lock, has_content, new_file, new_folder


def test_files_and_folders_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "a/b") as file:
        file.write(b"x")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "c") as folder:
        (folder / "x").write_text("x")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.rglob("*")] == ["a"]
    with new_folder(tmp_path / "c") as folder:
        (folder / "x").write_text("x")
        assert not (tmp_path / "c").exists()
    assert (tmp_path / "c/x").read_text() == "x"
    for name in ("c", "c/x"):
        with pytest.raises(InputError, match="is not an empty folder; give a new one"):
            check_free(tmp_path / name)
    check_free(tmp_path / "a")
    check_free(tmp_path / "d/e")
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch, pytest.raises(InputError, match="name a new folder in it"):
        patch.setattr(Path, "is_mount", lambda path: path == tmp_path / "empty")
        check_free(tmp_path / "empty")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="name a new folder in it"):
        patch.chdir(tmp_path / "empty")
        check_free(Path())
    (tmp_path / "link").symlink_to("empty")
    with new_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "empty/x").is_file() and (tmp_path / "link").is_symlink()
    with pytest.raises(InputError, match="cannot be written"), new_file(tmp_path / "c/x/y"):
        pass


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    """The second is refused at once, or at the end where nothing can be locked; no hidden folder is named."""
    out = tmp_path / "out"
    (tmp_path / f".out.{os.getpid() + 1}").mkdir()  # of a run that was killed
    with new_folder(out) as folder:
        (folder / "x").write_text("first")
        with pytest.raises(InputError, match=f"^{out}: another run is writing it; give a new one$"):
            check_free(out)
        check_free(tmp_path / "out2")
    assert (out / "x").read_text() == "first"
    late = tmp_path / "late"
    with pytest.raises(InputError, match=f"^{late}: exists and is not an empty folder; give a new one$"):  # noqa: SIM117
        with new_folder(late) as folder:
            late.mkdir()
            (late / "y").write_text("faster")
    assert not folder.exists() and (late / "y").read_text() == "faster"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are used unlocked; where one must wait for another, it stops in a line, as at any other failure."""

    def cannot(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", cannot)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)), folder_lock(tmp_path):
            pytest.fail("unlocked")
    else:
        with new_folder(tmp_path / "unlocked") as folder, folder_lock(folder):
            (folder / "x").write_text("x")
        assert [path.name for path in (tmp_path / "unlocked").iterdir()] == ["x"]
    line = rf"^{tmp_path}/a.lock: cannot be locked \({os.strerror(number)}\); check it$"
    with pytest.raises(InputError, match=line), file_lock(tmp_path / "a.lock"):
        pytest.fail("unlocked")


def test_the_lock_of_a_folder_is_no_content_and_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with folder_lock(folder):
        assert not has_content(folder) and not has_content(folder, "x")
        with pytest.raises(InputError, match="another run is using it"):
            check_free(folder)
        (folder / "x").touch()
        assert has_content(folder) and not has_content(folder, "x")
    assert [path.name for path in folder.iterdir()] == ["x"]


def test_a_lock_file_that_nobody_holds_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    stale = tmp_path / "out" / LOCK
    stale.touch()
    check_idle(tmp_path / "out")
    assert not stale.exists()
    stale.touch()
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_one_waits_for_the_other(tmp_path: Path) -> None:
    """Eight threads add to a number that each reads and writes back later: with the lock none is lost."""
    number = tmp_path / "number"
    number.write_text("0")

    def add() -> None:
        for _ in range(5):
            with file_lock(tmp_path / "number.lock"):
                value = int(number.read_text())
                time.sleep(0.001)
                number.write_text(str(value + 1))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(add) for _ in range(8)]:
            done.result(timeout=60)
    assert number.read_text() == "40"


def test_errors_name_what_the_user_gave_not_the_hidden_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=rf"^{out}/none/x.png: cannot be written \(No such file or directory\)"):  # noqa: SIM117
        with new_folder(out) as folder:
            (folder / "none" / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match=rf"^{out}/inner/data: cannot be written"):  # noqa: SIM117
        with new_folder(out) as folder, new_folder(folder / "inner") as inner, new_file(inner / "data") as file:
            file.close()
            os.remove(file.name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_as_long_as_the_file_system_takes_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        with new_file(tmp_path / name) as file:
            file.write(b"x")
        (tmp_path / name).unlink()
        with new_folder(tmp_path / name) as folder:
            (folder / "x").write_text("x")
            with pytest.raises(InputError, match="another run is writing it"):
                check_free(tmp_path / name)
        assert (tmp_path / name / "x").is_file()
