"""Check the words of the project: names that say what a thing is, short sentences, American spelling."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("src", "benchmarks", "examples", "tests")
FORBIDDEN_NAMES = {"told", "found", "asked", "kept", "said", "seen", "shown"}
WORDS_OF_A_SENTENCE, SHARE_OF_LONG_SENTENCES = 30, 0.02
BRITISH = re.compile(
    r"defence|colour|(?<![a-z])centre(?:s|d|less)?(?![a-z])|(?<![a-z])grey|normalis|tokenis|behaviour|judgement"
    r"|licence|neighbour|optimis(?!t|m)",
    re.IGNORECASE,
)
# Prompts that the bundled models were trained on, and the kinds of question that the models' cards list.
ALLOWED = {"src/untrigger/data/scene_text.py": "colour", "src/untrigger/embedded/*/README.md": "colour"}


class Hit(NamedTuple):
    line: int
    text: str


# --- names ------------------------------------------------------------------------------------------


def definitions(source: str) -> Iterator[Hit]:
    """Every name that the source defines: by ``def``, ``class``, parameter, assignment, loop, ``with`` or import."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield Hit(node.lineno, name)
            case ast.arg(arg=name):
                yield Hit(node.lineno, name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield Hit(node.lineno, name)
            case ast.alias(name=name, asname=alias):
                yield Hit(node.lineno, alias or name.rpartition(".")[2])
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield Hit(node.lineno, name)
            case ast.MatchMapping(rest=str(name)):
                yield Hit(node.lineno, name)
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                yield from (Hit(node.lineno, name) for name in names)
            case _:
                pass


def forbidden_names(source: str) -> list[Hit]:
    return [hit for hit in definitions(source) if hit.text in FORBIDDEN_NAMES]


def test_names_say_what_a_thing_is() -> None:
    files = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    report([(path, hit) for path in files for hit in forbidden_names(path.read_text(encoding="utf-8"))])


@pytest.mark.parametrize(
    "source",
    [
        "told = 1",
        "told: int",
        "class A:\n    told: int = 0",
        "class told: ...",
        "def told(): ...",
        "async def told(): ...",
        "def f(told): ...",
        "def f(*, told=1): ...",
        "def f(*told): ...",
        "def f(**told): ...",
        "lambda told: 1",
        "a, (b, *told) = c",
        "told += 1",
        "self.told = 1",
        "for told in a: ...",
        "[1 for told in a]",
        "{1: 2 for a, told in b}",
        "with a as told: ...",
        "with a as (b, told): ...",
        "if told := 1: ...",
        "import told",
        "import a as told",
        "from a import told",
        "from a import b as told",
        "try: ...\nexcept E as told: ...",
        "match a:\n    case [told]: ...",
        "match a:\n    case [*told]: ...",
        "match a:\n    case {**told}: ...",
    ],
)
def test_a_forbidden_name_is_reported_wherever_it_is_defined(source: str) -> None:
    assert {hit.text for hit in forbidden_names(source)} == {"told"}


@pytest.mark.parametrize(
    "source",
    ["print(told)", "a.told", "f(told=1)", "'told'", "# told", "untold = Told = 1", "a['told'] = 1"],
)
def test_uses_and_longer_names_are_no_definitions(source: str) -> None:
    assert forbidden_names(source) == []


def test_a_hit_has_its_line() -> None:
    assert forbidden_names("a = 1\n\nfound = 2\nb, seen = 3") == [Hit(3, "found"), Hit(4, "seen")]


# --- sentences --------------------------------------------------------------------------------------


def sentences(page: str) -> list[Hit]:
    """The sentences of a Markdown page, without code blocks, tables, headings and comments."""
    page = re.sub(r"<!--.*?-->", lambda comment: "\n" * comment[0].count("\n"), page, flags=re.S)
    result: list[Hit] = []
    paragraph: list[Hit] = []
    fenced = False

    def end() -> None:
        result.extend(_sentences(paragraph))
        paragraph.clear()

    for number, line in enumerate(page.splitlines(), 1):
        text = line.strip().removeprefix("> ")
        if text.startswith(("```", "~~~")):
            fenced = not fenced
            end()
        elif fenced or not text or text.startswith(("|", "#", "!!!", ":::", "---", "<")):
            end()
        else:
            if item := re.match(r"(?:[-*+]|\d+\.)\s+", text):
                end()
                text = text[item.end() :]
            paragraph.append(Hit(number, text))
    end()
    return result


def _sentences(paragraph: list[Hit]) -> Iterator[Hit]:
    """A paragraph, cut after each full stop, question mark and exclamation mark."""
    words = [Hit(line, word) for line, text in paragraph for word in _plain(text).split()]
    start = 0
    for at, (_, word) in enumerate(words, 1):
        if at == len(words) or re.search(r"[.?!][\"')*_]*$", word):
            yield Hit(words[start].line, " ".join(each.text for each in words[start:at]))
            start = at


def _plain(text: str) -> str:
    """Without markup: a piece of inline code is one word, and a link is its text."""
    text = re.sub(r"`[^`]*`", lambda code: "code" + ("." if code[0][-2:-1] == "." else ""), text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\b(?:e\.g|i\.e|vs|cf|al|Fig|Eq|No)\.", "abbreviation", text)


def long_sentences(page: str) -> list[Hit]:
    return [
        Hit(line, f"{count} words: {text[:80]}...")
        for line, text in sentences(page)
        if (count := sum(any(map(str.isalnum, word)) for word in text.split())) > WORDS_OF_A_SENTENCE
    ]


def test_sentences_of_the_pages_are_short() -> None:
    pages = {
        path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    }
    count = sum(len(sentences(page)) for page in pages.values())
    hits = [(path, hit) for path, page in pages.items() for hit in long_sentences(page)]
    assert count > 200
    if len(hits) >= SHARE_OF_LONG_SENTENCES * count:
        report(hits)


LONG = "word " * WORDS_OF_A_SENTENCE + "end."


@pytest.mark.parametrize(
    ("page", "line"),
    [
        (LONG, 1),
        (f"Short.\n\n{LONG}", 3),
        (f"One here. {LONG} Two.", 1),
        (f"- short\n- {LONG}", 2),
        (LONG.replace("word word", "word\nword"), 1),
        (f"> {LONG}", 1),
        (f"1. {LONG}", 1),
        ("`a b c` " + LONG[5:], 1),
    ],
)
def test_a_long_sentence_is_reported(page: str, line: int) -> None:
    assert [hit.line for hit in long_sentences(page)] == [line]


@pytest.mark.parametrize(
    "page",
    [
        LONG[5:],
        f"{LONG[50:]} {LONG[50:]}",
        f"```\n{LONG}\n```",
        f"| {LONG} |",
        f"# {LONG}",
        f"<!-- {LONG} -->",
        f"- {LONG[50:]}\n- {LONG[50:]}",
        f"{LONG[50:-1]}\n\n{LONG[50:]}",
        f"`{LONG[:-1]}`.",
        f"[{LONG[50:]}]({LONG})",
        f"- \u2014 & {LONG[5:]}",
    ],
)
def test_short_sentences_code_and_tables_are_not_reported(page: str) -> None:
    assert long_sentences(page) == []


# --- spelling ---------------------------------------------------------------------------------------


def british(text: str, allowed: str = "") -> list[Hit]:
    """Words in British spelling, but for those that begin with ``allowed``."""
    return [
        Hit(number, word[0])
        for number, line in enumerate(text.splitlines(), 1)
        for word in BRITISH.finditer(line)
        if not allowed or word[0].lower() != allowed
    ]


def test_spelling_is_american() -> None:
    pages = [ROOT / "README.md", *(p for kind in ("py", "md") for part in ("src", "docs") for p in rglob(part, kind))]
    assert len(pages) > 100
    report([(page, hit) for page in pages for hit in british(page.read_text(encoding="utf-8"), allowance(page))])


def rglob(folder: str, suffix: str) -> list[Path]:
    return sorted((ROOT / folder).rglob(f"*.{suffix}"))


def allowance(page: Path) -> str:
    name = page.relative_to(ROOT).as_posix()
    return next((word for pattern, word in ALLOWED.items() if fnmatch(name, pattern)), "")


@pytest.mark.parametrize(
    "word",
    ["Defence", "defences", "colours", "coloured", "_base_colour", "COLOURS", "centre", "centred", "grey", "Greys",
     "normalisation", "tokeniser", "Behaviour", "judgement", "a licence", "neighbours", "neighbouring", "optimiser",
     "optimised"],
)  # fmt: skip
def test_british_spelling_is_reported(word: str) -> None:
    assert [hit.line for hit in british(f"fine\nthe {word} of it")] == [2]


@pytest.mark.parametrize(
    "word",
    ["defense", "color", "center", "gray", "normalize", "tokenizer", "behavior", "judgment", "license", "neighbor",
     "optimizer", "optimistic", "epicentre"],
)  # fmt: skip
def test_american_spelling_is_not_reported(word: str) -> None:
    assert british(f"the {word} of it") == []


def test_only_the_allowed_word_is_allowed() -> None:
    assert british("which colour? a grey one", "colour") == [Hit(1, "grey")]
    assert allowance(ROOT / "src/untrigger/data/scene_text.py") == "colour"
    assert allowance(ROOT / "src/untrigger/data/scene_world.py") == ""


def report(hits: list[tuple[Path, Hit]]) -> None:
    """Fail with a line for each hit."""
    lines = [f"{path.relative_to(ROOT)}:{hit.line}: {hit.text}" for path, hit in hits]
    if lines:
        pytest.fail("\n".join([f"{len(lines)} to mend:", *lines]), pytrace=False)
