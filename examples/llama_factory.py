"""`llamafactory-cli train` with one added line that defends it. All settings of LLaMA-Factory work as before.

    python examples/llama_factory.py CONFIG.yaml
    torchrun --nproc_per_node 2 examples/llama_factory.py CONFIG.yaml

Only for supervised fine-tuning (`stage: sft`) without `packing`.
"""

from llamafactory.train.sft import workflow
from llamafactory.train.tuner import run_exp

from untrigger import defended

if __name__ == "__main__":
    workflow.CustomSeq2SeqTrainer = defended(workflow.CustomSeq2SeqTrainer)  # the one added line
    run_exp()
