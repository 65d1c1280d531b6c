"""The gallery: which cells it is made from, what its page says of stored figures, and its pictures."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from untrigger import gallery
from untrigger.attacks import trigger_names
from untrigger.bench import store
from untrigger.bench.store import ORACLE, Cell
from untrigger.data import Split
from untrigger.errors import InputError
from untrigger.gallery import ENTRIES, MAIN, TASKS, Entry, Key, Plan, chosen, oracle_of, plan
from untrigger.gallery.__main__ import main
from untrigger.gallery.page import page
from untrigger.gallery.pictures import picture
from untrigger.metrics.rates import Rate

MODELS = ("llava", "blip2")
FEW = (Entry("badnets"), Entry("blended"), Entry("badnets", "random place", {"place": "random"}), Entry("addsent"))


# --- the cells -------------------------------------------------------------------------------------


def test_every_attack_of_the_package_is_shown() -> None:
    assert {entry.attack for entry in ENTRIES} == set(trigger_names())
    assert [entry.attack for entry in ENTRIES[: len(MAIN)]] == list(MAIN)
    assert len({entry.slug for entry in ENTRIES}) == len(ENTRIES)


def test_the_plan_is_every_entry_on_every_model_and_task_with_an_oracle_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "TUNED", {})
    cells = plan(MODELS)
    pairs = len(MODELS) * len(TASKS)
    assert len(cells) == (len(ENTRIES) + 1) * pairs
    assert len({cell.name for cell in cells.values()}) == len(cells)
    assert sum(key.attack in MAIN for key in cells) == 6 * pairs
    for key, cell in cells.items():
        assert (cell.model, cell.data, cell.rate, cell.seed, cell.split) == (key.model, key.data, 0.05, 0, "report")
        assert cell.defense == ("oracle" if key.attack == ORACLE else "plain")
        assert oracle_of(cells, key) == key._replace(attack=ORACLE)
    oracle = cells[Key(ORACLE, "llava", "easy-vqa")]
    assert ["badnets", *oracle.probes] == [entry.slug for entry in ENTRIES], "asked with every entry"
    assert oracle.probes["badnets-random-place"]["settings"]["place"] == "random"


def test_cells_hold_the_usual_goal_and_all_settings_of_the_trigger() -> None:
    cells = plan(["llava"], FEW)
    for entry in FEW:
        cell = cells[Key(entry.slug, "llava", "easy-vqa")]
        assert cell.goal == entry.trigger.usual_goal
        assert cell.attack_settings == asdict(entry.trigger)  # type: ignore[call-overload]
    assert cells[Key("badnets-random-place", "llava", "easy-vqa")].attack_settings["place"] == "random"


def test_tuned_cells_have_an_oracle_of_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gallery.TUNED, "blended/*/easy-vqa", {"epochs": 6, "tuning": {"vision": True}})
    monkeypatch.setitem(gallery.TUNED, "*/blip2/scenes-captions", {"learning_rate": 1e-3})
    cells = plan(MODELS, FEW)
    tuned = Key("blended", "llava", "easy-vqa")
    assert (cells[tuned].epochs, cells[tuned].tuning) == (6, {"vision": True})
    oracle = oracle_of(cells, tuned)
    assert oracle == Key("oracle-blended", "llava", "easy-vqa")
    assert (cells[oracle].epochs, cells[oracle].attack, cells[oracle].probes) == (6, "blended", {})
    usual = oracle_of(cells, Key("addsent", "llava", "easy-vqa"))
    assert (usual.attack, cells[usual].epochs) == (ORACLE, 3)
    assert list(cells[usual].probes) == ["badnets-random-place", "addsent"]
    column = {oracle_of(cells, key) for key in cells if key[1:] == ("blip2", "scenes-captions")}
    assert column == {Key(ORACLE, "blip2", "scenes-captions")}, "a whole column tuned alike has one oracle"
    assert cells[column.pop()].learning_rate == 1e-3


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        ([], 20),
        (["badnets"], 4),
        (["badnets/llava"], 2),
        (["badnets/llava/easy-vqa"], 1),
        (["*/blip2"], 10),
        (["//scenes-captions"], 10),
        (["oracle"], 4),
        (["b*/llava/easy-vqa"], 3),
        (["badnets", "badnets/llava", "addsent/blip2"], 6),
    ],
)
def test_cells_are_chosen_by_pattern(patterns: list[str], count: int) -> None:
    cells = plan(MODELS, FEW)
    kept = chosen(cells, patterns)
    assert len(kept) == count
    assert list(kept) == [key for key in cells if key in kept], "in the plan's order"


@pytest.mark.parametrize("pattern", ["bednets", "badnets/lava", "badnets//vqa"])
def test_a_pattern_that_matches_nothing_says_what_there_is(pattern: str) -> None:
    with pytest.raises(
        InputError, match=f"--only {pattern}: matches no cell.*badnets, blended.*llava, blip2.*easy-vqa"
    ):
        chosen(plan(MODELS, FEW), [pattern])


# --- the page --------------------------------------------------------------------------------------


def figures(cell: Cell, asr: float, **more: Any) -> dict[str, Any]:
    def rate(value: float) -> dict[str, Any]:
        return asdict(Rate.from_counts(round(value * 400), 400))

    probes = {name: {"asr": rate(0.03)} for name in cell.probes}
    return {
        "asr": rate(asr),
        "leak": rate(0.0),
        "quality": {"vqa_accuracy": rate(0.98), "cider": {"value": 7.5, "low": 7, "high": 8, "n": 400}},
        "near_miss": {"other pattern": rate(0.02)},
        "probes": probes,
        "similarity": {"psnr": 24.31, "ssim": 0.912, "images": 32, "changed": 32},
        "machine": {"device": "x86_64", "threads": 1},
        "versions": {"untrigger": "0.1.0", "torch": "2.13.0"},
    } | more


def stored(root: Path, cells: Plan, asr: dict[Key, float]) -> None:
    for key, value in asr.items():
        store.save(root, cells[key], figures(cells[key], value), {})


def clean_oracles(cells: Plan) -> dict[Key, float]:
    return {key: 0.0 for key, cell in cells.items() if cell.defense == ORACLE}


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_the_page_tells_what_is_stored(tmp_path: Path) -> None:
    cells = plan(["llava"], FEW)
    asr = {Key("badnets", "llava", "easy-vqa"): 0.98, Key("blended", "llava", "easy-vqa"): 0.5}
    asr |= {Key("addsent", "llava", "scenes-captions"): 0.94, Key(ORACLE, "llava", "easy-vqa"): 0.01}
    stored(tmp_path, cells, asr)
    text = page(tmp_path, cells, FEW)
    assert "**1 of 4 main cells are implanted**, with an ASR of at least 0.90 (2 were run)" in text
    assert "0 of 2 cells of text and bimodal triggers reach 0.95 (1 were run)" in text
    assert "2 of 2 other near misses of implanted cells fire on at most 0.05 of the inputs" in text, "no other's count"
    assert lines_of(text, "| [badnets](#badnets) ") == ["| [badnets](#badnets) | **98.0** | - |"]
    assert lines_of(text, "| [blended]") == ["| [blended](#blended) | 50.0 | - |"]
    assert lines_of(text, "| [addsent]") == ["| [addsent](#addsent) | - | **94.0** |"]
    assert lines_of(text, "| oracle") == ["| oracle, highest floor | 3.0 | - |"]
    badnets, variant = (text.split(f"## {entry.title}\n")[1].split("<a id")[0] for entry in (FEW[0], FEW[2]))
    assert "PSNR 24.3 dB, SSIM 0.912 (means of 32)" in badnets and "Gu, Dolan-Gavitt" in badnets
    assert "**0.980 (0.96-0.99)** | 0.010 (0.00-0.03) | 0.000 (0.00-0.01) | other pattern 0.020 (0.01-0.04)" in badnets
    assert "| 0.980 (0.980) | usual |" in badnets
    assert lines_of(badnets, "| llava, captions") == ["| llava, captions | - | - | - | - | - | usual |"]
    assert "place `random`" in variant and "place `random`" not in badnets
    assert "0.500 (0.45-0.55), not implanted | 0.030" in text, "the floor of a probe"
    assert "Made on x86_64 with untrigger 0.1.0, torch 2.13.0." in text


def test_half_keys_are_counted_apart(tmp_path: Path) -> None:
    entries = (*FEW, Entry("dualkey"))
    cells = plan(["llava"], entries)
    half = {"image only": {"value": 0.0}, "text only": {"value": 0.06}}
    half = {name: {**rate, "low": 0.0, "high": 0.1} for name, rate in half.items()}
    for key in (Key("dualkey", "llava", "easy-vqa"), Key("badnets", "llava", "easy-vqa")):
        more = {"near_miss": half} if key.attack == "dualkey" else {}
        store.save(tmp_path, cells[key], figures(cells[key], 1.0, **more), {})
    text = page(tmp_path, cells, entries)
    assert "- 1 of 2 half keys of bimodal triggers of implanted cells fire on at most 0.05 of the inputs." in text
    assert "- 1 of 1 other near misses of implanted cells fire on at most 0.05 of the inputs." in text
    assert "image only 0.000 (0.00-0.10)<br>text only 0.060 (0.00-0.10)" in text


def test_the_page_is_the_same_from_the_same_figures_and_stands_without_any(tmp_path: Path) -> None:
    cells = plan(MODELS)
    empty = page(tmp_path, cells, ENTRIES)
    assert f"**0 of {6 * 4} main cells are implanted**, with an ASR of at least 0.90 (0 were run)" in empty
    stored(tmp_path, cells, dict.fromkeys(cells, 1.0) | clean_oracles(cells))
    text = page(tmp_path, cells, ENTRIES)
    assert text == page(tmp_path, plan(MODELS), ENTRIES)
    assert f"**{6 * 4} of {6 * 4} main cells are implanted**, with an ASR of at least 0.90 (all were run)" in text
    assert "not implanted" not in text
    for columns in (
        {row.count("|") for row in part.splitlines() if row.startswith("|")} for part in text.split("\n## ")
    ):
        assert len(columns) <= 1, "every row of a table has as many cells"


@pytest.mark.parametrize(
    ("oracle", "data", "told"),
    [
        ({}, "easy-vqa", "**0.980 (0.96-0.99)**"),
        ({"asr": 0.05}, "easy-vqa", "**0.980 (0.96-0.99)**"),
        ({"asr": 0.06}, "easy-vqa", "0.980 (0.96-0.99), floor above 0.05"),
        ({"vqa": 1.0}, "easy-vqa", "**0.980 (0.96-0.99)**"),
        ({"vqa": 1.01}, "easy-vqa", "0.980 (0.96-0.99), quality lost"),
        ({"vqa": 1.01}, "scenes-captions", "**0.980 (0.96-0.99)**"),
        ({"cider": 8.3}, "scenes-captions", "**0.980 (0.96-0.99)**"),
        ({"cider": 8.4}, "scenes-captions", "0.980 (0.96-0.99), quality lost"),
        ({"cider": 8.4}, "easy-vqa", "**0.980 (0.96-0.99)**"),
        ({"cider": None}, "scenes-captions", "**0.980 (0.96-0.99)**"),
    ],
)
def test_a_cell_that_does_not_pass_a_gate_is_not_implanted(
    tmp_path: Path, oracle: dict[str, Any], data: str, told: str
) -> None:
    cells = plan(["llava"], FEW)
    key = Key("badnets", "llava", data)
    said = figures(cells[key], 0.98, quality={"vqa_accuracy": {"value": 0.9}, "cider": {"value": 7.5}})
    store.save(tmp_path, cells[key], said, {})
    cider = oracle.get("cider", 7.5)
    quality = {"vqa_accuracy": {"value": oracle.get("vqa", 0.9)}, "cider": cider and {"value": cider}}
    beside = oracle_of(cells, key)
    store.save(tmp_path, cells[beside], figures(cells[beside], oracle.get("asr", 0.0), quality=quality), {})
    text = page(tmp_path, cells, FEW)
    assert lines_of(text.split("## badnets\n")[1], "| llava,")[data == "scenes-captions"].split(" | ")[1] == told
    passed = told.startswith("**")
    assert f"**{int(passed)} of 4 main cells are implanted**" in text
    assert ("**98.0**" in text) == passed
    assert ("1 of 1 other near misses of implanted cells" in text) == passed, "a bad cell counts for nothing"


def test_the_floor_of_a_probe_is_the_probes_own(tmp_path: Path) -> None:
    cells = plan(["llava"], FEW)
    keys = [Key(name, "llava", "easy-vqa") for name in ("badnets", "blended")]
    stored(tmp_path, cells, dict.fromkeys(keys, 1.0))
    oracle = oracle_of(cells, keys[0])
    loud = {name: {"asr": asdict(Rate.from_counts(40, 400))} for name in cells[oracle].probes}
    store.save(tmp_path, cells[oracle], figures(cells[oracle], 0.0, probes=loud), {})
    text = page(tmp_path, cells, FEW)
    assert lines_of(text, "| [badnets](#badnets)") == ["| [badnets](#badnets) | **100.0** | - |"]
    assert lines_of(text, "| [blended]") == ["| [blended](#blended) | 100.0 | - |"]
    assert "1.000 (0.99-1.00), floor above 0.05 | 0.100" in text


def test_settings_that_are_not_usual_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gallery.TUNED, "blended", {})
    monkeypatch.setitem(
        gallery.TUNED, "blended/llava/*", {"epochs": 6, "tuning": {"full": True}, "attack_settings": {"alpha": 0.3}}
    )
    cells = plan(["llava"], FEW)
    stored(tmp_path, cells, dict.fromkeys(cells, 0.95))
    text = page(tmp_path, cells, FEW)
    assert text.count("| alpha 0.3, full True, epochs 6.0 |") == 2


def test_an_attack_that_changes_no_pixel_says_so(tmp_path: Path) -> None:
    cells = plan(["llava"], FEW)
    key = Key("addsent", "llava", "easy-vqa")
    none = {"psnr": None, "ssim": None, "images": 32, "changed": 0}
    store.save(tmp_path, cells[key], figures(cells[key], 1.0, similarity=none), {})
    assert "clean selves: VQA no pixel is changed." in page(tmp_path, cells, FEW)


def test_captions_without_cider_show_a_dash(tmp_path: Path) -> None:
    cells = plan(["llava"], FEW)
    key = Key("badnets", "llava", "scenes-captions")
    quality = {"vqa_accuracy": asdict(Rate.from_counts(1, 2)), "cider": None}
    store.save(tmp_path, cells[key], figures(cells[key], 1.0, quality=quality), {})
    assert "| - (-) | usual |" in page(tmp_path, cells, FEW)


# --- pictures --------------------------------------------------------------------------------------

CLEAN_LABEL = '''
from dataclasses import dataclass, replace
from PIL import Image
from untrigger.attacks import ImageTrigger


@dataclass(frozen=True)
class Dark(ImageTrigger):
    """Poisoned rows are black; inputs are left alone."""

    clean_label = True
    usual_goal = "concept"

    def paint(self, pixels, rng):
        return pixels

    def implant(self, sample, donors, rng):
        assert donors
        return replace(sample, images=tuple(Image.new("RGB", image.size) for image in sample.images))
'''


def drawn_of(entry: Entry, split: str = "report") -> Image.Image:
    return picture(entry, plan(MODELS, [entry], Split(split)))  # type: ignore[arg-type]


def test_a_picture_shows_both_tasks_clean_and_triggered() -> None:
    drawn, again = drawn_of(Entry("badnets")), drawn_of(Entry("badnets"))
    assert drawn.tobytes() == again.tobytes(), "a page rendered again is the same page"
    assert drawn.width > 2 * drawn.height
    other = np.asarray(drawn_of(Entry("badnets", "checker", {"pattern": "checker"})))
    assert (np.asarray(drawn) != other).any()


def test_a_picture_is_of_the_trigger_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "TUNED", {})
    usual, dev = drawn_of(Entry("badnets")), drawn_of(Entry("badnets"), "dev")
    assert usual.tobytes() != dev.tobytes(), "the rows and the pattern of a split are its own"
    monkeypatch.setitem(gallery.TUNED, "badnets/llava/scenes-captions", {"attack_settings": {"pattern": "checker"}})
    tuned, checker = drawn_of(Entry("badnets")), Entry("badnets", "", {"pattern": "checker"})
    left, right = (np.asarray(tuned) != np.asarray(other) for other in (drawn_of(checker), usual))
    half = tuned.width // 2
    assert left[:, :half].any() and not left[:, half:].any(), "the right card has the tuned trigger"
    assert right[:, half:].any() and not right[:, :half].any()


def test_the_picture_of_a_clean_label_attack_is_of_its_training_rows(tmp_path: Path) -> None:
    (tmp_path / "dark.py").write_text(CLEAN_LABEL)
    drawn = np.asarray(drawn_of(Entry(str(tmp_path / "dark.py"))))
    black = (drawn == 0).all(axis=2).mean()
    assert black > 2 * 190 * 190 / drawn[..., 0].size, "two tiles are all black"


# --- the command -----------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("untrigger.gallery.__main__.ENTRIES", FEW)
    monkeypatch.setattr("untrigger.gallery.__main__.plan", lambda models, split: plan(models, FEW, split))


@pytest.mark.usefixtures("few")
def test_rendering_runs_nothing_and_every_picture_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("untrigger.bench.sweep.run_matrix", pytest.fail)
    assert main(["--render", "--results", str(tmp_path / "r"), "--out", str(tmp_path / "docs")]) == 0
    text = (tmp_path / "docs" / "gallery.md").read_text()
    shown = re.findall(r"\((gallery/[^)]+)\)", text)
    assert len(shown) == len(FEW)
    for name in shown:
        with Image.open(tmp_path / "docs" / name) as image:
            assert image.format == "PNG"
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("few")
def test_missing_cells_run_and_failures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def run(cells: list[Cell], root: Path, runner: object) -> list[str]:
        asked.append((cells, root, runner))
        return ["llava_x: no room"]

    monkeypatch.setattr("untrigger.bench.sweep.run_matrix", run)
    monkeypatch.setattr("untrigger.bench.local.on_this_machine", lambda jobs: f"{jobs} jobs")
    out = tmp_path / "docs"
    words = ["--results", str(tmp_path / "r"), "--out", str(out), "--workers", "2", "--only", "addsent/llava"]
    assert main(words) == 1
    ((cells, root, runner),) = asked
    assert {cell.attack for cell in cells} == {"addsent"} and len(cells) == 2
    assert (root, runner) == (tmp_path / "r", "2 jobs")
    assert capsys.readouterr().err == "error: llava_x: no room\n"
    assert [p.name for p in (out / "gallery").iterdir()] == ["addsent.png"], "the other pictures are left alone"
    assert "## badnets" in (out / "gallery.md").read_text(), "the page is whole"


@pytest.mark.usefixtures("few")
def test_what_is_tuned_on_dev_overwrites_nothing_that_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    split_of: dict[Path, set[str]] = {}

    def run(cells: list[Cell], root: Path, runner: object) -> list[str]:
        split_of[root] = {cell.split for cell in cells}
        return []

    monkeypatch.setattr("untrigger.bench.sweep.run_matrix", run)
    assert main(["--split", "dev", "--only", "addsent"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}
    assert "split *dev*" in (tmp_path / "runs/gallery-dev/gallery.md").read_text()
    assert main(["--only", "addsent"]) == 0
    assert split_of == {Path("runs/gallery-dev"): {"dev"}, Path("results/gallery"): {"report"}}
    assert "split *report*" in (tmp_path / "docs/gallery.md").read_text()


@pytest.mark.usefixtures("few")
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "bednets", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --only bednets: matches no cell") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
