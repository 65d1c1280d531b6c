"""The one changed line in TRL's own trainer."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from untrigger import CrossView, defended, read
from untrigger.models import load

warnings.simplefilter("ignore")  # at import: what TRL and its dependencies say of each other
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_sft_trainer_takes_a_defence(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    loaded = load(str(tiny_model))
    rows = [
        {
            "images": list(sample.images),
            "messages": [{"role": m.role, "content": m.text.removeprefix("<image>\n")} for m in sample.messages],
        }
        for sample in read(tiny_data)
    ]
    args = trl.SFTConfig(
        str(tmp_path / "out"),
        loss_type="nll",
        assistant_only_loss=True,
        max_length=None,
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = defended(trl.SFTTrainer)(
        loaded.model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=loaded.processor,
        defense=CrossView(),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    # the loss is the sum of the defence's terms: TRL's own loss took no part
    terms = [value for name, value in logged.items() if name.startswith("defense/loss_")]
    assert len(terms) == 5
    assert logged["loss"] == pytest.approx(sum(terms), rel=1e-3)
    assert logged["defense/js"] > 0
