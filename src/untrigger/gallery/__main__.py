"""``python -m untrigger.gallery``: run the cells that are missing, draw the pictures, write the page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from untrigger.data import Split
from untrigger.errors import InputError
from untrigger.files import write_text
from untrigger.gallery import ENTRIES, chosen, plan
from untrigger.gallery.page import page

# Of the cells and of the page: what is tuned on dev overwrites nothing that is published.
FOLDERS = {
    "report": (Path("results/gallery"), Path("docs")),
    "dev": (Path("runs/gallery-dev"), Path("runs/gallery-dev")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where a cell failed; 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser("python -m untrigger.gallery", description=__doc__)
    parser.add_argument("--results", type=Path, help="folder of the cells (results/gallery; dev: runs/gallery-dev)")
    parser.add_argument("--out", type=Path, help="folder of gallery.md and gallery/*.png (docs; dev: runs/gallery-dev)")
    parser.add_argument("--split", default="report", help="report, or dev to tune on")
    parser.add_argument("--render", action="store_true", help="run nothing: draw what is stored")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="ATTACK/MODEL/DATA",
        help="these cells alone; parts may be * or left out; repeatable",
    )
    args = parser.parse_args(argv)
    try:
        split = Split(args.split)
        results, out = FOLDERS[split.name]
        return _make(args.results or results, args.out or out, split, args.only, args.render, args.workers)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _make(results: Path, out: Path, split: Split, only: Sequence[str], render: bool, workers: int) -> int:
    from untrigger.bench.local import on_this_machine
    from untrigger.bench.sweep import run_matrix
    from untrigger.gallery.pictures import picture
    from untrigger.models.loading import embedded_models

    cells = plan(embedded_models(), split=split)
    wanted = chosen(cells, only)
    failed = [] if render else run_matrix(list(wanted.values()), results, on_this_machine(workers))
    (out / "gallery").mkdir(parents=True, exist_ok=True)
    for entry in ENTRIES:
        if any(key.attack == entry.slug for key in wanted):
            picture(entry, cells).save(out / "gallery" / f"{entry.slug}.png", optimize=True)
    write_text(out / "gallery.md", page(results, cells, ENTRIES))
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
