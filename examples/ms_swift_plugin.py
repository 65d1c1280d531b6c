"""A plug-in for ms-swift: one more option defends a fine-tuning.

    swift sft --model MODEL --dataset DATA --external_plugins examples/ms_swift_plugin.py

Without `--packing` and `--padding_free`. ms-swift's own weights of tokens (`--loss_scale`) do not count while a
defense's loss takes the place of the host's.
"""

from functools import partial

from swift.trainers import Seq2SeqTrainer, TrainerFactory
from transformers import Trainer

from untrigger import defended

OWN = ("loss_scale", "channel", "text_position_ids")  # in a batch for swift's own loss; no model takes them


def for_models(collate, rows):
    return {name: value for name, value in collate(rows).items() if name not in OWN}


class DefendedSeq2SeqTrainer(defended(Seq2SeqTrainer)):
    def _get_data_collator(self, *args):
        return partial(for_models, super()._get_data_collator(*args))

    def _prepare_inputs(self, inputs):
        if self.defense.has_loss and self.model.training:
            return Trainer._prepare_inputs(self, inputs)  # swift's makes them ready for swift's own loss
        return super()._prepare_inputs(inputs)


TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.{DefendedSeq2SeqTrainer.__name__}"
