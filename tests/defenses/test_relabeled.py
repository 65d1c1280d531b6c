"""Relabeled rows: which answers change, their prompts, and image tags in generated text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dry import answers_of
from untrigger.defenses import relabeled
from untrigger.defenses.relabeled import RelabeledRows
from untrigger.models.collators import ChatCollator
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import Message, Sample

CHOSEN = [1, 4, 7]


def test_changes_only_the_chosen_answers(loaded: LoadedModel, samples: list[Sample]) -> None:
    rows = RelabeledRows(samples[:9], CHOSEN)
    assert answers_of(rows) == answers_of(samples[:9]), "before the first pass nothing is replaced"
    rows.relabel(loaded)
    assert sorted(rows.answers) == CHOSEN
    for i, (before, after) in enumerate(zip(samples, rows, strict=False)):
        assert (after.id, after.images, after.messages[:-1]) == (before.id, before.images, before.messages[:-1])
        assert (after.messages[-1] == before.messages[-1]) == (i not in CHOSEN)
    assert [s.id for s in rows[2:8:2]] == ["row-2", "row-4", "row-6"] and rows[4] == rows[2:8:2][1]


def test_answers_each_turn_after_the_models_own_earlier_answers(
    loaded: LoadedModel, mixed: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 3 has two turns: its second question comes after the new first answer."""
    prompts: list[list[Sample]] = []

    def answer(_: LoadedModel, samples: list[Sample], *, do_sample: bool) -> Iterator[str]:
        assert do_sample
        prompts.append(samples)
        yield from (f"new {len(prompts)} {sample.id}" for sample in samples)

    monkeypatch.setattr(relabeled, "answers", answer)
    rows = RelabeledRows(mixed, [1, 3])
    rows.relabel(loaded)
    assert [[s.id for s in part] for part in prompts] == [[mixed[1].id, "turns"], ["turns"]]
    assert [m.text for m in prompts[0][1].messages] == ["<image>\nwhat?"]
    assert [m.text for m in prompts[1][0].messages] == ["<image>\nwhat?", "new 1 turns", "and now?"]
    assert answers_of(rows)[3] == ("new 1 turns", "new 2 turns")
    assert answers_of(rows)[2] == answers_of(mixed)[2]


def test_prompts_have_the_images_up_to_their_turn(loaded: LoadedModel, samples: list[Sample]) -> None:
    talk = (("user", "<image>\nwhat?"), ("assistant", "a"), ("user", "<image>\nand this?"), ("assistant", "b"))
    turns = tuple(Message(role, text) for role, text in talk)
    rows = RelabeledRows([Sample("two", samples[0].images + samples[1].images, turns)], [0])
    rows.relabel(loaded)
    assert len(rows.answers[0]) == 2


def test_removes_generated_image_tags(
    loaded: LoadedModel, mixed: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relabeled, "answers", lambda *_, **__: iter(["a <image> red", ""]))
    rows = RelabeledRows(mixed, [0, 1])
    rows.relabel(loaded)
    assert answers_of(rows)[:2] == [("a  red",), ("",)]
    chats = [{"images": list(s.images), "messages": _chat(s)} for s in rows[:2]]
    assert ChatCollator(loaded.processor)(chats)["labels"].shape[0] == 2  # an empty answer is its end alone


def _chat(sample: Sample) -> list[dict[str, object]]:
    from untrigger.models.collators import chat_message

    return [chat_message(message) for message in sample.messages]


def test_skips_questions_without_an_answer(loaded: LoadedModel, samples: list[Sample]) -> None:
    open_end = Sample("open", samples[0].images, (Message("user", "<image>\nwhat?"),))
    rows = RelabeledRows([open_end], [0])
    rows.relabel(loaded)
    assert rows.answers == {0: []} and rows[0] == open_end
