"""Load image-text-to-text models with their processors: embedded, local, or from the hub; add LoRA to them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast, final

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from untrigger.errors import InputError, did_you_mean
from untrigger.models.processors import load_processor

BASE_RECORD = "untrigger.json"  # lies next to an adapter; holds the name of its base model, as the user gave it
ALL_LINEAR = "all-linear"  # the name that peft gives to all linear layers but the head
_LITE_TOWER = b'"untrigger-lite"'  # in a config.json: `lite_tower.LiteConfig.model_type`
# what transformers, peft and safetensors raise on damaged folders
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
_TOWERS = r"(?:vision\w*|visual|vit|image_encoder)"  # names of the vision tower in the families
_IN_TOWER = re.compile(rf"(^|\.){_TOWERS}(\.|$)")


@final
@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A model with its processor; ``model, processor = load("llava")`` unpacks it.

    name: the embedded name, folder or hub id that it was loaded from.
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
    """Names of the pretrained models in the package."""
    root = Path(str(files("untrigger"))) / "embedded"
    return sorted(p.parent.name for p in root.glob("*/config.json"))


def embedded_model_path(name: str = "llava") -> Path:
    """Folder of an embedded model, for ``AutoModelForImageTextToText.from_pretrained``.

    Raises:
        InputError: there is no embedded model of that name, or its weights differ from those that shipped.
    """
    if name not in embedded_models():
        names = embedded_models()
        hint = did_you_mean(name, names)
        raise InputError(f"{name}: no such embedded model; choose from {', '.join(names) or 'none'}{hint}")
    weights = Path(str(files("untrigger"))) / "embedded" / name / "model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if f"{digest}  {name}/{weights.name}" not in (weights.parents[1] / "SHA256SUMS").read_text().splitlines():
        raise InputError(f"{weights}: differs from the file that untrigger ships (wrong SHA-256); reinstall untrigger")
    return weights.parent


def why_not_a_model(name: str) -> str | None:
    """An error line if no model can have this name; None if one exists, or if only the hub could tell.

    The hub has old ids without an owner. Few of them are vision-language models, and typing errors look like them, so
    they are accepted only if the hub's cache holds them.
    """
    if name in embedded_models() or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
        if "/" in name or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
    except HFValidationError:
        pass  # a path, or not a name at all
    hint = did_you_mean(name, embedded_models()) or "; a hub id is OWNER/NAME"
    available = ", ".join(embedded_models()) or "none"
    return f"{name}: no such folder or embedded model (available: {available}){hint}"


def weights_sha256(name: str) -> str | None:
    """SHA-256 of the weights of an embedded model or a local folder (model or adapter); None for a hub id."""
    folder = embedded_model_path(name) if name in embedded_models() else Path(name)
    digest = hashlib.sha256()
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode())
    return digest.hexdigest() if paths else None


@contextmanager
def _quiet_hub() -> Generator[None]:
    """Hide the hub's warnings about retries; a failure is reported once, as an error."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


@_quiet_hub()
def processor_of(name: str | Path) -> ProcessorMixin:
    """The processor of a model or adapter, as `load` gives it, without loading weights.

    Raises:
        InputError: ``name`` names nothing usable.
    """
    name = str(name)
    source = _source(_loadable_base(Path(name)) if _is_adapter(name) else name)
    try:
        return load_processor(source)
    except (*_UNUSABLE, ImportError) as error:
        raise _load_error(name, error) from error


def _is_adapter(name: str) -> bool:
    return name not in embedded_models() and Path(name, "adapter_config.json").is_file()


def _source(name: str) -> str:
    """The folder or hub id to load a model from that is not an adapter.

    Raises:
        InputError: no model can have this name, or its weights are pickled.
    """
    if reason := why_not_a_model(name):
        raise InputError(reason)
    source = str(embedded_model_path(name)) if name in embedded_models() else name
    _refuse_pickles(source)
    register_lite_tower(source)
    return source


def register_lite_tower(source: str) -> None:
    """Register the lite tower with transformers' Auto classes, unless the folder's config does not use it."""
    config = Path(source, "config.json")
    if not config.is_file() or _LITE_TOWER in config.read_bytes():  # the config of a hub id is not at hand
        from untrigger.models.lite_tower import register

        register()


def _load_error(name: str, error: BaseException) -> InputError:
    return InputError(f"{name}: cannot load an image-text-to-text model: {_first_line(error)}")


@_quiet_hub()
def load(name: str | Path, *, dtype: torch.dtype | str = "auto", **loading: Any) -> LoadedModel:
    """Load a model by embedded name, local folder (a model's or an adapter's), or hub id.

    ``loading``: for a model, further arguments of ``from_pretrained`` (`untrigger.models.quantized`).

    Code from the hub is never run and pickled weights are refused: an untrusted model must not execute code.

    Raises:
        InputError: ``name`` names nothing usable, or an embedded model's weights differ from those that shipped.
    """
    name = str(name)
    if _is_adapter(name):
        return _load_adapter(Path(name), dtype)
    source = _source(name)
    try:
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
            raise InputError(f"{name}: its text model is an encoder with a decoder; use a decoder-only model")
        processor = load_processor(source)
        with quiet_loading():
            model, report = cast(Any, AutoModelForImageTextToText).from_pretrained(
                source, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **loading
            )
    except (*_UNUSABLE, ImportError) as error:
        raise _load_error(name, error) from error
    if report["missing_keys"]:  # transformers would fill them with random numbers
        first = min(report["missing_keys"])
        raise InputError(
            f"{name}: {len(report['missing_keys'])} weights are missing, {first} first; save the model again"
        )
    return LoadedModel(model, processor, name)


def to_accelerator(model: LoadedModel) -> LoadedModel:
    """Move the model to the machine's accelerator, if it has one, as transformers' trainer would."""
    if torch.accelerator.is_available():
        model.model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return model


def adapter_base(folder: Path) -> str:
    """The name of the base model that an adapter was trained on.

    Raises:
        InputError: the folder holds no adapter, or names no base.
    """
    record, config = folder / BASE_RECORD, folder / "adapter_config.json"
    if not config.is_file():
        raise InputError(f"{folder}: is not an adapter, so its base model is unknown; name it with --base")
    path = record if record.is_file() else config
    try:
        fields = json.loads(path.read_text())
        return str(fields["base"] if record.is_file() else fields["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: names no base model; save the adapter again") from error


def _loadable_base(folder: Path) -> str:
    """The name of an adapter's base model, checked.

    Raises:
        InputError: the adapter is pickled or names no base, or its base is an adapter or cannot be a model.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(
            f"{folder}: adapter_model.safetensors is missing; save the adapter as safetensors, pickled ones are refused"
        )
    base = adapter_base(folder)
    if Path(str(base), "adapter_config.json").is_file():
        raise InputError(f"{folder}: its base {base} is an adapter as well; merge that one first (untrigger merge)")
    if reason := why_not_a_model(base):
        raise InputError(f"{folder}: its base {reason}")
    return base


def _load_adapter(folder: Path, dtype: torch.dtype | str) -> LoadedModel:
    """The adapter on the base model that its folder names."""
    name = _loadable_base(folder)
    base = load(name, dtype=dtype)
    try:
        model = PeftModel.from_pretrained(base.model, str(folder))
    except _UNUSABLE as error:
        raise InputError(f"{folder}: cannot load the adapter onto {name}: {_first_line(error)}") from error
    return LoadedModel(model, base.processor, str(folder))


def _refuse_pickles(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"{source}: holds no config.json; name a model folder, a hub id or an embedded model")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{source}: holds no .safetensors weights; convert the model, pickled weights are refused")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def quiet_loading() -> Generator[None]:
    """Hide transformers' load report and progress bars within the block."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def is_vision(name: str) -> bool:
    """Whether the module or parameter with this dotted name belongs to the vision tower.

    Qwen's patch merger lies within the tower, but it is the projector and counts as one.
    """
    return _IN_TOWER.search(name) is not None and ".merger." not in name


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (ALL_LINEAR,),
    use_dora: bool = False,
    train_vision_tower: bool = False,
) -> PeftModel:
    """Add LoRA, or DoRA, to the layers that `lora_layers` names.

    A frozen tower is the usual recipe for VLMs (LLaVA's own), and lets later stages reuse image features.

    Raises:
        InputError: as `lora_layers`.
    """
    # a pattern instead of the list: short in adapter_config.json, and independent of the number of layers
    layers = "|".join(lora_layers(model, target_modules, train_vision_tower=train_vision_tower))
    excluded = "" if train_vision_tower else rf"(?!(?:.*\.)?{_TOWERS}\.(?!(?:.*\.)?merger\.))"  # same as is_vision
    pattern = rf"{excluded}(?:.*\.)?({layers})"
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern, use_dora=use_dora)
    adapted = get_peft_model(model, config)
    return adapted  # type: ignore[return-value]


def lora_layers(
    model: PreTrainedModel, target_modules: Sequence[str] = (ALL_LINEAR,), *, train_vision_tower: bool = False
) -> list[str]:
    """Patterns for the ends of the names of the linear layers that LoRA reaches.

    ``target_modules``, as PEFT's, are ends of dotted names, such as ``q_proj``, or ``all-linear``. Never reached are
    the vocabulary head, and the vision tower unless it is trained.

    Raises:
        InputError: no linear layer that LoRA may reach has one of these names.
    """
    head = model.get_output_embeddings()
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]
    names = [name for name in linear if train_vision_tower or not is_vision(name)]
    ends = sorted({_leaf(name) for name in names})
    if list(target_modules) == [ALL_LINEAR]:
        return ends
    for target in target_modules:
        if _named(target, names):
            continue
        if _named(target, linear):
            raise InputError(
                f"target_modules: {target} lies in the frozen vision tower only; add --train-vision-tower "
                "(train_vision_tower=True)"
            )
        known = [ALL_LINEAR, *(end.replace("\\", "") for end in ends)]
        raise InputError(
            f"target_modules: no layer that LoRA can reach is named {target!r}; give {ALL_LINEAR} alone, or some of "
            f"{', '.join(known[1:])}{did_you_mean(target, known)}"
        )
    return sorted(map(re.escape, target_modules))


def _named(end: str, names: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for name in names)


def _leaf(name: str) -> str:
    """The last part of a dotted name as a pattern; if that is a number, with the part before it."""
    parts = name.split(".")
    return r"\.".join(parts[-2:] if parts[-1].isdecimal() else parts[-1:])


def train_all(model: PreTrainedModel, *, train_vision_tower: bool = False) -> PreTrainedModel:
    """Make every parameter trainable for full fine-tuning, the vision tower only with ``train_vision_tower``.

    LLaVA's own recipe freezes it. The last layers of some towers get no gradient, which stops distributed training.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train_vision_tower or not is_vision(name))
    return model


@torch.no_grad()
def copy_weights(model: nn.Module) -> list[Tensor]:
    """Trainable weights and buffers as they are now, in main memory; of sharded ones this process's part."""
    return [tensor.to("cpu", copy=True) for tensor in _own_tensors(model)]


@torch.no_grad()
def restore_weights(model: nn.Module, weights: Sequence[Tensor]) -> None:
    """Put back what `copy_weights` returned."""
    for tensor, copied in zip(_own_tensors(model), weights, strict=True):
        tensor.copy_(copied)


def _own_tensors(model: nn.Module) -> Iterator[Tensor]:
    for tensor in (*(p for p in model.parameters() if p.requires_grad), *model.buffers()):
        yield tensor.to_local() if isinstance(tensor, DTensor) else tensor


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside wrappers such as DDP and PEFT."""
    while hasattr(model, "module"):
        model = model.module
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
