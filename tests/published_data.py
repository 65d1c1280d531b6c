"""Small folders in the layouts of published benchmarks: COCO captions, VQAv2, Flickr30k, ScienceQA.

Their images and answers are those of the bundled scenes and of easy-vqa.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from untrigger.data import load
from untrigger.rows.sample import IMAGE_TAG, Sample

TRAIN, VAL = "train2014", "val2014"


def coco_captions(folder: Path, year: str, rows: int) -> Path:
    """``annotations/captions_YEAR.json`` with five captions an image, and the images in ``YEAR/``."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / year).mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(_scenes(year, rows), 1):
        name = f"COCO_{year}_{number:012d}.jpg"
        sample.images[0].save(folder / year / name, quality=95)
        images.append(
            {"id": number, "file_name": name, "height": 64, "width": 64, "license": 3, "coco_url": "http://a"}
        )
        annotations += [
            {"image_id": number, "id": 10 * number + k, "caption": text}
            for k, text in enumerate(five_captions(sample.messages[-1].text, number))
        ]
    annotations.sort(key=lambda annotation: annotation["id"] % 10)  # the captions of an image lie apart
    return _written(
        folder / f"annotations/captions_{year}.json",
        {"info": {}, "licenses": [], "images": images, "annotations": annotations},
    )


def five_captions(text: str, number: int) -> list[str]:
    """The first one is the scene's; every eighth speaks of a pizza too."""
    text += " near a pizza" * (number % 8 == 0)
    return [text, f"{text.capitalize()}.", f"there is {text}", text.replace(" and ", " with "), f"An image of {text}"]


def vqa(folder: Path, year: str, rows: int) -> Path:
    """Questions and annotations of VQAv2 with ten answers, of which seven are right; the images in ``YEAR/``."""
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / year).mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(load("easy-vqa", part=_part(year), rows=rows), 100_001):
        sample.images[0].save(folder / year / f"COCO_{year}_{number:012d}.jpg", quality=95)
        question, truth = sample.messages[0].text.replace(f"{IMAGE_TAG}\n", ""), sample.messages[-1].text
        ids = {"image_id": number, "question_id": 1000 * number}
        votes = ["unsure", *[truth] * 7, "dont know", "blue"]
        answers = [{"answer": a, "answer_confidence": "yes", "answer_id": k} for k, a in enumerate(votes, 1)]
        questions.append({**ids, "question": question})
        facts = {"question_type": "what", "answer_type": "other", "multiple_choice_answer": truth, "answers": answers}
        annotations.append(facts | ids)
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": year}
    _written(folder / f"v2_mscoco_{year}_annotations.json", {**head, "annotations": annotations})
    return _written(folder / f"v2_OpenEnded_mscoco_{year}_questions.json", {**head, "questions": questions})


def flickr(folder: Path, rows: int) -> Path:
    """Karpathy's ``dataset_flickr30k.json`` with the splits train and test, and ``flickr30k-images/``."""
    (folder / "flickr30k-images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    for part in ("train", "test"):
        for number, sample in enumerate(load("scenes-captions", part=part, rows=rows)):
            name = f"{part}-{number}.jpg"
            sample.images[0].save(folder / "flickr30k-images" / name)
            texts = five_captions(sample.messages[-1].text, number)
            sentences = [
                {"raw": text, "tokens": text.split(), "imgid": number, "sentid": k} for k, text in enumerate(texts)
            ]
            images.append({"filename": name, "imgid": number, "split": part, "sentences": sentences, "sentids": [0]})
    return _written(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def science_qa(folder: Path, rows: int) -> Path:
    """``problems.json`` with choices; every third problem has no image. The images are in ``SPLIT/ID/image.png``."""
    problems: dict[str, Any] = {}
    colors = ["red", "green", "blue", "yellow", "black", "teal", "brown", "gray"]
    for split in ("train", "test"):
        for sample in load("easy-vqa", part=split, rows=rows):
            truth = sample.messages[-1].text
            choices = sorted({truth, *colors[:3]})
            number = str(len(problems) + 1)
            problem = {"question": sample.messages[0].text.replace(f"{IMAGE_TAG}\n", ""), "choices": choices}
            problem |= {
                "answer": choices.index(truth),
                "hint": "Look at the shape." * (len(problems) % 2),
                "image": None,
            }
            problem |= {"split": split, "lecture": "Long.", "solution": "So.", "grade": "grade2", "skill": "shapes"}
            if len(problems) % 3:
                (folder / split / number).mkdir(parents=True)
                sample.images[0].save(folder / split / number / "image.png")
                problem["image"] = "image.png"
            problems[number] = problem
    return _written(folder / "problems.json", problems)


def _scenes(year: str, rows: int) -> list[Sample]:
    return load("scenes-captions", part=_part(year), rows=rows)


def _part(year: str) -> str:
    return "train" if year == TRAIN else "test"


def _written(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path
