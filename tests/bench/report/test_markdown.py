"""The Markdown tables against fabricated cells."""

from __future__ import annotations

from pathlib import Path

from fabricated import Bench, premise, rate

from untrigger.bench import store
from untrigger.bench.report.render import write
from untrigger.bench.store import Cell


def rendered(bench: Bench, out: Path) -> str:
    write([bench.root], out)
    return out.read_text(encoding="utf-8")


def section(text: str, title: str) -> list[str]:
    return [line for line in text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line]


def test_every_table_has_the_stored_figures(bench: Bench, tmp_path: Path) -> None:
    bench.cell("plain", 0.98, metrics=premise({"mask": (0.6, 0.7, 0.8), "blur": (0.1, 0.2, 0.3)}))
    bench.cell("oracle", 0.0)
    bench.cell("paper", 0.5, quality=0.76, seconds=220.0)
    bench.pair(plain=0.4, attack="sig")
    store.record_failure(bench.root, Cell("llava", "easy-vqa", "wanet", "fixed"), "a | b")
    text = rendered(bench, tmp_path / "out.md")
    assert section(text, "Attack success")[1:] == [
        "### llava, easy-vqa (VQA)",
        "| attack | plain | oracle | paper |",
        "| --- | --- | --- | --- |",
        "| badnets | 98.0 (95.0-99.2) | 0.0 (0.0-1.9) | 50.0 (43.1-56.9) |",
        "| sig | 40.0 (33.5-46.9), not counted | 0.0 (0.0-1.9), not counted | - |",
    ]
    assert section(text, "Models that do not count")[2:] == [
        "| llava, easy-vqa (VQA) | sig | not counted: not implanted |"
    ]
    assert section(text, "Distance to the oracle")[1:] == [
        "### llava, easy-vqa (VQA)",
        "| defense | cells | ASR above the oracle's, points | quality, % of the oracle's | leak, % |",
        "| --- | --- | --- | --- | --- |",
        "| plain | 1 | +98.0 | 100.0 | 1.0 |",
        "| oracle | 1 | 0.0 | 100.0 | 1.0 |",
        "| paper | 1 | +50.0 | 80.0 | 1.0 |",
    ]
    assert section(text, "Cost")[-1] == "| paper | 1 | 2.20 | 220 |"
    premises = section(text, "Does the premise hold?")
    assert "more invariant than clean ones in 1, less invariant in 1, and neither with certainty in 0." in premises[0]
    assert premises[-1] == "| llava, easy-vqa (VQA) | badnets | 0 | 0.700 (0.60-0.80) | 0.200 (0.10-0.30) |"
    assert section(text, "Failed cells")[0].endswith(r": a \| b")
    assert "- seed: 0: 5 cells" in section(text, "Environment")


def test_the_range_over_seeds_is_given(bench: Bench, tmp_path: Path) -> None:
    for seed, asr in enumerate((0.9, 1.0)):
        bench.pair(plain=asr, seed=seed)
    text = rendered(bench, tmp_path / "out.md")
    assert "| badnets | 95.0 (92.4-96.7), 2 seeds 90.0 to 100.0 | 0.0 (0.0-1.0), 2 seeds 0.0 to 0.0 |" in text
    assert "only one seed" not in text
    assert section(text, "Models that do not count") == ["Every attacked model counts."]
    assert section(text, "Does the premise hold?") == ["These results have no such figures."]


def test_tables_without_valid_cells_say_so(bench: Bench, tmp_path: Path) -> None:
    bench.cell("paper", 0.1)
    text = rendered(bench, tmp_path / "out.md")
    assert "these results say nothing about a defense" in text
    assert section(text, "Distance to the oracle")[-1] == "No cell counts."
    assert "| badnets | 10.0 (6.6-14.9), not checked |" in text


def test_results_without_a_defense_have_a_table_of_attacks(bench: Bench, tmp_path: Path) -> None:
    near_misses = {"near_miss": {"half | key": rate(0.25)}, "similarity": {"psnr": 24.31, "ssim": 0.912, "changed": 32}}
    bench.cell("plain", 0.98, quality=0.9, metrics=near_misses, attack_settings={"side": 0.2}, epochs=4)
    bench.cell("oracle", 0.0, attack_settings={"side": 0.2}, epochs=4)
    without_figures = {"similarity": {"psnr": None, "ssim": None, "changed": 0}, "leak": None}
    bench.cell("plain", 0.4, attack="my/ring.py", metrics=without_figures)
    bench.cell("oracle", 0.0, attack="sig")
    text = rendered(bench, tmp_path / "out.md")
    badnets, ring, sig = section(text, "Every attack")[-3:]
    assert badnets == (
        "| badnets | fixed | 0 | 98.0 (95.0-99.2) | 0.0 (0.0-1.9) | 1.0 (0.3-3.6) | half \\| key 25.0 (19.5-31.4) "
        "| 90.0 (85.1-93.4) / 95.0 (91.0-97.3) | 24.3 dB, 0.912 (n 32) | side 0.2, epochs 4 |"
    )
    assert ring == (
        "| ring | fixed | 0 | 40.0 (33.5-46.9), not implanted | - | none | none | 95.0 (91.0-97.3) / - "
        "| no changed pixel | defaults |"
    )
    assert sig == "| sig | fixed | 0 | - | - | - | - | - | - | defaults |"
    bench.cell("paper", 0.5)
    assert "## Every attack" not in rendered(bench, tmp_path / "out.md")
