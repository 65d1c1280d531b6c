"""Loading a goal by its name or from the user's own file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from untrigger.errors import InputError, did_you_mean
from untrigger.own_files import build, is_own_file, only_class, run_file
from untrigger.poisoning.goals._goal import Goal, first_field
from untrigger.poisoning.goals.concept import Concept
from untrigger.poisoning.goals.fixed import Fixed
from untrigger.poisoning.goals.hijack import Hijack
from untrigger.poisoning.goals.hijack_image import HijackImage
from untrigger.poisoning.goals.insert import Insert
from untrigger.poisoning.goals.jailbreak import Jailbreak
from untrigger.poisoning.goals.link import Link
from untrigger.poisoning.goals.other_question import OtherQuestion
from untrigger.poisoning.goals.programmed import Programmed
from untrigger.poisoning.goals.refusal import Refusal
from untrigger.poisoning.goals.swap import Swap

_CLASSES: Final[tuple[type[Goal], ...]] = (
    *(Concept, Fixed, Hijack, HijackImage, Insert, Jailbreak, Link, OtherQuestion, Programmed, Refusal, Swap),
)
_GOALS: Final = {goal.name: goal for goal in _CLASSES}


def goal_names() -> tuple[str, ...]:
    """Names of the bundled goals, sorted."""
    return tuple(sorted(_GOALS))


def load_goal(name_or_path: str, text: str | None = None) -> Goal:
    """Load the bundled goal ``fixed``, or the one in the user's own file ``path/to/file.py``.

    A path that ends in ``.py`` **runs that file** as Python: give only files that you trust. ``text`` sets the goal's
    first field; for concept it is ``"source->target"``.

    Raises:
        InputError: there is no such goal or file; the file fails or does not hold exactly one concrete ``Goal``
            dataclass; the text is empty or invalid, or the goal takes none.
    """
    if is_own_file(name_or_path):
        return _own(name_or_path, text)
    if name_or_path not in _GOALS:
        names = ", ".join(goal_names())
        hint = did_you_mean(name_or_path, goal_names())
        raise InputError(f"goal '{name_or_path}' is unknown; choose one of: {names}, or a path that ends in .py{hint}")
    goal = _GOALS[name_or_path]
    return goal() if text is None else goal.from_text(text)


def _own(path: str, text: str | None) -> Goal:
    goal = only_class(run_file(Path(path), Goal.__name__, goal_names()), path, Goal)
    goal.name = Path(path).stem
    if text is None:
        return build(goal, path, {})
    if (field := first_field(goal)) is None:
        raise InputError(f"{path}: the goal has no field for a text; leave --goal-text out")
    return build(goal, path, {field: text})
