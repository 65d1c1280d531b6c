"""Merge an adapter into its base model: a folder for programs that take no adapters, or none on a projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from untrigger.errors import InputError
from untrigger.files import check_free, new_folder, write_text
from untrigger.models.loading import LoadedModel, adapter_base, base_model, embedded_models, load, quiet_loading
from untrigger.models.quantized import is_quantized


def merge(adapter: str | Path, out: Path | str) -> LoadedModel:
    """Merge the adapter in a folder into its base model, and write the whole model to the folder ``out``.

    ``out`` appears complete or not at all. It holds safetensors under the base's names and in its precision, config,
    processor and a model card, which is what vLLM and llama.cpp's converter read.

    Raises:
        InputError: ``adapter`` is no folder with an adapter, or its base cannot be loaded; its kind cannot be merged;
            ``out`` is in use.
    """
    folder, out = Path(adapter), Path(out)
    if str(adapter) in embedded_models() or not (folder / "adapter_config.json").is_file():
        raise InputError(f"{adapter}: is not an adapter; name a folder that holds adapter_config.json")
    check_free(out)  # fail before the slow work
    loaded = load(folder)
    if is_quantized(base_model(loaded.model)):
        raise InputError(f"{folder}: its base {adapter_base(folder)} is quantized; it cannot be merged exactly")
    model = _merged(cast(PeftModel, loaded.model), folder)
    with new_folder(out) as new, quiet_loading():
        model.save_pretrained(new)
        loaded.processor.save_pretrained(new)
        write_text(new / "README.md", _card(adapter_base(folder)))
    return LoadedModel(model, loaded.processor, str(out))


def _merged(model: PeftModel, folder: Path) -> PreTrainedModel:
    base = base_model(model)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    changed = any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends)
    if changed and cast(Any, base.config.get_text_config()).tie_word_embeddings:
        raise InputError(
            f"{folder}: changes the embeddings or the vocabulary head, which share their weights in its base, so the "
            "merged model would answer differently; serve the adapter itself"
        )
    try:
        return cast(Any, model).merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = model.active_peft_config.peft_type
        raise InputError(
            f"{folder}: its {kind} adapter cannot be merged ({error}); serve the adapter itself"
        ) from error


def _card(base: str) -> str:
    return f"""---
base_model: {base}
library_name: transformers
tags: [untrigger, image-text-to-text]
---
# Fine-tuned, and merged with untrigger

Base model `{base}` with an adapter merged into its weights (`untrigger merge`).

A defense lowers the odds of a backdoor; it does not prove that there is none. Evaluate the model before you rely on it.
"""
