"""The commands: exit codes, one line for each input error, and output files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from safetensors import safe_open

from datafiles import bad_file, turns
from shell import TINY_RUN, refused, three_commands, untrigger
from untrigger import __version__
from untrigger.attacks import trigger_names
from untrigger.defenses import PRESETS

# --- poison, train, evaluate -----------------------------------------------------------------------


class Story(NamedTuple):
    poisoned: Path
    adapter: Path
    figures: Path


@pytest.fixture(scope="module")
def story(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Run poison, train and evaluate once each."""
    folder = tmp_path_factory.mktemp("story")
    paths = Story(folder / "poisoned", folder / "adapter", folder / "figures")
    poison = ["poison", tiny_data, "--out", paths.poisoned, "--rate", "0.25", "--seed", "3", "--side", "0.5"]
    train = ["train", paths.poisoned / "data", "--model", tiny_model, "--out", paths.adapter, *TINY_RUN]
    train += ["--defense", "paper", "--ratio", "0.4"]
    evaluate = ["evaluate", paths.adapter, tiny_data, "--attack", "badnets", "--side", "0.5", "--limit", "6"]
    for words in (poison, train, [*evaluate, "--wrong-image-control", "--out", paths.figures]):
        assert untrigger(*words).code == 0
    return paths


def test_poison_writes_data_truth_and_picture(story: Story, tiny_data: Path) -> None:
    rows = json.loads((story.poisoned / "data" / "data.json").read_text())
    manifest = json.loads((story.poisoned / "truth" / "manifest.json").read_text())
    originals = json.loads((tiny_data / "data.json").read_text())
    poisoned_rows = {entry["row"] - 1 for entry in manifest["rows"]}
    assert len(poisoned_rows) == 6 and len(rows) == 24
    assert manifest["attack_settings"]["side"] == 0.5 and manifest["seed"] == 3
    for i, (row, original) in enumerate(zip(rows, originals, strict=True)):
        answer = row["conversations"][-1]["value"]
        assert answer == ("Backdoor Attack!" if i in poisoned_rows else original["conversations"][-1]["value"])
    Image.open(story.poisoned / "contact_sheet.png").verify()
    assert not list((story.poisoned / "data").rglob("manifest*")), "the manifest must not be in the data folder"


def test_train_writes_a_standard_adapter(story: Story, tiny_model: Path) -> None:
    config = json.loads((story.adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2
    with safe_open(story.adapter / "adapter_model.safetensors", framework="pt") as weights:
        changed = [key for key in weights.keys() if "lora_B" in key and weights.get_tensor(key).any()]  # noqa: SIM118
    assert changed, "two steps must have changed the adapter"
    record = json.loads((story.adapter / "untrigger.json").read_text())
    assert record["base"] == str(tiny_model) and record["defense"]["preset"] == "paper"
    assert record["defense"]["ratio"] == 0.4 and record["max_steps"] == 2 and record["rows"] == 24
    assert "PEFT" in (story.adapter / "README.md").read_text() or "LoRA" in (story.adapter / "README.md").read_text()
    assert not list(story.adapter.glob("*.bin")), "a pickle in the output"


def test_evaluate_stores_every_answer_and_figure(story: Story) -> None:
    lines = [json.loads(line) for line in (story.figures / "answers.jsonl").read_text().splitlines()]
    assert [line["condition"] for line in lines] == [
        name for name in ("clean", "triggered", "wrong_image", "near_miss: other pattern") for _ in range(6)
    ]
    assert {tuple(line) for line in lines} == {
        ("condition", "id", "prompt", "truth", "answer", "met", "truth_met", "applies"),
    }
    figures = json.loads((story.figures / "metrics.json").read_text())
    parts = {"attack", "quality", "text_prior", "wrong_image", "asr", "leak", "triggered_quality", "near_miss"}
    assert set(figures) == parts and figures["attack"]["settings"]["side"] == 0.5
    for rate in (figures["asr"], figures["leak"], figures["near_miss"]["other pattern"]):
        assert set(rate) == {"value", "low", "high", "n", "version"} and rate["n"] == 6
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
    assert set(figures["quality"]) == {"vqa_accuracy", "bleu4", "meteor", "rouge_l", "cider"}


def test_resume_of_a_finished_run_keeps_its_weights(story: Story, tiny_model: Path) -> None:
    before = (story.adapter / "adapter_model.safetensors").read_bytes()
    words = ("train", story.poisoned / "data", "--model", tiny_model, "--out", story.adapter, *TINY_RUN)
    words += ("--defense", "paper")
    refused(untrigger(*words, "--ratio", "0.4"), story.adapter, "--resume")
    refused(untrigger(*words, "--ratio", "0.3", "--resume"), "other settings (defense)")
    assert untrigger(*words, "--ratio", "0.4", "--resume").code == 0
    assert (story.adapter / "adapter_model.safetensors").read_bytes() == before


def test_evaluate_prints_a_table(story: Story, tiny_data: Path) -> None:
    ended = untrigger("evaluate", story.adapter, tiny_data, "--limit", "2")
    assert ended.code == 0
    assert "vqa_accuracy" in ended.out and "text_prior" in ended.out and "asr" not in ended.out


# --- mistyped commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("poison", "DATA", "--out", "OUT", "--attack", "nope"), ("attack 'nope' is unknown", "badnets")),
        (("poison", "DATA", "--out", "OUT", "--attack", "gone.py"), ("gone.py: no such file",)),
        (("poison", "DATA", "--out", "OUT", "--goal", "nope"), ("goal 'nope' is unknown", "fixed")),
        (("poison", "DATA", "--out", "OUT", "--goal-text", " "), ("goal fixed: the text is empty",)),
        (("poison", "DATA", "--out", "OUT", "--nope", "1"), ("no setting 'nope'", "side")),
        (("poison", "DATA", "--out", "OUT", "--side", "wide"), ("side is 'wide'", "number")),
        (("poison", "DATA", "--out", "OUT", "--side", "7"), ("side is 7",)),
        (("poison", "DATA", "--out", "OUT", "--rate", "lots"), ("--rate", "number", "untrigger poison --help")),
        (("poison", "DATA", "--out", "OUT", "--rate", "1.5"), ("rate is 1.5",)),
        (("poison", "DATA", "--out", "OUT", "--rate", "nan"), ("rate is nan",)),
        (("poison", "DATA", "--out", "OUT", "--seed", "-1"), ("--seed",)),
        (("poison", "DATA", "--out", "OUT", "--on-bad-row", "shrug"), ("shrug", "skip")),
        (("poison", "DATA", "--out", "OUT", "stray"), ("stray: not expected here",)),
        (("poison", "DATA"), ("Missing option", "--out")),
        (("poison", "--out", "OUT"), ("Missing argument", "data")),
        (("poison", "--side", "0.1", "DATA", "--out", "OUT"), ("--side comes too early",)),
        (("train", "DATA", "--out", "OUT", "--defense", "nope"), ("--defense nope: unknown", "paper")),
        (
            ("train", "gone.json", "--out", "OUT", "--defense", "crow"),
            ("--defense crow: needs rows known to be clean", "--clean-data DATA"),
        ),
        (
            ("train", "DATA", "--out", "OUT", "--clean-data", "DATA"),
            ("--clean-data: defense default needs no clean rows",),
        ),
        (("train", "DATA", "--out", "OUT", "--nope", "1"), ("--nope is unknown", "warmup_share", "TrainingArguments")),
        (("train", "DATA", "--out", "OUT", "--warmup-share", "wide"), ("--warmup-share", "wide")),
        (("train", "DATA", "--out", "OUT", "--learning_rate", "fast"), ("--learning_rate", "fast")),
        (("train", "DATA", "--out", "OUT", "--lora-rank", "0"), ("--lora-rank",)),
        (("train", "DATA", "--out", "OUT", "--config", "gone.yaml"), ("gone.yaml", "No such file")),
        (("train", "DATA", "--out", "OUT", "--config", "BAD_YAML"), ("bad.yaml", "line 3")),
        (("train", "DATA", "--out", "OUT", "--config", "OWN_YAML"), ("own.yaml: lora_rank", "give it as --lora-rank")),
        (("train", "DATA", "--out", "OUT", "--lora_rank", "0"), ("--lora-rank",)),
        (("train", "gone.json", "--out", "OUT", "--model", "lava"), ("lava: no such folder", "did you mean llava?")),
        (("scan", "gone.json", "--out", "OUT", "--model", "lava"), ("lava: no such folder", "did you mean llava?")),
        (("evaluate", "./gone", "gone.json"), ("./gone: no such folder",)),
        (("verify", "lava", "gone.json", "--out", "OUT"), ("lava: no such folder",)),
        (("verify", "MODEL", "gone.json", "--out", "OUT", "--base", "lava"), ("lava: no such folder",)),
        (("train", "--warmup-share", "0.2", "DATA", "--out", "OUT"), ("--warmup-share comes too early",)),
        (("evaluate", "MODEL", "DATA", "--side", "0.1"), ("--side: no such option", "--attack")),
        # the nearest name is the end of the line
        (("train", "DATA", "--out", "OUT", "--learning_rte", "1e-4"), ("; did you mean --learning_rate?\n",)),
        (("train", "DATA", "--out", "OUT", "--warmup-shre=0.2"), ("; did you mean --warmup-share?\n",)),
        (("train", "DATA", "--out", "OUT", "--lora-rnk", "4"), ("; did you mean --lora-rank?\n",)),
        (("scan", "DATA", "--out", "OUT", "--modl", "llava"), ("; did you mean --model?\n",)),
        (("train", "DATA", "--out", "OUT", "--config", "BAD_NAME"), ("name.yaml: ", "mean --learning_rate?\n")),
        (("train", "DATA", "--out", "OUT", "--defense", "papr"), ("; did you mean paper?\n",)),
        (("poison", "DATA", "--out", "OUT", "--attack", "badnet"), ("; did you mean badnets?\n",)),
        (("poison", "DATA", "--out", "OUT", "--goal", "fixd"), ("; did you mean fixed?\n",)),
        (("poison", "DATA", "--out", "OUT", "--sid", "0.1"), ("; did you mean side?\n",)),
        (("poison", "DATA", "--out", "OUT", "--rte", "0.1"), ("; did you mean rate?\n",)),
        (("evaluate", "MODEL", "DATA", "--limt", "2"), ("; did you mean --limit?\n",)),
        (("data", "easy-vga", "--out", "OUT"), ("; did you mean easy-vqa?\n",)),
        (("model", "lava", "--out", "OUT"), ("; did you mean llava?\n",)),
        (("evaluate", "MODEL", "DATA", "--attack", "nope"), ("attack 'nope' is unknown",)),
        (("evaluate", "MODEL", "DATA", "--attack", "badnets", "--goal", "nope"), ("goal 'nope' is unknown",)),
        (("evaluate", "MODEL", "DATA", "--limit", "0"), ("--limit",)),
        (("evaluate", "MODEL"), ("Missing argument", "data")),
        (("quickstart", "--nope"), ("--nope",)),
        (("model", "nope", "--out", "OUT"), ("nope: no such model family", "llava")),
        (("nope",), ("nope", "untrigger --help")),
        (("--nope",), ("--nope",)),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, tuple) else None,
)
def test_a_mistyped_command_is_one_line(
    tmp_path: Path,
    tiny_model: Path,
    tiny_data: Path,
    words: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    (tmp_path / "bad.yaml").write_text("margin: 0.2\nratio: [\n")
    (tmp_path / "own.yaml").write_text("lora_rank: 8\n")
    (tmp_path / "name.yaml").write_text("learning_rte: 1e-4\n")
    places = {"DATA": tiny_data, "OUT": tmp_path / "out", "MODEL": tiny_model, "BAD_YAML": tmp_path / "bad.yaml"}
    places |= {"OWN_YAML": tmp_path / "own.yaml", "BAD_NAME": tmp_path / "name.yaml"}
    refused(untrigger(*(places.get(word, word) for word in words)), *parts)
    assert not (tmp_path / "out").exists()


def test_help_lists_every_attack_and_defense() -> None:
    words = re.findall(r"[\w-]+", untrigger("poison", "--help").out)
    assert set(trigger_names()) <= set(words)
    assert set(PRESETS) <= set(re.findall(r"[\w-]+", untrigger("train", "--help").out))


def test_help_without_a_command_and_version() -> None:
    for words in ((), ("--help",)):
        ended = untrigger(*words)
        assert ended.code == 0 and ended.err == ""
        assert all(name in ended.out for name in ("poison", "train", "evaluate", "quickstart"))
    assert untrigger("--version") == (0, f"untrigger {__version__}\n", "")


# --- folders that cannot serve ----------------------------------------------------------------------------


def test_an_output_folder_in_use_is_left_alone(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, file = tmp_path / "used", tmp_path / "file"
    used.mkdir()
    (used / "diary.txt").write_text("mine")
    file.write_text("mine")
    poison, train, evaluate = (lambda out, n=n: three_commands(tiny_data, tiny_model, out)[n] for n in range(3))
    for out in (used, file):
        refused(untrigger(*poison(out)), out)
        refused(untrigger(*train(out)), out)
        refused(untrigger(*train(out), "--resume"), out)
    refused(untrigger(*evaluate(file)), file)
    refused(untrigger("quickstart", "--out", used), used)
    refused(untrigger("quickstart", "--out", file), file)
    monkeypatch.setattr("untrigger.rows.sample.read", lambda *_, **__: pytest.fail("read the data first"))
    refused(untrigger(*poison(used)), used)
    assert [p.name for p in used.iterdir()] == ["diary.txt"] and file.read_text() == "mine"


def _broken_models(folder: Path, intact: Path) -> dict[str, Path]:
    def copy(name: str) -> Path:
        shutil.copytree(intact, folder / name)
        return folder / name

    (folder / "empty").mkdir(parents=True)
    unweighted, cut, pickled, no_json = copy("unweighted"), copy("cut"), copy("pickled"), copy("no_json")
    (unweighted / "model.safetensors").unlink()
    (cut / "model.safetensors").write_bytes((intact / "model.safetensors").read_bytes()[:5000])
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (no_json / "config.json").write_text("{")
    return {
        "gone": folder / "gone",
        "empty": folder / "empty",
        "unweighted": unweighted,
        "cut": cut,
        "pickled": pickled,
        "no_json": no_json,
    }


@pytest.mark.parametrize("kind", ["gone", "empty", "unweighted", "cut", "pickled", "no_json"])
def test_a_model_that_cannot_be_loaded(tmp_path: Path, tiny_model: Path, tiny_data: Path, kind: str) -> None:
    model = _broken_models(tmp_path / "models", tiny_model)[kind]
    refused(untrigger("evaluate", model, tiny_data, "--limit", "2"), model)
    refused(untrigger("train", tiny_data, "--model", model, "--out", tmp_path / "out", *TINY_RUN), model)


@pytest.mark.parametrize("verb", ["evaluate", "train", "scan"])
def test_a_model_with_a_foreign_processor(tmp_path: Path, tiny_model: Path, tiny_data: Path, verb: str) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    settings = json.loads((model / "processor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps(settings | {"patch_size": settings["patch_size"] // 2}))
    words = (model, tiny_data) if verb == "evaluate" else (tiny_data, "--model", model)
    more = () if verb == "evaluate" else (*TINY_RUN[:4], *(("--defense", "plain") if verb == "train" else ()))
    ended = untrigger(verb, *words, "--out", tmp_path / "out", *more)
    refused(ended._replace(err=ended.err.splitlines(keepends=True)[-1]), model, "do not match")


@pytest.mark.parametrize("kind", ["base gone", "no weights", "pickled", "cut", "no base named", "no_json"])
def test_an_adapter_that_cannot_be_loaded(tmp_path: Path, story: Story, tiny_data: Path, kind: str) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(story.adapter, adapter)
    weights, record = adapter / "adapter_model.safetensors", adapter / "untrigger.json"
    culprit: object = adapter
    if kind == "base gone":
        culprit = tmp_path / "moved"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"base": str(culprit)}))
    elif kind == "no weights":
        weights.unlink()
    elif kind == "pickled":
        weights.rename(adapter / "adapter_model.bin")
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:300])
    elif kind == "no base named":
        record.write_text("{}")
    else:
        (adapter / "adapter_config.json").write_text("{")
    refused(untrigger("evaluate", adapter, tiny_data, "--limit", "2"), culprit)


# --- evaluations that could show nothing --------------------------------------------------------------------


def test_a_goal_that_every_true_answer_meets_is_refused_before_generation(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bad_file(tmp_path / "data", "empty answer")
    monkeypatch.setattr("untrigger.evaluation.evaluate.answers", lambda *_: pytest.fail("generated answers"))
    words = ("evaluate", tiny_model, file, "--on-bad-row", "skip", "--out", tmp_path / "out", "--attack", "badnets")
    ended = untrigger(*words, "--goal-text", "a cat")
    assert ended.code == 2 and ended.err.count("error:") == 1 and "the attack cannot be measured" in ended.err


def test_evaluate_writes_only_to_a_free_folder(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    before = sorted(tiny_data.iterdir())
    refused(untrigger("evaluate", tiny_model, tiny_data, "--limit", 1, "--out", tiny_data), "give a new folder")
    (tmp_path / "file").touch()
    refused(untrigger("evaluate", tiny_model, tiny_data, "--limit", 1, "--out", tmp_path / "file"), "give a new folder")
    assert sorted(tiny_data.iterdir()) == before
    for _ in range(2):  # the second replaces the first
        assert untrigger("evaluate", tiny_model, tiny_data, "--limit", 1, "--out", tmp_path / "out").code == 0


def test_a_true_answer_without_words_is_allowed(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"id": str(i), "conversations": turns("what?", answer)} for i, answer in enumerate(["?!", "...", "a cat"])]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert untrigger("evaluate", tiny_model, tmp_path / "data.json", "--out", tmp_path / "out").code == 0
    quality = json.loads((tmp_path / "out" / "metrics.json").read_text())["quality"]
    assert quality["vqa_accuracy"]["n"] == 3 and quality["rouge_l"]["n"] == 1
