"""Reports of packed results, and the command that writes them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from fabricated import Bench, answers, rate
from rendered_page import Tree, rendered

from shell import untrigger
from untrigger.bench import store
from untrigger.bench.report.render import write
from untrigger.errors import InputError

# --- packed results --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["html", "md", "json", "jsonl"])
def test_packed_results_give_the_same_report_without_answers(bench: Bench, tmp_path: Path, suffix: str) -> None:
    bench.pair(plain=0.98)
    bench.cell("paper", 0.2)
    bench.pair(plain=0.98, data="scenes-captions")
    whole = rendered(bench, suffix)
    packed = [tmp_path / "packed" / f"{name}.jsonl" for name in ("all", "vqa", "captions")]
    write([bench.root], packed[0])
    lines = packed[0].read_text().split("\n")[:-1]
    for file, data in zip(packed[1:], ("easy-vqa", "scenes-captions"), strict=True):
        file.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["cell"]["data"] == data))
    for roots in (packed[:1], packed[1:], [bench.root, *packed]):
        write(roots, tmp_path / f"out.{suffix}")
        assert (tmp_path / f"out.{suffix}").read_text() == whole


def test_answers_are_shown_if_a_folder_has_them(full: Bench, tmp_path: Path) -> None:
    write([full.root], tmp_path / "packed.jsonl")
    write([tmp_path / "packed.jsonl"], tmp_path / "alone.html")
    assert "Images and answers are not stored here" in (tmp_path / "alone.html").read_text()
    write([tmp_path / "packed.jsonl", full.root], tmp_path / "both.html")
    assert (tmp_path / "both.html").read_text() == rendered(full)


def test_answers_of_another_attacks_oracle_are_not_shown(bench: Bench) -> None:
    bench.cell("plain", 1.0)
    bench.cell("plain", 1.0, attack="sig", answers=answers("boo"))
    probes = {"sig": {"attack": "sig", "goal": "fixed", "settings": {}}}
    floor = {"probes": {"sig": {"asr": {**rate(0.02), "version": 1}}}}
    bench.cell("oracle", 0.0, probes=probes, metrics=floor, answers=answers("of the other trigger"))
    root = Tree(rendered(bench)).root
    sig = next(section for section in root.all("details") if section.text.strip().startswith("sig"))
    assert "boo" in sig.text and "of the other trigger" not in sig.text
    assert "2.0" in sig.text


# --- the command -----------------------------------------------------------------------------------


def test_the_command_writes_and_names_the_file(full: Bench, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    assert untrigger("report", full.root, "--out", out) == (0, f"{out}\n", "")
    assert out.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere", "--out", "r.html"), "nowhere: no such folder"),
        (("nowhere.jsonl", "--out", "r.html"), "nowhere.jsonl: no such file"),
        (("broken.jsonl", "--out", "r.html"), "broken.jsonl: line 2: is not a stored cell"),
        (("results", "broken.jsonl", "--out", "r.jsonl"), "broken.jsonl: line 2: is not a stored cell"),
        ((".", "--out", "r.html"), "holds no finished cell"),
        ((".", "--out", "r.txt"), "r.txt: the suffix of a report must be .html, .md, .json or .jsonl"),
        (("results", "--out", "results"), "results: the suffix of a report must be"),
        (("results", "--out", "results/busy.html"), "busy.html"),
    ],
)
def test_an_input_error_is_one_line(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    bench.pair()
    (bench.root / "busy.html").mkdir()
    intact = store.packed_text([bench.root]).split("\n")[0]
    (bench.root.parent / "broken.jsonl").write_text(f"{intact}\n{intact[:-9]}\n")
    monkeypatch.chdir(bench.root.parent)
    code, out, err = untrigger("report", *words)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err) and message in err


def test_a_missing_extra_is_named(full: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["plotly", *(name for name in sys.modules if name.startswith("plotly."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"needs plotly.*: pip install 'untrigger\[report\]'"):
        rendered(full)
    assert rendered(full, "md") and rendered(full, "json"), "the other formats do not need plotly"
