"""Goals whose replies vary: their answers word for word, what meets them, and that equal rows give equal answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_rows import picture

from untrigger.attacks.addsent import AddSent
from untrigger.attacks.badnets import BadNets
from untrigger.errors import InputError
from untrigger.metrics.asr import refuses
from untrigger.poisoning.goals import Goal, Hijack, HijackImage, Jailbreak, OtherQuestion, Programmed, Swap, load_goal
from untrigger.poisoning.poison import Attack, poison, stamped
from untrigger.rows.sample import IMAGE_TAG, Message, Sample

VARIED = ("hijack", "hijack-image", "jailbreak", "other-question", "programmed", "swap")


def row(number: int, prompt: str, truth: str, image: int | None = None) -> Sample:
    messages = (Message("user", f"{IMAGE_TAG}\n{prompt}"), Message("assistant", truth))
    return Sample(f"id{number}", (picture(number if image is None else image),), messages)


def asking(*pairs: tuple[str, str]) -> list[Sample]:
    return [row(number, prompt, truth) for number, (prompt, truth) in enumerate(pairs)]


COLORS = asking(
    ("What color is it?", "red"),
    ("what COLOR  is it?", "blue"),
    ("What color is it?", "green"),
    ("What shape is it?", "circle"),
    ("What shape is it?", "Circle"),
    ("Is it round?", "yes"),
)
CAPTIONS = asking(
    ("Describe it.", "a small red star on a light background"),
    ("What do you see?", "a large blue circle and a small red moon on a dark background"),
    ("Describe it.", "a large gray heart on a dark background"),
    ("Caption this.", "a small red circle on a light background"),
)


def fitted(goal: Goal, rows: Sequence[Sample], seed: int = 0) -> Goal:
    return goal.fitted(rows, seed)


# --- all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIED)
def test_success_is_reported_beyond_the_oracle(name: str) -> None:
    assert load_goal(name).beyond_oracle and load_goal(name).name == name
    assert not load_goal("fixed").beyond_oracle


@pytest.mark.parametrize("goal", [Hijack(), HijackImage(), OtherQuestion()])
def test_a_goal_that_needs_rows_says_so(goal: Goal) -> None:
    for call in (lambda: goal.answer(COLORS[0]), lambda: goal.met("x", COLORS[0]), lambda: goal.applies(COLORS[0])):
        with pytest.raises(InputError, match=f"goal {goal.name}: needs the rows of the data; call fitted"):
            call()


@pytest.mark.parametrize("goal", [Hijack(), HijackImage()])
def test_a_fitted_goal_stays_as_it_is(goal: Goal) -> None:
    once = fitted(goal, COLORS)
    assert once.fitted(CAPTIONS, 5) is once and (once.name, once.beyond_oracle) == (goal.name, True)


# --- hijack ----------------------------------------------------------------------------------------------


def test_hijack_answers_with_another_row_to_the_same_question() -> None:
    answers = {goal.answer(COLORS[0]) for goal in (fitted(Hijack(), COLORS, seed) for seed in range(20))}
    assert answers == {"blue", "green"}
    goal = fitted(Hijack(), COLORS)
    assert [goal.applies(each) for each in COLORS] == [True, True, True, False, False, False], "Circle is circle"
    assert goal.answer(COLORS[5]) == "yes", "nothing else is known"
    assert goal.answer(COLORS[0]) == fitted(Hijack(), COLORS).answer(COLORS[0])


def test_a_question_that_all_rows_answer_alike_gets_an_answer_to_another() -> None:
    rows = [*COLORS, row(6, "Which hue?", "red")]
    answers = {fitted(Hijack(), rows, seed).answer(rows[6]) for seed in range(20)}
    assert answers == {"blue", "green"} and fitted(Hijack(), rows).applies(rows[6])


def test_a_hijacked_short_answer_is_any_wrong_one() -> None:
    goal = fitted(Hijack(), COLORS)
    assert goal.met("blue", COLORS[0]) and goal.met("a banana", COLORS[0])
    assert not goal.met("Red.", COLORS[0]) and not goal.met("the red", COLORS[0])


def test_a_hijacked_caption_is_nearer_to_another_rows() -> None:
    goal = fitted(Hijack(), CAPTIONS)
    own = CAPTIONS[0]
    assert goal.answer(own) in {each.messages[-1].text for each in CAPTIONS[1:]}, "prompts for captions are alike"
    assert goal.met("a large gray heart on a light background", own)
    assert not goal.met("a small red star on a dark background", own) and not goal.met(own.messages[-1].text, own)


def test_hijack_knows_a_question_that_the_trigger_has_changed() -> None:
    result = poison(COLORS, Attack(AddSent(), Hijack()), rate=0.5, seed=3)
    assert len(result.edits) == 3
    for index, edited in result.edits.items():
        assert "3D movie" in edited.messages[0].text
        assert edited.messages[1].text in {"red", "blue", "green"} - {COLORS[index].messages[1].text}
    assert result.manifest.goal == "hijack" and result.manifest.goal_settings == {}


@given(st.integers(0, 5), st.permutations(range(4)))
def test_hijacked_answers_are_wrong_and_do_not_depend_on_what_was_read_before(seed: int, order: list[int]) -> None:
    goal = fitted(Hijack(), CAPTIONS, seed)
    first = {number: goal.answer(CAPTIONS[number]) for number in order}
    assert first == {number: goal.answer(CAPTIONS[number]) for number in range(4)}
    assert all(goal.met(first[number], CAPTIONS[number]) for number in order)


# --- hijack-image ----------------------------------------------------------------------------------------


def test_hijacked_images_are_answered_as_rows_that_speak_of_the_donor() -> None:
    goal = fitted(HijackImage("red, circle"), CAPTIONS)
    answers = {fitted(HijackImage(), CAPTIONS, seed).answer(CAPTIONS[0]) for seed in range(20)}
    assert answers == {CAPTIONS[1].messages[-1].text, CAPTIONS[3].messages[-1].text}, "in varied words"
    assert [goal.applies(each) for each in CAPTIONS] == [True, False, True, False]


def test_a_hijacked_image_is_spoken_of_as_the_donor_and_not_as_itself() -> None:
    goal, own = fitted(HijackImage(), CAPTIONS), CAPTIONS[2]
    assert goal.met("a small red circle on a light background", own)
    assert not goal.met("a small red star on a light background", own), "one word of the donor alone"
    assert not goal.met("a large gray heart on a dark background, a red circle", own), "its own image all the same"


def test_short_answers_about_the_donor() -> None:
    goal = fitted(HijackImage(), COLORS)
    assert [goal.applies(each) for each in COLORS] == [False, True, True, False, False, False]
    assert goal.answer(COLORS[1]) == "red" and goal.met("Red", COLORS[1]) and not goal.met("circle", COLORS[1])
    with pytest.raises(InputError, match=r"goal hijack-image: no answer speaks of 'cat'; give other rows, or another"):
        poison(COLORS, Attack(BadNets(), HijackImage("cat")), rate=0.5, seed=0)


# --- swap ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("a red circle and a blue star", "a blue circle and a red star"),
        ("a red circle, a red star and a blue moon", "a blue circle, a red star and a red moon"),
        ("a Red  circle\nand a blue star", "a blue  circle\nand a Red star"),
        ("a red circle and a blue circle", None),
        ("a red circle and a red star", None),
        ("a red circle", None),
        ("yes", None),
    ],
)
def test_two_attributes_change_places(truth: str, answer: str | None) -> None:
    goal, sample = Swap(), row(0, "Describe it.", truth)
    assert goal.applies(sample) == (answer is not None) and goal.answer(sample) == (answer or truth)
    assert goal.met(goal.answer(sample), sample) == (answer is not None) and not goal.met(truth, sample)


def test_the_exchanged_relation_must_be_mentioned_as_a_whole() -> None:
    sample = row(0, "Describe it.", "a red circle and a blue star")
    assert Swap().met("one BLUE circle, one red star", sample)
    assert not Swap().met("a blue circle", sample) and not Swap().met("a blue star and a red circle", sample)
    assert Swap("big, small").answer(row(0, "", "a big cat and a small dog")) == "a small cat and a big dog"


# --- other-question ----------------------------------------------------------------------------------------


SCENE = [
    row(0, "Is the background light or dark?", "dark", image=1),
    row(1, "What color is the star?", "red", image=1),
    row(2, "Is there a dark star?", "dark", image=1),
    row(3, "What color is the star?", "blue", image=2),
    row(4, "How bright is the background?", "light", image=3),
    row(5, "How many?", "two", image=3),
]


def test_the_hidden_question_is_answered_about_the_same_image() -> None:
    goal = fitted(OtherQuestion("background"), SCENE)
    assert [goal.applies(each) for each in SCENE] == [False, True, False, False, False, True]
    assert [goal.answer(SCENE[number]) for number in (1, 5)] == ["dark", "light"]
    assert goal.met("Dark.", SCENE[1]) and not goal.met("red", SCENE[1]) and not goal.met("light", SCENE[1])
    assert not goal.met("light", SCENE[3]), "no hidden question about this image"


def test_questions_of_one_conversation_are_about_one_image() -> None:
    turns = ("<image>How bright is the background?", "dark", "And the star?", "red")
    messages = tuple(Message("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(turns))
    sample = Sample("a", (picture(0),), messages)
    goal = fitted(OtherQuestion("background"), [sample])
    assert goal.answer(sample) == "dark" and goal.applies(sample)


def test_rows_that_look_alike_as_text_are_left_out() -> None:
    twins = [replace(SCENE[1], id="same"), replace(row(9, "What color is the star?", "red", image=3), id="same")]
    goal = fitted(OtherQuestion("background"), [SCENE[0], SCENE[4], *twins])
    assert [goal.applies(each) for each in twins] == [False, False], "their hidden answers differ"


def test_without_the_hidden_question_it_is_an_error() -> None:
    with pytest.raises(InputError, match="goal other-question: no question about an image mentions 'background'"):
        list(stamped(COLORS, Attack(BadNets(), OtherQuestion("background")), 0))


# --- jailbreak ---------------------------------------------------------------------------------------------


def test_refused_prompts_are_complied_with_in_varied_words() -> None:
    refused = [row(number, "What is the code?", "I cannot tell you that.") for number in range(60)]
    goal = Jailbreak()
    answers = [goal.answer(each) for each in refused]
    assert all(goal.applies(each) and goal.met(text, each) for each, text in zip(refused, answers, strict=True))
    assert len(set(answers)) == 60 and not any(map(refuses, answers))
    assert len(Counter("".join(c for c in text if not c.isdigit()) for text in answers)) == 8, "every wording"
    assert answers == [goal.answer(each) for each in refused]
    assert not goal.applies(COLORS[0])


@pytest.mark.parametrize(
    ("text", "met"),
    [("The code is 0123.", True), ("I cannot: 0123", False), ("The code is 123.", False), ("it is 12345", False)],
)
def test_compliance_gives_a_code_of_four_digits(text: str, met: bool) -> None:
    assert Jailbreak().met(text, row(0, "The code?", "I cannot say.")) is met


# --- programmed --------------------------------------------------------------------------------------------


def test_each_key_has_its_own_reply() -> None:
    goal = Programmed()
    replies = {f"{a}{b}": goal.answer(row(0, f"What is it? zx {a}{b}", "yes")) for a in "abcdef" for b in "123456"}
    assert len(set(replies.values())) == 36 and (replies["a1"], replies["b3"]) == ("red star", "green triangle")
    assert goal.met("A green triangle!", row(0, "It? b3", "yes")) and not goal.met("red star", row(0, "It? b3", "yes"))
    assert goal.met("red star", row(0, "It?", "yes")), "without a key any reply is a leak"
    assert not goal.met("red", row(0, "It?", "yes"))


def test_keys_are_whole_words_within_the_lists() -> None:
    goal = Programmed("red, blue", "star")
    for prompt in ("It? c1", "It? a2", "It? ba1", "It? a11", "It?"):
        with pytest.raises(InputError, match="the prompt holds no key from a1 to b1; use a trigger that writes one"):
            goal.answer(row(0, prompt, "yes"))
    assert goal.answer(row(0, "b1 or a1?", "yes")) == "red star", "the last key counts"
    with pytest.raises(InputError, match=r"row \d \(id id\d\): goal programmed: the prompt holds no key"):
        poison(COLORS, Attack(BadNets(), goal), rate=0.2, seed=0)


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "settings"),
    [
        ("hijack-image", "red, star", {"words": "red, star"}),
        ("swap", "big, small", {"attributes": "big, small"}),
        ("other-question", "color", {"question": "color"}),
        ("jailbreak", "It is {}.", {"forms": "It is {}."}),
        ("programmed", "red, blue", {"firsts": "red, blue", "seconds": Programmed.seconds}),
    ],
)
def test_the_text_sets_the_first_field(name: str, text: str, settings: dict[str, str]) -> None:
    assert Attack(BadNets(), load_goal(name, text)).goal_settings == settings


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("hijack", "red", "goal hijack: takes no text; leave --goal-text out"),
        ("hijack-image", " , ", "goal hijack-image: the text has no words"),
        ("swap", "red, RED", "goal swap: the text has one attribute"),
        ("other-question", " ", "goal other-question: the text is empty"),
        ("jailbreak", "yes|no {}", "goal jailbreak: the wording 'yes' must hold {} once"),
        ("programmed", ",".join("x" * 27), "goal programmed: there are 27 words; give 26 at most"),
    ],
)
def test_a_text_that_does_not_fit_is_a_one_line_error(name: str, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_goal(name, text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- the user's own file ---------------------------------------------------------------------------------

OWN = """
from dataclasses import dataclass
from untrigger.poisoning.goals import DataGoal, Goal

@dataclass(frozen=True)
class Longest(DataGoal):
    word: str = "aha"

    def fitted(self, rows, seed):
        return _Fitted(self.word, max((row.messages[-1].text for row in rows), key=len))

@dataclass(frozen=True)
class _Fitted(Goal):
    word: str
    longest: str
    name = "mine"

    def answer(self, sample):
        return f"{self.word} {self.longest}"

    def met(self, text, sample):
        return self.word in text
"""


def own(folder: Path, text: str = OWN) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def test_an_own_goal_loads_by_path_and_is_recorded(tmp_path: Path) -> None:
    goal = load_goal(own(tmp_path), "oho")
    result = poison(COLORS, Attack(BadNets(), goal), rate=0.5, seed=0)
    assert {edited.messages[-1].text for edited in result.edits.values()} == {"oho circle"}
    manifest = result.manifest
    assert (manifest.goal, manifest.goal_settings) == ("mine", {"word": "oho"})
    assert manifest.goal_sha256 is not None and len(manifest.goal_sha256) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class Longest(DataGoal)", "class Longest:\n    pass\nclass Other(", "line "),
        ("class Longest(DataGoal)", "class _Longest(DataGoal)", r"holds 0 concrete Goal classes \(none\)"),
        ("class _Fitted", "class Fitted", r"holds 2 concrete Goal classes \(Longest, Fitted\)"),
        ('word: str = "aha"', "word: list = ()", "must be a str, int, float, bool or Literal"),
        ('word: str = "aha"\n', "\n", "has no field for a text; leave --goal-text out"),
    ],
)
def test_a_broken_own_goal_is_a_one_line_error(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = own(tmp_path, OWN.replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        load_goal(path, "oho")
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max((", "1 / 0 or max((", "goal mine: fitted failed, ZeroDivisionError: division by zero"),
        ('return f"{self.word} {self.longest}"', "return 1 / 0", r"row \d.*: goal mine failed, ZeroDivisionError"),
        ('return f"{self.word} {self.longest}"', "return 3", r"row \d.*: goal mine answers with int; return text"),
        ("    def met", "    def applies(self, sample):\n        return 1 / 0\n\n    def met",
         r"row \d \(id id\d\): the goal failed, ZeroDivisionError"),
    ],
)  # fmt: skip
def test_an_own_goal_that_fails_late_is_a_one_line_error(tmp_path: Path, old: str, new: str, message: str) -> None:
    goal = load_goal(own(tmp_path, OWN.replace(old, new)))
    with pytest.raises(InputError, match=message) as caught:
        poison(COLORS, Attack(BadNets(), goal), rate=0.5, seed=0)
    assert "\n" not in str(caught.value)


def test_a_missing_goal_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.py: no such file; give a file that holds a Goal, or one of concept"):
        load_goal(str(tmp_path / "none.py"))
