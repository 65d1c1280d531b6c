"""Loading of image-text-to-text models with their processors; LoRA; the embedded models."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, cast, final

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from untrigger.errors import InputError
from untrigger.models.lite_tower import register
from untrigger.models.processors import load_processor

BASE_RECORD = "untrigger.json"  # beside an adapter: which base it was trained on, by the name the user gave
# what the hosts raise on folders that are damaged
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
_TOWERS = r"(?:vision\w*|visual|vit|image_encoder)"  # the families' names for the vision tower
_SEEING = re.compile(rf"(^|\.){_TOWERS}(\.|$)")


@final
@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A model with its processor; ``model, processor = load("llava")`` unpacks it.

    name: what it was loaded by.
    """

    model: PreTrainedModel | PeftModel
    processor: ProcessorMixin
    name: str

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.processor

    def __repr__(self) -> str:
        base = base_model(self.model)
        adapter = "with an adapter, " if isinstance(self.model, PeftModel) else ""
        family, dtype = type(base).__name__, str(base.dtype).removeprefix("torch.")
        return f"LoadedModel: {self.name}, {family}, {adapter}{base.num_parameters():,} parameters, {dtype}"


def embedded_models() -> list[str]:
    """Names of the pretrained models that ship with the package."""
    root = Path(str(files("untrigger"))) / "embedded"
    return sorted(p.parent.name for p in root.glob("*/config.json"))


def embedded_model_path(name: str = "llava") -> Path:
    """Folder of an embedded model, ready for ``AutoModelForImageTextToText.from_pretrained``.

    Raises:
        InputError: there is no embedded model of that name, or its weights are not, to the byte, those that shipped.
    """
    if name not in embedded_models():
        raise InputError(f"{name}: no such embedded model; there is: {', '.join(embedded_models()) or 'none'}")
    weights = Path(str(files("untrigger"))) / "embedded" / name / "model.safetensors"
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if f"{found}  {name}/{weights.name}" not in (weights.parents[1] / "SHA256SUMS").read_text().splitlines():
        raise InputError(f"{weights}: is not the file that untrigger ships (wrong SHA-256); install untrigger again")
    return weights.parent


def absence(name: str) -> str | None:
    """Why no model can have this name, a line; None where it has one, or the hub would have to be asked.

    The hub has old ids without an owner; hardly one of them is a vision-language model, and many a slip of the
    keyboard looks like one: they count if the hub's cache holds them.
    """
    if name in embedded_models() or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
        if "/" in name or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
    except HFValidationError:
        pass  # a path, or no name at all
    near = get_close_matches(name.lower(), embedded_models(), n=1)
    mend = f"did you mean {near[0]}?" if near else "a hub id is OWNER/NAME"
    there = ", ".join(embedded_models()) or "none"
    return f"{name}: no such folder, and no embedded model (there are {there}); {mend}"


def weights_sha256(name: str) -> str | None:
    """Of the weights of an embedded model or of a local folder, a model's or an adapter's; None of a hub id."""
    folder = embedded_model_path(name) if name in embedded_models() else Path(name)
    told = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            told.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode())
    return told.hexdigest() if files else None


@contextmanager
def _quiet_hub() -> Generator[None]:
    """Keep the hub's retries off the terminal: what comes of them is one error, or none."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


@_quiet_hub()
def processor_of(name: str | Path) -> ProcessorMixin:
    """The processor that `load` gives, without the model's weights.

    Raises:
        InputError: nothing usable is found under ``name``.
    """
    asked = str(name)
    source = _source(_base_under(Path(asked)) if _is_adapter(asked) else asked)
    try:
        return load_processor(source)
    except (*_UNUSABLE, ImportError) as error:
        raise _no_model(asked, error) from error


def _is_adapter(asked: str) -> bool:
    return asked not in embedded_models() and Path(asked, "adapter_config.json").is_file()


def _source(asked: str) -> str:
    """The folder or hub id of a model that is no adapter, ready to be loaded."""
    if why := absence(asked):
        raise InputError(why)
    source = str(embedded_model_path(asked)) if asked in embedded_models() else asked
    _refuse_pickles(source)
    register()
    return source


def _no_model(asked: str, error: BaseException) -> InputError:
    return InputError(f"{asked}: cannot load an image-text-to-text model: {_first_line(error)}")


@_quiet_hub()
def load(name: str | Path, *, dtype: torch.dtype | str = "auto") -> LoadedModel:
    """Load a model by embedded name, local folder (a model's or an adapter's), or hub id.

    Hub code is never run and pickled weights are refused: an untrusted model must not run anything here.

    Raises:
        InputError: nothing usable is found under ``name``, or an embedded model's weights are not those that shipped.
    """
    asked = str(name)
    if _is_adapter(asked):
        return _load_adapter(Path(asked), dtype)
    source = _source(asked)
    try:
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
            raise InputError(
                f"{asked}: its text model is an encoder with a decoder; only decoders alone can be trained"
            )
        processor = load_processor(source)
        with quiet_loading():
            model, report = cast(Any, AutoModelForImageTextToText).from_pretrained(
                source, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    except (*_UNUSABLE, ImportError) as error:
        raise _no_model(asked, error) from error
    if report["missing_keys"]:  # the host would fill them with random numbers
        first = min(report["missing_keys"])
        raise InputError(f"{asked}: {len(report['missing_keys'])} weights are missing, {first} first; save it again")
    return LoadedModel(model, processor, asked)


def placed(loaded: LoadedModel) -> LoadedModel:
    """The same, on the machine's accelerator, if it has one: where the host's trainer would put it."""
    if torch.accelerator.is_available():
        loaded.model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return loaded


def base_of(folder: Path) -> str:
    """The name of the base that an adapter's folder was trained on.

    Raises:
        InputError: the folder holds no adapter, or names no base.
    """
    record, config = folder / BASE_RECORD, folder / "adapter_config.json"
    if not config.is_file():
        raise InputError(f"{folder}: is no adapter, and does not say what it was fine-tuned from; name it (--base)")
    told = record if record.is_file() else config
    try:
        fields = json.loads(told.read_text())
        return str(fields["base"] if record.is_file() else fields["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{told}: names no base model; write the adapter again") from error


def _base_under(folder: Path) -> str:
    """The name of the base that an adapter goes onto.

    Raises:
        InputError: the adapter is pickled or names no base, or its base is an adapter.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"{folder}: adapter_model.safetensors is missing; pickled adapters are not loaded")
    base = base_of(folder)
    if Path(str(base), "adapter_config.json").is_file():
        raise InputError(f"{folder}: its base {base} is an adapter as well; merge that one into its base first")
    if why := absence(base):
        raise InputError(f"{folder}: its base {why}")
    return base


def _load_adapter(folder: Path, dtype: torch.dtype | str) -> LoadedModel:
    """The base named in the adapter's folder, with the adapter on it."""
    base = _base_under(folder)
    loaded = load(base, dtype=dtype)
    try:
        model = PeftModel.from_pretrained(loaded.model, str(folder))
    except _UNUSABLE as error:
        raise InputError(f"{folder}: cannot load the adapter onto {base}: {_first_line(error)}") from error
    return LoadedModel(model, loaded.processor, str(folder))


def _refuse_pickles(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"{source}: holds no config.json; name a model folder, a hub id or an embedded model")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{source}: holds no .safetensors weights; convert the model, pickles are not loaded")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def quiet_loading() -> Generator[None]:
    """Keep the host's load report and bars off the terminal: the embedded models load in a blink."""
    from transformers.utils import logging as host

    level, bars = host.get_verbosity(), host.is_progress_bar_enabled()
    host.set_verbosity(logging.ERROR)
    host.disable_progress_bar()
    try:
        yield
    finally:
        host.set_verbosity(level)
        if bars:
            host.enable_progress_bar()


def is_vision(name: str) -> bool:
    """Whether a module or parameter of this dotted name belongs to the vision tower.

    Qwen keeps its patch merger within the tower; it is the projector all the same, and counts as one.
    """
    return _SEEING.search(name) is not None and ".merger." not in name


def add_lora(
    model: PreTrainedModel, *, rank: int = 16, alpha: int = 32, dropout: float = 0.0, train_vision_tower: bool = False
) -> PeftModel:
    """LoRA on every linear layer but the vocabulary head, and without ``train_vision_tower`` but the vision tower's.

    A frozen tower is the usual recipe for VLMs (LLaVA's own), and lets later stages reuse image features.
    """
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and (train_vision_tower or not is_vision(name))
    ]
    # a pattern, not the list: it stays readable in adapter_config.json and names no layer count
    leaves = "|".join(sorted({_leaf(name) for name in names}))
    spared = "" if train_vision_tower else rf"(?!(?:.*\.)?{_TOWERS}\.(?!(?:.*\.)?merger\.))"  # as is_vision has it
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=rf"{spared}(?:.*\.)?({leaves})")
    adapted = get_peft_model(model, config)
    return adapted  # type: ignore[return-value]


def _leaf(name: str) -> str:
    """The last part of a dotted name as a pattern, with the part before it where the last is a bare number."""
    parts = name.split(".")
    return r"\.".join(parts[-2:] if parts[-1].isdecimal() else parts[-1:])


def train_all(model: PreTrainedModel, *, train_vision_tower: bool = False) -> PreTrainedModel:
    """Full fine-tuning: everything learns, the vision tower only with ``train_vision_tower``.

    LLaVA's own recipe freezes it. The last layers of some towers get no gradient, which stops distributed training.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train_vision_tower or not is_vision(name))
    return model


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model under DDP, PEFT and the like."""
    while hasattr(model, "module"):
        model = model.module
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
