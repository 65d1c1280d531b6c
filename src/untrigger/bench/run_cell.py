"""One cell of the gauntlet: poison, fine-tune, ask, save. What cells have in common is done once.

Below the results, ``shared`` keeps every training that starts from a model itself (`untrigger.training.stages`):
the undefended model that several defenses go on from, the oracle that several attacks have in common.
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

from untrigger import __version__
from untrigger.attacks import load_trigger
from untrigger.bench import store
from untrigger.bench.store import ORACLE, Cell
from untrigger.data import load
from untrigger.defenses import PRESETS, Defense
from untrigger.errors import InputError
from untrigger.evaluation.evaluate import evaluate
from untrigger.evaluation.invariance import measure_invariance
from untrigger.files import locked, new_folder
from untrigger.metrics.asr import ASR_VERSION, attack_success_rate
from untrigger.metrics.detection import detection
from untrigger.metrics.similarity import psnr, ssim
from untrigger.models.loading import LoadedModel, weights_sha256
from untrigger.poisoning.goals import load_goal
from untrigger.poisoning.poison import Attack, Poisoned, poison, stamped
from untrigger.rows.sample import Sample
from untrigger.training.schedule import clock
from untrigger.training.settings import arguments
from untrigger.training.stages import Stages, Tuning

SHARED = "shared"
_PAIRS = 32  # attacked images that are compared with their clean selves
_SHOWN = 6  # test rows that are kept as pictures
_CLEAN_DRAW = 1000  # added to the seed: rows known to be clean come from a draw of their own


class Material(NamedTuple):
    """The rows of a cell: poisoned ones to train on, held-out ones to ask, and some that are known to be clean."""

    attack: Attack
    rows: Sequence[Sample]
    poisoned: Poisoned
    data: Sequence[Sample]
    test: Sequence[Sample]
    clean_rows: Sequence[Sample]

    @property
    def clean(self) -> list[Sample]:
        """The training rows that the attack left alone; its decoys are not among them."""
        tampered = {entry.index for entry in (*self.poisoned.manifest.rows, *self.poisoned.manifest.decoys)}
        return [sample for row, sample in enumerate(self.data) if row not in tampered]


def run_cell(cell: Cell, root: Path) -> None:
    """Poison, fine-tune, ask and save one cell; an oracle is also asked with wrong images (does it look?).

    Raises:
        InputError: the cell names something that is not there, or its attack cannot be made on its data.
    """
    defense, tuning = defense_of(cell)
    material = _material(json.dumps(asdict(_bare(cell))))
    loaded, stages, training = _train(cell, material, defense, tuning, root / SHARED / "stages")
    attack, test, manifest = material.attack, material.test, material.poisoned.manifest
    asked = clock()
    evaluation = evaluate(loaded, test, attack=attack, seed=cell.seed, wrong_image_control=cell.defense == ORACLE)
    asking = clock() - asked
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
    if stages.scores:
        metrics["detection"] = detection(stages.scores, stages.flagged, {entry.index for entry in manifest.rows})
    poisoned = [material.data[entry.index] for entry in manifest.rows]
    if cell.defense == "plain" and poisoned and material.clean:
        metrics["premise"] = measure_invariance(loaded, material.clean[: cell.test_rows], poisoned, cell.seed)
    store.save(root, cell, metrics, evaluation.conditions)


def model_of(cell: Cell, root: Path) -> tuple[LoadedModel, Material]:
    """The finished model of a cell, and its rows; what ``shared`` below ``root`` still holds is not trained again.

    Raises:
        InputError: as `run_cell`.
    """
    material = _material(json.dumps(asdict(_bare(cell))))
    return _train(cell, material, *defense_of(cell), root / SHARED / "stages")[0], material


def defense_of(cell: Cell) -> tuple[Defense, Tuning]:
    """The defense of a cell, of an oracle the plain one, and how its model is adapted.

    Raises:
        InputError: the cell names a defense, or a field of it or of the tuning, that is not there.
    """
    preset = "plain" if cell.defense == ORACLE else cell.defense
    if preset not in PRESETS:
        raise InputError(f"defense {preset}: unknown; choose one of: {ORACLE}, {', '.join(PRESETS)}")
    try:
        return PRESETS[preset](**cell.defense_settings), Tuning(**cell.tuning)
    except (TypeError, ValueError) as error:
        raise InputError(f"defense {preset}, tuning: {error}") from error


# --- rows ------------------------------------------------------------------------------------------


def _bare(cell: Cell) -> Cell:
    """What its rows depend on, and no more."""
    kept = ("data", "attack", "goal", "rate", "seed", "split", "attack_settings", "goal_text")
    kept = (*kept, "train_rows", "test_rows", "clean_rows")
    return replace(Cell("", "", "", ""), **{name: getattr(cell, name) for name in kept})


@lru_cache(maxsize=1)  # cells that follow one another mostly differ in the defense
def _material(told: str) -> Material:
    cell = Cell(**json.loads(told))
    attack = _attack(cell.attack, cell.attack_settings, cell.goal, cell.goal_text)
    draw = partial(load, cell.data, cell.split)
    rows, test = draw("train", cell.train_rows, cell.seed), draw("test", cell.test_rows, cell.seed)
    poisoned = poison(rows, attack, rate=cell.rate, seed=cell.seed)
    data = [poisoned.data[i] for i in range(len(rows))]  # stamped once, not once an epoch
    used = {sample.id for sample in rows}
    others = draw("train", 2 * cell.clean_rows, cell.seed + _CLEAN_DRAW)
    clean_rows = [sample for sample in others if sample.id not in used][: cell.clean_rows]
    return Material(attack, rows, poisoned, data, test, clean_rows)


def _attack(name: str, settings: Mapping[str, Any], goal: str, goal_text: str | None = None) -> Attack:
    return Attack(load_trigger(name, **settings), load_goal(goal, goal_text))


def _pairs(material: Material, seed: int) -> list[tuple[Sample, Sample]]:
    """Clean rows and what the attack makes of them."""
    rows, test, poisoned = material.rows, material.test, material.poisoned
    if material.attack.trigger.clean_label:  # what it changes is the training rows: nobody tells them by their answers
        return [(rows[entry.index], poisoned.edits[entry.index]) for entry in poisoned.manifest.rows[:_PAIRS]]
    triggered = stamped(test, material.attack, seed)[:_PAIRS]
    return [(test[row], sample) for row, sample in zip(triggered.numbers, triggered, strict=True)]


def _examples(cell: Cell, material: Material, root: Path) -> str:
    """Name of a folder with some test rows, clean and triggered, for people to look at."""
    name = hashlib.sha256(json.dumps(asdict(_bare(cell)), sort_keys=True).encode()).hexdigest()[:16]
    with file_lock(root / f"{name}.lock"):
        if not (root / name).exists():
            triggered = stamped(material.test, material.attack, cell.seed)[:_SHOWN]
            told: list[dict[str, str]] = []
            with new_folder(root / name) as folder:
                for number, (row, sample) in enumerate(zip(triggered.numbers, triggered, strict=True)):
                    sample.images[0].convert("RGB").save(folder / f"{number}-triggered.png")
                    material.test[row].images[0].convert("RGB").save(folder / f"{number}-clean.png")
                    told.append({"id": sample.id})
                (folder / "rows.json").write_text(json.dumps(told), encoding="utf-8")
    return name


# --- training and asking ---------------------------------------------------------------------------


def _train(
    cell: Cell, material: Material, defense: Defense, tuning: Tuning, shelf: Path
) -> tuple[LoadedModel, Stages, float]:
    """The model, its stages, and the seconds that they took, also where another cell has spent them."""
    rows = material.data
    if cell.defense == ORACLE:
        rows = material.clean
    with tempfile.TemporaryDirectory(prefix="untrigger-") as folder:
        args = arguments(
            Path(folder, "model"),
            save_strategy="no",
            seed=cell.seed,
            num_train_epochs=cell.epochs,
            per_device_train_batch_size=cell.batch_size,
            learning_rate=cell.learning_rate,
            bf16=cell.precision == "bf16",
            use_cpu=cell.precision == "bf16" and not torch.accelerator.is_available(),  # the host wants to be told
        )
        stages = Stages(cell.model, rows, args, tuning, clean_rows=material.clean_rows, shelf=shelf)
        started = clock()
        loaded = defense.fine_tune(stages)
        between = clock() - started - stages.waited
    return loaded, stages, stages.seconds + between


def _probe(
    loaded: LoadedModel, test: Sequence[Sample], name: str, probe: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """How often the model answers as an attacker wants to a trigger it never saw: the floor of that attack."""
    attack = _attack(probe["attack"], probe["settings"], probe["goal"], probe.get("goal_text"))
    rows = list(stamped(test, attack, seed))
    said = evaluate(loaded, rows, title=f"probing with {name}").clean  # its answers to triggered inputs, and no others
    met = [attack.goal.met(answer.answer, row) for answer, row in zip(said, rows, strict=True)]
    truth_met = [attack.goal.met(answer.truth, row) for answer, row in zip(said, rows, strict=True)]
    return {"asr": {**asdict(attack_success_rate(met, truth_met)), "version": ASR_VERSION}}


# --- what is told beside the figures ---------------------------------------------------------------


def _similarity(pairs: Iterable[tuple[Sample, Sample]]) -> dict[str, float | int | None]:
    """Mean PSNR (dB) and SSIM over pairs of clean and attacked images; None where no pixel is changed in any."""
    images = [
        (np.asarray(before.convert("RGB")), np.asarray(after.convert("RGB")))
        for clean, attacked in pairs
        for before, after in zip(clean.images, attacked.images, strict=True)
    ]
    changed = [pair for pair in images if (pair[0] != pair[1]).any()]
    means = [float(np.mean([of(*pair) for pair in changed])) if changed else None for of in (psnr, ssim)]
    return {"psnr": means[0], "ssim": means[1], "images": len(images), "changed": len(changed)}


def _machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": name, "threads": torch.get_num_threads()}


def _versions() -> dict[str, str]:
    hosts = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {"untrigger": __version__, "python": platform.python_version(), **hosts}
