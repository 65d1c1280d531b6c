"""What `defended` takes: classes of transformers trainers, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from untrigger import InputError, defended


def make_trainer(*args: Any) -> Trainer:
    return Trainer(*args)


REFUSED: list[tuple[Any, str]] = [
    (make_trainer, "function make_trainer is no class; give a class that derives from transformers.Trainer"),
    ([Trainer], "an object of type list is no class; give a class"),
    ("Trainer", "an object of type str is no class; give a class"),
    (None, "an object of type NoneType is no class; give a class"),
    (dict, "dict does not derive from transformers.Trainer; give a class that does"),
    (TrainingArguments, "TrainingArguments does not derive from transformers.Trainer"),
    (defended(Trainer), "DefendedTrainer is defended already; call defended once"),
]


@pytest.mark.parametrize(("given", "refusal"), REFUSED)
def test_refuses_what_is_no_trainer_class_in_one_line(given: Any, refusal: str) -> None:
    with pytest.raises(InputError, match=f"^defended: {refusal}") as caught:
        defended(given)
    assert "\n" not in str(caught.value)


def test_refuses_a_trainer_that_is_made_already(tmp_path: Path) -> None:
    made: Any = Trainer(nn.Linear(1, 1), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(InputError, match=r"wrap its class before you make it: defended\(Trainer\)\(\.\.\.\)$"):
        defended(made)


def test_takes_any_trainer_class_and_makes_one_class_of_it() -> None:
    assert issubclass(defended(Seq2SeqTrainer), Seq2SeqTrainer) and defended(Seq2SeqTrainer) is defended(Seq2SeqTrainer)
