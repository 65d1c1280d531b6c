"""Atomic writes, and what two runs into one folder are told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from untrigger.errors import InputError
from untrigger.files import check_free, new_file, new_folder


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


def test_two_runs_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused at once, or at the end where folders cannot be locked; no hidden folder is named."""
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

    def cannot(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", cannot)
    with new_folder(tmp_path / "unlocked") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "unlocked/x").is_file()


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
