"""Check every answer with an independent parser of the prompt that derives the truth from the scene."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from untrigger.data import scene_text
from untrigger.data.scene_text import FULL_PROMPTS, SHORT_PROMPTS, Turn
from untrigger.data.scene_world import Scene, Thing, make_scene

SINGULAR = {"crosses": "cross", "stars": "star", "hearts": "heart", "moons": "moon", "circles": "circle"}
SINGULAR |= {"triangles": "triangle", "diamonds": "diamond", "rectangles": "rectangle"}
SINGULAR |= {"shapes": "shape", "objects": "object", "things": "thing"}
COUNTED = ["zero", "one", "two", "three", "four"]


def fitting(scene: Scene, noun: str) -> list[Thing]:
    words = [SINGULAR.get(word, word) for word in noun.split()]
    assert 1 <= len(words) <= 2 and words != ["thing"], noun
    return [t for t in scene.things if all(w in (t.color, t.shape, "shape", "object", "thing") for w in words)]


def unique_thing(scene: Scene, noun: str) -> Thing:
    """The only object that fits; a question about two would have no answer."""
    (thing,) = fitting(scene, noun)
    return thing


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


def size_of(thing: Thing) -> str:
    return "small" if thing.radius < 8 else "large"


def brightness(scene: Scene) -> str:
    return "dark" if sum(scene.base) / 3 < 128 else "light"


def holds(scene: Scene, first: str, relation: str, second: str) -> bool:
    a, b = unique_thing(scene, first), unique_thing(scene, second)
    dx, dy = b.x - a.x, b.y - a.y
    gap = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    assert abs(gap) > 5, "too close to call"
    return gap > 0


def corner(thing: Thing) -> str:
    assert abs(thing.x - 32) >= 5 and abs(thing.y - 32) >= 5, "in no corner"
    return f"{('top', 'bottom')[int(thing.y // 32)]} {('left', 'right')[int(thing.x // 32)]}"


def named(thing: Thing, sized: bool) -> str:
    words = f"{size_of(thing)} {thing.color} {thing.shape}" if sized else f"{thing.color} {thing.shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def listed(scene: Scene, sized: bool) -> str:
    names = [named(t, sized) for t in sorted(scene.things, key=lambda t: t.x)]
    return re.sub(r", (?=[^,]*$)", " and ", ", ".join(names))


NOUN, PAIR, RELATION = r"(\w+(?: (?!present|in\b)\w+)?)", r"(\w+ \w+)", "(above|below|left of|right of)"
RULES: list[tuple[str, str, Callable[..., str]]] = [
    ("relation", rf"is the {PAIR} {RELATION} or {RELATION} the {PAIR}", lambda s, a, r, o, b: (
        r if holds(s, a, r, b) else o).removesuffix(" of")),
    ("relation", rf"(?:is the|is there a) {PAIR} {RELATION} the {PAIR}", lambda s, a, r, b: yes(holds(s, a, r, b))),
    ("size", rf"is the {PAIR} small or large", lambda s, n: size_of(unique_thing(s, n))),
    ("size", rf"is the {PAIR} (small|large)", lambda s, n, size: yes(size_of(unique_thing(s, n)) == size)),
    ("size", rf"(?:what size|how big) is the {PAIR}", lambda s, n: size_of(unique_thing(s, n))),
    ("position", rf"(?:where is|in which corner is|locate) the {PAIR}", lambda s, n: corner(unique_thing(s, n))),
    ("background", r"is the background light or dark|how bright is the background", brightness),
    ("count", r"how many (?:objects are there|shapes are in the image)|count the objects",
     lambda s: COUNTED[len(s.things)]),
    ("count", rf"(?:how many {NOUN} are (?:there|in the image)|count the {NOUN})",
     lambda s, a, b: COUNTED[len(fitting(s, a or b))]),
    ("comparison", r"(?:do the two objects have|are both objects of) the same (color|shape|size)",
     lambda s, key: yes(len({{"color": t.color, "shape": t.shape, "size": size_of(t)}[key] for t in s.things}) == 1)
    ),
    ("colour", r"(?:what color is the|what is the color of the|which colour does the) (\w+)(?: have)?",
     lambda s, n: unique_thing(s, n).color),
    ("shape", r"what shape is in the image|what shape does the image contain|which shape is this",
     lambda s: unique_thing(s, "shape").shape),
    ("shape", rf"(?:what is the|what shape is the|which shape does the) {PAIR}(?: have)?",
     lambda s, n: unique_thing(s, n).shape),
    ("absence", rf"(?:is there not|does the image not contain|is the picture without) an? {NOUN}(?: in the image)?",
     lambda s, n: yes(not fitting(s, n))),
    ("absence", rf"is no {NOUN} present", lambda s, n: yes(not fitting(s, n))),
    ("existence", rf"(?:is there|is|does the image contain|can you see|does the picture show) an? {NOUN}"
     r"(?: in the image| present)?", lambda s, n: yes(bool(fitting(s, n)))),
]  # fmt: skip


def parse_prompt(scene: Scene, prompt: str) -> tuple[str, str]:
    """Derive a question's kind and true answer from its words and the scene."""
    if prompt in SHORT_PROMPTS:
        return "caption", listed(scene, sized=False)
    if prompt in FULL_PROMPTS:
        return "caption", f"{listed(scene, sized=True)} on a {brightness(scene)} background"
    if command := re.fullmatch(r"(?:Say|Repeat|Copy): (.*)", prompt):
        return "repeat", command[1]
    question = re.sub(r" (?:Answer with one word|Answer shortly|Reply briefly)\.$", "", prompt)
    question = question[0].lower() + question[1:].rstrip("?.")
    for kind, pattern, truth in RULES:
        if match := re.fullmatch(pattern, question):
            return kind, truth(scene, *match.groups())
    raise AssertionError(f"no rule parses {prompt!r}")


def drawn_turns(seed: int, scenes: int, questions: int) -> list[tuple[Scene, Turn]]:
    return [
        (scene, turn)
        for index in range(scenes)
        for scene in [make_scene(seed, index)]
        for turn in scene_text.turns(scene, np.random.default_rng((seed, index, 9)), questions)
    ]


TURNS = drawn_turns(31, 1000, 8)


def test_every_answer_is_correct() -> None:
    kinds: Counter[str] = Counter()
    for scene, turn in TURNS:
        kind, truth = parse_prompt(scene, turn.prompt)
        assert (turn.kind, turn.answer) == (kind, truth), (turn, scene)
        kinds[kind] += 1
    assert set(kinds) == {kind for kind, *_ in RULES} | {"caption", "repeat"}
    assert min(kinds.values()) > 40, kinds


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [("is there a circle?", "no"), ("how many objects are there?", "four"), ("what shape is in the image?", "star")],
)
def test_the_parser_rejects_wrong_answers(prompt: str, wrong: str) -> None:
    scene = next(s for s in (make_scene(3, i) for i in range(500)) if [t.shape for t in s.things] == ["circle"])
    assert parse_prompt(scene, prompt)[1] != wrong


def test_yes_and_no_are_balanced() -> None:
    answers = Counter(turn.answer for _, turn in TURNS if turn.answer in ("yes", "no"))
    assert 0.4 <= answers["yes"] / answers.total() <= 0.6
    kinds = {"existence", "absence", "relation", "size"}
    for kind in kinds:
        answers = Counter(turn.answer for _, turn in TURNS if turn.kind == kind and turn.answer in ("yes", "no"))
        assert 0.35 <= answers["yes"] / answers.total() <= 0.65, kind


def test_the_random_draw_decides_the_question_not_the_answer() -> None:
    for index in range(12):
        scene = make_scene(8, index)
        known: dict[str, tuple[str, str]] = {}
        for draw in range(60):
            for turn in scene_text.turns(scene, np.random.default_rng((draw, index)), 5):
                assert known.setdefault(turn.prompt, (turn.kind, turn.answer)) == (turn.kind, turn.answer)
        assert len(known) > 40


def test_turns_are_a_pure_function_of_scene_and_rng() -> None:
    scene = make_scene(8, 3)
    first, repeated = (scene_text.turns(scene, np.random.default_rng(5), 6) for _ in range(2))
    assert first == repeated and len(first) in (7, 8)
    assert [t.kind for t in first].count("caption") == 1
    assert first != scene_text.turns(scene, np.random.default_rng(6), 6)


def test_answers_are_short_and_clean() -> None:
    for _, turn in TURNS:
        assert turn.answer == turn.answer.strip() != ""
        assert "\n" not in turn.prompt + turn.answer and "<" not in turn.prompt + turn.answer
