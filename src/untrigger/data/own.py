"""A user's own data in a plan: files, folders or hub ids to train on and to test on, with a task and a metric."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, get_args

import numpy as np

from untrigger.data.catalog import SplitName, Task
from untrigger.errors import InputError, did_you_mean
from untrigger.rows.benchmarks import open_benchmark
from untrigger.rows.formats import Picture
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import Sample

METRICS: Final[Mapping[str, Task | None]] = {  # the figure of quality, and the task that it is limited to
    "vqa_accuracy": "vqa",
    "cider": None,
    "bleu4": None,
    "meteor": None,
    "rouge_l": None,
}
USUAL_METRIC: Final[Mapping[Task, str]] = {"vqa": "vqa_accuracy", "captions": "cider"}
_KEYS: Final = ("train", "test", "task", "metric")
_REFERENCES: Final = (0, 1, 10)  # true answers for which the accuracy of VQA is defined; 0: the answer is the only one


def own_data(entry: Mapping[str, Any]) -> dict[str, str]:
    """Check an entry and fill in its metric: ``train``, ``test``, ``task`` and ``metric``.

    Raises:
        InputError: a key is missing or unknown, or a value is.
    """
    entry = {"metric": USUAL_METRIC.get(entry.get("task", ""), ""), **entry}
    if unknown := next((str(key) for key in entry if key not in _KEYS), None):
        raise InputError(f"{unknown} is unknown; give name, {', '.join(_KEYS)}{did_you_mean(unknown, _KEYS)}")
    for key in _KEYS[:3]:
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise InputError(f"{key} is missing; give name, train, test (files, folders or OWNER/NAME) and task")
    task, metric = entry["task"], entry["metric"]
    if task not in get_args(Task):
        raise InputError(f"task is {task!r}; write vqa or captions")
    fitting = [name for name, limited_to in METRICS.items() if limited_to in (None, task)]
    if metric not in fitting:
        raise InputError(f"metric is {metric!r}; for the task {task} choose one of: {', '.join(fitting)}")
    return {key: entry[key] for key in _KEYS}


def own_rows(
    files: Mapping[str, str], split: SplitName, part: str, rows: int, seed: int, spare: int = 0
) -> list[Sample]:
    """Draw rows that have an image, without replacement, and open their images.

    A hash of its first image decides whether a row belongs to ``dev`` or to ``report``, so the two share no image: of
    the path in the row, or of the bytes where the row holds them. Only the rows that are drawn are read.

    Args:
        files: what `own_data` returned.
        part: ``train`` or ``test``.
        rows: how many rows to draw. ``spare``: how many more, if there are as many.

    Raises:
        InputError: the data has fewer rows, cannot be read, or a drawn row is bad; or the task is ``vqa`` and a test
            row has neither one nor ten true answers.
    """
    data = open_benchmark(files[part])
    drawn: list[Sample] = []
    for number in map(int, np.random.default_rng(seed).permutation(len(data))):
        if len(drawn) == rows + spare:
            break
        pictures = data.entry(number).pictures
        if not pictures or _split_of(pictures[0]) != split:
            continue
        sample = data[number]
        if part == "test" and files["task"] == "vqa" and len(sample.references) not in _REFERENCES:
            count = len(sample.references)
            raise InputError(
                f"{data.path}: row {number + 1}: has {count} true answers; accuracy is defined for one and for ten"
            )
        drawn.append(sample)
    if len(drawn) < rows:
        raise InputError(
            f"{files[part]}: has {len(drawn)} rows with an image in the split {split}, and {rows} are wanted; "
            f"set {part}_rows lower"
        )
    return drawn


def check_no_shared_image(train: Sequence[Sample], test: Sequence[Sample], name: str) -> None:
    """Check that no drawn test row shows an image of a training row.

    Raises:
        InputError: one does.
    """
    trained = {pixels_sha256(image) for sample in train for image in sample.images}
    shared = [sample.id for sample in test if any(pixels_sha256(image) in trained for image in sample.images)]
    if shared:
        raise InputError(
            f"data {name}: {len(shared)} test rows show an image that is trained on, id {shared[0]} first; "
            "remove them from train or from test"
        )


def _split_of(picture: Picture) -> SplitName:
    content = picture.encode() if isinstance(picture, str) else picture
    return "dev" if hashlib.sha256(content).digest()[0] % 2 else "report"
