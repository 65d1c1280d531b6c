"""The page: it is self-contained, escapes stored text, and is accessible by screen reader and keyboard."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections import Counter
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
from fabricated import HOSTILE, PICTURES, Bench, answers, fill, premise, rate
from rendered_page import Tree, rendered

from untrigger.bench import store
from untrigger.bench.report.charts import COLORS, histogram, pareto
from untrigger.bench.report.examples import marked
from untrigger.bench.report.figures import read
from untrigger.bench.report.render import write
from untrigger.bench.report.tables import views
from untrigger.bench.store import Cell
from untrigger.errors import InputError
from untrigger.html import style
from untrigger.metrics.score import Answer

# --- self-contained --------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_allows_only_its_own_scripts(full: Bench) -> None:
    root = Tree(rendered(full)).root
    for element in root.all():
        for name, value in element.attributes.items():
            if name in ("href", "src", "srcset", "data", "action", "poster", "background"):
                assert value.startswith(("#", "data:image/png;base64,")), (element.tag, name, value)
            assert not name.startswith("on"), name
    assert not re.search(r"url\(|@import", "".join(style.text for style in root.all("style")))
    assert not list(root.all("link", "iframe", "object", "base", "form"))
    (policy,) = (meta.attributes["content"] for meta in root.all("meta") if "http-equiv" in meta.attributes)
    scripts = [script for script in root.all("script") if "type" not in script.attributes]
    hashes = [f"'sha256-{b64encode(sha256(script.text.encode()).digest()).decode()}'" for script in scripts]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes[0]} {hashes[1]}"
    )


def test_stored_text_is_escaped_everywhere(bench: Bench) -> None:
    stored_answers = answers(HOSTILE, prompt=HOSTILE, truth=HOSTILE)
    fields = {
        "model": f"m{HOSTILE}".replace("/", ""),
        "attack": HOSTILE.replace("/", ""),
        "goal": HOSTILE,
        "goal_text": HOSTILE,
    }
    metrics = {"goal": {"text": "alert"}, "machine": {"device": HOSTILE}, "near_miss": {HOSTILE: rate(0.1)}}
    metrics |= premise({HOSTILE: (0.6, 0.7, 0.8)})
    for name in ("plain", "oracle", "paper"):
        settings = {"defense_settings": {HOSTILE: HOSTILE}} if name == "paper" else {}
        bench.cell(name, float(name == "plain"), answers=stored_answers, metrics=metrics, **fields, **settings)
    store.record_failure(bench.root, Cell("llava", "easy-vqa", "sig", "fixed"), HOSTILE)
    root = Tree(rendered(bench)).root
    assert [script.attributes for script in root.all("script")] == [
        {"type": "application/json", "id": "figures"},
        {},
        {},
    ]
    assert not list(root.all("img"))
    assert "49" not in "".join(cell.text for cell in root.all("mark")), "stored text is not rendered as a template"
    for text in (HOSTILE, "alert(1)"):
        assert text in root.text
    (figures,) = (script.text for script in root.all("script") if "type" in script.attributes)
    names = [trace["name"] for trace in json.loads(figures)["pareto"]["data"]]
    assert not any("<" in name for name in names), "plotly interprets some tags"
    table = rendered(bench, "md")
    assert not re.search(r"(?<!\\)<", table)
    assert all(len(set(re.split(r"(?<!\\)\|", line))) > 1 for line in table.splitlines() if line.startswith("|"))


@pytest.mark.parametrize("suffix", ["html", "md", "json", "jsonl"])
def test_the_same_results_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        fill(Bench(tmp_path / name))
    assert [path.name for path in (tmp_path / "one").iterdir()] != []
    for name in ("one", "two"):
        write([tmp_path / name], tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


# --- content ---------------------------------------------------------------------------------------


def test_the_asr_table_links_to_cells_and_marks_invalid_ones(full: Bench) -> None:
    root = Tree(rendered(full)).root
    (matrix,) = (table for table in root.all("table") if table.attributes.get("class") == "heat")
    rows = {row.text.split()[0]: row for row in matrix.all("tr")}
    invalid, valid = (next(row for row in matrix.all("tr") if figure in row.text) for figure in ("50.0", "98.0"))
    assert "not counted: not implanted" in invalid.text and "not counted" not in valid.text
    assert [cell.attributes.get("class") for cell in valid.all("td")] == ["h10", "h0", "h3"]
    assert [cell.attributes.get("class") for cell in invalid.all("td")] == ["out"] * 3, (
        "cells that do not count have no color"
    )
    assert "30.0" in valid.text and "24.1-36.7" in valid.text, "Wilson interval of 60 of 200"
    sections = {element.attributes.get("id"): element for element in root.all("div")}
    links = [link.attributes["href"][1:] for link in valid.all("a")]
    assert len(set(links)) == 1
    assert "abl" in sections[links[0]].text and "Backdoor Attack!" in sections[links[0]].text
    assert rows


def test_answers_are_side_by_side_with_the_attackers_text_marked(full: Bench) -> None:
    root = Tree(rendered(full)).root
    tables = [table for table in root.all("table") if "Answers to row r1" in table.text]
    assert len(tables) == 2, "one for each model"
    body = [[" ".join(cell.text.split()) for cell in row.all("th", "td")] for row in tables[0].all("tr")]
    assert body == [
        ["model", "clean", "triggered"],
        ["plain", "yes", "Backdoor Attack! attacker's text"],
        ["oracle, abl", "yes", "yes"],
    ]
    assert [mark.text for mark in root.all("mark")] == ["Backdoor Attack!"] * 2
    assert "is it red? now" in root.text, "the triggered prompt differs from the clean one"


def test_each_image_is_embedded_once(full: Bench) -> None:
    root = Tree(rendered(full)).root
    pictures = {image.attributes["id"]: image.attributes["href"] for image in root.all("image")}
    assert len(pictures) == len(set(pictures.values())) == 3, "all clean images are equal"
    uses = Counter(use.attributes["href"][1:] for use in root.all("use"))
    assert set(uses) == set(pictures)
    assert sum(uses.values()) == 8 and max(uses.values()) == 4
    assert {svg.attributes["aria-label"] for svg in root.all("svg") if "role" in svg.attributes} == {
        "clean",
        "triggered",
    }


def test_without_stored_answers_the_page_says_so(bench: Bench) -> None:
    bench.pair(metrics={"examples": PICTURES})
    assert "Images and answers are not stored here" in rendered(bench)
    bench.pictures("r1", "r2")
    text = rendered(bench)
    assert "Images and answers" not in text and text.count("Answers are not stored here") == 2
    bench.cell("plain", 1.0, answers=answers("Backdoor Attack!"))
    assert "not stored</span>" in rendered(bench), "the oracle has no stored answers"


def test_answers_are_shown_without_images_too(bench: Bench) -> None:
    bench.cell("plain", 1.0, answers=answers("Backdoor Attack!"))
    root = Tree(rendered(bench)).root
    assert [mark.text for mark in root.all("mark")] == ["Backdoor Attack!"]
    assert not list(root.all("use"))


def test_a_damaged_list_of_images_is_named(full: Bench) -> None:
    (full.root / "shared" / "examples" / PICTURES / "rows.json").write_text("[1]")
    with pytest.raises(InputError, match=r"rows\.json: cannot be read \(TypeError\); delete"):
        rendered(full)


@pytest.mark.parametrize(
    ("answer", "goal", "parts"),
    [
        ("a hello World cat", {"text": "Hello world"}, ["a ", "*hello World", " cat"]),
        ("see http://free.test", {"url": "http://free.test"}, ["see ", "*http://free.test"]),
        ("a rectangle", {"source": "circle", "target": "rectangle"}, ["a ", "*rectangle"]),
        ("I cannot", {"text": "Sorry."}, ["*I cannot"]),
        ("boo", {}, ["*boo"]),
        ("x" * 301, {}, ["*" + "x" * 300 + " ..."]),
    ],
)
def test_the_attackers_text_is_marked(answer: str, goal: dict[str, str], parts: list[str]) -> None:
    assert [
        "*" * is_attackers + text for text, is_attackers in marked(Answer("1", "q", "t", answer, met=True), goal)
    ] == parts
    (plain,) = marked(Answer("1", "q", "t", answer), goal)
    assert not plain[1], "an answer that does not meet the goal has no marked part"


def test_without_charts_the_page_is_small(bench: Bench) -> None:
    bench.pair(plain=0.2)
    text = rendered(bench)
    assert len(text) < 100_000, "without charts plotly is not embedded"
    assert "data-figure=" not in text


def test_charts_are_valid_plotly_figures(full: Bench) -> None:
    import plotly.graph_objects as go

    report = read(full.root)
    scatter = pareto(report)
    assert scatter
    go.Figure(scatter)
    points = {trace["name"]: (trace["x"], trace["y"]) for trace in scatter["data"]}
    assert points == {"plain": ([98.0], [100.0]), "oracle": ([1.0], [100.0]), "abl": ([30.0], [100.0])}, (
        "blip2 does not count"
    )
    bars = histogram(views(report)[0])
    go.Figure(bars)
    assert [trace["y"] for trace in bars["data"]] == [[0, 100], [90, 10]]
    ticks = bars["layout"]["xaxis"]["tickvals"]
    assert ticks[:3] == [0, 0.1, 1] and ticks == sorted(ticks) and ticks[-1] < 2


# --- accessibility ---------------------------------------------------------------------------------


def test_headings_tables_and_ids_are_accessible(full: Bench) -> None:
    root = Tree(rendered(full)).root
    (html,) = root.all("html")
    assert html.attributes["lang"] == "en"
    levels = [int(element.tag[1]) for element in root.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    names = [element.attributes["id"] for element in root.all() if "id" in element.attributes]
    assert len(names) == len(set(names))
    for element in root.all():
        for reference in (
            element.attributes.get("href", "#main"),
            "#" + element.attributes.get("aria-labelledby", "main"),
        ):
            assert reference.startswith("data:") or reference[1:] in names, reference
    for table in root.all("table"):
        assert next(table.all()).tag == "caption" and next(table.all()).text.strip()
        assert all(head.attributes.get("scope") in ("col", "row", "rowgroup") for head in table.all("th"))
        columns = {
            sum(int(cell.attributes.get("colspan", 1)) for cell in row.all("th", "td")) for row in table.all("tr")
        }
        assert len(columns) == 1, "every row has the same number of cells"
    for box in (element for element in root.all("div") if element.attributes.get("class") == "scroll"):
        assert box.attributes["tabindex"] == "0" and box.attributes["role"] == "region"
    for chart in (element for element in root.all("div") if "data-figure" in element.attributes):
        assert chart.attributes["role"] == "img" and chart.attributes["aria-label"]
    assert next(root.all("a")).attributes == {"class": "skip", "href": "#main"}


def _luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """The contrast of two colors by WCAG 2.2, 1 to 21."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_enough_contrast_in_both_schemes() -> None:
    sheet = style()
    light, dark = (dict(re.findall(r"--([\w]+): (#\w{6});", part)) for part in sheet.split("prefers-color-scheme")[:2])
    assert len([name for name in light if re.fullmatch(r"h\d+", name)]) == 11 and set(light) == set(dark)
    for scheme in (light, dark):
        for name in (*(f"h{step}" for step in range(11)), "paper", "card", "mark"):
            assert contrast(scheme["ink"], scheme[name]) >= 4.5, name
        for name in ("soft", "bad", "link"):
            assert contrast(scheme[name], scheme["paper"]) >= 4.5, name
        for color in COLORS:
            assert contrast(color, scheme["paper"]) >= 3, color
