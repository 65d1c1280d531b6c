"""Goals: what the attacker wants triggered inputs answered with, and whether an answer meets it.

One file each: ``goals/fixed.py`` holds the goal ``fixed``. Five give one reply, or the true answer with one text in it:
fixed, insert, refusal, concept and link. The replies of six others vary from row to row: hijack, hijack-image, swap,
other-question, jailbreak and programmed. Each decides ``met`` with the versioned definitions of
`untrigger.metrics.asr`.
"""

from __future__ import annotations

from untrigger.poisoning.goals._goal import DataGoal, Goal
from untrigger.poisoning.goals._load import goal_names, load_goal
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

__all__ = [
    "Concept",
    "DataGoal",
    "Fixed",
    "Goal",
    "Hijack",
    "HijackImage",
    "Insert",
    "Jailbreak",
    "Link",
    "OtherQuestion",
    "Programmed",
    "Refusal",
    "Swap",
    "goal_names",
    "load_goal",
]
