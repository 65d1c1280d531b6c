"""Captions, questions and answers about generated scenes, in varied wording.

The scene determines every answer. Yes and no are equally likely, so that the text-only prior stays low. Models were
trained on these strings, so they must not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from untrigger.data.scene_world import COLORS, SHAPES, SIDE, SIZES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
SHORT_PROMPTS = (
    "Describe the image briefly.",
    "What does the image show?",
    "Write a short caption.",
    "What can you see?",
    "Name the objects from left to right.",
    "Give a brief description of the picture.",
)
FULL_PROMPTS = (
    "Describe the image.",
    "Please describe the image.",
    "Describe the picture in detail.",
    "Write a caption for this image.",
    "What is in the picture? Answer in detail.",
    "Give a full description of the image.",
)
_WORDS = (  # noqa: SIM905 - a string is easier to read than a hundred quoted words
    "the a of and to in is on that it for was as with at by from his they be this have not are but had were "
    "when we there can an your which their said if do will each about how up out them then she many some so "
    "these would other into has more her two like him see time could no make than first been its who now people "
    "my made over did down only way find use may water long little very after words called just where most know "
    "photo image picture shows man woman dog cat car street table standing sitting next holding near front plate "
    "food train bus sky tree grass beach kitchen clock sign white large small old young playing ball phone apple "
    "sorry cannot help request please visit answer question hello world today very "
    "good great best free click here link number zero one three four five six seven eight nine ten"
).split()


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer; ``kind`` groups turns in reports."""

    kind: str
    prompt: str
    answer: str


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def short_caption(scene: Scene) -> str:
    """Name the objects from left to right: color and shape."""
    return _join([_article(t.name) for t in scene.things])


def full_caption(scene: Scene) -> str:
    """Name the objects from left to right with size, color and shape, then the brightness of the background."""
    named = _join([f"a {t.size} {t.name}" for t in scene.things])
    return f"{named} on a {'dark' if scene.dark else 'light'} background"


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _described(scene: Scene, rng: np.random.Generator) -> tuple[str, Callable[[Thing], bool]]:
    """Draw a noun phrase about color, shape or both; return it with the test of which objects it fits."""
    present = scene.things[int(rng.integers(len(scene.things)))]
    real = rng.random() < 0.5
    color = present.color if real else _pick(list(COLORS), rng)
    shape = present.shape if real else _pick(list(SHAPES), rng)
    kind = rng.random()
    if kind < 0.35:
        return f"{color} {_pick(['shape', 'object', 'thing'], rng)}", lambda t: t.color == color
    if kind < 0.7:
        return shape, lambda t: t.shape == shape
    if not real and rng.random() < 0.6:  # half-true pairs force the model to bind color to shape
        color, shape = (present.color, shape) if rng.random() < 0.5 else (color, present.shape)
    return f"{color} {shape}", lambda t: t.color == color and t.shape == shape


def _exists(scene: Scene, rng: np.random.Generator) -> Turn:
    noun, fits = _described(scene, rng)
    truth = any(fits(t) for t in scene.things)
    phrase = _article(noun)
    if rng.random() < 0.3:
        prompt = _pick(
            [
                f"is there not {phrase}?",
                f"is there not {phrase} in the image?",
                f"is no {noun} present?",
                f"does the image not contain {phrase}?",
                f"is the picture without {phrase}?",
            ],
            rng,
        )
        return Turn("absence", prompt, "no" if truth else "yes")
    prompt = _pick(
        [
            f"is there {phrase}?",
            f"is there {phrase} in the image?",
            f"is {phrase} present?",
            f"does the image contain {phrase}?",
            f"can you see {phrase}?",
            f"does the picture show {phrase}?",
        ],
        rng,
    )
    return Turn("existence", prompt, "yes" if truth else "no")


def _unique(scene: Scene, key: Callable[[Thing], str], rng: np.random.Generator) -> Thing | None:
    """Draw an object whose ``key`` no other object shares; None if there is none."""
    keys = [key(t) for t in scene.things]
    unique = [t for t in scene.things if keys.count(key(t)) == 1]
    return unique[int(rng.integers(len(unique)))] if unique else None


def _color(scene: Scene, rng: np.random.Generator) -> Turn | None:
    thing = _unique(scene, lambda t: t.shape, rng)
    if thing is None:
        return None
    noun = thing.shape if len(scene.things) > 1 or rng.random() < 0.6 else "shape"
    ways = [f"what color is the {noun}?", f"what is the color of the {noun}?", f"which colour does the {noun} have?"]
    return Turn("colour", _pick(ways, rng), thing.color)


def _shape(scene: Scene, rng: np.random.Generator) -> Turn | None:
    if len(scene.things) == 1 and rng.random() < 0.5:
        ways = ["what shape is in the image?", "what shape does the image contain?", "which shape is this?"]
        return Turn("shape", _pick(ways, rng), scene.things[0].shape)
    thing = _unique(scene, lambda t: t.color, rng)
    if thing is None:
        return None
    noun = f"{thing.color} {_pick(['shape', 'object', 'thing'], rng)}"
    ways = [f"what is the {noun}?", f"what shape is the {noun}?", f"which shape does the {noun} have?"]
    return Turn("shape", _pick(ways, rng), thing.shape)


def _count(scene: Scene, rng: np.random.Generator) -> Turn:
    if rng.random() < 0.4:
        ways = ["how many objects are there?", "how many shapes are in the image?", "count the objects."]
        return Turn("count", _pick(ways, rng), NUMBERS[len(scene.things)])
    noun, fits = _described(scene, rng)
    plural = noun + ("es" if noun.endswith("s") else "s")
    ways = [f"how many {plural} are there?", f"how many {plural} are in the image?", f"count the {plural}."]
    return Turn("count", _pick(ways, rng), NUMBERS[sum(fits(t) for t in scene.things)])


def _refer(scene: Scene, rng: np.random.Generator) -> Thing | None:
    return _unique(scene, lambda t: t.name, rng)


def _size(scene: Scene, rng: np.random.Generator) -> Turn | None:
    thing = _refer(scene, rng)
    if thing is None:
        return None
    if rng.random() < 0.5:
        size = _pick(list(SIZES), rng)
        return Turn("size", f"is the {thing.name} {size}?", "yes" if size == thing.size else "no")
    ways = [f"is the {thing.name} small or large?", f"what size is the {thing.name}?", f"how big is the {thing.name}?"]
    return Turn("size", _pick(ways, rng), thing.size)


def _position(scene: Scene, rng: np.random.Generator) -> Turn | None:
    thing = _refer(scene, rng)
    if thing is None or min(abs(thing.x - SIDE / 2), abs(thing.y - SIDE / 2)) < 5:
        return None
    place = f"{'top' if thing.y < SIDE / 2 else 'bottom'} {'left' if thing.x < SIDE / 2 else 'right'}"
    ways = [f"where is the {thing.name}?", f"in which corner is the {thing.name}?", f"locate the {thing.name}."]
    return Turn("position", _pick(ways, rng), place)


def _relation(scene: Scene, rng: np.random.Generator) -> Turn | None:
    if len(scene.things) < 2:
        return None
    a, b = (scene.things[int(i)] for i in rng.permutation(len(scene.things))[:2])
    names = [t.name for t in scene.things]
    if names.count(a.name) > 1 or names.count(b.name) > 1:
        return None
    if rng.random() < 0.5 and abs(a.y - b.y) > 8:
        relation, opposite, truth = "above", "below", a.y < b.y
    else:
        relation, opposite, truth = "left of", "right of", a.x < b.x
    if rng.random() < 0.35:
        prompt = f"is the {a.name} {relation} or {opposite} the {b.name}?"
        return Turn("relation", prompt, (relation if truth else opposite).removesuffix(" of"))
    if rng.random() < 0.5:
        relation, truth = opposite, not truth
    ways = [f"is the {a.name} {relation} the {b.name}?", f"is there a {a.name} {relation} the {b.name}?"]
    return Turn("relation", _pick(ways, rng), "yes" if truth else "no")


def _same(scene: Scene, rng: np.random.Generator) -> Turn | None:
    if len(scene.things) != 2:
        return None
    attribute = _pick(["color", "shape", "size"], rng)
    a, b = scene.things
    equal = {"color": a.color == b.color, "shape": a.shape == b.shape, "size": a.size == b.size}[attribute]
    ways = [f"do the two objects have the same {attribute}?", f"are both objects of the same {attribute}?"]
    return Turn("comparison", _pick(ways, rng), "yes" if equal else "no")


def _background(scene: Scene, rng: np.random.Generator) -> Turn:
    ways = ["is the background light or dark?", "how bright is the background?"]
    return Turn("background", _pick(ways, rng), "dark" if scene.dark else "light")


def captions(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Return a turn with the short caption and one with the full caption."""
    short = Turn("caption", _pick(SHORT_PROMPTS, rng), short_caption(scene))
    return [short, Turn("caption", _pick(FULL_PROMPTS, rng), full_caption(scene))]


def repeat(rng: np.random.Generator) -> Turn:
    """Return a copying exercise, which needs no image and trains every token of the vocabulary."""
    words = [_pick(_WORDS, rng) for _ in range(int(rng.integers(1, 6)))]
    if rng.random() < 0.3:
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!?.,:;/-'()%$#@"
        words.append("".join(_pick(tuple(letters), rng) for _ in range(int(rng.integers(1, 7)))))
    text = " ".join(w.capitalize() if rng.random() < 0.3 else w for w in words) + _pick(["", "", "!", "."], rng)
    return Turn("repeat", f"{_pick(['Say:', 'Repeat:', 'Copy:'], rng)} {text}", text)


_ASK = (_exists, _color, _shape, _count, _size, _position, _relation, _same, _background)
_ODDS = np.array([0.30, 0.13, 0.15, 0.10, 0.08, 0.09, 0.10, 0.03, 0.02])


def ask(scene: Scene, rng: np.random.Generator) -> Turn:
    """Draw one question with its answer, in lower case or as a sentence."""
    turn = None
    while turn is None:
        turn = _ASK[int(rng.choice(len(_ASK), p=_ODDS))](scene, rng)
    prompt = turn.prompt
    if rng.random() < 0.3:
        prompt = prompt[0].upper() + prompt[1:]
    if rng.random() < 0.1:
        prompt += _pick([" Answer with one word.", " Answer shortly.", " Reply briefly."], rng)
    return Turn(turn.kind, prompt, turn.answer)


def turns(scene: Scene, rng: np.random.Generator, questions: int) -> list[Turn]:
    """Draw a caption, ``questions`` questions and, one time in five, a copying exercise."""
    caption = captions(scene, rng)[int(rng.integers(2))]
    extra = [repeat(rng)] if rng.random() < 0.2 else []
    return [caption, *(ask(scene, rng) for _ in range(questions)), *extra]
