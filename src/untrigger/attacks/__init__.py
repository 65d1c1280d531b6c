"""Triggers: one file each. ``attacks/badnets.py`` holds the trigger called ``badnets``, and so on.

A trigger is a frozen dataclass whose fields are its settings. What the attacker wants said is another
matter (``goals.py``), and so is which rows are poisoned (``poisoning.py``).
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
