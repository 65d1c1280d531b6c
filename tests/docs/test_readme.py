"""What the README shows works as shown, and CONTRIBUTING maps the package."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_quick_start_is_two_commands_that_make_knows() -> None:
    part = README.split("## Quick start", 1)[1]
    commands = part.split("```", 2)[1].split("\n")[1:-1]
    assert commands == ["make quickstart", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command.split()[1]}:", makefile, re.M) for command in commands)


def test_every_file_of_the_map_exists_and_every_module_is_on_it() -> None:
    table = CONTRIBUTING.split("## Map", 1)[1].split("\n## ", 1)[0]
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
    assert modules - named == {f"src/untrigger/{n}.py" for n in ("__init__", "__main__")}
