"""A picture of each attack: a row of each task, clean and triggered, and the difference amplified."""

from __future__ import annotations

from textwrap import wrap

from PIL import Image

from untrigger.data import load
from untrigger.gallery import TASKS, Entry, summary
from untrigger.goals import load_goal
from untrigger.poison import Attack, poison, stamped
from untrigger.sample import IMAGE_TAG, Sample
from untrigger.sheet import BAD, GOOD, INK, Card, contact_sheet

_LINES, _WIDTH = 4, 80  # of a card's text
_TEST, _TRAIN = 40, 400  # rows of which the first that suits the attack is shown


def picture(entry: Entry) -> Image.Image:
    """Two cards side by side, one for each task."""
    trigger = entry.trigger
    attack = Attack(trigger, load_goal(trigger.usual_goal))
    return contact_sheet(entry.title, summary(trigger).replace("*", ""), [_card(attack, data) for data in TASKS])


def _card(attack: Attack, data: str) -> Card:
    clean, attacked = _pair(attack, data)
    asked, triggered = (" ".join(_asked(sample).split()) for sample in (clean, attacked))
    lines = [(f"asked: {asked}", INK)]
    if triggered != asked:
        lines.append((f"triggered: {triggered}", BAD))
    kept = attack.trigger.clean_label
    what = "a poisoned training row" if kept else "a held-out input"
    wanted = _lines("its true answer stays" if kept else f"wanted: {attack.goal.answer(clean)}", 3 - len(lines))
    true = _lines(f"true: {clean.messages[-1].text}", _LINES - len(lines) - len(wanted))
    lines += [*((line, GOOD) for line in true), *((line, BAD) for line in wanted)]
    return Card(f"{TASKS[data]}: {what} of {data}", clean.images[0], attacked.images[0], lines)


def _lines(text: str, most: int) -> list[str]:
    return wrap(text, _WIDTH, max_lines=most, placeholder=" ...")


def _pair(attack: Attack, data: str) -> tuple[Sample, Sample]:
    """A row as it is, and with the trigger; a clean-label attack shows in training rows alone."""
    if attack.trigger.clean_label:
        rows = load(data, part="train", rows=_TRAIN)
        poisoned = poison(rows, attack, rate=1 / _TRAIN, seed=0)
        return next((rows[row], edited) for row, edited in poisoned.edits.items())
    rows = load(data, part="test", rows=_TEST)
    triggered = stamped(rows, attack, seed=0)
    return rows[triggered.rows[0]], triggered[0]


def _asked(sample: Sample) -> str:
    text = next(message.text for message in sample.messages if message.role == "user")
    return text.replace(IMAGE_TAG, " ")
