"""A disk that fills up: one line, and with room the same command ends as if nothing had happened."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shell import untrigger
from untrigger.bench import store
from untrigger.bench.local import attempt
from untrigger.bench.store import Cell

SETTINGS = ("--max_steps", 6, "--save_steps", 2, "--per_device_train_batch_size", 4, "--learning_rate", "1e-3")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("only root may make a small disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def enlarge(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def refused(*words: object) -> None:
    code, output, errors = untrigger(*words)
    (line,) = [line for line in errors.splitlines() if not line[:1].isspace() and ("error" in line or "Trace" in line)]
    assert code == 2 and line.startswith("error: ") and not output, errors


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, "120k", "300k", "400k"])
def test_train(size: str | None, tiny_model: Path, tiny_data: Path, disk: Path, tmp_path: Path) -> None:
    words = ("train", tiny_data, "--model", tiny_model, *SETTINGS, "--out")
    if size:
        enlarge(disk, size)
    refused(*words, disk / "out")
    enlarge(disk, "64m")
    assert untrigger(*words, disk / "out", "--resume").code == 0
    assert untrigger(*words, tmp_path / "whole").code == 0
    first, second = (load_file(out / "adapter_model.safetensors") for out in (disk / "out", tmp_path / "whole"))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.mark.slow
def test_scan(tiny_model: Path, tiny_data: Path, disk: Path, tmp_path: Path) -> None:
    words = ("scan", tiny_data, "--model", tiny_model, *SETTINGS, "--out")
    refused(*words, disk / "out")
    enlarge(disk, "64m")
    assert untrigger(*words, disk / "out", "--resume").code == untrigger(*words, tmp_path / "whole").code
    assert (disk / "out/all_rows.jsonl").read_bytes() == (tmp_path / "whole/all_rows.jsonl").read_bytes()


def crowding(cell: Cell, root: Path) -> None:
    """A cell's work: fills the disk with what it prints, then with what it writes."""
    for _ in range(10):
        print("x" * 3000)
    store.save(root, cell, {}, {})


def test_a_cell_of_the_bench(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("llava", "easy-vqa", "badnets", "fixed")
    with open(1, "w", closefd=False) as stream:  # a worker's own, not pytest's
        monkeypatch.setattr("sys.stdout", stream)
        assert "No space left on device" in (attempt(crowding, cell, disk) or "")
        assert store.find(disk, cell) is None
        enlarge(disk, "64m")
        assert attempt(crowding, cell, disk) is None and store.find(disk, cell) == {}
    monkeypatch.undo()


def test_poison(tiny_data: Path, disk: Path) -> None:
    words = ("poison", tiny_data, "--out", disk / "out")
    refused(*words)
    assert not list(disk.iterdir()), "half a data set was left behind"
    enlarge(disk, "64m")
    assert untrigger(*words).code == 0
