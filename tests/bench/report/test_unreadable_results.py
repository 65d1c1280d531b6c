"""Results that cannot be read; the modules that a report does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fabricated import Bench, premise

from untrigger.bench import store
from untrigger.bench.report.figures import read
from untrigger.bench.report.render import write
from untrigger.bench.store import Cell
from untrigger.errors import InputError


def test_failures_are_listed_beside_older_figures(bench: Bench) -> None:
    cell = bench.cell("plain", 1.0)
    second = Cell("llava", "easy-vqa", "sig", "fixed")
    store.record_failure(bench.root, cell, "out of\nmemory")
    store.record_failure(bench.root, second, "no such attack")
    assert read(bench.root).failures == {cell.name: "out of memory", second.name: "no such attack"}


@pytest.mark.parametrize("suffix", ["html", "md", "json", "jsonl"])
def test_results_without_cells_are_a_one_line_error(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        write([tmp_path / "nowhere"], out)
    with pytest.raises(InputError, match=r"holds no finished cell; run untrigger bench"):
        write([tmp_path], out)
    store.record_failure(tmp_path, Cell("llava", "easy-vqa", "sig", "fixed"), "it broke")
    with pytest.raises(InputError, match=r"holds no finished cell, 1 failed; run untrigger bench"):
        write([tmp_path], out)
    assert not out.exists()


def test_an_unknown_suffix_is_an_error_before_reading(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out\.pdf: the suffix of a report must be \.html, \.md, \.json or \.jsonl"):
        write([tmp_path / "nowhere"], tmp_path / "out.pdf")


def test_a_cell_without_its_figures_is_named(bench: Bench, tmp_path: Path) -> None:
    cell = bench.cell("plain", 1.0, metrics={"seconds": None})
    with pytest.raises(InputError, match=f"{cell.name}: metrics.json has no seconds; delete the folder"):
        write([bench.root], tmp_path / "out.json")
    packed = tmp_path / "packed.jsonl"
    packed.write_text(store.packed_text([bench.root]))
    with pytest.raises(InputError, match=r"packed\.jsonl: line 1 has no seconds; delete the line"):
        write([packed], tmp_path / "out.json")


def test_a_report_loads_no_torch(bench: Bench, tmp_path: Path) -> None:
    bench.pair(metrics=premise({"mask": (0.6, 0.7, 0.8)}))
    code = (
        "import sys\nfrom pathlib import Path\nfrom untrigger.bench.report.render import write\n"
        "for suffix in ('html', 'md', 'json', 'jsonl'):\n"
        f"    write([Path({str(bench.root)!r})], Path({str(tmp_path)!r}) / f'out.{{suffix}}')\n"
        "    print(suffix, [m for m in ('torch', 'transformers', 'trl', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "html []\nmd []\njson []\njsonl []\n"
