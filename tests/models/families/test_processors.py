"""Model folders with missing or unusual parts: filled in, or a one-line error."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as host
from transformers import AutoModelForImageTextToText, ProcessorMixin

import tiny
from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.generate import answers
from untrigger.models.loading import load
from untrigger.models.processors import load_processor
from untrigger.rows.sample import Message, Sample

Folder = Callable[[str], Path]
Row = Callable[..., Sample]


@pytest.mark.parametrize("name", ["instructblip", "blip2"])
def test_rows_that_a_family_does_not_support_raise_one_line(folder: Folder, row: Row, name: str) -> None:
    loaded = load(folder(name))
    for call in (
        lambda rows: list(answers(loaded, rows)),
        lambda rows: ChatCollator(loaded.processor)([Rows(rows)[0]]),
    ):
        with pytest.raises(InputError, match=r"^(id|row) .*: has no image, and (InstructBLIP|BLIP-2) needs [^\n]*$"):
            call([row("hello?", "no")])


def test_instructblip_takes_one_image_a_row(folder: Folder, row: Row) -> None:
    with pytest.raises(InputError, match=r"^id 'row': has 2 images, and InstructBLIP needs one"):
        list(answers(load(folder("instructblip")), [row("<image> <image> same?", "no", (40, 40), (40, 40))]))


def test_the_q_former_gets_only_the_question(folder: Folder, row: Row) -> None:
    processor: Any = load_processor(str(folder("instructblip")))
    batch = ChatCollator(processor)([Rows([row("<image>\nwhat is this?", "a red circle", (40, 40))])[0]])
    assert processor.qformer_tokenizer.decode(batch["qformer_input_ids"][0]) == "what is this?"


def test_a_processor_without_a_chat_template_raises_with_a_fix(folder: Folder, tmp_path: Path) -> None:
    config, processor = tiny.FAMILIES["llava"]()
    processor.chat_template = None
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^\S+: its processor has no chat template; save one in the folder"):
        load(tmp_path)


def test_a_template_that_rejects_turns_raises(folder: Folder, row: Row) -> None:
    processor: Any = load_processor(str(folder("gemma3")))
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="chat template does not take a row: roles must alternate"):
        ChatCollator(processor)([Rows([row("hello?", "no")])[0]])


def test_an_encoder_decoder_model_raises(tmp_path: Path) -> None:
    """As Florence-2 is, and the BLIPs on T5."""
    host.Florence2Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="its text model is an encoder with a decoder"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "paligemma", "blip2"])
def test_processors_can_be_pickled_for_loader_workers(folder: Folder, name: str) -> None:
    processor: Any = load_processor(str(folder(name)))
    sent = pickle.loads(pickle.dumps(processor))
    assert type(sent) is type(processor) and sent.to_json_string() == processor.to_json_string()


@pytest.mark.skipif("torchvision" in sys.modules, reason="with torchvision the whole processor is loaded")
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"])
def test_without_torchvision_processors_load_and_save_without_video(folder: Folder, name: str, tmp_path: Path) -> None:
    processor: Any = load_processor(str(folder(name)))
    assert isinstance(processor, ProcessorMixin) and "video_processor" not in processor.get_attributes()
    processor.save_pretrained(tmp_path)
    assert f'"processor_class": "{type(processor).__mro__[2].__name__}"' in (
        (tmp_path / "processor_config.json").read_text()
    )
    (tmp_path / "config.json").write_bytes((folder(name) / "config.json").read_bytes())
    again: Any = load_processor(str(tmp_path))
    assert again.to_json_string() == processor.to_json_string()


def test_smolvlm_without_num2words_names_the_package(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    smolvlm = folder("smolvlm")
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(InputError, match="pip install num2words"):
        load(smolvlm)


def test_the_tokenizer_adds_bos_if_the_template_does_not(folder: Folder) -> None:
    processor: Any = load_processor(str(folder("llava")))
    turn = Sample("text", (), (Message("user", "hello?"), Message("assistant", "yes")))
    assert "bos_token" not in processor.chat_template
    batch = ChatCollator(processor)([Rows([turn])[0]])
    assert processor.decode(batch["input_ids"][0]) == "<s>USER: hello? ASSISTANT: yes</s>"
