"""Run by `torchrun`: a defense's gradients with the weights sharded over the processes, against those of one process.

    sharded.py MODEL DATA OUT

Writes for each tuning and kind of view the number of compared weights and the largest difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from untrigger.defenses import CrossView
from untrigger.models.collators import ChatCollator, Collate, DropCollator, PairCollator, Rows
from untrigger.models.forward import decoder_layers
from untrigger.models.loading import add_lora, load
from untrigger.rows.sample import read

TERMS: dict[str, Any] = {"margin": 0.6, "bound": -0.9, "entropy_high": 0.5}
WAYS = {
    "both": CrossView(**TERMS),
    "still": CrossView(**TERMS, stop_gradient=True),
    "drop": CrossView(**TERMS, view="drop"),
}


def batch_of(defense: CrossView, collate: Collate, rows: Rows) -> dict[str, Any]:
    collator = DropCollator(collate, 0) if defense.paired is None else PairCollator(collate, defense.paired[0], 0)
    return collator([rows[i] for i in range(len(rows))])


def gradients_apart(model_folder: str, data: str, tuning: str) -> dict[str, tuple[int, float]]:
    """For each kind of view the number of compared weights, and the largest difference."""
    torch.manual_seed(0)  # the adapters' too
    loaded = load(model_folder, dtype=torch.float64)
    model: Any = add_lora(loaded.model, rank=2) if tuning == "lora" else loaded.model
    rows, collate = Rows(list(read(Path(data)))[:3]), ChatCollator(loaded.processor)

    def gradients(defense: CrossView) -> dict[str, torch.Tensor]:
        model.zero_grad()
        defense.step(model, batch_of(defense, collate, rows)).total.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone = {way: gradients(defense) for way, defense in WAYS.items()}
    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)
    gaps_by_way: dict[str, tuple[int, float]] = {}
    for way, defense in WAYS.items():
        sharded: dict[str, Any] = gradients(defense)
        assert sharded.keys() == alone[way].keys()
        gaps = [float((sharded[name].full_tensor() - alone[way][name]).abs().max()) for name in sharded]
        gaps_by_way[f"{tuning}, {way}"] = len(gaps), max(gaps)
    return gaps_by_way


def main(model_folder: str, data: str, out: str) -> None:
    dist.init_process_group("gloo")
    gaps_by_way = gradients_apart(model_folder, data, "lora") | gradients_apart(model_folder, data, "full")
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(gaps_by_way))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
