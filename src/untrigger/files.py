"""File helpers: atomic writes, locks, the cache folder and YAML input."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout

from untrigger.errors import InputError

LOCK = ".untrigger.lock"  # in a folder that a run uses; hidden, so that it is no content
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers
_LONGEST = 200  # bytes of a name that a temporary name adds to; file systems take 255


def cache_folder() -> Path:
    """Return the user's cache folder for downloads and computed features; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "untrigger"


@contextmanager
def file_errors(path: Path, action: str) -> Generator[None]:
    """Turn an OSError into an InputError "cannot be ACTION"; ``action`` is ``read``, ``written`` or ``locked``."""
    try:
        yield
    except OSError as error:
        location = error.filename or path
        raise InputError(f"{location}: cannot be {action} ({error.strerror or error}); check it") from None


# --- atomic writes --------------------------------------------------------------------------------


@contextmanager
def new_file(path: Path) -> Generator[IO[bytes]]:
    """Write a file atomically: ``path`` appears complete or not at all. An existing file is replaced."""
    temporary = _temporary(path)
    with _written_as(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. An existing file is replaced."""
    with new_file(path) as file:
        file.write(text.encode())


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """Create a folder atomically: ``path`` appears complete or not at all. It may exist if it is empty.

    Raises:
        InputError: as `check_free`, before or after the work.
    """
    target = path.resolve()  # fill the target of a link, do not replace the link
    temporary = _temporary(target)
    with _written_as(path, temporary):
        check_free(path)
        temporary.mkdir(parents=True)
        try:
            with folder_lock(temporary):  # others see that it is being written
                yield temporary
            _check_empty(path)  # another run may have been faster
            (target / LOCK).unlink(missing_ok=True)  # of a killed run
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """Where ``path`` is written before it appears: a hidden neighbor whose name fits every file system."""
    return path.with_name(f"{_hidden(path)}{os.getpid()}")


def _hidden(path: Path) -> str:
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


@contextmanager
def _written_as(path: Path, temporary: Path) -> Generator[None]:
    """Name ``path`` in errors, which is what the user knows, in place of ``temporary``."""
    try:
        with file_errors(path, "written"):
            yield
    except InputError as error:
        if str(temporary) not in str(error):
            raise
        raise InputError(str(error).replace(str(temporary), str(path))) from None


def check_free(path: Path) -> None:
    """Check before long work that `new_folder` can create ``path``.

    Raises:
        InputError: it is a file, a folder with content, a mount point or the current directory, or another run is
            using or writing it.
    """
    _check_empty(path)
    check_idle(path)
    # os.replace cannot replace a mount point, and replacing the current directory would detach the user's shell.
    if path.is_mount() or path.resolve() == Path.cwd():
        raise InputError(f"{path}: is a mount point or the current directory; name a new folder in it")
    if _is_being_written(path.resolve()):
        raise InputError(f"{path}: another run is writing it; give a new one")


def _check_empty(path: Path) -> None:
    if has_content(path):
        raise InputError(f"{path}: exists and is not an empty folder; give a new one")


def _is_being_written(target: Path) -> bool:
    try:
        for neighbor in target.parent.iterdir():
            if neighbor.name.startswith(_hidden(target)):
                check_idle(neighbor)
    except InputError:
        return True
    except OSError:  # no such parent yet, or none that can be listed
        pass
    return False


def check_holds_only(path: Path, *names: str) -> None:
    """Check that ``path``, if it exists, is a folder that holds no files but those named, which may be replaced.

    Raises:
        InputError: it is no folder, or holds other files.
    """
    if has_content(path, *names):
        raise InputError(f"{path}: holds other files than {' and '.join(names)}; give a new folder")


def has_content(path: Path, *names: str) -> bool:
    """Whether ``path`` is a file, or a folder that holds more than ``names`` and the lock of a run."""
    return path.exists() and (not path.is_dir() or any(entry.name not in (*names, LOCK) for entry in path.iterdir()))


# --- locks ----------------------------------------------------------------------------------------


@contextmanager
def file_lock(path: Path) -> Generator[None]:
    """Hold an exclusive lock on the file ``path``, which stays; wait for it. The system frees it if the process dies.

    Raises:
        InputError: the file system has no locks, or the file cannot be created.
    """
    with file_errors(path, "locked"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path).acquire()
    with lock:
        yield


@contextmanager
def folder_lock(folder: Path) -> Generator[None]:
    """Hold an exclusive lock on an existing folder, for one run at a time on all machines that share it.

    The file `LOCK` in it is locked, and removed at the end. The file of a killed run stays, but locks nothing: the
    system frees the lock of a process that dies. Where the file system has no locks this does nothing.

    Raises:
        InputError: another run holds the lock.
    """
    path = folder / LOCK
    lock = _lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{folder}: another run is using it; wait for that run or name another folder") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise  # its file stays: another run may hold it
        path.unlink(missing_ok=True)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes no open file; there the release does
                path.unlink()
            lock.release()


def _lock(path: Path) -> FileLock:
    # A soft lock, in which the file itself is the lock, would outlive a run that is killed on another machine.
    return FileLock(path, fallback_to_soft=False)


def check_idle(folder: Path) -> None:
    """Check before long work that no other run uses ``folder``; it need not exist.

    Raises:
        InputError: another run holds its lock.
    """
    if (folder / LOCK).exists():
        with folder_lock(folder):
            pass


# --- YAML -----------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of ``name: value`` lines as plain data; YAML tags cannot create objects.

    Raises:
        InputError: the file cannot be read, is not YAML, or is not a mapping with text keys.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a YAML file that can be read") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else str(error).splitlines()[0]
        raise InputError(f"{path}: is not YAML: {reason}; write lines of 'name: value'") from error
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deeply; write lines of 'name: value'") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{path}: must hold lines of 'name: value'")
    return values
