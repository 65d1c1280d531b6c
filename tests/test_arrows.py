"""Imports that must never exist, found in the source of every file (inside functions too)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import untrigger

ROOT = Path(untrigger.__file__).parent
# Folders from the top floor to the ground: imports go down this list only, and what stands in no folder is below it.
FLOORS = (
    "cli",
    "bench",
    "pretraining",
    "embedded",
    "scanning",
    "verification",
    "training",
    "evaluation",
    "poisoning",
    "defenses",
    "attacks",
    "models",
    "data",
    "rows",
    "views",
    "losses",
    "metrics",
)
RED = ("untrigger.attacks", "untrigger.poisoning")
BLUE = ("untrigger.defenses", "untrigger.training", "untrigger.scanning", "untrigger.verification")
# from -> never to; a name stands for the module and everything below it
ARROWS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("untrigger.losses", "untrigger.views"), ("untrigger", "transformers")),
    (BLUE, RED),
    (RED, ("untrigger.defenses", "untrigger.training")),
    (
        ("untrigger.metrics", "untrigger.bench.store", "untrigger.bench.report", "untrigger.bench.local"),
        ("torch", "transformers"),
    ),
    (("untrigger",), ("untrigger.cli",)),
)
ALLOWED = {("untrigger.__main__", "untrigger.cli")}
LATE = ("trl", "ray")  # extras: never at import time


class Import(NamedTuple):
    name: str  # "untrigger.views.View" for "from untrigger.views import View"
    line: int
    when: str  # "import", "call" (inside a function) or "typing" (under TYPE_CHECKING)


def imports(source: str, module: str, package: bool) -> list[Import]:
    return list(_walk(ast.parse(source), module, package, "import"))


def _walk(node: ast.AST, module: str, package: bool, when: str) -> Iterator[Import]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        when = "call"
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.body:
            yield from _walk(child, module, package, "typing")
        for child in node.orelse:
            yield from _walk(child, module, package, when)
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, when)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            home = module.split(".")[: len(module.split(".")) - node.level + package]
            base = ".".join([*home, *([base] if base else [])])
        for alias in node.names:
            yield Import(f"{base}.{alias.name}", node.lineno, when)
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func).rpartition(".")[2]
        first = node.args[0] if node.args else None
        if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
            yield Import(str(first.value), node.lineno, when)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, module, package, when)


def sources(root: Path) -> dict[str, list[Import]]:
    """Every module of the package with its imports."""
    imports_of: dict[str, list[Import]] = {}
    for file in sorted(root.rglob("*.py")):
        parts = [root.name, *file.relative_to(root).with_suffix("").parts]
        package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if package else parts)
        imports_of[module] = imports(file.read_text(encoding="utf-8"), module, package)
    return imports_of


def within(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def broken(imports_of: dict[str, list[Import]]) -> list[str]:
    """Each import that an arrow forbids, or that an extra's users alone may make."""
    complaints: list[str] = []
    for module, its in imports_of.items():
        for each in its:
            for sources_, targets in ARROWS:
                room = module if module.count(".") < 2 else module.rpartition(".")[0]
                is_own = within(each.name, [room])
                if within(module, sources_) and within(each.name, targets) and not is_own:
                    if any(module == a and within(each.name, [b]) for a, b in ALLOWED):
                        continue
                    complaints.append(f"{module}:{each.line} imports {each.name}")
            if within(each.name, LATE) and each.when == "import":
                complaints.append(f"{module}:{each.line} imports {each.name} at import time")
    return complaints


def links(imports_of: dict[str, list[Import]]) -> dict[str, list[str]]:
    """What each module pulls in itself, by any route but typing and the root's lazy names."""
    own = [module for module in imports_of if module != "untrigger"]
    return {
        module: [m for each in its if each.when != "typing" for m in own if within(each.name, [m])]
        for module, its in imports_of.items()
    }


def ties(imports_of: dict[str, list[Import]]) -> dict[str, list[str]]:
    """The files that each file names; a package's face, which hands names on, is none."""
    packages = {module.rpartition(".")[0] for module in imports_of}
    linked = links(imports_of)
    return {m: [other for other in linked[m] if other not in packages] for m in linked if m not in packages}


def reach(linked: dict[str, list[str]], start: str) -> set[str]:
    """``start`` and every module that it pulls in."""
    reached: set[str] = set()
    todo = [start]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += linked[module]
    return reached


def test_no_forbidden_import() -> None:
    assert broken(sources(ROOT)) == []


@pytest.mark.parametrize(("starts", "never"), [(BLUE, RED), (RED, ("untrigger.defenses", "untrigger.training"))])
def test_no_forbidden_route(starts: tuple[str, ...], never: tuple[str, ...]) -> None:
    linked = links(sources(ROOT))
    for module in (m for m in linked if within(m, starts)):
        assert not {m for m in reach(linked, module) if within(m, never)}, module


def folder_of(name: str, floors: Sequence[str] = FLOORS) -> str:
    """The folder that a module lies in; empty for what lies in none."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in floors else ""


def upward(imports_of: dict[str, list[Import]]) -> list[str]:
    """Each import from a folder to one above it, also where only types are meant."""
    height = {folder: -at for at, folder in enumerate(FLOORS)} | {"": -len(FLOORS)}
    return [
        f"{module}:{each.line} imports {each.name}"
        for module, its in imports_of.items()
        if module not in ("untrigger", "untrigger.__main__")  # the root hands names on, when they are asked for
        for each in its
        if within(each.name, ["untrigger"]) and height[folder_of(each.name)] > height[folder_of(module)]
    ]


def test_no_import_goes_up_between_folders() -> None:
    """A list that all imports go down has no circle between its folders either."""
    assert upward(sources(ROOT)) == []


def test_every_folder_has_a_floor_and_says_what_lives_there() -> None:
    folders = {path.parent for path in ROOT.rglob("*.py")} - {ROOT}
    assert {folder.relative_to(ROOT).parts[0] for folder in folders} == set(FLOORS)
    for folder in folders:
        sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert sentence and sentence.splitlines()[0].endswith("."), folder


def test_no_two_files_import_each_other() -> None:
    linked = ties(sources(ROOT))
    for module in linked:
        assert not any(module in reach(linked, other) for other in linked[module] if other != module), module


def test_the_checker_finds_a_way_up() -> None:
    source = "def f():\n    from untrigger.training.trainer import defended"
    assert len(upward({"untrigger.rows.bad": imports(source, "untrigger.rows.bad", False)})) == 1
    assert len(upward({"untrigger.files": imports("import untrigger.rows", "untrigger.files", False)})) == 1


def test_the_walk_sees_the_package() -> None:
    imports_of = sources(ROOT)
    assert {"untrigger", "untrigger.cli.main", "untrigger.metrics.asr", "untrigger.attacks.badnets"} <= set(imports_of)
    assert "untrigger.losses.objective" in reach(links(imports_of), "untrigger.training.trainer")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("untrigger.defenses.bad", "from untrigger.attacks.badnets import BadNets"),
        ("untrigger.defenses.bad", "def f():\n    import untrigger.poisoning"),
        ("untrigger.training.trainer", "from untrigger.poisoning import goals"),
        ("untrigger.training.trainer", "from .. import poisoning"),
        ("untrigger.defenses.bad", "from ..attacks import Trigger"),
        ("untrigger.scanning", "from importlib import import_module\nimport_module('untrigger.poisoning.goals')"),
        ("untrigger.attacks.bad", "if True:\n    from untrigger.defenses import CrossView"),
        (
            "untrigger.poisoning.goals",
            "if TYPE_CHECKING:\n    import untrigger.training",
        ),
        ("untrigger.losses.objective", "from untrigger.rows.sample import Sample"),
        ("untrigger.views.patches", "import transformers.utils"),
        ("untrigger.metrics.bad", "def f():\n    import torch"),
        ("untrigger.bench.report.page", "from transformers import Trainer"),
        ("untrigger.models.loading", "import trl"),
        ("untrigger.bench.sweep", "try:\n    from ray import remote\nexcept ImportError:\n    pass"),
        ("untrigger.bench.plan", "from untrigger import cli"),
        ("untrigger.bench.plan", "async def f():\n    from untrigger.cli.main import main"),
    ],
)
def test_the_checker_finds_a_bad_file(module: str, source: str) -> None:
    assert len(broken({module: imports(source, module, False)})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("untrigger.bench.sweep", "def f():\n    import ray"),
        ("untrigger.training.trainer", "if TYPE_CHECKING:\n    from trl import SFTTrainer"),
        ("untrigger.losses.chunked", "import torch\nfrom untrigger.losses import objective"),
        ("untrigger.__main__", "from untrigger.cli.main import main"),
        ("untrigger.poisoning.goals", "from untrigger.metrics.asr import matches"),
        ("untrigger.models.loading", "import trlx, arrays, untrigger.clique"),
    ],
)
def test_the_checker_leaves_good_files_alone(module: str, source: str) -> None:
    assert broken({module: imports(source, module, False)}) == []


def test_the_checker_finds_a_bad_route() -> None:
    imports_of = {
        "untrigger.training.trainer": imports("from untrigger.helper import x", "untrigger.training.trainer", False),
        "untrigger.helper": imports("def f():\n    from untrigger.attacks import badnets", "untrigger.helper", False),
        "untrigger.attacks": [],
        "untrigger.attacks.badnets": [],
    }
    assert {"untrigger.attacks", "untrigger.attacks.badnets"} <= reach(links(imports_of), "untrigger.training.trainer")


def test_neither_rescoring_nor_an_idle_worker_loads_torch() -> None:
    """The imports of the files say little about what *they* import: a fresh process shows."""
    code = (
        "import sys, untrigger.bench.local, untrigger.metrics.asr, untrigger.metrics.vqa\n"
        "from untrigger.metrics.captions import caption_scores\n"
        "from untrigger.metrics.detection import detection\n"
        "from untrigger.metrics.score import Answer, score\n"
        "caption_scores(['a dog', 'a cat'], ['a dog', 'the cat'])\n"
        "score([Answer('1', 'q', 'a red cat', 'a cat')] * 2, [Answer('1', 'q', 'no', 'boo', met=True)])\n"
        "detection([0.1, 0.2, 0.3], [1], {1})\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_no_extra_is_loaded_with_the_trainer() -> None:
    code = (
        "import sys, untrigger.training.finetune, untrigger.cli.quickstart, untrigger.cli.main\n"
        "print([m for m in ('trl', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "[]\n"
