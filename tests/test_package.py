"""What the wheel holds and says of itself, as an index and a type checker read it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = runpy.run_path(str(ROOT / "hatch_build.py"))
TARGET = re.compile(r"\]\(([^)\s]*)|(?:href|src)=\"([^\"]*)")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


def targets(text: str) -> list[str]:
    return [markdown or html for markdown, html in TARGET.findall(text)]


def test_the_wheel_holds_every_file_of_the_package_and_its_marker_of_types(wheel: zipfile.ZipFile) -> None:
    source = ROOT / "src"
    files = {p.relative_to(source).as_posix() for p in (source / "untrigger").rglob("*") if p.is_file()}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {name for name in files if "__pycache__" not in name}
    assert "untrigger/py.typed" in names


def test_the_long_description_has_no_relative_link(metadata: Message) -> None:
    text = str(metadata.get_payload())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "untrigger scan     DATA --model llava" in text and "what TRL and transformers need besides" in text
    assert targets(text), "links to other sites stay"
    assert [link for link in targets(text) if not link.startswith("https://")] == []


def test_urls_and_links_follow_from_one_address(metadata: Message) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    address = project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]
    urls = [f"{label}, {url}" for label, url in BUILD["project_urls"](address).items()]
    assert (metadata.get_all("Project-URL") or []) == urls
    assert [line.partition(", ")[0] for line in urls] == (
        ["Homepage", "Documentation", "Changelog", "Issues"] if address else []
    )


def test_with_an_address_every_link_leads_to_a_file_of_the_repository() -> None:
    address, readme = "https://host.test/untrigger", (ROOT / "README.md").read_text(encoding="utf-8")
    relative = [link for link in targets(readme) if "://" not in link]
    links = targets(BUILD["long_description"](readme, address))
    own = [link.removeprefix(address) for link in links if link.startswith(address)]
    assert own == [f"/{'raw' if link.endswith('.png') else 'blob'}/main/{link}" for link in relative]
    assert len(own) > 20 and all(link.startswith("https://") for link in links)
    pages = [*own, *(url.removeprefix(address) for url in BUILD["project_urls"](address).values())]
    paths = [page.split("/main/", 1)[1].partition("#")[0] for page in pages if "/main/" in page]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("text", "without", "within"),
    [
        ("[a](b.md#c)", "a", "[a](R/blob/main/b.md#c)"),
        ("![a](b.png)", "", "![a](R/raw/main/b.png)"),
        ("[`a`](b/c) and [d](e)", "`a` and d", "[`a`](R/blob/main/b/c) and [d](R/blob/main/e)"),
        ("[a](https://b.test) [c](mailto:d@e.test) [f](#g)", None, None),
        ("a[1] (b)", None, None),
    ],
)
def test_only_relative_links_change(text: str, without: str | None, within: str | None) -> None:
    assert BUILD["long_description"](text, "") == (text if without is None else without)
    assert BUILD["long_description"](text, "R") == (text if within is None else within)


def test_each_python_that_is_allowed_is_a_classifier(metadata: Message) -> None:
    labels = [str(label) for label in metadata.get_all("Classifier") or []]
    minors = sorted(int(match[1]) for label in labels if (match := re.search(r"Python :: 3\.(\d+)$", label)))
    assert f">=3.{minors[0]}" in metadata["Requires-Python"] and f"<3.{minors[-1] + 1}" in metadata["Requires-Python"]
    assert minors == [*range(minors[0], minors[-1] + 1)]
    assert "Typing :: Typed" in labels
