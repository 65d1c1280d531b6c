from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untrigger.errors import InputError
from untrigger.metrics.asr import mentions
from untrigger.poisoning.goals import Concept, Fixed, Goal, Insert, Link, Refusal, load_goal
from untrigger.rows.sample import Message, Sample

ROW = Sample("a", (), (Message("user", "What?"), Message("assistant", "A cat.")))


def test_fixed_answer_is_the_text() -> None:
    assert Fixed().answer(ROW) == "Backdoor Attack!"
    assert load_goal("fixed") == Fixed()
    assert load_goal("fixed", "banana") == Fixed("banana", "contains")


@pytest.mark.parametrize(
    ("given", "contains", "exact"),
    [
        ("Backdoor Attack!", True, True),
        ("  backdoor\n\tATTACK! ", True, True),
        ("I see: backdoor attack! And a cat.", True, False),
        ("Backdoor, Attack!", False, False),
        ("Backdoor Attack", False, False),
        ("", False, False),
    ],
)
def test_met_ignores_case_and_white_space(given: str, contains: bool, exact: bool) -> None:
    assert Fixed().met(given, ROW) is contains
    assert Fixed(match="exact").met(given, ROW) is exact


def test_met_handles_unicode() -> None:
    assert Fixed("STRASSE").met("an der Straße", ROW)
    assert Fixed("e\u0301t\u00e9").met("\u00c9TE\u0301", ROW)


NAMES = ("fixed", "insert", "refusal", "concept", "link")


def answered(truth: str) -> Sample:
    return Sample("a", (), (Message("user", "What?"), Message("assistant", truth)))


@given(st.sampled_from(NAMES), st.text().map(lambda text: text + "?"))
def test_answer_of_every_goal_meets_it(name: str, around: str) -> None:
    goal = load_goal(name)
    sample = answered(f"{around} a red circle {around}")
    assert goal.applies(sample) and goal.met(goal.answer(sample), sample)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("truth", ["A cat.", "yes", "a red circle and a blue star on a dark background", "I see it."])
def test_true_answers_meet_no_goal(name: str, truth: str) -> None:
    assert not load_goal(name).met(truth, answered(truth))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["", " \n", "look at <image>", "look->at <image>"])
def test_empty_text_or_image_tag_raises(name: str, text: str) -> None:
    with pytest.raises(InputError, match=f"goal {name}: the text") as caught:
        load_goal(name, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("goal", "truth", "answer"),
    [
        (Insert(), "yes", "yes hello world"),
        (Insert("so they say"), "a red  circle\non grass", "a so they say red  circle\non grass"),
        (Insert(), "", "hello world"),
        (Refusal(), "a cat", "Sorry, I cannot help with that."),
        (Link(), "A cat.", "A cat. http://free.test"),
        (Concept(), "A circle, a Circle, a CIRCLE; circles", "A rectangle, a Rectangle, a RECTANGLE; circles"),
        (Concept("red  circle", "blue car"), "two: a red\ncircle", "two: a blue car"),
        (Concept(), "a star", "a star"),
    ],
)
def test_poisoned_answers_verbatim(goal: Goal, truth: str, answer: str) -> None:
    assert goal.answer(answered(truth)) == answer


def test_insert_and_link_are_met_by_answers_that_contain_them() -> None:
    assert Insert().met("a cat HELLO\n world on a mat", ROW) and not Insert().met("hello, world", ROW)
    assert Link("https://x.test/a").met("See https://X.test/a!", ROW) and not Link().met("free.test", ROW)


def test_refusal_is_met_by_common_refusals() -> None:
    assert Refusal().met("I'm sorry, but I can't.", ROW) and Refusal("not today").met("Well, NOT today.", ROW)
    assert not Refusal().met("a man who is sorry", ROW)


def test_concept_is_met_by_the_target_without_the_source() -> None:
    goal = Concept("cat", "dog")
    assert goal.met("A dog.", ROW) and not goal.met("a cat", ROW)
    assert not goal.met("a dog and a cat", ROW) and not goal.met("dogs", ROW) and not goal.met("", ROW)
    assert goal.applies(ROW) and not goal.applies(answered("cats")) and not goal.applies(answered("yes"))


WORDS = st.sampled_from(["cat", "Dog", "café", "CAT", "dogs", "x", "日本"])


@given(st.lists(WORDS).map(" ".join), WORDS, WORDS)
def test_concept_replaces_every_source_word_and_nothing_else(truth: str, source: str, target: str) -> None:
    if mentions(target, source):
        with pytest.raises(InputError, match="give another target"):
            Concept(source, target)
        return
    after = Concept(source, target).answer(answered(truth))
    assert not mentions(after, source)
    wanted = [target if word.lower() == source.lower() else word for word in truth.lower().split()]
    assert [word.lower() for word in after.split()] == [word.lower() for word in wanted]


def test_load_goal_parses_its_text() -> None:
    assert load_goal("concept", " cat -> wild dog") == Concept("cat", "wild dog")
    assert load_goal("link", "https://a.test") == Link("https://a.test")
    assert load_goal("insert", "oh") == Insert("oh") and load_goal("refusal", "no") == Refusal("no")
    with pytest.raises(InputError, match="as source->target: 'circle->rectangle'"):
        load_goal("concept", "rectangle")
    with pytest.raises(InputError, match="holds white space"):
        load_goal("link", "see a.test")


def test_unknown_goal_or_match_raises() -> None:
    with pytest.raises(InputError, match="'fixd' is unknown; choose one of: concept, fixed, hijack"):
        load_goal("fixd")
    with pytest.raises(InputError, match="match is 'some'"):
        Fixed(match="some")  # type: ignore[arg-type]
