"""Where images may lie: any name of a file inside the data folder, and ``data:`` URIs."""

from __future__ import annotations

import errno
import os
import re
from base64 import b64encode
from pathlib import Path

import pytest

from untrigger.errors import InputError, UnreadableFile
from untrigger.rows import images
from untrigger.rows.images import decode, locate, relative_name, uri_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a b.png").write_bytes(b"a")
    (tmp_path / "in/link.png").symlink_to("a b.png")
    (tmp_path / "in/out.png").symlink_to("../other.png")
    (tmp_path / "in/loop.png").symlink_to("loop.png")
    (tmp_path / "other.png").write_bytes(b"b")
    (tmp_path / "door").symlink_to("in")
    return tmp_path / "in"


INSIDE = ("a b.png", "./a b.png", "sub/../a b.png", "../in/a b.png", "{}/a b.png", "{}/sub/../a b.png", "{}/link.png")
ADDRESSES = ("file://{}/a%20b.png", "file://localhost{}/a b.png", "FILE:{}/a%20b.png", "file:///{}/sub/../a b.png")


@pytest.mark.parametrize("name", INSIDE + ADDRESSES)
def test_every_name_of_a_file_inside_is_taken(folder: Path, name: str) -> None:
    for root in (folder, folder.parent / "door"):
        given = name.format(root)
        assert locate(root, given, "x").resolve() == folder / "a b.png"
        relative = relative_name(root, given, "x")
        assert not os.path.isabs(relative) and ".." not in relative
        assert os.path.samefile(root / relative, folder / "a b.png")


def test_a_folder_that_is_a_link_may_not_lead_out(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere/a.png").write_bytes(b"a")
    (folder / "away").symlink_to("../elsewhere")
    (folder / "near").symlink_to(".")
    with pytest.raises(InputError, match="outside the data folder"):
        locate(folder, "away/a.png", "x")
    assert locate(folder, "near/a b.png", "x") == folder / "a b.png"


def test_plain_relative_names_stay(folder: Path) -> None:
    assert relative_name(folder, "link.png", "x") == "link.png"
    assert relative_name(folder, "./a b.png", "x") == "./a b.png"
    assert relative_name(folder, f"file://{folder}/a%20b.png", "x") == "a b.png"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "x is outside the data folder; copy it there, or move the data file to a folder above it")
          for name in ("../other.png", "out.png", "/etc/passwd", "file:///etc/passwd", "sub/../../other.png", "{}x/a")),
        *((name, "x is a link to the network, which is not followed; download it into the data folder and use its path")
          for name in ("http://a.org/b.png", "HTTPS://a.org", "s3://a/b", "gs://a/b", "file://host/b.png")),
        ("none.png", "x does not exist in {}; add it, remove the row, or move the data file to where its paths start"),
        ("a b.png/c", "x does not exist in {}; add it, remove the row, or move the data file to where its paths start"),
        ("", "x is an empty path; write the path of a file or remove the row"),
        ("sub", "x is a folder or a device, not a file; correct the path"),
        ("n" * 300, "x cannot be a file name (OSError); correct the path"),
        ("a\0", "x cannot be a file name (ValueError); correct the path"),
        ("\ud800", "x cannot be a file name (UnicodeEncodeError); correct the path"),
    ],
)  # fmt: skip
def test_other_names_are_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message.format(folder))}$") as error:
        locate(folder, name.format(folder), "x")
    assert not isinstance(error.value, UnreadableFile)


def test_a_loop_of_links_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^x cannot be a file name \(\w+\); correct the path$"):
        locate(folder, "loop.png", "x")


NUMBERS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_file_that_cannot_be_read_is_no_bad_row(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    wanted = re.escape(f"x cannot be read ({os.strerror(number)}); check its permissions and its drive")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.raises(UnreadableFile, match=f"^{wanted}$"):
            decode(folder / "a b.png", "x")
    with monkeypatch.context() as patch:
        patch.setattr(images.Image, "open", fail)  # while its bytes are read
        with pytest.raises(UnreadableFile, match=f"^{wanted}$"):
            decode(folder / "a b.png", "x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", fail)
        with pytest.raises(UnreadableFile, match=f"^{wanted}$"):
            locate(folder, "a b.png", "x")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_permissions_are_named(folder: Path) -> None:
    (folder / "a b.png").chmod(0)
    with pytest.raises(UnreadableFile, match=r"Permission denied"):
        decode(locate(folder, "a b.png", "x"), "x")


def test_a_file_that_vanishes_is_a_bad_row(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^x does not exist; add the file or remove the row$") as error:
        decode(folder / "none.png", "x")
    assert not isinstance(error.value, UnreadableFile)


# --- data: URIs ------------------------------------------------------------------------------------


def test_a_data_uri_gives_its_bytes() -> None:
    content = bytes(range(256))
    body = b64encode(content).decode()
    for head in ("data:image/png;base64,", "DATA:image/jpeg;charset=utf-8;BASE64,", "data:image/*;base64,"):
        assert uri_bytes(head + body, "x") == content
    for text in ("a.png", "", "data", "file:///data:image/png;base64,"):
        assert uri_bytes(text, "x") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "x is a data URI of another kind; write data:image/...;base64, and the file's bytes")
          for text in ("data:", "data:,", "data:image/png,ab", "data:text/html;base64,ab", "data:image/png;base64")),
        *(("data:image/png;base64," + body, "x is a data URI without valid base64; encode the file's bytes again")
          for body in ("abc", "ab cd", "ab\ncd", "a-_d", "äbcd", "ab=d", "abcd%3D")),
    ],
)  # fmt: skip
def test_other_data_uris_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        uri_bytes(text, "x")


def test_a_data_uri_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_MAX_URI", 8)
    assert uri_bytes("data:image/png;base64,abcdabcd", "x") is not None
    with pytest.raises(InputError, match=r"^x is a data URI of more than 8 characters; make the image smaller$"):
        uri_bytes("data:image/png;base64,abcdabcdabcd", "x")


def test_a_relative_folder_means_that_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process may work in several folders, and a link may be given another target."""
    for name in ("first", "second"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data/a.png").write_bytes(b"a")
        monkeypatch.chdir(tmp_path / name)
        assert locate(Path("data"), "a.png", "x").resolve() == tmp_path / name / "data/a.png"
    link = tmp_path / "latest"
    for name in ("first", "second"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name / "data")
        assert locate(link, "a.png", "x").resolve() == tmp_path / name / "data/a.png"
