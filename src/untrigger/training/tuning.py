"""Which weights of a model are trained: all of them, or an adapter's, on which layers, over which base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel

from untrigger.errors import InputError, check_range
from untrigger.models.loading import ALL_LINEAR, add_lora, lora_layers, train_all
from untrigger.models.quantized import require_bitsandbytes


@dataclass(frozen=True)
class Tuning:
    """Which weights are trained.

    Fields:
        full_finetune: all weights, in place of LoRA adapters.
        rank, alpha, dropout: of LoRA; the dropout is from 0 to 0.99.
        target_modules: names of the layers that LoRA reaches, as peft's; by default all linear ones but the head.
            Those of the vision tower count only with ``train_vision_tower``.
        use_dora: whether LoRA's matrices change directions only, and the lengths are trained apart (DoRA).
        train_vision_tower: whether the vision tower is trained too.
        load_in_4bit, load_in_8bit: whether the base's linear layers are held in 4 or 8 bits (QLoRA).

    Raises:
        InputError: a setting of LoRA with ``full_finetune``; ``target_modules`` is no list of names; both numbers of
            bits, or one without bitsandbytes.
        ValueError: ``dropout`` is out of range.
    """

    full_finetune: bool = False
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Sequence[str] = (ALL_LINEAR,)
    use_dora: bool = False
    train_vision_tower: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False

    def __post_init__(self) -> None:
        check_range(0, 0.99, dropout=self.dropout)
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise InputError(f"target_modules: is {self.target_modules!r}; give a list of names, or [{ALL_LINEAR}]")
        if self.full_finetune and (self.dropout or self.use_dora or list(self.target_modules) != [ALL_LINEAR]):
            raise InputError(
                "full_finetune: trains all weights, without LoRA; leave out its dropout, target_modules and use_dora"
            )
        if self.bits:
            if self.full_finetune or (self.load_in_4bit and self.load_in_8bit):
                raise InputError("load_in_4bit, load_in_8bit: give one of them, and train a LoRA adapter")
            require_bitsandbytes()

    @property
    def bits(self) -> int:
        """Of the base's linear layers; 0 if they stay as they are."""
        return 4 * self.load_in_4bit or 8 * self.load_in_8bit

    def adapt(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """The model with an adapter to train, or with its own weights to train."""
        if self.full_finetune:
            return train_all(model, train_vision_tower=self.train_vision_tower)
        return add_lora(
            model,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            use_dora=self.use_dora,
            train_vision_tower=self.train_vision_tower,
        )

    def check(self, model: PreTrainedModel) -> None:
        """Raise an InputError if the model lacks one of ``target_modules``."""
        if not self.full_finetune:
            lora_layers(model, self.target_modules, train_vision_tower=self.train_vision_tower)
