"""Files that appear whole or not at all, and where kept results lie."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from untrigger.errors import InputError


def cache_folder() -> Path:
    """Where what was fetched or computed once is kept for all runs of a user; it need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "untrigger"


@contextmanager
def file_errors(path: Path, what: str) -> Generator[None]:
    """The system's refusals as the user's errors: what could not be read, or written."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise InputError(f"{where}: cannot be {what} ({error.strerror or error}); check it") from None


@contextmanager
def new_file(path: Path) -> Generator[IO[bytes]]:
    """A file that appears under ``path`` whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with file_errors(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, UTF-8, whole or not at all; one that is there is replaced."""
    with new_file(path) as file:
        file.write(text.encode())


def check_free(path: Path) -> None:
    """Raises InputError unless `new_folder` can appear under ``path``: to be known before long work."""
    if _holds_else(path):
        raise InputError(f"{path}: exists and is not an empty folder; give a new one")
    if path.is_mount() or path.resolve() == Path.cwd():  # it cannot be replaced, or not under the feet of a shell
        raise InputError(f"{path}: is a mount point, or where you stand; name a new folder in it")


def check_holds_only(path: Path, *names: str) -> None:
    """Raises InputError if ``path`` is no folder, or holds something beside files of these names, to be replaced."""
    if _holds_else(path, *names):
        raise InputError(f"{path}: holds something else than {' and '.join(names)}; give a new folder")


def _holds_else(path: Path, *names: str) -> bool:
    return path.exists() and (not path.is_dir() or any(each.name not in names for each in path.iterdir()))


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """A folder that appears under ``path`` whole, or not at all. ``path`` may exist if it is empty."""
    target = path.resolve()  # behind a link its target is filled
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with file_errors(path, "written"):
        check_free(path)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Generator[None]:
    """One process at a time; the system lets go of a lock whose holder was killed."""
    import fcntl  # not on Windows, where nothing but the bench is missed

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def alone(folder: Path) -> Generator[None]:
    """A folder for this run and no other of this machine.

    The folder itself is locked: nothing is left in it, and the system lets go of the lock of a run that was killed.

    Raises:
        InputError: another run is at work in it.
    """
    if sys.platform == "win32":  # which locks no folder
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another run is at work in it; let it end, or name another folder") from None
        yield
    finally:
        os.close(handle)


def check_idle(folder: Path) -> None:
    """Raises InputError if another run is at work in the folder: to be known before long work."""
    if folder.is_dir():
        with alone(folder):
            pass
