"""`trl sft` with one added line that defends it. All settings of TRL's command work as before.

    python examples/trl_cli.py --config CONFIG.yaml
    torchrun --nproc_per_node 2 examples/trl_cli.py --config CONFIG.yaml

In CONFIG.yaml set `assistant_only_loss: true` for a data set of messages, and `max_length: null`.
"""

import trl
from trl.scripts import sft

from untrigger import defended

if __name__ == "__main__":
    trl.SFTTrainer = defended(trl.SFTTrainer)  # the one added line
    sft.main(*sft.make_parser().parse_args_and_config())
