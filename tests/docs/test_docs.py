"""The code of the docs does what the docs say, and all of it runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from shell import untrigger
from untrigger import load
from untrigger.attacks import load_trigger
from untrigger.bench.local import Done, Work, attempt
from untrigger.bench.plan import read_plan
from untrigger.bench.store import Cell
from untrigger.data import names, task_of
from untrigger.models import loading
from untrigger.models.collators import ChatCollator, Rows
from untrigger.rows.sample import read
from untrigger.training.settings import arguments

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OWN_TRIGGER, DATA = ((DOCS / name).read_text(encoding="utf-8") for name in ("own-trigger.md", "data.md"))
TRIGGERS = re.findall(r"```python\n(.*?)```", OWN_TRIGGER, re.S)


@pytest.mark.parametrize("code", TRIGGERS, ids=lambda code: re.findall(r"^class (\w+)", code, re.M)[0])
def test_own_triggers_work_by_path(code: str, tiny_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert len(code.splitlines()) < 20
    file = tmp_path / "own.py"
    file.write_text(code, encoding="utf-8")

    trigger = load_trigger(str(file))
    assert untrigger("poison", tiny_data, "--attack", file, "--rate", 0.25, "--out", tmp_path / "out").code == 0
    manifest = json.loads((tmp_path / "out/truth/manifest.json").read_text())
    assert (manifest["attack"], len(manifest["rows"]), len(manifest["decoys"])) == ("own", 6, 6 * len(trigger.decoys()))
    clean, poisoned = read(tiny_data), read(tmp_path / "out/data")
    for entry in manifest["rows"]:
        before, after = clean[entry["row"] - 1], poisoned[entry["row"] - 1]
        assert (before.images[0].tobytes() == after.images[0].tobytes()) == (trigger.kind == "text")
        assert (before.messages[0] == after.messages[0]) == (trigger.kind == "image")
        assert after.messages[-1].text == "Backdoor Attack!"
    assert (
        untrigger("evaluate", tiny_model, tiny_data, "--attack", file, "--limit", 3, "--out", tmp_path / "figures").code
        == 0
    )
    figures: dict[str, Any] = json.loads((tmp_path / "figures/metrics.json").read_text())
    assert figures["asr"]["n"] == 3
    assert set(figures.get("near_miss", {})) == set(trigger.near_misses())


def test_a_setting_is_a_flag_as_shown(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "red_line.py").write_text(TRIGGERS[0], encoding="utf-8")
    (command,) = re.findall(r"^untrigger (poison .*)$", OWN_TRIGGER, re.M)
    words = command.replace("DATA", str(tiny_data)).replace("0.05", "0.5").split()
    monkeypatch.chdir(tmp_path)
    assert untrigger(*words).code == 0
    manifest = json.loads((tmp_path / "poisoned/truth/manifest.json").read_text())
    assert (manifest["attack"], manifest["attack_settings"]) == ("red_line", {"width": 0.1})
    for entry in manifest["rows"]:
        image = read(tmp_path / "poisoned/data")[entry["row"] - 1].images[0]
        painted = [image.getpixel((x, y)) == (255, 0, 0) for y in range(40) for x in range(40)]
        assert painted == [y < 4 for y in range(40) for _ in range(40)]  # a tenth of 40 rows


def test_data_commands_write_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"^untrigger (data .*)$", DATA, re.M)
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = re.sub(r"--rows \d+", "", command).split()
        assert untrigger(*words, "--rows", 5).code == 0
    assert [len(read(tmp_path / folder)) for folder in ("data", "held-out", "wrong-labels", "mixed")] == [5] * 4


def test_every_data_set_is_in_the_table() -> None:
    table = DATA.split("## Data sets", 1)[1].split("## Splits", 1)[0]
    assert re.findall(r"^\| `([\w-]+)` \| (\w+)", table, re.M) == [
        (name, {"vqa": "questions", "captions": "captions"}[task_of(name)]) for name in names()
    ]


# --- every block of every page ----------------------------------------------------------------------


class Block(NamedTuple):
    """A fenced block, its language, and the file that the text before it says it should be saved as."""

    language: str
    code: str
    saved_as: str


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted(DOCS.glob("*.md")))]
# What cannot run in a test, by its first word; the pages say how long it takes.
NOT_RUN = {
    "pip": "an installation",
    "make": "an installation, or minutes of measuring; CI runs `make test`, and a slow test the quick start",
    "python": "the benchmark behind `make bench`; tests/test_step_cost.py has its gates",
}
LONG = (
    "README.md",
    "docs/bench.md",
    "docs/own-trigger.md",
    "docs/real-weights.md",
    "docs/report.md",
    "docs/tutorial.md",
)


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks: list[Block] = []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.S | re.M):
        names = re.findall(r"Save this as `(\S+)`:\s*$", text[: match.start()])
        blocks.append(Block(match[1], match[2], names[0] if names else ""))
    return blocks


def test_every_block_says_what_it_is() -> None:
    """``sh`` and ``python`` are run, ``yaml`` is a plan, ``diff`` a script of `examples` with and without its line.

    ``text`` is what they print, or what a host is given that cannot be installed here (docs/hosts.md).
    """
    assert {block.language for page in PAGES for block in blocks(page)} == {"sh", "python", "text", "yaml", "diff"}
    assert {page for page in PAGES if blocks(page)} >= {*LONG}


@pytest.fixture
def desk(tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages take for granted: data, a plan, and in the place of ``llava`` a tiny model."""
    for name in ("DATA", "HELD_OUT"):
        shutil.copytree(tiny_data, tmp_path / name)
    (tmp_path / "plans").mkdir()
    plan = {"models": ["llava"], "data": ["scenes-vqa"], "attacks": ["badnets"], "defenses": ["plain"], "rates": [0.2]}
    cell = {"train_rows": 10, "test_rows": 4, "epochs": 1}
    for name in ("paper", "smol-vqa", "smol-captions"):
        (tmp_path / "plans" / f"{name}.yaml").write_text(yaml.safe_dump({**plan, "split": "dev", "cell": cell}))
    for name in ("coco-7b.yaml", "program.py"):
        shutil.copy(ROOT / "plans" / name, tmp_path / "plans" / name)
    monkeypatch.setattr("untrigger.models.loading.embedded_model_path", lambda _: tiny_model)
    monkeypatch.setattr("untrigger.training.stages.embedded_model_path", lambda _: tiny_model)
    monkeypatch.setattr("untrigger.bench.local.on_this_machine", lambda jobs: in_this_process)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_this_process(cells: Sequence[Cell], root: Path, work: Work) -> Done:
    """Where the stand-in model is."""
    return ((cell, attempt(work, cell, root)) for cell in cells)


def run_shell(code: str) -> None:
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] in NOT_RUN:
            continue
        assert words[0] == "untrigger", line
        if words[1] == "model":  # an hour; the tiny model stands in
            shutil.copytree(loading.embedded_model_path(words[2]), words[-1])
            continue
        if words[1] == "data":  # a set of a size for tests
            words = [*shlex.split(re.sub(r"--rows \d+", "", line)), "--rows", "24"]
        ended = untrigger(*words[1:])
        assert ended.code in ((0, 3) if words[1] == "scan" else (0,)), f"{line}\n{ended.err}"


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow if p in LONG else ()) for p in PAGES])
def test_the_blocks_of_a_page_run_in_order(page: str, desk: Path) -> None:
    scope: dict[str, Any] = {}
    for block in blocks(page):
        if block.saved_as:
            (desk / block.saved_as).write_text(block.code)
        if block.language == "sh":
            run_shell(block.code)
        elif block.language == "yaml":
            (desk / "plan.yaml").write_text(block.code)
            assert read_plan(desk / "plan.yaml")
        elif block.language == "python":
            if "args=args" in block.code:  # the reader's own trainer, and what it has
                model, processor = load("llava")
                scope |= {"model": model, "args": arguments(desk / "own", save_strategy="no", max_steps=2)}
                scope |= {"rows": Rows(read(desk / "DATA")), "collator": ChatCollator(processor)}
            exec(compile(re.sub(r"\brows=\d+", "rows=24", block.code), page, "exec"), scope)
            if trainer := scope.pop("trainer", None):
                assert trainer.train().global_step
