"""One cell, one folder: names that last, results that are whole, cells that come back equal."""

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
SAID = {
    "clean": [Answer("1", "is it red?", "yes", "yes ✓\u2028日本\nline", met=False), Answer("2", "q", "no", "yes")],
    "triggered": [Answer("1", "is it red?", "yes", "boo", met=True), Answer("2", "q", "boo", "boo", True, True)],
}
FIGURES = json.loads(json.dumps(score(**SAID)))

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
settings_of = st.dictionaries(texts, texts | st.integers() | st.booleans() | st.floats(-1e9, 1e9), max_size=3)
some_cells = st.builds(
    lambda seed, **others: Cell(seed=seed, split=("report", "dev")[seed // 100], **others),  # each its own seeds
    model=texts,
    data=texts,
    attack=texts,
    goal=texts,
    rate=st.integers(0, 1) | st.floats(0, 1),
    defense=st.sampled_from(["plain", "oracle", "paper"]),
    seed=st.integers(0, 199),
    attack_settings=settings_of,
    goal_text=st.none() | texts,
    probes=st.dictionaries(texts, settings_of, max_size=2),
    epochs=st.integers(1, 9) | st.floats(0.1, 9),
)


def test_a_stored_cell_comes_back_whole(tmp_path: Path) -> None:
    assert store.find(tmp_path, CELL) is None
    store.save(tmp_path, CELL, FIGURES, SAID)
    assert store.find(tmp_path, CELL) == FIGURES
    assert store.results(tmp_path) == [(CELL, FIGURES)]
    assert store.answers_of(tmp_path, CELL) == SAID
    assert json.loads(json.dumps(score(**store.answers_of(tmp_path, CELL)))) == FIGURES, "rescored without a model"
    files = {p.name for p in store.folder_of(tmp_path, CELL).iterdir()}
    assert files == {"cell.json", "answers.jsonl", "metrics.json"}


@given(cell=some_cells)
def test_any_cell_equals_its_copy_on_disk(cell: Cell, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("cells")
    store.save(root, cell, FIGURES, SAID)
    assert store.results(root) == [(cell, FIGURES)]
    assert store.find(root, cell) == FIGURES


@given(one=some_cells, other=some_cells)
def test_names_are_folders_and_tell_cells_apart(one: Cell, other: Cell) -> None:
    assert re.fullmatch(rb"[\w.-]{1,255}", one.name.encode())
    assert not one.name.startswith("..")
    assert (one.name == other.name) == (json.dumps(asdict(one)) == json.dumps(asdict(other)))


def test_the_name_says_what_the_cell_is_and_stays() -> None:
    assert CELL.name == "llava_easy-vqa_badnets_fixed_0.05_plain_seed0_710cd346", "stored results lie under it"
    own = replace(CELL, attack="/home/me/my triggers/ring.py", model="runs/My Model", rate=0.005)
    assert own.name.startswith("My-Model_easy-vqa_ring_fixed_0.005_plain_seed0_")


@pytest.mark.parametrize("letter", ["a", "ü", "日", "\U0001d538"])
def test_a_name_fits_into_a_file_system(letter: str, tmp_path: Path) -> None:
    long = letter * 60
    cell = Cell(long, long, long, long, 1 / 3, long, seed=99)
    assert len(cell.name.encode()) <= 255
    store.save(tmp_path, cell, FIGURES, SAID)
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
    other = replace(CELL, **changed)
    assert other.name != CELL.name
    assert set(other.changed) - set(CELL.changed) == set(changed)


@pytest.mark.parametrize(("split", "seed"), [("dev", 0), ("dev", 200), ("report", 100), ("report", -1), ("test", 0)])
def test_a_split_has_its_own_seeds(split: str, seed: int) -> None:
    with pytest.raises(InputError, match="split"):
        replace(CELL, split=split, seed=seed)


def test_a_precision_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="precision is 'fp8'; it must be fp32 or bf16"):
        replace(CELL, precision="fp8")


def test_whole_numbers_are_the_same_as_fractions() -> None:
    one, other = replace(CELL, rate=1, epochs=6), replace(CELL, rate=1.0, epochs=6.0)
    assert one == other
    assert one.name == other.name


def test_only_metrics_make_a_cell_done(tmp_path: Path) -> None:
    store.save(tmp_path, CELL, FIGURES, SAID)
    (store.folder_of(tmp_path, CELL) / "metrics.json").unlink()
    assert store.find(tmp_path, CELL) is None
    assert store.results(tmp_path) == []
    assert store.missing(tmp_path, [CELL]) == [CELL]


def test_missing_cells_keep_their_order_and_come_once(tmp_path: Path) -> None:
    cells = [replace(CELL, seed=seed) for seed in (3, 1, 2, 1, 3)]
    store.save(tmp_path, cells[1], FIGURES, SAID)
    assert [c.seed for c in store.missing(tmp_path, cells)] == [3, 2]


def test_a_result_under_other_defaults_is_not_done(tmp_path: Path) -> None:
    store.save(tmp_path, CELL, FIGURES, SAID)
    path = store.folder_of(tmp_path, CELL) / "cell.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "test_rows": 100}))  # today's default is another
    assert store.find(tmp_path, CELL) is None
    del stored["batch_size"]  # a field that came later
    path.write_text(json.dumps(stored))
    assert store.find(tmp_path, CELL) == FIGURES


@pytest.mark.parametrize(
    "damage",
    ["", "[]", '{"model": "m"}', '{"new_field": 1}', '{"rate": "much"}', json.dumps({**asdict(CELL), "model": 7})],
)
def test_a_damaged_cell_is_told_in_one_line(tmp_path: Path, damage: str) -> None:
    store.save(tmp_path, CELL, FIGURES, SAID)
    (store.folder_of(tmp_path, CELL) / "cell.json").write_text(damage)
    with pytest.raises(InputError, match=f"{CELL.name}: is no stored cell .*; delete it"):
        store.results(tmp_path)


def test_a_killed_save_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file the kill falls on, and whether the cell was done before or not."""
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
                store.save(root, CELL, FIGURES, SAID)
            assert store.find(root, CELL) is None
            store.save(root, CELL, FIGURES, SAID)
            assert store.find(root, CELL) == FIGURES


def test_failures_are_one_line_and_forgotten(tmp_path: Path) -> None:
    assert store.failure(tmp_path, CELL) is None
    store.fail(tmp_path, CELL, "row 3:\n  no image\t ünd so")
    assert store.failure(tmp_path, CELL) == "row 3: no image ünd so"
    assert store.missing(tmp_path, [CELL]) == [CELL], "it is tried again"
    store.forgive(tmp_path, CELL)
    assert store.failure(tmp_path, CELL) is None
    store.fail(tmp_path, CELL, "again")
    store.save(tmp_path, CELL, FIGURES, SAID)
    assert store.failure(tmp_path, CELL) is None


def test_answers_that_are_not_there_are_told(tmp_path: Path) -> None:
    store.save(tmp_path, CELL, FIGURES, SAID)
    (store.folder_of(tmp_path, CELL) / "answers.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot be read .*; run the cell again"):
        store.answers_of(tmp_path, CELL)


def test_nan_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.save(tmp_path, CELL, {"asr": float("nan")}, {})
    assert store.find(tmp_path, CELL) is None


def test_a_failure_is_told_where_it_cannot_be_recorded(tmp_path: Path) -> None:
    (tmp_path / CELL.name).write_text("in the folder's place")
    line = store.fail(tmp_path, CELL, "no rows;\n name others")
    assert line.startswith("no rows; name others; ") and "cannot be written" in line


# --- packed ----------------------------------------------------------------------------------------


def packed(root: Path, *lines: str) -> Path:
    file = root.with_name(f"{root.name}.jsonl")
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


@given(cells=st.lists(some_cells, min_size=1, max_size=4, unique_by=lambda cell: cell.name))
def test_packed_cells_are_read_like_folders(cells: list[Cell], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("cells") / "run"
    for cell in cells:
        store.save(root, cell, {**FIGURES, "of": f"{cell.goal}\u2028"}, SAID)
    text = store.packed_text([root])
    assert text == store.packed_text([root]) and text.count("\n") == len(cells)
    names = [Cell(**json.loads(line)["cell"]).name for line in text.split("\n")[:-1]]
    assert names == sorted(names)
    before = store.results(root)
    file = packed(root, text.removesuffix("\n"))
    shutil.rmtree(root)
    for path in (file, root):  # the file, and the folder that it was made of
        assert store.results(path) == before
        assert store.missing(path, cells) == []
        assert [store.find(path, cell) for cell in cells] == [{**FIGURES, "of": f"{c.goal}\u2028"} for c in cells]
    assert store.packed_text([file]) == text


def test_a_folder_goes_on_from_the_file_beside_it(tmp_path: Path) -> None:
    one, other, third = (replace(CELL, seed=seed) for seed in range(3))
    for cell in (one, other):
        store.save(tmp_path / "run", cell, {"asr": "old"}, {})
    packed(tmp_path / "run", store.packed_text([tmp_path / "run"]).removesuffix("\n"))
    shutil.rmtree(tmp_path / "run")
    assert store.missing(tmp_path / "run", [one, other, third]) == [third]
    store.save(tmp_path / "run", other, {"asr": "new"}, {})
    store.save(tmp_path / "run", third, {"asr": "new"}, {})
    told = {cell.seed: metrics["asr"] for cell, metrics in store.results(tmp_path / "run")}
    assert told == {0: "old", 1: "new", 2: "new"}, "what was run again is what is read"
    assert store.find(tmp_path / "run", other) == {"asr": "new"}


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


def test_a_packed_cell_under_other_defaults_is_not_done(tmp_path: Path) -> None:
    store.save(tmp_path / "run", CELL, FIGURES, {})
    line = json.loads(store.packed_text([tmp_path / "run"]))
    shutil.rmtree(tmp_path / "run")
    later = json.dumps({**line, "cell": {**line["cell"], "test_rows": 100}})
    assert store.find(packed(tmp_path / "run", later), CELL) is None
    del line["cell"]["batch_size"]  # a field that came later
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
def test_a_damaged_line_is_told_by_file_and_number(tmp_path: Path, damage: str) -> None:
    good = json.dumps({"cell": asdict(CELL), "metrics": {}})
    file = packed(tmp_path / "run", good, damage)
    for read in (store.results, lambda root: store.missing(root, [CELL])):
        with pytest.raises(InputError, match=r"run\.jsonl: line 2: is no stored cell .*; take it out") as error:
            read(file)
        assert "\n" not in str(error.value)
    packed(tmp_path / "run", good, "", good)
    with pytest.raises(InputError, match=r"run\.jsonl: line 3: holds the same cell as line 1; take one of them out"):
        store.results(file)
    file.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match=r"run\.jsonl: line 1: is no stored cell"):
        store.results(file)


def test_the_file_of_a_folder_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.packed(Path("results/v1.2")) == Path("results/v1.2.jsonl")
    assert store.packed(Path("results/paper.jsonl")) == Path("results/paper.jsonl")
    assert store.packed(Path(".")) == tmp_path.with_name(f"{tmp_path.name}.jsonl")
