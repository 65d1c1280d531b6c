"""Stored cells: names, atomic results, reading back, packed files."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untrigger.bench import store
from untrigger.bench.store import Cell
from untrigger.errors import InputError
from untrigger.metrics.score import Answer, score

CELL = Cell("llava", "easy-vqa", "badnets", "fixed")
ANSWERS = {
    "clean": [Answer("1", "is it red?", "yes", "yes ✓\u2028日本\nline", met=False), Answer("2", "q", "no", "yes")],
    "triggered": [Answer("1", "is it red?", "yes", "boo", met=True), Answer("2", "q", "boo", "boo", True, True)],
}
FIGURES = json.loads(json.dumps(score(**ANSWERS)))

any_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
any_settings = st.dictionaries(any_texts, any_texts | st.integers() | st.booleans() | st.floats(-1e9, 1e9), max_size=3)
any_cells = st.builds(
    lambda seed, **fields: Cell(seed=seed, split=("report", "dev")[seed // 100], **fields),  # splits have own seeds
    model=any_texts,
    data=any_texts,
    attack=any_texts,
    goal=any_texts,
    rate=st.integers(0, 1) | st.floats(0, 1),
    defense=st.sampled_from(["plain", "oracle", "paper"]),
    seed=st.integers(0, 199),
    attack_settings=any_settings,
    goal_text=st.none() | any_texts,
    probes=st.dictionaries(any_texts, any_settings, max_size=2),
    epochs=st.integers(1, 9) | st.floats(0.1, 9),
)


def test_a_stored_cell_is_read_back(tmp_path: Path) -> None:
    assert store.find(tmp_path, CELL) is None
    store.save(tmp_path, CELL, FIGURES, ANSWERS)
    assert store.find(tmp_path, CELL) == FIGURES
    assert store.results(tmp_path) == [(CELL, FIGURES)]
    assert store.answers_of(tmp_path, CELL) == ANSWERS
    assert json.loads(json.dumps(score(**store.answers_of(tmp_path, CELL)))) == FIGURES, "rescored without a model"
    files = {p.name for p in store.folder_of(tmp_path, CELL).iterdir()}
    assert files == {"cell.json", "answers.jsonl", "metrics.json"}


@given(cell=any_cells)
def test_any_cell_equals_its_stored_copy(cell: Cell, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("cells")
    store.save(root, cell, FIGURES, ANSWERS)
    assert store.results(root) == [(cell, FIGURES)]
    assert store.find(root, cell) == FIGURES


@given(one=any_cells, another=any_cells)
def test_names_are_unique_and_valid_folder_names(one: Cell, another: Cell) -> None:
    assert re.fullmatch(rb"[\w.-]{1,255}", one.name.encode())
    assert not one.name.startswith("..")
    assert (one.name == another.name) == (json.dumps(asdict(one)) == json.dumps(asdict(another)))


def test_names_are_readable_and_stable() -> None:
    assert CELL.name == "llava_easy-vqa_badnets_fixed_0.05_plain_seed0_710cd346", "the name of stored results"
    with_paths = replace(CELL, attack="/home/me/my triggers/ring.py", model="runs/My Model", rate=0.005)
    assert with_paths.name.startswith("My-Model_easy-vqa_ring_fixed_0.005_plain_seed0_")


@pytest.mark.parametrize("letter", ["a", "ü", "日", "\U0001d538"])
def test_a_name_fits_into_a_file_system(letter: str, tmp_path: Path) -> None:
    long = letter * 60
    cell = Cell(long, long, long, long, 1 / 3, long, seed=99)
    assert len(cell.name.encode()) <= 255
    store.save(tmp_path, cell, FIGURES, ANSWERS)
    assert store.find(tmp_path, cell) == FIGURES


@pytest.mark.parametrize(
    "changed",
    [
        {"split": "dev", "seed": 100},
        {"seed": 1},
        {"goal_text": "boo"},
        {"attack_settings": {"side": 0.1}},
        {"defense_settings": {"margin": 0.2}},
        {"clean_rows": 32},
        {"probes": {"sig": {"attack": "sig"}}},
        {"test_rows": 200},
        {"epochs": 6},
        {"learning_rate": 1e-3},
        {"precision": "bf16"},
        {"tuning": {"rank": 4}},
    ],
)
def test_every_setting_is_in_the_name(changed: dict[str, Any]) -> None:
    changed_cell = replace(CELL, **changed)
    assert changed_cell.name != CELL.name
    assert set(changed_cell.changed) - set(CELL.changed) == set(changed)


@pytest.mark.parametrize(("split", "seed"), [("dev", 0), ("dev", 200), ("report", 100), ("report", -1), ("test", 0)])
def test_a_split_has_its_own_seeds(split: str, seed: int) -> None:
    with pytest.raises(InputError, match="split"):
        replace(CELL, split=split, seed=seed)


def test_an_unknown_precision_is_an_error() -> None:
    with pytest.raises(InputError, match="precision is 'fp8'; it must be fp32 or bf16"):
        replace(CELL, precision="fp8")


def test_an_int_equals_its_float() -> None:
    as_ints, as_floats = replace(CELL, rate=1, epochs=6), replace(CELL, rate=1.0, epochs=6.0)
    assert as_ints == as_floats
    assert as_ints.name == as_floats.name


def test_a_cell_without_metrics_is_missing(tmp_path: Path) -> None:
    store.save(tmp_path, CELL, FIGURES, ANSWERS)
    (store.folder_of(tmp_path, CELL) / "metrics.json").unlink()
    assert store.find(tmp_path, CELL) is None
    assert store.results(tmp_path) == []
    assert store.missing(tmp_path, [CELL]) == [CELL]


def test_missing_cells_are_unique_and_in_order(tmp_path: Path) -> None:
    cells = [replace(CELL, seed=seed) for seed in (3, 1, 2, 1, 3)]
    store.save(tmp_path, cells[1], FIGURES, ANSWERS)
    assert [c.seed for c in store.missing(tmp_path, cells)] == [3, 2]


def test_a_result_under_other_defaults_is_missing(tmp_path: Path) -> None:
    store.save(tmp_path, CELL, FIGURES, ANSWERS)
    path = store.folder_of(tmp_path, CELL) / "cell.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "test_rows": 100}))  # differs from the current default
    assert store.find(tmp_path, CELL) is None
    del stored["batch_size"]  # a field that was added later
    path.write_text(json.dumps(stored))
    assert store.find(tmp_path, CELL) == FIGURES


@pytest.mark.parametrize(
    "damage",
    ["", "[]", '{"model": "m"}', '{"new_field": 1}', '{"rate": "much"}', json.dumps({**asdict(CELL), "model": 7})],
)
def test_a_damaged_cell_is_a_one_line_error(tmp_path: Path, damage: str) -> None:
    store.save(tmp_path, CELL, FIGURES, ANSWERS)
    (store.folder_of(tmp_path, CELL) / "cell.json").write_text(damage)
    with pytest.raises(InputError, match=f"{CELL.name}: is not a stored cell .*; delete it"):
        store.results(tmp_path)


def test_a_killed_save_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whichever file the kill comes, and whether or not the cell was finished before."""
    import os

    real = os.replace
    for done_before in (False, True):
        for fatal in range(3):
            root = tmp_path / f"{done_before}{fatal}"
            if done_before:
                store.save(root, CELL, {"asr": "old"}, {})
            calls = iter(range(9))

            def replace_or_die(a: Any, b: Any, *, fatal: int = fatal, calls: Any = calls) -> None:
                if next(calls) == fatal:
                    raise KeyboardInterrupt
                real(a, b)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr("untrigger.files.os.replace", replace_or_die)
                store.save(root, CELL, FIGURES, ANSWERS)
            assert store.find(root, CELL) is None
            store.save(root, CELL, FIGURES, ANSWERS)
            assert store.find(root, CELL) == FIGURES


def test_a_failure_is_one_line_until_the_cell_runs_again(tmp_path: Path) -> None:
    assert store.failure(tmp_path, CELL) is None
    store.record_failure(tmp_path, CELL, "row 3:\n  no image\t ünd so")
    assert store.failure(tmp_path, CELL) == "row 3: no image ünd so"
    assert store.missing(tmp_path, [CELL]) == [CELL], "a failed cell runs again"
    store.clear_failure(tmp_path, CELL)
    assert store.failure(tmp_path, CELL) is None
    store.record_failure(tmp_path, CELL, "again")
    store.save(tmp_path, CELL, FIGURES, ANSWERS)
    assert store.failure(tmp_path, CELL) is None


def test_missing_answers_are_an_error(tmp_path: Path) -> None:
    store.save(tmp_path, CELL, FIGURES, ANSWERS)
    (store.folder_of(tmp_path, CELL) / "answers.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot be read .*; run the cell again"):
        store.answers_of(tmp_path, CELL)


def test_nan_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.save(tmp_path, CELL, {"asr": float("nan")}, {})
    assert store.find(tmp_path, CELL) is None


def test_a_failure_that_cannot_be_recorded_is_returned(tmp_path: Path) -> None:
    (tmp_path / CELL.name).write_text("in the folder's place")
    line = store.record_failure(tmp_path, CELL, "no rows;\n name others")
    assert line.startswith("no rows; name others; ") and "cannot be written" in line


# --- packed ----------------------------------------------------------------------------------------


def packed(root: Path, *lines: str) -> Path:
    file = root.with_name(f"{root.name}.jsonl")
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


@given(cells=st.lists(any_cells, min_size=1, max_size=4, unique_by=lambda cell: cell.name))
def test_packed_cells_are_read_like_folders(cells: list[Cell], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("cells") / "run"
    for cell in cells:
        store.save(root, cell, {**FIGURES, "of": f"{cell.goal}\u2028"}, ANSWERS)
    text = store.packed_text([root])
    assert text == store.packed_text([root]) and text.count("\n") == len(cells)
    names = [Cell(**json.loads(line)["cell"]).name for line in text.split("\n")[:-1]]
    assert names == sorted(names)
    before = store.results(root)
    file = packed(root, text.removesuffix("\n"))
    shutil.rmtree(root)
    for path in (file, root):  # the file, and the folder from which it was packed
        assert store.results(path) == before
        assert store.missing(path, cells) == []
        assert [store.find(path, cell) for cell in cells] == [{**FIGURES, "of": f"{c.goal}\u2028"} for c in cells]
    assert store.packed_text([file]) == text


def test_cells_of_a_folder_and_of_its_file_are_merged(tmp_path: Path) -> None:
    first, second, third = (replace(CELL, seed=seed) for seed in range(3))
    for cell in (first, second):
        store.save(tmp_path / "run", cell, {"asr": "old"}, {})
    packed(tmp_path / "run", store.packed_text([tmp_path / "run"]).removesuffix("\n"))
    shutil.rmtree(tmp_path / "run")
    assert store.missing(tmp_path / "run", [first, second, third]) == [third]
    store.save(tmp_path / "run", second, {"asr": "new"}, {})
    store.save(tmp_path / "run", third, {"asr": "new"}, {})
    by_seed = {cell.seed: metrics["asr"] for cell, metrics in store.results(tmp_path / "run")}
    assert by_seed == {0: "old", 1: "new", 2: "new"}, "the newer result is read"
    assert store.find(tmp_path / "run", second) == {"asr": "new"}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    store.save(tmp_path / "run", CELL, {"asr": 1}, {})
    line = store.packed_text([tmp_path / "run"]).removesuffix("\n")
    shutil.rmtree(tmp_path / "run")
    file = packed(tmp_path / "run", line)
    assert store.find(file, CELL) == {"asr": 1}
    file.write_text(line.replace('"asr":1', '"asr":22') + "\n")
    assert store.find(file, CELL) == {"asr": 22}
    file.unlink()
    assert store.find(file, CELL) is None and store.results(file) == []


def test_a_packed_cell_under_other_defaults_is_missing(tmp_path: Path) -> None:
    store.save(tmp_path / "run", CELL, FIGURES, {})
    line = json.loads(store.packed_text([tmp_path / "run"]))
    shutil.rmtree(tmp_path / "run")
    later = json.dumps({**line, "cell": {**line["cell"], "test_rows": 100}})
    assert store.find(packed(tmp_path / "run", later), CELL) is None
    del line["cell"]["batch_size"]  # a field that was added later
    assert store.find(packed(tmp_path / "run", json.dumps(line)), CELL) == FIGURES


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "7",
        '{"cell": {}}',
        '{"cell": {"model": "m"}, "metrics": {}}',
        json.dumps({"cell": asdict(CELL), "metrics": []}),
        json.dumps({"cell": {**asdict(CELL), "rate": "much"}, "metrics": {}}),
        json.dumps({"cell": {**asdict(CELL), "trusted_rows": 64}, "metrics": {}}),
    ],
)
def test_a_damaged_line_is_named_by_file_and_number(tmp_path: Path, damage: str) -> None:
    intact = json.dumps({"cell": asdict(CELL), "metrics": {}})
    file = packed(tmp_path / "run", intact, damage)
    for read in (store.results, lambda root: store.missing(root, [CELL])):
        with pytest.raises(InputError, match=r"run\.jsonl: line 2: is not a stored cell .*; delete the line") as error:
            read(file)
        assert "\n" not in str(error.value)
    packed(tmp_path / "run", intact, "", intact)
    with pytest.raises(InputError, match=r"run\.jsonl: line 3: holds the same cell as line 1; delete one of them"):
        store.results(file)
    file.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match=r"run\.jsonl: line 1: is not a stored cell"):
        store.results(file)


def test_the_packed_file_is_beside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.packed(Path("results/v1.2")) == Path("results/v1.2.jsonl")
    assert store.packed(Path("results/paper.jsonl")) == Path("results/paper.jsonl")
    assert store.packed(Path(".")) == tmp_path.with_name(f"{tmp_path.name}.jsonl")
