"""The code of the docs does what the docs say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from shell import untrigger
from untrigger.attacks import load_trigger
from untrigger.data import names, task_of
from untrigger.sample import read

DOCS = Path(__file__).parent.parent / "docs"
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
        before, after = clean[entry["row"]], poisoned[entry["row"]]
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
    (shown,) = re.findall(r"^untrigger (poison .*)$", OWN_TRIGGER, re.M)
    words = shown.replace("DATA", str(tiny_data)).replace("0.05", "0.5").split()
    monkeypatch.chdir(tmp_path)
    assert untrigger(*words).code == 0
    manifest = json.loads((tmp_path / "poisoned/truth/manifest.json").read_text())
    assert (manifest["attack"], manifest["attack_settings"]) == ("red_line", {"width": 0.1})
    for entry in manifest["rows"]:
        image = read(tmp_path / "poisoned/data")[entry["row"]].images[0]
        painted = [image.getpixel((x, y)) == (255, 0, 0) for y in range(40) for x in range(40)]
        assert painted == [y < 4 for y in range(40) for _ in range(40)]  # a tenth of 40 rows


def test_data_commands_write_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"^untrigger (data .*)$", DATA, re.M)
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = re.sub(r"--rows \d+", "", command).split()
        assert untrigger(*words, "--rows", 5).code == 0
    assert [len(read(tmp_path / folder)) for folder in ("data", "held-out")] == [5, 5]


def test_every_data_set_is_in_the_table() -> None:
    table = DATA.split("## Data sets", 1)[1].split("## Splits", 1)[0]
    assert re.findall(r"^\| `([\w-]+)` \| (\w+)", table, re.M) == [
        (name, {"vqa": "questions", "captions": "captions"}[task_of(name)]) for name in names()
    ]
