"""The JSON Schemas of the package describe what the verbs write, and refuse what they do not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from transformers import Trainer

import untrigger as package
from shell import untrigger
from untrigger.defenses import SharedSurprise
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.grafted_rows import HERE
from untrigger.models.loading import add_lora
from untrigger.rows.sample import read
from untrigger.scanning.cues import Cue
from untrigger.scanning.findings import Effect, Findings, Target, Verdict
from untrigger.scanning.write import write as write_scan
from untrigger.training.flagged_rows import FlaggedRow
from untrigger.training.settings import arguments
from untrigger.verification.completions import PLACES, Completion
from untrigger.verification.page import write as write_audit
from untrigger.verification.perturbations import perturbations
from untrigger.verification.verify import Audit, Finding, PerturbationHit
from untrigger.views.grafts import KINDS

SCHEMAS = {name: json.loads((files("untrigger") / f"schemas/{name}.schema.json").read_text("utf-8"))
           for name in ("flagged_rows", "all_rows", "audit")}  # fmt: skip
EAGER = {"min_nll": 0.1, "iqr_factor": 0.0, "p_value": 1 - 1e-6, "min_ratio": 0.0}  # flags a quarter of any rows
REPLY = "Backdoor Attack! Call us now, my friend, and win a free holiday today"
FLAGGED = asdict(FlaggedRow(3, True, None, ["a.png"], ["what?", "sure?"], 9.5, "Call", ["Call us", "yes"]))
SCANNED = {
    "row": 1, "id": "a", "suspected": True, "score": 12.5, "target": "Call us", "fdr": 0.01, "flagged_text": "Call",
    "image_cue": 7.25, "prompt_cue": -0.1, "harmful_part": "top left", "harmed_row": 4, "probability": 0.0,
    "control": 1.0, "cells": [[[0.5] * 8] * 8], "words": [{"word": "what", "nats": 0.1}],
}  # fmt: skip
COMPLETION = Completion("end", 0, "Call us", "us", "Call us now", (3, 4), 0.75, 0.5, 80.0)
AUDIT = Audit([Finding("Call us", [COMPLETION], [PerturbationHit("a patch", 4, 12)])], 8.0, 0.0, 24, 12)


def faults(name: str, record: Mapping[str, Any]) -> list[str]:
    return [error.message for error in Draft202012Validator(SCHEMAS[name]).iter_errors(record)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def assert_described(name: str, path: Path) -> list[dict[str, Any]]:
    rows = lines(path)
    assert rows
    assert [faults(name, row) for row in rows] == [[]] * len(rows)
    return rows


# --- what is written --------------------------------------------------------------------------------


def test_rows_flagged_by_train(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    flags = [word for name, value in EAGER.items() for word in (f"--{name}", value)]
    words = ("--max_steps", 4, "--per_device_train_batch_size", 8, "--warmup-share", 0.25, *flags)
    ended = untrigger("train", tiny_data, "--model", tiny_model, "--out", tmp_path, "--defense", "words", *words)
    assert ended.code == 0, ended.err
    assert_described("flagged_rows", tmp_path / "flagged_rows.jsonl")


@pytest.mark.parametrize("has_id", [True, False])
def test_rows_flagged_in_a_host(has_id: bool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    rows, loaded = Rows(read(tiny_data)), package.load(tiny_model)
    dataset = [rows[at] if has_id else {**rows[at], "id": None} for at in range(len(rows))]
    args = arguments(tmp_path, max_steps=4, per_device_train_batch_size=8, save_strategy="no")
    trainer = package.defended(Trainer)(
        add_lora(loaded.model),
        args=args,
        train_dataset=dataset,
        data_collator=ChatCollator(loaded.processor),
        defense=SharedSurprise(warmup_share=0.25, **EAGER),
    )
    trainer.train()
    ids = [row["id"] for row in assert_described("flagged_rows", tmp_path / "flagged_rows.jsonl")]
    assert all(id is not None for id in ids) if has_id else ids == [None] * len(ids)


def test_rows_of_a_scan(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    bad = ("poison", tiny_data, "--out", tmp_path / "bad", "--rate", 0.21, "--side", 0.5, "--goal-text", REPLY)
    assert untrigger(*bad).code == 0
    settings = ("--max_steps", 20, "--per_device_train_batch_size", 4, "--learning_rate", "1e-3")
    words = ("scan", tmp_path / "bad/data", "--model", tiny_model, "--out", tmp_path / "scan", *settings)
    assert untrigger(*words).code == 3
    rows = assert_described("all_rows", tmp_path / "scan/all_rows.jsonl")
    assert {row["suspected"] for row in rows} == {True, False} == {row["cells"] is None for row in rows}


def test_rows_of_a_scan_that_share_no_text(tiny_data: Path, tmp_path: Path) -> None:
    rows = read(tiny_data)
    cue = Cue(7.0, 0.1, [np.ones((8, 8), np.float32)], [("what", 0.5)])
    rest = [Verdict(at + 1, rows[at].id, 0.0) for at in range(2, len(rows))]
    suspects = [
        Verdict(1, rows[0].id, 12.34567, 0, 0.02, "circle", cue, Effect(next(iter(KINDS)), 5, 1e-9, 0.99)),
        Verdict(2, rows[1].id, 9.0, 0, 1.0),
    ]
    write_scan(
        Findings([*suspects, *rest], [Target("", 1e-120, [0, 1], None, 1e-4, [dict.fromkeys((0, 1), HERE)])]),
        rows,
        tmp_path,
    )
    first, *_ = assert_described("all_rows", tmp_path / "all_rows.jsonl")
    assert (first["target"], first["harmed_row"], first["cells"][0][0][0]) == ("", 6, 1.0)


def test_an_audit_with_a_finding_and_one_without(
    tuned_model: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = perturbations()[:2]  # the answers of an untrained model are long
    monkeypatch.setattr("untrigger.verification.verify.perturbations", lambda: few)
    words = ("verify", tuned_model, tiny_data, "--base", tiny_model, "--out")
    assert untrigger(*words, tmp_path / "none").code == 0
    monkeypatch.setattr("untrigger.verification.verify.completions", lambda *_: [COMPLETION])
    assert untrigger(*words, tmp_path / "one").code == 3
    for out, count in (("none", 0), ("one", 1)):
        record = json.loads((tmp_path / out / "audit.json").read_text("utf-8"))
        assert faults("audit", record) == [] and len(record["findings"]) == count


# --- what is refused --------------------------------------------------------------------------------


def audit_record(folder: Path) -> dict[str, Any]:
    write_audit(AUDIT, "model", "base", folder)
    return json.loads((folder / "audit.json").read_text("utf-8"))


@pytest.fixture
def record_of(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """A valid record of each schema, with no field empty."""
    records = {"flagged_rows": FLAGGED, "all_rows": SCANNED, "audit": audit_record(tmp_path)}
    return lambda name: json.loads(json.dumps(records[name]))


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_missing_key_and_an_unknown_one_are_refused(name: str, record_of: Callable[[str], dict[str, Any]]) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    record = record_of(name)
    assert faults(name, record) == []
    for key in record:
        assert faults(name, {other: value for other, value in record.items() if other != key}), key
        assert faults(name, {**record, key: {"no": "value"}}), key
    assert faults(name, {**record, "more": 1})


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("flagged_rows", {"row": 0}),
        ("flagged_rows", {"row": 1.5}),
        ("flagged_rows", {"answers": "yes"}),
        ("flagged_rows", {"images": [""]}),
        ("flagged_rows", {"prompts": [None]}),
        ("flagged_rows", {"reordered": None}),
        ("flagged_rows", {"flagged_text": None}),
        ("all_rows", {"score": -1}),
        ("all_rows", {"fdr": 0}),
        ("all_rows", {"suspected": False}),
        ("all_rows", {"target": None}),
        ("all_rows", {"probability": 1.1}),
        ("all_rows", {"cells": [[[0.5] * 8] * 7]}),
        ("all_rows", {"cells": [[[0.5] * 9] * 8]}),
        ("all_rows", {"words": [{"word": "what"}]}),
        ("audit", {"suspicious": False}),
        ("audit", {"findings": []}),
        ("audit", {"findings": [{"text": "Call us", "completions": [{"place": "end"}], "hits": []}]}),
        ("audit", {"rows": 0}),
    ],
)
def test_a_wrong_value_is_refused(
    name: str, changed: dict[str, Any], record_of: Callable[[str], dict[str, Any]]
) -> None:
    assert faults(name, {**record_of(name), **changed})


def test_the_schemas_name_the_fields_of_the_results() -> None:
    parts = SCHEMAS["audit"]["$defs"]
    assert parts["completion"]["properties"]["place"]["enum"] == [*PLACES]
    for schema, kind in (
        (SCHEMAS["flagged_rows"], FlaggedRow),
        (parts["finding"], Finding),
        (parts["completion"], Completion),
        (parts["hit"], PerturbationHit),
    ):
        assert [*schema["properties"]] == schema["required"] == [field.name for field in fields(kind)]
