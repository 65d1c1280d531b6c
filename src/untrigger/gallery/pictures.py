"""A picture of each attack: a row of each task, clean and triggered, and the difference amplified."""

from __future__ import annotations

from textwrap import wrap

from PIL import Image

from untrigger.attacks import load_trigger
from untrigger.bench.store import Cell
from untrigger.data import load
from untrigger.gallery import TASKS, Entry, Plan, summary
from untrigger.poisoning.contact_sheet import BAD, GOOD, INK, Card, draw_sheet
from untrigger.poisoning.goals import load_goal
from untrigger.poisoning.poison import Attack, poison, stamped
from untrigger.rows.sample import IMAGE_TAG, Sample

_LINES, _WIDTH = 4, 80  # of a card's text
_TEST, _TRAIN = 40, 400  # rows of which the first that suits the attack is shown


def picture(entry: Entry, cells: Plan) -> Image.Image:
    """Two cards side by side, one for each task: the attack of the first model's cell, as it is measured."""
    first = [next(cells[key] for key in cells if (key.attack, key.data) == (entry.slug, data)) for data in TASKS]
    return draw_sheet(entry.title, summary(entry.trigger).replace("*", ""), [_card(cell) for cell in first])


def _card(cell: Cell) -> Card:
    attack = Attack(load_trigger(cell.attack, **cell.attack_settings), load_goal(cell.goal, cell.goal_text))
    clean, attacked = _pair(attack, cell)
    asked, triggered = (" ".join(_asked(sample).split()) for sample in (clean, attacked))
    lines = [(f"asked: {asked}", INK)]
    if triggered != asked:
        lines.append((f"triggered: {triggered}", BAD))
    kept = attack.trigger.clean_label
    what = "a poisoned training row" if kept else "a held-out input"
    wanted = _lines("its true answer stays" if kept else f"wanted: {attack.goal.answer(clean)}", 3 - len(lines))
    true = _lines(f"true: {clean.messages[-1].text}", _LINES - len(lines) - len(wanted))
    lines += [*((line, GOOD) for line in true), *((line, BAD) for line in wanted)]
    return Card(f"{TASKS[cell.data]}: {what} of {cell.data}", clean.images[0], attacked.images[0], lines)


def _lines(text: str, most: int) -> list[str]:
    return wrap(text, _WIDTH, max_lines=most, placeholder=" ...")


def _pair(attack: Attack, cell: Cell) -> tuple[Sample, Sample]:
    """A row as it is, and with the trigger; a clean-label attack shows in training rows alone."""
    if attack.trigger.clean_label:
        rows = load(cell.data, cell.split, "train", _TRAIN, cell.seed)
        poisoned = poison(rows, attack, rate=1 / _TRAIN, seed=cell.seed)
        return next((rows[row], edited) for row, edited in poisoned.edits.items())
    rows = load(cell.data, cell.split, "test", _TEST, cell.seed)
    triggered = stamped(rows, attack, cell.seed)
    return rows[triggered.numbers[0]], triggered[0]


def _asked(sample: Sample) -> str:
    text = next(message.text for message in sample.messages if message.role == "user")
    return text.replace(IMAGE_TAG, " ")
