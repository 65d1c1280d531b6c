"""Triggers, one file each: ``attacks/badnets.py`` holds the trigger named ``badnets``.

A trigger is a frozen dataclass whose fields are its settings. What a triggered input should be answered with is a goal
(`untrigger.poisoning.goals`). Which rows are poisoned is decided in `untrigger.poisoning.poison`.
"""

from __future__ import annotations

from untrigger.attacks._load import load_trigger, trigger_names
from untrigger.attacks._paint import Pixels, pixels_of, repaint
from untrigger.attacks._trigger import ImageTrigger, Stamper, TextTrigger, Trigger

__all__ = [
    "ImageTrigger",
    "Pixels",
    "Stamper",
    "TextTrigger",
    "Trigger",
    "load_trigger",
    "pixels_of",
    "repaint",
    "trigger_names",
]
