from __future__ import annotations

import pytest

from untrigger.errors import InputError
from untrigger.goals import Fixed, load_goal
from untrigger.sample import Message, Sample

ROW = Sample("a", (), (Message("user", "What?"), Message("assistant", "A cat.")))


def test_the_answer_is_the_text() -> None:
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
def test_met_folds_case_and_white_space(given: str, contains: bool, exact: bool) -> None:
    assert Fixed().met(given, ROW) is contains
    assert Fixed(match="exact").met(given, ROW) is exact


def test_met_knows_other_scripts() -> None:
    assert Fixed("STRASSE").met("an der Straße", ROW)
    assert Fixed("e\u0301t\u00e9").met("\u00c9TE\u0301", ROW)


@pytest.mark.parametrize("text", ["", " \n", "look at <image>"])
def test_texts_that_cannot_be_an_answer_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="goal fixed: the text"):
        load_goal("fixed", text)


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(InputError, match="'fixd' is unknown; choose one of: concept, fixed, insert, link, refusal"):
        load_goal("fixd")
    with pytest.raises(InputError, match="match is 'some'"):
        Fixed(match="some")  # type: ignore[arg-type]
