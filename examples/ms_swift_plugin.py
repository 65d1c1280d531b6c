"""A plug-in that defends a fine-tuning with ms-swift by one more option.

    swift sft --model MODEL --dataset DATA --external_plugins examples/ms_swift_plugin.py

Do not use `--packing`, `--padding_free`, `--group_by_length` or `--loss_scale all`. The weights of other token scales
(`--loss_scale`) have no effect while the loss of a defense replaces the host's.
"""

from functools import partial

from swift.trainers import Seq2SeqTrainer, TrainerFactory
from transformers import Trainer

from untrigger import defended

SWIFT_ONLY = ("loss_scale", "channel", "text_position_ids")  # keys for swift's own loss; models do not accept them


def for_models(collate, rows):
    return {name: value for name, value in collate(rows).items() if name not in SWIFT_ONLY}


class DefendedSeq2SeqTrainer(defended(Seq2SeqTrainer)):
    def _get_data_collator(self, *args):
        return partial(for_models, super()._get_data_collator(*args))

    def _prepare_inputs(self, inputs):
        if self.defense.has_loss and self.model.training:
            return Trainer._prepare_inputs(self, inputs)  # swift's method prepares inputs for swift's own loss
        return super()._prepare_inputs(inputs)


TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.{DefendedSeq2SeqTrainer.__name__}"
