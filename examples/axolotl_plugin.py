"""A plug-in that defends a fine-tuning with axolotl by one line of its YAML file.

    plugins: [axolotl_plugin.UntriggerPlugin]

    PYTHONPATH=examples axolotl train CONFIG.yaml

Do not use `sample_packing`. For images set `remove_unused_columns: false`, which axolotl itself requires.
"""

from axolotl.integrations.base import BasePlugin

from untrigger import defended


class UntriggerPlugin(BasePlugin):
    def get_trainer_cls(self, cfg):
        from axolotl.core.trainers import AxolotlTrainer  # imported late, because it imports plug-ins itself

        return defended(AxolotlTrainer)
