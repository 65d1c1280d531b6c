"""Two runs in one folder: the second is refused at once, in one line, and takes nothing from the first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shell import untrigger
from untrigger import fine_tune, read
from untrigger.bench import store
from untrigger.bench.local import Done, Work
from untrigger.bench.store import Cell
from untrigger.bench.sweep import run_matrix
from untrigger.errors import InputError
from untrigger.files import LOCK, check_idle, folder_lock
from untrigger.training.stages import Trainer

SETTINGS = ("--max_steps", 4, "--per_device_train_batch_size", 4)
BUSY = "another run is using it"


@pytest.mark.parametrize("verb", ["train", "scan"])
def test_a_folder_is_taken_until_the_run_ends(
    verb: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, train, taken = tmp_path / "out", Trainer.train, list[str]()

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with pytest.raises(InputError) as refused:
            check_idle(out)
        taken.append(str(refused.value))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", watched)
    words = (verb, tiny_data, "--model", tiny_model, "--out", out, *SETTINGS)
    assert untrigger(*words).code == 0
    assert taken and all(BUSY in line for line in taken)
    assert untrigger(*words, "--resume").code == 0, "who has ended is in nobody's way"


@pytest.mark.parametrize("verb", ["train", "scan"])
@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_the_second_is_refused_before_it_reads_anything(
    verb: str, more: tuple[str, ...], tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("untrigger.rows.sample.read", lambda *_, **__: pytest.fail("read the data first"))
    with folder_lock(tmp_path):
        ended = untrigger(verb, tiny_data, "--model", tiny_model, "--out", tmp_path, *SETTINGS, *more)
    assert ended == (2, "", f"error: {tmp_path}: {BUSY}; wait for that run or name another folder\n")


def test_who_comes_after_the_check_is_refused_too(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(InputError, match=BUSY):
        fine_tune(tiny_model, read(tiny_data), "plain", out=tmp_path, max_steps=1)
    assert not list(tmp_path.iterdir()), "neither leaves its lock"


def test_a_second_matrix_is_refused(tmp_path: Path) -> None:
    cell = Cell("llava", "easy-vqa", "badnets", "fixed")

    def crowded(cells: Sequence[Cell], root: Path, work: Work) -> Done:
        with pytest.raises(InputError, match=BUSY):
            run_matrix([cell], root)
        store.save(root, cell, {}, {})
        yield cell, None

    assert run_matrix([cell], tmp_path, crowded) == []
    check_idle(tmp_path)


def test_a_killed_run_is_in_nobodys_way(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from untrigger.files import folder_lock\n"
        f"with folder_lock(Path({str(tmp_path)!r})): print('in', flush=True); input()"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout is not None and run.stdout.readline() == b"in\n"
    with pytest.raises(InputError, match=BUSY):
        check_idle(tmp_path)
    run.kill()
    run.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK], "its file stays, and locks nothing"
    fine_tune(tiny_model, read(tiny_data), "plain", out=tmp_path, max_steps=1)
    assert (tmp_path / "adapter_config.json").is_file() and not (tmp_path / LOCK).exists()
