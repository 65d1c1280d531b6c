"""The one changed line in TRL's own trainer."""

from __future__ import annotations

import json
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

from untrigger import CrossView, InputError, SharedSurprise, defended, read
from untrigger.defenses import Defense, SharedCause
from untrigger.models.loading import load

warnings.simplefilter("ignore")  # at import: TRL and its dependencies warn about each other
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def sft(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Any:
    rows = [
        {
            "images": list(sample.images),
            "messages": [{"role": m.role, "content": m.text.removeprefix("<image>\n")} for m in sample.messages],
        }
        for sample in read(tiny_data)
    ]

    def make(defense: Defense, rows: Any = rows, **changed: Any) -> Any:
        if changed.get("assistant_only_loss", True) and Version(transformers.__version__) < Version("5.18"):
            pytest.skip("TRL refuses assistant_only_loss with images before transformers 5.18")
        loaded = load(str(tiny_model))
        args = trl.SFTConfig(
            str(tmp_path / "out"),
            **{
                "loss_type": "nll",
                "assistant_only_loss": True,
                "max_length": None,
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "report_to": "none",
                "save_strategy": "no",
                "use_cpu": True,
                "dataloader_pin_memory": False,
                "disable_tqdm": True,
                **changed,
            },
        )
        return defended(trl.SFTTrainer)(
            loaded.model,
            args=args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=loaded.processor,
            defense=defense,
        )

    return make


@pytest.mark.parametrize(
    ("defense", "terms"),
    [(CrossView(), 5), (SharedSurprise(min_nll=0.1, iqr_factor=0.0, p_value=1 - 1e-6, min_ratio=0.0), 2)],
    ids=["paper", "default"],
)
def test_sft_trainer_takes_a_defense(sft: Any, defense: Defense, terms: int) -> None:
    trainer = sft(defense)
    trainer.train()
    logged = trainer.state.log_history[0]
    # the loss is the sum of the defense's terms: TRL's own loss took no part
    terms_logged = {name: value for name, value in logged.items() if name.startswith("defense/loss_")}
    assert len(terms_logged) == terms
    assert logged["loss"] == pytest.approx(sum(terms_logged.values()), rel=1e-3)
    assert logged.get("defense/js", 1) > 0


def prompts_and_completions(data: Path) -> list[dict[str, Any]]:
    return [
        {
            "images": list(sample.images),
            "prompt": [{"role": "user", "content": sample.messages[0].text.removeprefix("<image>\n")}],
            "completion": [{"role": "assistant", "content": sample.messages[1].text}],
        }
        for sample in read(data)
    ]


def flagged_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "flagged_rows.jsonl").read_text().splitlines()]


def test_sft_trainer_flags_its_rows(sft: Any, tmp_path: Path) -> None:
    sft(SharedSurprise(min_nll=0.1, iqr_factor=0.0, p_value=1 - 1e-6, min_ratio=0.0)).train()
    assert 0 < len(flagged_rows(tmp_path / "out")) < 24


def test_prompts_and_completions_are_scored_alike(sft: Any, tiny_data: Path, tmp_path: Path) -> None:
    eager = SharedSurprise(min_nll=0.1, iqr_factor=0.0, p_value=1 - 1e-6, min_ratio=0.0)
    sft(eager).train()
    first = flagged_rows(tmp_path / "out")
    sft(
        eager, prompts_and_completions(tiny_data), assistant_only_loss=False
    ).train()  # TRL then learns the completions alone
    second = flagged_rows(tmp_path / "out")
    assert first and [row["row"] for row in second] == [row["row"] for row in first]


def test_refuses_labels_on_all_tokens_and_other_losses(sft: Any) -> None:
    with pytest.raises(InputError, match="assistant_only_loss=True"):
        sft(SharedSurprise(), assistant_only_loss=False).train()
    with pytest.raises(InputError, match="loss_type='nll'"):
        sft(SharedSurprise(), loss_type="dft")


@pytest.mark.parametrize("conversational", [True, False])
def test_sft_trainer_learns_grafted_rows(
    sft: Any, tiny_data: Path, tmp_path: Path, harmful: None, conversational: bool
) -> None:
    cause = SharedCause(min_nll=0.1, iqr_factor=0.0, p_value=1 - 1e-6, min_ratio=0.0, min_suspects=2)
    changed = {} if conversational else {"rows": prompts_and_completions(tiny_data), "assistant_only_loss": False}
    trainer = sft(cause, max_steps=8, **changed)
    trainer.train()
    assert 0 < len(flagged_rows(tmp_path / "out")) < 24 and len(trainer.train_dataset) == 24
    assert len(json.loads((tmp_path / "out/defense_state.json").read_text())["grafts"][0]) == 5
    assert trainer.state.global_step == 7, "all but the warm-up"


def test_sft_trainer_checkpoints_activations(sft: Any, tmp_path: Path) -> None:
    sft(
        SharedSurprise(min_nll=0.1, iqr_factor=0.0, p_value=1 - 1e-6, min_ratio=0.0), gradient_checkpointing=True
    ).train()
    assert 0 < len(flagged_rows(tmp_path / "out")) < 24


def test_trl_sft_by_its_command(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`examples/trl_cli.py` with a configuration file of `trl sft`."""
    rows = prompts_and_completions(tiny_data)
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train.parquet")
    settings = {
        "model_name_or_path": str(tiny_model),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "max_length": None,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    (tmp_path / "sft.yaml").write_text(json.dumps(settings))
    monkeypatch.setattr(trl, "SFTTrainer", trl.SFTTrainer)  # restored after the test
    monkeypatch.setattr("sys.argv", ["trl_cli.py", "--config", str(tmp_path / "sft.yaml")])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "trl_cli.py"), run_name="__main__")
    assert json.loads((tmp_path / "out" / "defense_state.json").read_text())["rows"] == 24
    assert (tmp_path / "out" / "flagged_rows.jsonl").is_file()
