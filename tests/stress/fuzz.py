"""Send thousands of damaged rows and images through every command: each is refused in one line or skipped.

    python tests/stress/fuzz.py [--rows 10000] [--seed 0] [--json FILE]

Every data file is read with both settings of ``--on-bad-row``, and no row may be lost. Some files go through poison,
scan, train, evaluate and verify as a user types them. Models, adapters, settings, plans and results are damaged too.
A command must end within its time with exit code 0, 2 or 3; with 2 it must say why in one line.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from containers import file
from damage import damaged, hurt, odd, small_results
from layouts import Drawn
from pictures import Pixels
from PIL import Image
from rich.console import Console

from untrigger.cli import main as cli
from untrigger.errors import InputError
from untrigger.files import write_text
from untrigger.models.loading import embedded_model_path
from untrigger.rows.sample import Data, Sample, read, write

ROWS = 20  # in a file
SECONDS = 120  # that a case may take
Content = tuple[str, list[tuple[str, str]], list[Pixels]]  # id, turns, pixels of the images
TINY = ("--max_steps", "1", "--per_device_train_batch_size", "4", "--save_strategy", "no")


class Fuzz:
    """Counts what came of each case, and keeps what was wrong."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.counts, self.wrong, self.seconds = Counter[str](), list[str](), dict[str, float]()

    def case(self, name: str, number: int, work: Callable[[random.Random, Path], str]) -> None:
        """One case in a folder of its own; ``work`` gives what came of it."""
        place = self.folder / name / str(number)
        place.mkdir(parents=True)
        started = time.perf_counter()
        try:
            with within(SECONDS):
                came = work(random.Random(f"{self.seed} {name} {number}"), place)
        except Exception:
            came = "wrong"
            self.wrong.append(f"{name} {number}: {traceback.format_exc()[-3000:]}")
            print(self.wrong[-1], flush=True)
        self.counts[f"{name}: {came}"] += 1
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 1)
        shutil.rmtree(place)


@contextmanager
def within(seconds: int) -> Generator[None]:
    """Raises TimeoutError in whatever takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def fuzz(folder: Path, rows: int, seed: int) -> Fuzz:
    """All of it; so many rows, and of everything else in proportion."""
    run = Fuzz(folder, seed)
    files = max(50, rows // ROWS)
    for number in range(rows // ROWS):
        run.case("read", number, reading)
    for number in range(files // 5):
        run.case("settings", number, settling)
        run.case("plan", number, planning)
        run.case("report", number, reporting)
    adapter = folder / "trained"
    example(random.Random(0), folder / "example")
    assert ended("train", folder / "example", "--out", adapter, "--defense", "plain", *TINY) == "done"
    for number in range(files // 25):
        run.case("model", number, lambda rng, place: modelling(rng, place, embedded_model_path()))
        run.case("adapter", number, lambda rng, place: modelling(rng, place, adapter))
        run.case("resume", number, lambda rng, place: resuming(rng, place, adapter))
    for number in range(files // 50):
        run.case("commands", number, commanding)
    return run


# --- data -------------------------------------------------------------------------------------------


def reading(rng: random.Random, place: Path) -> str:
    """A file is read; every row of it is either there, whole, or listed with a reason, and survives being written."""
    drawn = file(rng, place / "data", ROWS)
    strict = tried(lambda: read(drawn.path))
    listed = place / "skipped.jsonl"
    data = tried(lambda: read(drawn.path, on_bad_row="skip", skipped_to=listed))
    if isinstance(data, str):
        assert isinstance(strict, str), "read with no bad row, and refused with all"
        assert not any(row.turns for row in drawn.rows or ()), data
        return "refused"
    skipped = {each["row"] - 1: each["reason"] for each in map(json.loads, listed.read_bytes().splitlines())}
    assert isinstance(strict, str) == bool(skipped), strict
    assert len(data) + len(skipped) == len(data.rows) == (len(data.rows) if drawn.rows is None else len(drawn.rows))
    assert sorted([*data.numbers, *skipped]) == list(range(len(data.rows)))
    assert all(map(one_line, skipped.values()))
    contents = [*map(content, data)]
    if drawn.rows is not None:
        read_as_drawn(drawn.rows, dict(zip(data.numbers, contents, strict=True)), skipped)
    for name, edits in (("copy", None), ("new", {})):
        write(data, place / name, edits=edits)
        again = read(place / name)
        assert [*map(content, again)] == [*map(renumbered, data.numbers, contents, again)], name
    return "some skipped" if skipped else "whole"


def read_as_drawn(rows: list[Drawn], contents: dict[int, Content], skipped: dict[int, str]) -> None:
    """Sound rows are read to the letter and the pixel; rows with a key that matters are refused because of it."""
    for number, row in enumerate(rows):
        if row.turns is not None:
            assert number in contents, f"{skipped[number]}: {row.row}"
            id, turns, pictures = contents[number]
            assert (id, turns) == (row.id or str(number + 1), row.turns), row.row
            assert pictures == row.pictures, f"other pixels: {row.row}"
        elif row.refused:
            assert row.refused in skipped.get(number, "it was read"), f"{skipped.get(number)}: {row.row}"


def tried(work: Callable[[], Data]) -> Data | str:
    """What it gives, or the line that it refuses with."""
    try:
        return work()
    except InputError as error:
        assert one_line(str(error)), str(error)
        return str(error)


def one_line(text: str) -> bool:
    return text.isprintable() and 0 < len(text) < 2000


def content(sample: Sample) -> Content:
    """A row's id, its turns and the pixels of its images."""
    assert all(type(image) is Image.Image and image.mode == "RGB" for image in sample.images)
    turns = [(message.role, message.text) for message in sample.messages]
    return sample.id, turns, [(image.size, image.tobytes()) for image in sample.images]


def renumbered(number: int, content: Content, copy: Sample) -> Content:
    """A row without an id of its own is known by its number, which is another where rows were left out."""
    return (copy.id if content[0] == str(number + 1) else content[0], *content[1:])


def commanding(rng: random.Random, place: Path) -> str:
    """A file through every command that takes one; none may write over its data."""
    path = file(rng, place / "data", ROWS).path
    before = {p: p.read_bytes() for p in (place / "data").rglob("*") if p.is_file() and not p.is_symlink()}
    how = ("--on-bad-row", rng.choice(("skip", "skip", "skip", "error")))
    attack = ("--attack", rng.choice(("badnets", "blended", "sig", "wanet", "ftrojan", "addsent", "badword", "issba")))
    came = [ended("poison", path, "--out", place / "poisoned", "--rate", "0.3", *attack, *how)]
    came += [ended("scan", path, "--out", place / "scan", *TINY, *how)]
    came += [ended("train", path, "--out", place / "model", "--defense", rng.choice(("default", "paper")), *TINY, *how)]
    came += [ended("evaluate", "llava", path, "--out", place / "figures", "--limit", "6", *attack, *how)]
    if (place / "model" / "adapter_config.json").is_file():
        came += [ended("verify", place / "model", path, "--out", place / "audit", *how)]
    after = {p: p.read_bytes() for p in (place / "data").rglob("*") if p.is_file() and not p.is_symlink()}
    assert after == before, "the data was touched"
    return "done" if "done" in came else "refused"


def ended(*words: object) -> str:
    """A command as a user types it, in this process; how it ended."""
    out, err = StringIO(), StringIO()
    sys.argv = ["untrigger", *map(str, words)]
    code: Any = None
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as stopped:
        code = stopped.code or 0
    report = f"{' '.join(sys.argv)[:300]}\nexit code {code}\n{err.getvalue()[-2000:]}"
    assert code in (0, 2, 3), report
    assert "Traceback" not in err.getvalue(), report
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    if code != 2:
        assert not errors, report
        return "done"
    assert len(errors) == 1 and err.getvalue().endswith(f"{errors[0]}\n"), report
    return "refused"


# --- everything else that is read -------------------------------------------------------------------


def example(rng: random.Random, folder: Path) -> None:
    """Rows with nothing wrong."""
    while True:
        path = file(rng, folder, 200).path
        data = tried(lambda path=path: read(path, on_bad_row="skip"))
        if isinstance(data, Data) and len(data) > 20:
            write(data[:20], folder.with_name("whole"))
            shutil.rmtree(folder)
            shutil.move(folder.with_name("whole"), folder)
            return
        shutil.rmtree(folder)


def damaged_json(rng: random.Random, path: Path) -> None:
    if rng.random() < 0.3:
        path.write_bytes(hurt(rng, path.read_bytes()))
        return
    value = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 3))):
        value = damaged(rng, value)
    path.write_text(json.dumps(value))


def modelling(rng: random.Random, place: Path, good: Path) -> str:
    """A model's or an adapter's folder with one of its files damaged or gone."""
    shutil.copytree(good, place / "model")
    path = rng.choice(sorted(p for p in (place / "model").iterdir() if p.suffix in (".json", ".jinja", ".safetensors")))
    way = rng.random()
    if way < 0.1:
        path.unlink()
    elif way < 0.15:
        path.unlink()
        path.mkdir()
    elif path.suffix == ".json":
        damaged_json(rng, path)
    else:
        path.write_bytes(hurt(rng, path.read_bytes()))
    rows = place.parent.parent / "example"
    return ended("evaluate", place / "model", rows, "--limit", "2")


def resuming(rng: random.Random, place: Path, good: Path) -> str:
    """A run's folder with one of its files damaged, and gone on with."""
    shutil.copytree(good, place / "run")
    damaged_json(rng, rng.choice([place / "run" / name for name in ("untrigger.json", "trainer_state.json")]))
    rows = place.parent.parent / "example"
    return ended("train", rows, "--out", place / "run", "--defense", "plain", *TINY, "--resume")


def settling(rng: random.Random, place: Path) -> str:
    """Settings in YAML with odd values; nothing is trained, for the data is not there."""
    names = (
        "warmup_share",
        "min_nll",
        "max_scored_rows",
        "learning_rate",
        "max_steps",
        "seed",
        "optim",
        "report_to",
        "output_dir",
        "nope",
    )
    settings: Any = {rng.choice(names): odd(rng) for _ in range(rng.choice((1, 2)))}
    return ended("train", place / "gone.json", "--out", place / "out", "--config", yaml_file(rng, place, settings))


def planning(rng: random.Random, place: Path) -> str:
    """A plan with something wrong; its cells are listed, not run."""
    attacks = ["badnets", {"attack": "sig", "goal": "refusal", "settings": {"delta": 0.2}}]
    plan: Any = {"models": ["llava"], "data": ["easy-vqa"], "attacks": attacks, "defenses": ["paper"], "rates": [0.1]}
    plan |= {"seeds": [0], "split": "dev", "cell": {"train_rows": 8}, "where": {"sig/*/*": {"epochs": 4}}}
    for _ in range(rng.choice((1, 1, 2))):
        plan = damaged(rng, plan)
    return ended("bench", yaml_file(rng, place, plan), "--out", place / "out", "--dry-run")


def yaml_file(rng: random.Random, place: Path, value: Any) -> Path:
    path = place / "settings.yaml"
    try:
        content = yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass")
    except RecursionError:
        content = b"[" * 3000
    path.write_bytes(hurt(rng, content) if rng.random() < 0.2 else content)
    return path


def reporting(rng: random.Random, place: Path) -> str:
    """A folder of results, one of its files damaged."""
    small_results(rng, place / "results")
    path = rng.choice(sorted((place / "results").rglob("*.json")))
    damaged_json(rng, path)
    return ended("report", place / "results", "--out", place / f"report{rng.choice(('.md', '.json', '.html'))}")


def main(
    rows: Annotated[int, typer.Option(min=ROWS)] = 10_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option("--json", help="File for the counts.")] = None,
) -> None:
    """Feed it all; exit code 1 where something was wrong."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))  # a request for all memory fails at once
    with tempfile.TemporaryDirectory(prefix="untrigger-") as folder:
        run = fuzz(Path(folder), rows, seed)
    if out:
        write_text(
            out,
            json.dumps(
                {"rows": rows, "seed": seed, "cases": run.counts, "seconds": run.seconds, "wrong": run.wrong}, indent=2
            )
            + "\n",
        )
    Console().print(dict(sorted(run.counts.items())))
    if run.wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
