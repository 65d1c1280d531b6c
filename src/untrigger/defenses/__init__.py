"""Defences: what a training step does with the views of its rows. One file each."""

from untrigger.defenses.base import Defense, Pair
from untrigger.defenses.cross_view import CrossView
from untrigger.defenses.patch_aug import PatchAug
from untrigger.defenses.plain import Plain
from untrigger.defenses.two_view import TwoView

PRESETS: dict[str, type[Defense]] = {"plain": Plain, "patch-aug": PatchAug, "two-view": TwoView, "paper": CrossView}

__all__ = ["PRESETS", "CrossView", "Defense", "Pair", "PatchAug", "Plain", "TwoView"]
