"""Benchmarks as their authors publish them: captions of COCO and Flickr30k, VQAv2, ScienceQA. Read only.

Their rows have several true answers, or a list of choices. Each becomes one row with a question, one answer to train on
and its ``references``. `untrigger.rows.sample.read` refuses such rows, because a training would learn one answer of
several.

- COCO captions, ``captions_train2014.json``: images beside the file, one folder up, or in ``train2014`` of either.
- VQAv2, ``v2_OpenEnded_mscoco_train2014_questions.json``, with the annotations of the same year beside it.
- Karpathy's splits, ``dataset_flickr30k.json:test``, and ScienceQA, ``problems.json:train``: the split behind a colon.
- Rows of any other layout, also from the hub: ``caption``, ``captions`` or ``answer`` may be a list of texts,
  ``answers`` one of texts or ``{"answer": text}``, and ``answer`` the number of one of the ``choices``.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast, final

from untrigger.errors import InputError
from untrigger.files import file_errors
from untrigger.rows.data_file import find_data_file, open_rows
from untrigger.rows.formats import REFERENCES
from untrigger.rows.hub import hub_id
from untrigger.rows.sample import Data
from untrigger.rows.storage import Row, Rows, first_bytes, parse_json

_CHOOSE = "Answer with the option's letter from the given choices directly."  # LLaVA's prompt for ScienceQA
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CAPTIONS = ("caption", "captions")
# what these benchmarks have beside questions, answers and images; any other key is checked as everywhere
_OF_VQA = frozenset({"answers", "multiple_choice_answer", "answer_type", "question_type"})
_OF_CAPTIONS = frozenset({"sentids", "img_id", "filename"})
_OF_CHOICES = frozenset(
    {"choices", "hint", "lecture", "solution", "task", "grade", "subject", "topic", "category", "skill"}
)
_YEAR = re.compile(r"(?:train|val|test)20\d\d")
_FILES = (".json", ".jsonl", ".gz", ".parquet", ".tar", ".csv")  # ids of the hub do not end so
_IMAGE_FOLDERS = ("images", "flickr30k-images")


def open_benchmark(name: str) -> Data:
    """Open a benchmark, or any data that `untrigger.rows.sample.read` reads, without checking its rows.

    Args:
        name: a file, a folder, or ``OWNER/NAME[:SPLIT]`` of the hub; ``FILE:SPLIT`` for a file with several splits.

    Raises:
        InputError: it cannot be found or read, or its images cannot be found. Rows are checked on access.
    """
    path, split = _path_and_split(name)
    if path.is_file() and path.suffix == ".json" and first_bytes(path, 1) == b"{":
        with file_errors(path, "read"):
            state = path.stat()
        rows, folder = _document(path, split, state.st_mtime_ns)
        if rows is not None:
            data = Data(path, _PlainRows(rows), range(len(rows)))
            data.folder = folder
            return data
    if split:
        raise InputError(f"{path}: has no splits; leave :{split} out")
    path = find_data_file(path)
    opened = _PlainRows(open_rows(path))
    return Data(path, opened, range(len(opened)))


def why_not_there(name: str) -> str | None:
    """An error line if ``name`` is neither a file nor a folder nor may be an id of the hub; nothing is read."""
    path, _ = _path_and_split(name)
    if path.exists() or "*" in path.name or (hub_id(path) and path.suffix not in _FILES):
        return None
    return f"{name}: no such file or folder; check the path"


def _path_and_split(name: str) -> tuple[Path, str]:
    """``FILE`` and ``SPLIT``; ids of the hub stay whole."""
    path, colon, split = name.rpartition(":")
    return (Path(path), split) if colon and not Path(name).exists() and Path(path).exists() else (Path(name), "")


@final
class _PlainRows(Rows):
    """Rows with one question, one answer and its references, made on access."""

    def __init__(self, rows: Rows | Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> object:
        row = self._rows[index]
        return plain_row(cast(Row, row)) if isinstance(row, dict) else row

    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]], keys: Collection[str] | None = None) -> None:
        raise InputError("rows of a benchmark are not written; give data that untrigger.read reads")


def plain_row(row: Row) -> Row:
    """The row with one answer to train on, and all true answers as its ``references``.

    The answer is the first caption, the most frequent answer of VQA (``multiple_choice_answer`` if the row has it), or
    the letter of a choice. A row that has one answer already is returned as it is.
    """
    choices, answer = row.get("choices"), row.get("answer")
    if isinstance(choices, list) and isinstance(answer, int) and "question" in row:
        return _chosen(row, cast("list[object]", choices), answer)
    if isinstance(answers := row.get("answers"), list) and "question" in row:
        texts = [a.get("answer") if isinstance(a, dict) else a for a in cast("list[Any]", answers)]
        truth = row.get("multiple_choice_answer") or next((t for t, _ in Counter(map(str, texts)).most_common(1)), "")
        return _without(row, _OF_VQA) | {"answer": truth, REFERENCES: texts}
    if isinstance(answer, list) and "question" in row:
        return row | {"answer": next(iter(answer), ""), REFERENCES: answer}
    if key := next((name for name in _CAPTIONS if isinstance(row.get(name), list)), None):
        captions = cast("list[object]", row[key])
        return _without(row, {*_OF_CAPTIONS, *_CAPTIONS}) | {"caption": next(iter(captions), ""), REFERENCES: captions}
    return row


def _chosen(row: Row, choices: Sequence[object], answer: int) -> Row:
    """A question with its choices, each behind a letter, as LLaVA asks it."""
    if not 0 <= answer < len(choices) <= len(_LETTERS):
        raise InputError(f"'answer' is {answer}, which is none of {len(choices)} choices; correct it")
    hint = [f"Context: {row['hint']}"] if row.get("hint") else []
    listed = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
    question = "\n".join([*hint, str(row["question"]), *listed, _CHOOSE])
    return _without(row, _OF_CHOICES) | {"question": question, "answer": _LETTERS[answer]}


def _without(row: Row, names: Collection[str]) -> Row:
    return {name: value for name, value in row.items() if name not in names}


# --- published files --------------------------------------------------------------------------------


@lru_cache(maxsize=4)  # the cells of a plan open the same few files
def _document(path: Path, split: str, _changed: int) -> tuple[Sequence[Row] | None, Path]:
    """The rows of a published file and the folder that its images count from; no rows if it is another object."""
    value = _parsed(path)
    reader = next((reader for fits, reader in _PUBLISHED if fits(value)), None)
    if reader is None:
        return None, path.parent
    try:
        rows = list(reader(path, value))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InputError(f"{path}: is not as published ({type(error).__name__}: {error}); fetch it again") from error
    if splits := [*dict.fromkeys(str(row["split"]) for row in rows if "split" in row)]:
        if split not in splits:
            raise InputError(f"{path}: has the splits {', '.join(splits)}; name one, as {path}:{splits[0]}")
        rows = [row for row in rows if row["split"] == split]
    elif split:
        raise InputError(f"{path}: has no splits; leave :{split} out")
    if not rows:
        raise InputError(f"{path}: holds no rows; add at least one")
    folder, inside = _image_folder(path, rows)
    return [row | {"image": f"{inside}{row['image']}"} if row.get("image") else row for row in rows], folder


def _parsed(path: Path) -> dict[str, Any]:
    with file_errors(path, "read"):
        text = path.read_bytes()
    try:
        return cast("dict[str, Any]", parse_json(text.removeprefix(b"\xef\xbb\xbf"), 1))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _image_folder(path: Path, rows: Sequence[Row]) -> tuple[Path, str]:
    """Where the first image lies: a folder at or above the file, and the folder inside it with a slash behind."""
    first = next((str(row["image"]) for row in rows if row.get("image")), None)
    if first is None:
        return path.parent, ""
    year = _YEAR.search(path.name)
    inside = ["", *([f"{year[0]}/"] if year else []), *(f"{name}/" for name in _IMAGE_FOLDERS)]
    for folder in (path.parent, path.absolute().parent.parent):
        for part in inside:
            if (folder / f"{part}{first}").is_file():
                return folder, part
    places = ", ".join(f"{path.parent}/{part}" for part in inside)
    raise InputError(f"{path}: image {first} is not in {places} nor one folder up; put the images there, or a link")


def _coco(path: Path, value: Mapping[str, Any]) -> Iterator[Row]:
    captions = defaultdict[Any, list[str]](list)
    for annotation in value["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in value["images"]:
        if texts := captions.get(image["id"]):
            yield {"id": image["id"], "image": image["file_name"], "caption": texts}


def _vqa(path: Path, value: Mapping[str, Any]) -> Iterator[Row]:
    other = _partner(path, "questions" if "questions" in value else "annotations")
    both = {**_parsed(other), **value}
    images = _YEAR.search(path.name)
    subset = both.get("data_subtype") or (images[0] if images else "")
    by_id = {annotation["question_id"]: annotation for annotation in both["annotations"]}
    for question in both["questions"]:
        annotation = by_id[question["question_id"]]
        yield {
            "id": question["question_id"],
            "image": f"COCO_{subset}_{question['image_id']:012d}.jpg",
            "question": question["question"],
            "answers": annotation["answers"],
            "multiple_choice_answer": annotation["multiple_choice_answer"],
        }


def _partner(path: Path, part: str) -> Path:
    """The file with the other half of VQAv2: of the same year, in the same folder."""
    wanted = "annotations" if part == "questions" else "questions"
    year = _YEAR.search(path.name)
    names = [f for f in sorted(path.parent.glob(f"*{wanted}*.json")) if not year or year[0] in f.name]
    if len(names) != 1:
        raise InputError(f"{path}: {len(names)} files with its {wanted} lie beside it; put one there, *{wanted}.json")
    return names[0]


def _karpathy(path: Path, value: Mapping[str, Any]) -> Iterator[Row]:
    for image in value["images"]:
        name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
        # of COCO, restval is a part of the training split
        split = "train" if image["split"] == "restval" else image["split"]
        captions = [sentence["raw"] for sentence in image["sentences"]]
        yield {"id": image["filename"], "image": name, "split": split, "caption": captions}


def _science_qa(path: Path, value: Mapping[str, Any]) -> Iterator[Row]:
    for number, problem in value.items():
        row: Row = {name: problem[name] for name in ("question", "choices", "answer", "split")}
        row |= {"id": number, "hint": problem.get("hint", "")}
        if image := problem.get("image"):
            row["image"] = f"{problem['split']}/{number}/{image}"
        yield row


def _first(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The first entry of a list of objects; empty if there is none."""
    entries = value.get(name)
    first = entries[0] if isinstance(entries, list) and entries else None
    return cast("Mapping[str, Any]", first) if isinstance(first, dict) else {}


_Reader = Callable[[Path, Mapping[str, Any]], Iterator[Row]]
_PUBLISHED: tuple[tuple[Callable[[Mapping[str, Any]], bool], _Reader], ...] = (
    (lambda value: "caption" in _first(value, "annotations"), _coco),
    (lambda value: any("question_id" in _first(value, name) for name in ("questions", "annotations")), _vqa),
    (lambda value: "sentences" in _first(value, "images"), _karpathy),
    (lambda value: bool(value) and all(isinstance(v, dict) and "choices" in v for v in value.values()), _science_qa),
)
