"""Noto emoji with captions in closed words: a real image-text set that a small model can learn.

Source: npm ``emoji-datasource-google`` 16.0.0 (C. Henderson, MIT; images: Google's Noto Emoji, Apache-2.0; names and
classes: Unicode). Its 64-pixel images stand for about 1,600 symbols once flags, silhouettes of families and skin-tone
variants, which look too much alike, are left out.

A caption tells the symbol's main colors, measured in the image, its kind, which is Unicode's category in one word,
and whether it is shown on light or dark paper: ``a yellow face on a light background``. Symbols' own names are left
out: no held-out image shows a name that training could have taught, and a model of a few million
parameters learns to spell 18 kinds, not 1,600 names, in a short fine-tuning.

Splits go by a hash of the symbol's motif, the code point that remains without who does it and which way they
face. So variants of one drawing (woman, man or person running) stay together.
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

# What Unicode's categories and, before them, its subcategories are called.
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
    **{f"plant-{which}": "plant" for which in ("flower", "other")},
    **{f"transport-{where}": "vehicle" for where in ("air", "ground", "water")},
    "Activities": "game",
    "Animals & Nature": "animal",
    "Food & Drink": "food",
    "Objects": "object",
    "People & Body": "person",
    "Smileys & Emotion": "face",
    "Symbols": "sign",
    "Travel & Places": "place",
}
_PAPERS: Final = {"light": (255, 255, 255), "dark": (40, 40, 48)}
# Hues in degrees, each color up to its upper end. Dark orange is brown and pale red is pink, as people say it.
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
    """``count`` captions of images; the first rows show every image once, further ones ask otherwise.

    ``source`` is the package's ``.tgz`` (``npm pack emoji-datasource-google@16.0.0``) or the folder it was
    unpacked to. Without one it is fetched with npm, once, into ``untrigger`` in the user's cache folder
    (``XDG_CACHE_HOME``, or else ``~/.cache``). A tarball is read only if its SHA-512 is the known one; nothing of it
    is unpacked.

    Raises:
        InputError: more rows than six per image, a source that is not this package, or npm cannot fetch it.
    """
    emojis = [e for e in _emojis(source or fetched()) if home(e.code) == (split, part)]
    most = len(emojis) * len(FULL_PROMPTS)
    if count > most:
        raise InputError(f"emoji: {count:,} rows are more than there are; ask for at most {most:,}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(emojis))
    first = rng.integers(len(FULL_PROMPTS), size=len(emojis))
    rows: list[Sample] = []
    for number in range(count):
        turn, at = divmod(number, len(emojis))
        emoji = emojis[int(order[at])]
        prompt = FULL_PROMPTS[(int(first[at]) + turn) % len(FULL_PROMPTS)]
        messages = (Message("user", f"{IMAGE_TAG}\n{prompt}"), Message("assistant", emoji.caption))
        rows.append(Sample(f"{emoji.code}-{turn}", (emoji.image,), messages))
    return rows


def home(code: str) -> tuple[str, str]:
    """Split and part of a symbol, given its code points (``1f3c3-200d-2640-fe0f``): a third is dev, a third test."""
    # joiner, variation selector, female, male, right arrow; man, woman, adult
    who = {"200d", "fe0f", "2640", "2642", "27a1", "1f468", "1f469", "1f9d1"}
    points = code.lower().split("-")
    motif = next((point for point in points if point not in who), points[0])
    draw = hashlib.sha256(motif.encode()).digest()
    return "report" if draw[0] % 3 else "dev", "train" if draw[1] % 3 else "test"


def colors_of(image: Image.Image) -> str:
    """``red`` where one color covers half of what is opaque, else the two commonest: ``red and white``."""
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
    most = Counter(cast("list[str]", named.tolist())).most_common(2)
    if len(most) == 1 or most[0][1] * 2 >= len(named):
        return most[0][0]
    return f"{most[0][0]} and {most[1][0]}"


# --- the package ---------------------------------------------------------------------------------


def fetched() -> Path:
    """The package's tarball in the user's cache folder, fetched with npm if it is not there yet."""
    name = f"{PACKAGE}-{VERSION}.tgz"
    cached = cache_folder() / name
    if cached.is_file():
        return cached
    by_hand = f"fetch {PACKAGE}@{VERSION} from npm and give the file with --source"
    npm = shutil.which("npm")  # npm and not the registry's address: it knows the user's mirror, proxy and certificates
    if npm is None:
        raise InputError(f"emoji: npm, which fetches the images, is not installed; install Node.js, or {by_hand}")
    print(f"emoji: npm fetches {PACKAGE}@{VERSION}, 74 MB, once", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        words = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--fetch-retries=1", "--loglevel=error"]
        try:
            done = subprocess.run(words, cwd=scratch, capture_output=True, text=True, timeout=600, check=False)
            why = next((line for line in done.stderr.splitlines() if line.strip()), f"npm ended with {done.returncode}")
        except subprocess.TimeoutExpired:
            why = "npm took more than ten minutes"
        tarball = Path(scratch) / name
        if not tarball.is_file():
            raise InputError(f"emoji: the images could not be fetched ({why}); go online, or {by_hand}")
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
    found: list[_Emoji] = []
    for entry in json.loads(files["emoji.json"]):
        name = f"{_IMAGES}/{entry['image']}"
        if not entry["has_img_google"] or _left_out(entry):
            continue
        if name not in files:
            raise InputError(f"{source}: lacks {name}; unpack the package again")
        image = decode(files[name], f"{source}: {name}").convert("RGBA")
        code = entry["unified"].lower()
        kind = KINDS.get(entry["subcategory"]) or KINDS[entry["category"]]
        paper = "dark" if hashlib.sha256(code.encode()).digest()[2] % 2 else "light"
        colors = colors_of(image)
        a = "an" if colors[0] in "aeiou" else "a"
        shown = Image.new("RGBA", image.size, _PAPERS[paper])
        shown.alpha_composite(image)
        found.append(_Emoji(code, f"{a} {colors} {kind} on a {paper} background", shown.convert("RGB")))
    return found


def _left_out(entry: dict[str, str]) -> bool:
    """What is drawn too much alike to be told apart: flags, the five skin tones, gray families."""
    return entry["category"] in ("Flags", "Component") or entry["name"].startswith("FAMILY")


def _check(tarball: Path) -> None:
    if not tarball.is_file():
        raise InputError(f"{tarball}: no such file; give the .tgz of {PACKAGE} {VERSION}, or its folder")
    with tarball.open("rb") as file:
        if hashlib.file_digest(file, "sha512").hexdigest() != _TARBALL_SHA512:
            raise InputError(f"{tarball}: is not {PACKAGE} {VERSION} (its SHA-512 differs); remove it, fetch it again")


def _packed(tarball: Path) -> dict[str, bytes]:
    """The files that are needed, by their path in the package; read in memory, nothing is unpacked."""
    files: dict[str, bytes] = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            wanted = name == "emoji.json" or name.startswith(f"{_IMAGES}/")
            if wanted and member.isfile() and (stream := archive.extractfile(member)):
                files[name] = stream.read()
    return files


def _unpacked(folder: Path) -> dict[str, bytes]:
    names = ["emoji.json", *(f"{_IMAGES}/{path.name}" for path in sorted((folder / _IMAGES).glob("*.png")))]
    return {name: locate(folder, name, f"{folder}: {name}").read_bytes() for name in names}
