"""Emoji rows from a toy package in the real layout and, in the slow suite, from the real package."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from shell import untrigger
from untrigger.data import emoji, load
from untrigger.data.emoji import KINDS, colors_of, split_and_part
from untrigger.data.scene_text import FULL_PROMPTS
from untrigger.data.scene_world import COLORS
from untrigger.errors import InputError
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import read

KINDS_OF = (("Animals & Nature", "animal-bird"), ("Food & Drink", "drink"), ("Smileys & Emotion", "heart"))
PAINTS = {"red": (220, 30, 30), "blue": (40, 60, 220), "green": (40, 160, 60)}


def png(color: tuple[int, int, int]) -> bytes:
    """A square of one color on a transparent canvas."""
    image = Image.new("RGBA", (64, 64))
    image.paste((*color, 255), (16, 16, 48, 48))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def packed(files: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for info in more:
            archive.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def toy() -> dict[str, bytes]:
    entries: list[dict[str, object]] = []
    files: dict[str, bytes] = {}
    for number in range(60):
        code = f"{0x1F400 + number:x}"
        color = list(PAINTS)[number % 3]
        red, green, blue = PAINTS[color]
        files[f"img/google/64/{code}.png"] = png((red, green, blue - number // 3))  # a different image for each number
        category, subcategory = KINDS_OF[number // 3 % 3]
        entries.append(
            {
                "unified": code.upper(),
                "name": f"THING {number}",
                "image": f"{code}.png",
                "category": category,
                "subcategory": subcategory,
                "has_img_google": True,
            }
        )
    entries.append({**entries[0], "unified": "1F46A", "name": "FAMILY: MAN, BOY", "subcategory": "family"})
    flag = {
        "unified": "1F1EA",
        "name": "FLAG",
        "image": "1f1ea.png",
        "subcategory": "country-flag",
        "has_img_google": True,
    }
    entries.append({**flag, "category": "Flags"})
    entries.append({**entries[0], "unified": "1F999", "image": "1f999.png", "has_img_google": False})
    return {"emoji.json": json.dumps(entries).encode(), **files}


@pytest.fixture
def tarball(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield pinned(tmp_path / "toy.tgz", packed(toy()), monkeypatch)
    emoji._emojis.cache_clear()


def pinned(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a tarball and make its hashes the expected ones."""
    path.write_bytes(content)
    monkeypatch.setattr(emoji, "_TARBALL_SHA512", hashlib.sha512(content).hexdigest())
    monkeypatch.setattr(emoji, "_LIST_SHA256", hashlib.sha256(toy()["emoji.json"]).hexdigest())
    return path


def test_captions_name_color_kind_and_background(tarball: Path) -> None:
    rows = load("emoji", rows=20, source=tarball)
    entries = {e["unified"].lower(): e for e in json.loads(toy()["emoji.json"])}
    for row in rows:
        code = row.id.rpartition("-")[0]
        (image,) = row.images
        assert (image.mode, image.size) == ("RGB", (64, 64))
        background = {(255, 255, 255): "light", (40, 40, 48): "dark"}[image.getpixel((0, 0))]
        kind = {"animal-bird": "animal", "drink": "drink", "heart": "heart"}[entries[code]["subcategory"]]
        color = list(PAINTS)[(int(code, 16) - 0x1F400) % 3]
        assert row.messages[1].text == f"a {color} {kind} on a {background} background"
        assert row.messages[0].text.removeprefix("<image>\n") in FULL_PROMPTS
    assert len({row.messages[1].text.split()[-2] for row in rows}) == 2


def test_every_image_comes_once_before_any_repeats(tarball: Path) -> None:
    with pytest.raises(InputError, match="ask for at most") as error:
        load("emoji", rows=10**4, source=tarball)
    limit = int(str(error.value).split()[-1])
    images = limit // len(FULL_PROMPTS)
    rows = load("emoji", rows=limit, source=tarball)
    codes = [row.id.rpartition("-")[0] for row in rows]
    assert len(set(codes[:images])) == images and codes[:images] == codes[images : 2 * images]
    assert len({(code, row.messages[0].text) for code, row in zip(codes, rows, strict=True)}) == limit
    assert codes != [row.id.rpartition("-")[0] for row in load("emoji", rows=limit, seed=1, source=tarball)]


def test_splits_share_no_image_and_cover_all(tarball: Path) -> None:
    hashes: list[str] = []
    for split in ("dev", "report"):
        for part in ("train", "test"):
            with pytest.raises(InputError) as error:
                load("emoji", split, part, rows=10**4, source=tarball)
            rows = load("emoji", split, part, rows=int(str(error.value).split()[-1]), source=tarball)
            hashes += sorted({pixels_sha256(row.images[0]) for row in rows})
    assert len(hashes) == len(set(hashes)) == 60


@pytest.mark.parametrize(
    "codes",
    [
        ("1f3c3", "1f3c3-200d-2640-fe0f", "1f3c3-200d-2642-fe0f-200d-27a1-fe0f"),  # runners
        ("1f468-200d-1f373", "1f469-200d-1f373", "1f9d1-200d-1f373"),  # cooks
    ],
)
def test_variants_of_a_drawing_stay_together(codes: tuple[str, ...]) -> None:
    assert len({split_and_part(code) for code in codes}) == 1


def test_a_third_is_dev_and_a_third_is_test() -> None:
    placements = [split_and_part(f"{code:x}") for code in range(0x1F300, 0x1F900)]
    assert sum(split == "dev" for split, _ in placements) / len(placements) == pytest.approx(1 / 3, abs=0.04)
    assert sum(part == "test" for _, part in placements) / len(placements) == pytest.approx(1 / 3, abs=0.04)


@pytest.mark.parametrize(
    ("rgb", "color"),
    [
        ((230, 30, 40), "red"), ((255, 150, 20), "orange"), ((255, 215, 60), "yellow"), ((60, 160, 60), "green"),
        ((0, 150, 140), "teal"), ((40, 90, 220), "blue"), ((140, 40, 200), "purple"), ((240, 80, 170), "pink"),
        ((250, 170, 170), "pink"), ((120, 70, 30), "brown"), ((130, 130, 135), "gray"), ((250, 250, 250), "white"),
        ((20, 20, 20), "black"),
    ],
)  # fmt: skip
def test_colors(rgb: tuple[int, int, int], color: str) -> None:
    assert color in COLORS
    image = Image.new("RGBA", (10, 10), (*rgb, 255))
    assert colors_of(image) == color
    image.paste((0, 255, 0, 0), (0, 0, 10, 6))  # transparent pixels do not count
    assert colors_of(image) == color


def test_two_colors_when_none_covers_half() -> None:
    image = Image.new("RGBA", (10, 10), (220, 30, 30, 255))
    image.paste((40, 60, 220, 255), (0, 0, 10, 3))
    image.paste((40, 160, 60, 255), (0, 3, 10, 6))
    image.paste((255, 255, 255, 255), (0, 6, 1, 7))
    assert colors_of(image) == "red and blue"


def test_kinds_are_eighteen_plain_words() -> None:
    kinds = set(KINDS.values())
    assert len(kinds) == 18
    assert all(kind.isascii() and kind.islower() and kind.isalpha() for kind in kinds)


# --- the package -----------------------------------------------------------------------------------


def test_an_unpacked_folder_gives_the_same_rows(tarball: Path, tmp_path: Path) -> None:
    with tarfile.open(tarball) as archive:
        archive.extractall(tmp_path / "there", filter="data")
    rows = load("emoji", rows=12, source=tarball)
    for folder in (tmp_path / "there", tmp_path / "there" / "package"):
        reloaded = load("emoji", rows=12, source=folder)
        assert [(r.id, r.messages) for r in reloaded] == [(r.id, r.messages) for r in rows]
    image = next((tmp_path / "there").rglob("*.png"))
    image.unlink()
    emoji._emojis.cache_clear()
    with pytest.raises(InputError, match=f"img/google/64/{image.name} is missing"):
        load("emoji", rows=12, source=tmp_path / "there")
    image.symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="is outside the data folder"):
        load("emoji", rows=12, source=tmp_path / "there")
    image.unlink()
    (tmp_path / "there" / "package" / "emoji.json").write_text("[]")
    with pytest.raises(InputError, match=r"is not emoji-datasource-google 16\.0\.0"):
        load("emoji", rows=12, source=tmp_path / "there")


def test_another_tarball_is_refused(tarball: Path, tmp_path: Path) -> None:
    tarball.write_bytes(tarball.read_bytes() + b"\0")
    with pytest.raises(InputError, match="SHA-512 differs"):
        load("emoji", rows=1, source=tarball)
    with pytest.raises(InputError, match="no such file"):
        load("emoji", rows=1, source=tmp_path / "none.tgz")


def test_links_and_outside_paths_in_a_tarball_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = toy()
    gone = next(name for name in files if name.endswith(".png"))
    del files[gone]
    link = tarfile.TarInfo(f"package/{gone}")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    outside = tarfile.TarInfo("package/../../evil.png")
    before = sorted(tmp_path.parent.rglob("*"))
    tarball = pinned(tmp_path / "bad.tgz", packed(files, link, outside), monkeypatch)
    with pytest.raises(InputError, match=f"{gone} is missing"):
        load("emoji", rows=1, source=tarball)
    assert sorted(tmp_path.parent.rglob("*")) == sorted([*before, tarball]), "no file may be unpacked"


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a Python script named ``npm`` on the PATH, alone, and use a new cache."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!{sys.executable}\nimport pathlib, shutil, sys\n{body}\n")
    (folder / "npm").chmod((folder / "npm").stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def test_npm_downloads_once(tarball: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "emoji-datasource-google-16.0.0.tgz"
    body = (
        f"assert sys.argv[1:3] == ['pack', 'emoji-datasource-google@16.0.0']\nshutil.copy({str(tarball)!r}, {name!r})"
    )
    fake_npm(tmp_path / "bin", monkeypatch, body)
    rows = load("emoji", rows=3)
    assert [row.id for row in rows] == [row.id for row in load("emoji", rows=3, source=tarball)]
    cached = tmp_path / "bin" / "cache" / "untrigger" / name
    assert cached.read_bytes() == tarball.read_bytes()
    assert os.listdir(cached.parent) == [name]
    (tmp_path / "bin" / "npm").unlink()
    assert emoji.fetch_package() == cached


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('npm error code ENOTFOUND\\nnpm error more')", "could not be downloaded (npm error code ENOTFOUND)"),
        ("sys.exit(3)", "could not be downloaded (npm exit 3)"),
        ("pathlib.Path('emoji-datasource-google-16.0.0.tgz').write_text('x')", "SHA-512 differs"),
    ],
)
def test_a_failed_fetch_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    fake_npm(tmp_path / "bin", monkeypatch, body)
    with pytest.raises(InputError) as error:
        emoji.fetch_package()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "bin" / "cache").exists()


def test_without_npm_the_error_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"not installed; install Node\.js, or fetch emoji-.*--source"):
        emoji.fetch_package()


def test_the_command_writes_what_poison_reads(tarball: Path, tmp_path: Path) -> None:
    words = ("data", "emoji", "--out", tmp_path / "out", "--source", tarball, "--rows", 8, "--split", "dev")
    ended = untrigger(*words)
    assert ended.code == 0
    assert "8 rows of emoji, train part of the split dev" in ended.out
    back = read(tmp_path / "out")
    assert [(r.id, r.messages) for r in back] == [
        (r.id, r.messages) for r in load("emoji", "dev", rows=8, source=tarball)
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_the_real_package() -> None:
    try:
        tarball = emoji.fetch_package()
    except InputError as error:
        if "could not be downloaded" in str(error):
            pytest.skip(str(error))
        raise
    all_hashes: set[str] = set()
    for split, part, count in (
        ("dev", "train", 300), ("dev", "test", 180), ("report", "train", 650), ("report", "test", 350)
    ):  # fmt: skip
        rows = load("emoji", split, part, rows=count, source=tarball)
        images = {pixels_sha256(row.images[0]) for row in rows}
        assert images.isdisjoint(all_hashes)
        all_hashes |= images
        assert len({row.messages[1].text for row in rows}) > count / 4
