"""Settings from YAML and flags: precedence, reachable fields, and errors."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from untrigger.defenses import PRESETS, CrossView, Defense, PatchAug, Plain, TwoView
from untrigger.errors import InputError
from untrigger.files import read_yaml
from untrigger.training.settings import DEFAULTS, command_settings, training_settings


def settings(
    folder: Path, *flags: str, config: dict[str, Any] | str | None = None, preset: str = "paper"
) -> tuple[Defense, TrainingArguments]:
    file = None
    if config is not None:
        file = folder / "settings.yaml"
        file.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return training_settings(preset, folder / "out", read_yaml(file) if file else {}, flags)


def test_defaults_are_the_projects_own(tmp_path: Path) -> None:
    defense, args = settings(tmp_path)
    assert defense == CrossView()
    assert args.output_dir == str(tmp_path / "out")
    for name, value in DEFAULTS.items():
        assert getattr(args, name) in (value, [], ["none"]) or str(getattr(args, name)) == str(value), name


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    config = {"learning_rate": 0.5, "num_train_epochs": 7, "margin": 0.3, "ratio": 0.25}
    defense, args = settings(tmp_path, "--learning_rate", "1e-3", "--margin=0.4", config=config)
    assert args.learning_rate == 1e-3 and args.num_train_epochs == 7
    assert isinstance(defense, CrossView)
    assert (defense.margin, defense.ratio, defense.patch) == (0.4, 0.25, CrossView().patch)
    assert args.per_device_train_batch_size == DEFAULTS["per_device_train_batch_size"]


def test_accepts_dashes_for_underscores(tmp_path: Path) -> None:
    assert settings(tmp_path, "--learning-rate", "1e-3")[1].learning_rate == 1e-3


def test_yaml_values_of_every_type(tmp_path: Path) -> None:
    text = """
        learning_rate: 2e-4               # YAML reads this as text
        save_total_limit: null            # back to the host's default
        lr_scheduler_type: cosine_with_restarts
        lr_scheduler_kwargs: {num_cycles: 2}
        full_determinism: no
        logging_first_step: true
        label_names: [labels, others]
        adam_epsilon: 1.0e-9
        bound: -0.25
        view: mask
    """
    defense, args = settings(tmp_path, config=text)
    assert isinstance(defense, CrossView) and (defense.bound, defense.view) == (-0.25, "mask")
    assert args.learning_rate == 2e-4 and args.save_total_limit is None and args.adam_epsilon == 1e-9
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.full_determinism is False and args.logging_first_step is True
    assert args.label_names == ["labels", "others"]
    assert settings(tmp_path, config="bound: -1e-3\n")[0].bound == -1e-3  # type: ignore[attr-defined]


def test_every_field_of_training_arguments_is_reachable(tmp_path: Path) -> None:
    """A YAML file with the value of every field, as the host itself writes them, reads back as the same run."""
    first = settings(tmp_path)[1]
    # the host derives these from other fields, or writes them for display; they are set one by one below
    given = {f.name: getattr(first, f.name) for f in fields(first) if f.init}
    special = {name for name, value in given.items() if not isinstance(value, bool | int | float | str | list | dict)}
    plain = {k: getattr(v, "value", v) for k, v in given.items() if k not in special and v not in ([], {})}
    plain["report_to"] = "none"
    del plain["output_dir"]  # set by --out, and refused here
    warnings.simplefilter("ignore", FutureWarning)  # some fields have newer names
    again = settings(tmp_path, config=plain)[1]
    assert {k: getattr(again, k) for k in plain if k != "report_to"} == {k: given[k] for k in plain if k != "report_to"}
    # and no name is unknown to the parser: a bad value is the error, never the name
    for name in sorted(set(given) - {"output_dir"}):
        try:
            settings(tmp_path, f"--{name}=@")
        except InputError as error:
            assert "is unknown" not in str(error), name
        except (OSError, RuntimeError, AssertionError):
            pass  # the host's own objection to "@"


@pytest.mark.parametrize(("preset", "cls"), PRESETS.items())
def test_every_field_of_every_defense_is_a_flag(tmp_path: Path, preset: str, cls: type[Defense]) -> None:
    other = {"view": "mask", "views": "1", "stop_gradient": "True", "max_scored_rows": "500"}
    other |= {"min_suspects": "9", "max_suspects": "20"}
    flags = {f.name: other.get(f.name, "0.125") for f in fields(cls)}
    if "entropy_high" in flags:
        flags["entropy_high"] = "0.75"
    defense, _ = settings(tmp_path, *(f"--{k}={v}" for k, v in flags.items()), preset=preset)
    assert type(defense) is cls
    assert {f.name: str(getattr(defense, f.name)) for f in fields(cls)} == flags


def test_no_defense_shares_a_name_with_the_host() -> None:
    host = {f.name for f in fields(TrainingArguments)}
    for cls in PRESETS.values():
        assert host.isdisjoint(f.name for f in fields(cls)), cls


@pytest.mark.parametrize(
    ("preset", "flags", "named"),
    [
        ("paper", ("--nope", "1"), "--nope"),
        ("paper", ("--mar", "0.2"), "--mar"),  # no abbreviations: another field may get that name one day
        ("plain", ("--margin", "0.2"), "--margin"),
        ("paper", ("stray",), "stray"),
        ("paper", ("--margin", "wide"), "--margin"),
        ("paper", ("--margin",), "--margin"),
        ("paper", ("--margin", "nan"), "margin"),
        ("paper", ("--margin", "-0.1"), "margin"),
        ("paper", ("--bound", "1.5"), "bound"),
        ("paper", ("--entropy_low", "2"), "entropy_low"),
        ("paper", ("--output_weight", "inf"), "output_weight"),
        ("paper", ("--view", "nope"), "nope"),
        ("paper", ("--patch", "0"), "patch"),
        ("paper", ("--ratio", "2"), "ratio"),
        ("paper", ("--view", "drop", "--ratio", "2"), "ratio"),
        ("paper", ("--view", "drop", "--ratio", "0"), "ratio"),
        ("patch-aug", ("--view", "nope"), "nope"),
        ("patch-aug", ("--share", "1.5"), "share"),
        ("two-view", ("--view_weight", "-1"), "view_weight"),
        ("paper", ("--max_steps", "some"), "--max_steps"),
        ("paper", ("--optim", "nope"), "--optim"),
        ("paper", ("--bf16", "perhaps"), "--bf16"),
        ("paper", ("--eval_strategy", "nope"), "--eval_strategy"),
        ("paper", ("--load_best_model_at_end", "true"), "load_best_model_at_end"),
        ("paper", ("--seed", "-1"), "seed"),
        ("paper", ("--per_device_train_batch_size", "0"), "per_device_train_batch_size"),
        ("paper", ("--gradient_accumulation_steps", "0"), "gradient_accumulation_steps"),
        ("paper", ("--learning_rate", "nan"), "learning_rate"),
        ("paper", ("--seed", "5000000000"), "seed"),
        ("paper", ("--num_train_epochs", "nan"), "num_train_epochs"),
        ("paper", ("--num_train_epochs", "0"), "num_train_epochs"),
        ("paper", ("--dataloader_num_workers", "-1"), "dataloader_num_workers"),
        ("paper", ("--max_steps", "0"), "max_steps is 0; it must be at least 1, or -1"),
        ("paper", ("--report_to", "foo"), "report_to: foo is not supported, only "),
    ],
)
def test_an_error_names_the_field(tmp_path: Path, preset: str, flags: tuple[str, ...], named: str) -> None:
    with pytest.raises(InputError) as caught:
        settings(tmp_path, *flags, preset=preset)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert "for the names" not in str(caught.value)


def test_accepts_negative_max_steps_and_every_logger(tmp_path: Path) -> None:
    assert settings(tmp_path, "--max_steps", "-1")[1].max_steps == -1
    assert settings(tmp_path, "--report_to", "wandb")[1].report_to == ["wandb"]
    assert settings(tmp_path, "--report_to", "none")[1].report_to == []
    settings(tmp_path, "--report_to", "all")


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("learning_rate: fast", (), "c.yaml: argument --learning_rate"),
        ("learning_rate: fast", ("--warmup-share", "0.2"), "c.yaml: argument --learning_rate"),
        ("learning_rate: 1", ("--learning_rate", "fast"), "settings: argument --learning_rate"),
        ("max_steps: 0", (), "c.yaml: max_steps is 0"),
        ("nope: 3", (), "c.yaml: --nope=3 is unknown"),
        ("nope: 3", ("--nope", "4"), "c.yaml: --nope=3 is unknown"),
        ("warmup_share: 0.2", ("--nope", "4"), "settings: --nope is unknown"),
        ("lora_rank: 8", (), "c.yaml: lora_rank is an option of the command; give it as --lora-rank"),
        ("lora-rank: 8", (), "c.yaml: lora-rank is an option of the command; give it as --lora-rank"),
    ],
)
def test_errors_name_the_file_or_the_flags(tmp_path: Path, text: str, flags: tuple[str, ...], message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        command_settings("default", tmp_path / "out", file, flags, {"lora_rank", "defense"})
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(message)


def test_accepts_weights_of_zero(tmp_path: Path) -> None:
    names = ("view_weight", "output_weight", "feature_weight", "entropy_weight")
    assert settings(tmp_path, *(f"--{name}=0" for name in names))[0].paired is None


def test_refuses_an_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--defense nope: unknown; choose one of: default, words, plain, patch-aug, two-view, paper"
    ):
        settings(tmp_path, preset="nope")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope: 3\n", "--nope"),
        ("margin: wide\n", "margin"),
        ("margin: {a: 1}\n", "margin"),
        ("margin: [0.1, 0.2]\n", "0.2"),
        ("- margin\n", "settings.yaml: must hold"),
        ("", "settings.yaml: must hold"),
        ("3: 4\n", "settings.yaml: must hold"),
        ("margin: [\n", "settings.yaml: is not YAML: line 2"),
        ("margin: !!python/object/apply:os.getcwd []\n", "settings.yaml: is not YAML: line 1"),
        ("\x00", "settings.yaml: is not YAML"),
    ],
)
def test_refuses_a_bad_yaml_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        settings(tmp_path, config=text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_refuses_missing_or_binary_yaml(tmp_path: Path) -> None:
    (tmp_path / "noise.yaml").write_bytes(b"\xff\xfe\x80 margin")
    for name in ("noise.yaml", "gone.yaml", "."):
        with pytest.raises(InputError, match=str(tmp_path)):
            read_yaml(tmp_path / name)


def test_defenses_check_their_fields() -> None:
    for bad in (
        lambda: CrossView(margin=-0.1),
        lambda: CrossView(bound=-1.1),
        lambda: CrossView(entropy_low=0.5, entropy_high=0.4),
        lambda: CrossView(feature_weight=math.nan),
        lambda: TwoView(view_weight=math.inf),
        lambda: PatchAug(share=-0.1),
    ):
        with pytest.raises(ValueError, match="it must"):
            bad()
    assert Plain() == Plain() and json.dumps(CrossView().margin)


@pytest.mark.parametrize("flag", ["--output_dir=x", "--output-dir"])
def test_refuses_output_dir_beside_out(tmp_path: Path, flag: str) -> None:
    with pytest.raises(InputError, match="--out"):
        settings(tmp_path, flag)


@pytest.mark.parametrize("form", ["flag", "two words", "file"])
def test_refuses_deepspeed_in_one_line(tmp_path: Path, form: str) -> None:
    """Whether or not it is installed."""
    given: dict[str, tuple[tuple[str, ...], str | None]] = {
        "flag": (("--deepspeed=zero2.json",), None),
        "two words": (("--deepspeed", "zero2.json"), None),
        "file": ((), "deepspeed: zero2.json\n"),
    }
    flags, config = given[form]
    with pytest.raises(InputError, match=r"deepspeed: it serves one trainer.*; use defended\(Trainer\) in your own sc"):
        settings(tmp_path, *flags, config=config) if config else settings(tmp_path, *flags)
