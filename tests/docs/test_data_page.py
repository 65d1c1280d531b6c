"""The rows that docs/data.md shows are read as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from untrigger.rows.sample import read

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
ROWS = re.findall(r"^\| ([\w -]+) \| `(\{.+\})` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_shows_rows() -> None:
    assert len(ROWS) >= 10


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[name for name, _ in ROWS])
def test_each_row_is_read(name: str, row: str, tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(row + "\n")
    assert json.loads(row)
    (sample,) = read(tmp_path)
    assert [(turn.role, turn.text.replace("<image>", "").strip()) for turn in sample.messages] == [
        ("user", "What is it?"),
        ("assistant", "A cat."),
    ]
    assert [image.getpixel((0, 0)) for image in sample.images] == [(255, 0, 0)]
