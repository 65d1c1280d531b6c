"""A plug-in for axolotl: one line of its YAML file defends a fine-tuning.

    plugins: [axolotl_plugin.UntriggerPlugin]

    PYTHONPATH=examples axolotl train CONFIG.yaml

Without `sample_packing`, and for images with `remove_unused_columns: false`, as axolotl itself asks for.
"""

from axolotl.integrations.base import BasePlugin

from untrigger import defended


class UntriggerPlugin(BasePlugin):
    def get_trainer_cls(self, cfg):
        from axolotl.core.trainers import AxolotlTrainer  # which itself looks for plug-ins

        return defended(AxolotlTrainer)
