"""Run one cell: poison the data, fine-tune, evaluate, save.

The folder ``shared`` in the results stores every training that starts from the model itself
(`untrigger.training.stages`). Cells reuse it: the undefended model from which several defenses start, and an oracle
that several attacks share.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TrainingArguments

from untrigger import __version__
from untrigger.attacks import load_trigger
from untrigger.bench import store
from untrigger.bench.store import ORACLE, Cell
from untrigger.data import check_no_shared_image, load, own_rows, parts_of, rows_of_part
from untrigger.defenses import PRESETS, Defense
from untrigger.errors import InputError, did_you_mean
from untrigger.evaluation.evaluate import evaluate
from untrigger.evaluation.invariance import measure_invariance
from untrigger.files import file_lock, new_folder
from untrigger.metrics.asr import ASR_VERSION, attack_success_rate
from untrigger.metrics.detection import detection
from untrigger.metrics.score import outcomes
from untrigger.metrics.similarity import psnr, ssim
from untrigger.models.loading import LoadedModel, weights_sha256
from untrigger.poisoning.goals import load_goal
from untrigger.poisoning.poison import Attack, Poisoned, poison, stamped
from untrigger.rows.sample import Sample
from untrigger.training.schedule import clock
from untrigger.training.settings import arguments
from untrigger.training.stages import Stages
from untrigger.training.tuning import Tuning

SHARED = "shared"
_PAIRS = 32  # attacked images that are compared with their clean originals
_EXAMPLES = 6  # test rows whose images are stored
_CLEAN_DRAW = 1000  # added to the seed, so that the clean rows are another draw


class Material(NamedTuple):
    """The rows of a cell.

    Attributes:
        attack: the trigger and the goal.
        rows: the training rows before poisoning.
        poisoned: the poisoned data set and its manifest.
        data: the training rows after poisoning.
        test: held-out rows for the evaluation; of a mixture with a poisoned part those of this part.
        other_tests: the held-out rows of the other parts, by the part's name.
        clean_rows: rows known to be clean, for the defenses that need some; none is among ``rows``.
    """

    attack: Attack
    rows: Sequence[Sample]
    poisoned: Poisoned
    data: Sequence[Sample]
    test: Sequence[Sample]
    clean_rows: Sequence[Sample]
    other_tests: Mapping[str, Sequence[Sample]]

    @property
    def clean(self) -> list[Sample]:
        """The training rows that are neither poisoned nor decoys."""
        tampered = {entry.index for entry in (*self.poisoned.manifest.rows, *self.poisoned.manifest.decoys)}
        return [sample for row, sample in enumerate(self.data) if row not in tampered]


def run_cell(cell: Cell, root: Path) -> None:
    """Poison, fine-tune, evaluate and save one cell.

    An oracle also answers with wrong images, to show whether it uses the image at all.

    Raises:
        InputError: the cell names something unknown, or its attack does not apply to its data.
    """
    defense, tuning = defense_of(cell)
    material = material_of(cell)
    loaded, stages, training = _train(cell, material, defense, tuning, root / SHARED / "stages")
    attack, test, manifest = material.attack, material.test, material.poisoned.manifest
    started = clock()
    evaluation = evaluate(loaded, test, attack=attack, seed=cell.seed, wrong_image_control=cell.defense == ORACLE)
    asking = clock() - started
    metrics = {
        **evaluation.figures,
        "probes": {name: _probe(loaded, test, name, probe, cell.seed) for name, probe in cell.probes.items()},
        "similarity": _similarity(_pairs(material, cell.seed)),
        "attack": {"settings": manifest.attack_settings, "sha256": manifest.attack_sha256},
        "goal": manifest.goal_settings,
        "poisoned": len(manifest.rows),
        "decoys": len(manifest.decoys),
        "seconds": {"training": round(training, 1), "asking": round(asking, 1)},
        "weights": weights_sha256(cell.model),
        "machine": _machine(),
        "versions": _versions(),
        "examples": _examples(cell, material, root / SHARED / "examples"),
    }
    if material.other_tests:
        metrics["other_parts"] = {
            name: evaluate(loaded, rows, title=f"evaluating {name}").figures
            for name, rows in material.other_tests.items()
        }
    if attack.goal.beyond_oracle:
        metrics["met"] = _digits(outcomes(evaluation.triggered))
    if stages.scores:
        metrics["detection"] = detection(stages.scores, stages.flagged, {entry.index for entry in manifest.rows})
    poisoned = [material.data[entry.index] for entry in manifest.rows]
    if cell.defense == "plain" and poisoned and material.clean:
        metrics["premise"] = measure_invariance(loaded, material.clean[: cell.test_rows], poisoned, cell.seed)
    store.save(root, cell, metrics, evaluation.conditions)


def model_of(cell: Cell, root: Path) -> tuple[LoadedModel, Material]:
    """The trained model of a cell, and its rows. Trainings stored in ``root``'s folder ``shared`` are reused.

    Raises:
        InputError: as `run_cell`.
    """
    material = material_of(cell)
    return _train(cell, material, *defense_of(cell), root / SHARED / "stages")[0], material


def defense_of(cell: Cell) -> tuple[Defense, Tuning]:
    """The defense of a cell (plain for an oracle) and the tuning of its model.

    Raises:
        InputError: the defense, one of its fields or a field of the tuning is unknown or out of range.
    """
    preset = "plain" if cell.defense == ORACLE else cell.defense
    if preset not in PRESETS:
        names = [ORACLE, *PRESETS]
        raise InputError(f"defense {preset}: unknown; choose one of: {', '.join(names)}{did_you_mean(preset, names)}")
    try:
        return PRESETS[preset](**cell.defense_settings), Tuning(**cell.tuning)
    except (TypeError, ValueError) as error:
        raise InputError(f"defense {preset}, tuning: {error}") from error


# --- rows ------------------------------------------------------------------------------------------


def material_of(cell: Cell) -> Material:
    """The rows of a cell; those of the last one are stored.

    Raises:
        InputError: the cell names something unknown, or its attack does not apply to its data.
    """
    return _material(json.dumps(asdict(_bare(cell))))


def _bare(cell: Cell) -> Cell:
    """The cell with only the fields that determine its rows."""
    fields = ("data", "attack", "goal", "rate", "seed", "split", "attack_settings", "goal_text")
    fields = (*fields, "train_rows", "test_rows", "clean_rows", "poisoned_part", "own_data")
    return replace(Cell("", "", "", ""), **{name: getattr(cell, name) for name in fields})


@lru_cache(maxsize=1)  # consecutive cells mostly differ in the defense only
def _material(cell_json: str) -> Material:
    cell = Cell(**json.loads(cell_json))
    attack = _attack(cell.attack, cell.attack_settings, cell.goal, cell.goal_text)
    rows, test, clean_rows = (_own if cell.own_data else _bundled)(cell)
    among = rows_of_part(rows, cell.poisoned_part) if cell.poisoned_part else None
    poisoned = poison(rows, attack, rate=cell.rate, seed=cell.seed, among=among)
    data = [poisoned.data[i] for i in range(len(rows))]  # stamp the triggers once, not in every epoch
    other_tests: dict[str, list[Sample]] = {}
    if cell.poisoned_part:
        tests = {part.name: [test[row] for row in rows_of_part(test, part.name)] for part in parts_of(cell.data)}
        test = tests.pop(cell.poisoned_part)
        other_tests = tests
    return Material(attack, rows, poisoned, data, test, clean_rows, other_tests)


def _bundled(cell: Cell) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Rows to train on, rows to test on, and clean rows."""
    draw = partial(load, cell.data, cell.split)
    rows, test = draw("train", cell.train_rows, cell.seed), draw("test", cell.test_rows, cell.seed)
    used = {sample.id for sample in rows}
    candidates = draw("train", 2 * cell.clean_rows, cell.seed + _CLEAN_DRAW)
    return rows, test, [sample for sample in candidates if sample.id not in used][: cell.clean_rows]


def _own(cell: Cell) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """As `_bundled`, from the user's own data, which may have too few rows for clean ones."""
    draw = partial(own_rows, cell.own_data, cell.split)
    rows = draw("train", cell.train_rows, cell.seed, spare=cell.clean_rows)
    test = draw("test", cell.test_rows, cell.seed)
    check_no_shared_image(rows, test, cell.data)
    return rows[: cell.train_rows], test, rows[cell.train_rows :]


def _attack(name: str, settings: Mapping[str, Any], goal: str, goal_text: str | None = None) -> Attack:
    return Attack(load_trigger(name, **settings), load_goal(goal, goal_text))


def _pairs(material: Material, seed: int) -> list[tuple[Sample, Sample]]:
    """Pairs of a clean row and the same row after the attack."""
    rows, test, poisoned = material.rows, material.test, material.poisoned
    if material.attack.trigger.clean_label:  # a clean-label attack changes the images of training rows
        return [(rows[entry.index], poisoned.edits[entry.index]) for entry in poisoned.manifest.rows[:_PAIRS]]
    triggered = stamped(test, material.attack, seed)[:_PAIRS]
    return [(test[row], sample) for row, sample in zip(triggered.numbers, triggered, strict=True)]


def _examples(cell: Cell, material: Material, root: Path) -> str:
    """Store images of some test rows, clean and triggered, for the report. Returns the name of their folder."""
    name = hashlib.sha256(json.dumps(asdict(_bare(cell)), sort_keys=True).encode()).hexdigest()[:16]
    with file_lock(root / f"{name}.lock"):
        if not (root / name).exists():
            triggered = stamped(material.test, material.attack, cell.seed)[:_EXAMPLES]
            entries: list[dict[str, str]] = []
            with new_folder(root / name) as folder:
                for number, (row, sample) in enumerate(zip(triggered.numbers, triggered, strict=True)):
                    sample.images[0].convert("RGB").save(folder / f"{number}-triggered.png")
                    material.test[row].images[0].convert("RGB").save(folder / f"{number}-clean.png")
                    entries.append({"id": sample.id})
                (folder / "rows.json").write_text(json.dumps(entries), encoding="utf-8")
    return name


# --- training and evaluation -----------------------------------------------------------------------


def arguments_of(cell: Cell, out: Path) -> TrainingArguments:
    """The host's arguments for the training of a cell in the folder ``out``."""
    return arguments(
        out,
        save_strategy="no",
        seed=cell.seed,
        num_train_epochs=cell.epochs,
        per_device_train_batch_size=cell.batch_size,
        learning_rate=cell.learning_rate,
        bf16=cell.precision == "bf16",
        use_cpu=cell.precision == "bf16" and not torch.accelerator.is_available(),  # or TrainingArguments refuses
        **cell.arguments,
    )


def _train(
    cell: Cell, material: Material, defense: Defense, tuning: Tuning, shelf: Path
) -> tuple[LoadedModel, Stages, float]:
    """The model, its stages, and their training seconds, including those of stages that another cell trained."""
    rows = material.data
    if cell.defense == ORACLE:
        rows = material.clean
    with tempfile.TemporaryDirectory(prefix="untrigger-") as folder:
        args = arguments_of(cell, Path(folder, "model"))
        stages = Stages(cell.model, rows, args, tuning, clean_rows=material.clean_rows, shelf=shelf)
        started = clock()
        loaded = defense.fine_tune(stages)
        between = clock() - started - stages.waited
    return loaded, stages, stages.seconds + between


def _probe(
    loaded: LoadedModel, test: Sequence[Sample], name: str, probe: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """The ASR of another attack, with whose trigger the model was not trained: the floor of that attack."""
    attack = _attack(probe["attack"], probe["settings"], probe["goal"], probe.get("goal_text")).fitted(test, seed)
    rows = list(stamped(test, attack, seed))
    # the rows are triggered already, so the evaluation takes them for clean ones
    answers = evaluate(loaded, rows, title=f"probing with {name}").clean
    met = [attack.goal.met(answer.answer, row) for answer, row in zip(answers, rows, strict=True)]
    truth_met = [attack.goal.met(answer.truth, row) for answer, row in zip(answers, rows, strict=True)]
    figures: dict[str, Any] = {"asr": {**asdict(attack_success_rate(met, truth_met)), "version": ASR_VERSION}}
    if attack.goal.beyond_oracle:
        figures["met"] = _digits(hit for hit, already in zip(met, truth_met, strict=True) if not already)
    return figures


def _digits(hits: Iterable[bool]) -> str:
    """``0110``: row by row, for the difference to the oracle (`untrigger.bench.validity.beyond`)."""
    return "".join(str(int(hit)) for hit in hits)


# --- further figures -------------------------------------------------------------------------------


def _similarity(pairs: Iterable[tuple[Sample, Sample]]) -> dict[str, float | int | None]:
    """Mean PSNR (dB) and SSIM over pairs of clean and attacked images; None if no image is changed."""
    images = [
        (np.asarray(before.convert("RGB")), np.asarray(after.convert("RGB")))
        for clean, attacked in pairs
        for before, after in zip(clean.images, attacked.images, strict=True)
    ]
    changed = [pair for pair in images if (pair[0] != pair[1]).any()]
    means = [float(np.mean([metric(*pair) for pair in changed])) if changed else None for metric in (psnr, ssim)]
    return {"psnr": means[0], "ssim": means[1], "images": len(images), "changed": len(changed)}


def _machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": name, "threads": torch.get_num_threads()}


def _versions() -> dict[str, str]:
    hosts = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {"untrigger": __version__, "python": platform.python_version(), **hosts}
