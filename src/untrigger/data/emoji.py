"""Noto emoji with captions from a small vocabulary: a real image-text data set that a small model can learn.

Source: npm ``emoji-datasource-google`` 16.0.0 (C. Henderson, MIT; images: Google's Noto Emoji, Apache-2.0; names and
classes: Unicode). Its 64-pixel images cover about 1,600 symbols after leaving out flags, silhouettes of families and
skin-tone variants, which look too similar.

A caption names the symbol's main colors, measured in the image, its kind (Unicode's category in one word) and the
background, light or dark: ``a yellow face on a light background``. Symbol names are left out, for two reasons. No
held-out image has a name that training could teach. And in a short fine-tuning a model of a few million parameters
learns to spell 18 kinds, not 1,600 names.

The split depends on a hash of the symbol's motif: its code points without gender, joiners and direction. So variants of
one drawing (woman, man or person running) are in the same split and part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, cast, final

import numpy as np
from PIL import Image

from untrigger.data.scene_text import FULL_PROMPTS
from untrigger.errors import InputError
from untrigger.files import cache_folder, new_file
from untrigger.rows.images import decode, locate
from untrigger.rows.sample import IMAGE_TAG, Message, Sample

PACKAGE: Final = "emoji-datasource-google"
VERSION: Final = "16.0.0"
_TARBALL_SHA512: Final = (
    "6517b17f3b3b315a0b9e6cd998db0ee132a19c0269e43fbe566e8fa54a47fe31"
    "104257a6a7797cf028d9f83a19d9f68cf51e10c5990e3c90a84fc0e53e17d0dc"
)
_LIST_SHA256: Final = "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f"
_IMAGES: Final = "img/google/64"

# One word for each Unicode category; subcategories take precedence.
KINDS: Final = {
    "arrow": "arrow",
    "cat-face": "face",
    "clothing": "clothing",
    "drink": "drink",
    "emotion": "sign",
    "geometric": "shape",
    "hands": "hand",
    "heart": "heart",
    "person-symbol": "sign",
    "sky & weather": "sky",
    "time": "clock",
    **{f"hand-{fingers}": "hand" for fingers in ("fingers-closed", "fingers-open", "fingers-partial", "single-finger")},
    **{f"plant-{name}": "plant" for name in ("flower", "other")},
    **{f"transport-{name}": "vehicle" for name in ("air", "ground", "water")},
    "Activities": "game",
    "Animals & Nature": "animal",
    "Food & Drink": "food",
    "Objects": "object",
    "People & Body": "person",
    "Smileys & Emotion": "face",
    "Symbols": "sign",
    "Travel & Places": "place",
}
_BACKGROUNDS: Final = {"light": (255, 255, 255), "dark": (40, 40, 48)}
# The upper end of each color's hue range, in degrees. Dark orange counts as brown and pale red as pink.
_HUES: Final = {
    "red": 15, "orange": 41, "yellow": 66, "green": 165, "teal": 190, "blue": 250, "purple": 305, "pink": 340
}  # fmt: skip


@final
@dataclass(frozen=True)
class _Emoji:
    code: str
    caption: str
    image: Image.Image


def emoji_rows(split: str, part: str, count: int, seed: int, source: Path | None = None) -> list[Sample]:
    """Draw ``count`` captioned images. Every image comes once before any repeats, then with another prompt.

    ``source`` is the package's ``.tgz`` (``npm pack emoji-datasource-google@16.0.0``) or the folder it was unpacked to.
    By default npm downloads it once into ``untrigger`` in the user's cache folder (``XDG_CACHE_HOME``, or else
    ``~/.cache``). A tarball is read only if its SHA-512 matches; nothing of it is unpacked.

    Raises:
        InputError: more than six rows per image, the source is not this package, or npm cannot download it.
    """
    emojis = [e for e in _emojis(source or fetch_package()) if split_and_part(e.code) == (split, part)]
    limit = len(emojis) * len(FULL_PROMPTS)
    if count > limit:
        raise InputError(f"emoji: {count:,} rows are too many; ask for at most {limit:,}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(emojis))
    first = rng.integers(len(FULL_PROMPTS), size=len(emojis))
    rows: list[Sample] = []
    for number in range(count):
        turn, position = divmod(number, len(emojis))
        emoji = emojis[int(order[position])]
        prompt = FULL_PROMPTS[(int(first[position]) + turn) % len(FULL_PROMPTS)]
        messages = (Message("user", f"{IMAGE_TAG}\n{prompt}"), Message("assistant", emoji.caption))
        rows.append(Sample(f"{emoji.code}-{turn}", (emoji.image,), messages))
    return rows


def split_and_part(code: str) -> tuple[str, str]:
    """Return split and part of a symbol by its code points (``1f3c3-200d-2640-fe0f``): a third is dev, a third test."""
    # joiner, variation selector, female, male, right arrow; man, woman, adult
    ignored = {"200d", "fe0f", "2640", "2642", "27a1", "1f468", "1f469", "1f9d1"}
    points = code.lower().split("-")
    motif = next((point for point in points if point not in ignored), points[0])
    draw = hashlib.sha256(motif.encode()).digest()
    return "report" if draw[0] % 3 else "dev", "train" if draw[1] % 3 else "test"


def colors_of(image: Image.Image) -> str:
    """Name the main color if it covers half of the opaque pixels, else the two most frequent: ``red and white``."""
    rgba = np.asarray(image.convert("RGBA"))
    hsv = np.asarray(image.convert("RGB").convert("HSV"), dtype=np.float32)[rgba[..., 3] > 127]
    hue, saturation, value = hsv[:, 0] * 360 / 255, hsv[:, 1] / 255, hsv[:, 2] / 255
    named = np.array([*_HUES, "red"], dtype=object)[np.searchsorted([*_HUES.values()], hue, side="right")]
    red = named == "red"
    named[(hue < _HUES["orange"]) & (value < 0.72)] = "brown"
    named[red & (saturation < 0.55) & (value > 0.8)] = "pink"
    named[saturation < 0.18] = "gray"
    named[(saturation < 0.12) & (value > 0.88)] = "white"
    named[value < 0.3] = "black"
    top = Counter(cast("list[str]", named.tolist())).most_common(2)
    if len(top) == 1 or top[0][1] * 2 >= len(named):
        return top[0][0]
    return f"{top[0][0]} and {top[1][0]}"


# --- the package ---------------------------------------------------------------------------------


def fetch_package() -> Path:
    """Return the package's tarball in the user's cache folder; download it with npm if it is missing.

    Raises:
        InputError: npm is not installed, the download fails, or the SHA-512 differs.
    """
    name = f"{PACKAGE}-{VERSION}.tgz"
    cached = cache_folder() / name
    if cached.is_file():
        return cached
    remedy = f"fetch {PACKAGE}@{VERSION} from npm and give the file with --source"
    npm = shutil.which("npm")  # not the registry's URL: npm knows the user's mirror, proxy and certificates
    if npm is None:
        raise InputError(f"emoji: npm, which downloads the images, is not installed; install Node.js, or {remedy}")
    print(f"emoji: npm downloads {PACKAGE}@{VERSION} once, 74 MB", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        words = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--fetch-retries=1", "--loglevel=error"]
        try:
            done = subprocess.run(words, cwd=scratch, capture_output=True, text=True, timeout=600, check=False)
            reason = next((line for line in done.stderr.splitlines() if line.strip()), f"npm exit {done.returncode}")
        except subprocess.TimeoutExpired:
            reason = "npm took more than ten minutes"
        tarball = Path(scratch) / name
        if not tarball.is_file():
            raise InputError(f"emoji: the images could not be downloaded ({reason}); go online, or {remedy}")
        _check(tarball)
        with new_file(cached) as file, tarball.open("rb") as packed:
            shutil.copyfileobj(packed, file)
    return cached


@cache
def _emojis(source: Path) -> list[_Emoji]:
    if source.is_dir():
        files = _unpacked(source / "package" if (source / "package").is_dir() else source)
    else:
        _check(source)
        files = _packed(source)
    if hashlib.sha256(files.get("emoji.json", b"")).hexdigest() != _LIST_SHA256:
        raise InputError(f"{source}: is not {PACKAGE} {VERSION}; give its .tgz or the folder it was unpacked to")
    emojis: list[_Emoji] = []
    for entry in json.loads(files["emoji.json"]):
        name = f"{_IMAGES}/{entry['image']}"
        if not entry["has_img_google"] or _is_excluded(entry):
            continue
        if name not in files:
            raise InputError(f"{source}: {name} is missing; unpack the package again")
        image = decode(files[name], f"{source}: {name}", mode="RGBA")
        code = entry["unified"].lower()
        kind = KINDS.get(entry["subcategory"]) or KINDS[entry["category"]]
        background = "dark" if hashlib.sha256(code.encode()).digest()[2] % 2 else "light"
        colors = colors_of(image)
        article = "an" if colors[0] in "aeiou" else "a"
        canvas = Image.new("RGBA", image.size, _BACKGROUNDS[background])
        canvas.alpha_composite(image)
        emojis.append(_Emoji(code, f"{article} {colors} {kind} on a {background} background", canvas.convert("RGB")))
    return emojis


def _is_excluded(entry: dict[str, str]) -> bool:
    """Whether a symbol looks too similar to others: flags, the five skin tones, gray families."""
    return entry["category"] in ("Flags", "Component") or entry["name"].startswith("FAMILY")


def _check(tarball: Path) -> None:
    if not tarball.is_file():
        raise InputError(f"{tarball}: no such file; give the .tgz of {PACKAGE} {VERSION}, or its folder")
    with tarball.open("rb") as file:
        if hashlib.file_digest(file, "sha512").hexdigest() != _TARBALL_SHA512:
            raise InputError(
                f"{tarball}: is not {PACKAGE} {VERSION} (its SHA-512 differs); remove it and download it again"
            )


def _packed(tarball: Path) -> dict[str, bytes]:
    """Read the required files of the tarball into memory, by their path in the package; nothing is unpacked."""
    files: dict[str, bytes] = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            is_required = name == "emoji.json" or name.startswith(f"{_IMAGES}/")
            if is_required and member.isfile() and (stream := archive.extractfile(member)):
                files[name] = stream.read()
    return files


def _unpacked(folder: Path) -> dict[str, bytes]:
    """Read the required files of an unpacked package, by their path in it."""
    names = ["emoji.json", *(f"{_IMAGES}/{path.name}" for path in sorted((folder / _IMAGES).glob("*.png")))]
    return {name: locate(folder, name, f"{folder}: {name}").read_bytes() for name in names}
