"""What the README shows works as shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

from shell import untrigger

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quick_start_is_two_commands_that_make_knows() -> None:
    part = README.split("## Quick start", 1)[1]
    commands = part.split("```", 2)[1].split("\n")[1:-1]
    assert commands == ["make quickstart", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command.split()[1]}:", makefile, re.M) for command in commands)


def test_every_file_of_the_map_exists_and_every_module_is_on_it() -> None:
    table = README.split("## Map", 1)[1]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named: set[str] = set()
    for cell in first_cells:
        folder = ""
        for path in re.findall(r"`([^`]+)`", cell):
            folder = path.rpartition("/")[0] + "/" if "/" in path else folder
            full = path if "/" in path else folder + path
            assert (ROOT / full).exists(), full
            named.add(full.rstrip("/"))
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "src/untrigger").glob("*.py")}
    assert modules - named == {f"src/untrigger/{n}.py" for n in ("__init__", "__main__", "errors")}


def test_the_trigger_of_the_readme_works_by_path(tmp_path: Path, tiny_data: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    (own,) = (block for block in blocks if "ImageTrigger" in block)
    assert len(own.splitlines()) < 20
    file = tmp_path / "red_line.py"
    file.write_text(own)
    words = ("poison", tiny_data, "--attack", file, "--width", 0.1, "--rate", 0.25)
    assert untrigger(*words, "--out", tmp_path / "out").code == 0
    manifest = json.loads((tmp_path / "out" / "truth" / "manifest.json").read_text())
    assert manifest["attack"] == "red_line"
    assert manifest["attack_settings"] == {"width": 0.1}
    assert len(manifest["rows"]) == 6
