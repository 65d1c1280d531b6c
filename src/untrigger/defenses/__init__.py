"""Fine-tuning procedures that resist backdoors in untrusted rows, one file each."""

from untrigger.defenses.abl import ABL
from untrigger.defenses.base import Defense, PairedDefense, Stage, StepDefense, Training
from untrigger.defenses.bye import BYE
from untrigger.defenses.byorn import BYORN
from untrigger.defenses.clean_tuning import CleanTuning
from untrigger.defenses.cross_view import CrossView
from untrigger.defenses.crow import CROW
from untrigger.defenses.fine_pruning import FinePruning
from untrigger.defenses.patch_aug import PatchAug
from untrigger.defenses.plain import Plain
from untrigger.defenses.shared_cause import SharedCause
from untrigger.defenses.shared_surprise import SharedSurprise
from untrigger.defenses.two_view import TwoView

PRESETS: dict[str, type[Defense]] = {
    "default": SharedCause,
    "words": SharedSurprise,
    "plain": Plain,
    "patch-aug": PatchAug,
    "two-view": TwoView,
    "paper": CrossView,
    "abl": ABL,
    "byorn": BYORN,
    "bye": BYE,
    "crow": CROW,
    "clean-tuning": CleanTuning,
    "fine-pruning": FinePruning,
}


def preset_of(defense: Defense) -> str:
    """A defense's name on the command line."""
    return next(name for name, cls in PRESETS.items() if cls is type(defense))


__all__ = [
    "ABL",
    "BYE",
    "BYORN",
    "CROW",
    "PRESETS",
    "CleanTuning",
    "CrossView",
    "Defense",
    "FinePruning",
    "PairedDefense",
    "PatchAug",
    "Plain",
    "SharedCause",
    "SharedSurprise",
    "Stage",
    "StepDefense",
    "Training",
    "TwoView",
    "preset_of",
]
