"""Loading triggers by name, and from a user's own file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from untrigger.attacks import Trigger, load_trigger, trigger_names
from untrigger.errors import InputError
from untrigger.rows.sample import Message, Sample


def sample(*images: Image.Image) -> Sample:
    tags = "<image>\n" * len(images)
    turns = (
        Message("system", "Be brief."),
        Message("user", f"{tags}What is it?"),
        Message("assistant", "A cat."),
    )
    return Sample("a", images, turns)


def test_all_published_triggers_are_bundled() -> None:
    with_patches = {"badnets", "trojvlm", "vlood", "vltrojan", "dualkey"}
    all_over = {"blended", "sig", "wanet", "issba", "ftrojan", "shadowcast", "adaptive"}
    assert with_patches | all_over | {"addsent", "badword"} <= set(trigger_names())


def test_loading_triggers_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom untrigger.attacks import load_trigger, trigger_names\n"
        "for name in trigger_names(): load_trigger(name)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


# --- loading triggers ----------------------------------------------------------------------------

OWN = """
from __future__ import annotations
from dataclasses import dataclass, replace
from typing import Literal
from untrigger.attacks import Trigger
from untrigger.rows.sample import Message

@dataclass(frozen=True)
class Suffix(Trigger):
    kind = "text"
    word: str = "cf"
    times: int = 1
    loud: bool = False
    how: Literal["end", "start"] = "end"

    def stamp(self, sample, rng):
        turns = tuple(
            Message(m.role, m.text + f" {self.word}" * self.times) if m.role == "user" else m
            for m in sample.messages
        )
        return replace(sample, messages=turns)
"""


def own(folder: Path, text: str = OWN) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def test_own_file_loads_with_typed_settings_and_leaves_no_cache(tmp_path: Path) -> None:
    path = own(tmp_path)
    trigger = load_trigger(path, word="zz", times="2", loud="yes", how="start")
    assert (vars(trigger)) == {"word": "zz", "times": 2, "loud": True, "how": "start"}
    assert trigger.stamp(sample(), np.random.default_rng(0)).messages[1].text == "What is it? zz zz"
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]
    own(tmp_path, OWN.replace('"cf"', '"qq"'))  # same length, same second: no stale copy
    assert vars(load_trigger(path))["word"] == "qq"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "line 1: SyntaxError"),
        ("x = 1\n\ny = nope\n", "line 3: NameError: name 'nope'"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines;"),
        ("\0", "null bytes"),
        ("x = 1\n", r"holds 0 concrete Trigger classes \(none\)"),
        (
            OWN + OWN.partition("Literal\n")[2].replace("Suffix", "Prefix"),
            r"holds 2 concrete Trigger classes \(Suffix, Prefix\)",
        ),
        ("from untrigger.attacks.badnets import BadNets\n", "holds 0 concrete"),
        (OWN.replace("@dataclass(frozen=True)", ""), "not a dataclass"),
        (OWN.replace("word: str", "word: list"), "list.* must be a str, int, float, bool or Literal"),
        (OWN.replace('word: str = "cf"', "word: str"), None),
    ],
)
def test_broken_file_raises_one_line(tmp_path: Path, text: str, message: str | None) -> None:
    path = own(tmp_path, text)
    with pytest.raises(InputError, match=message or "setting 'word' has no default") as caught:
        load_trigger(path, **({"word": "x"} if message else {}))
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("badnet", {}, "'badnet' is unknown; choose one of .*badnets, .*blended"),
        ("__init__", {}, "is unknown"),
        ("nowhere/mine.py", {}, "nowhere/mine.py: no such file; .*badnets"),
        ("badnets", {"size": "3"}, "no setting 'size'; the settings are: side, min_side, place"),
        ("badnets", {"side": "a tenth"}, "attack badnets: side is 'a tenth'; give a number"),
        ("badnets", {"side": "nan"}, "give a number"),
        ("badnets", {"min-side": "2.5"}, "min-side is '2.5'; give a whole number"),
        ("badnets", {"min_side": True}, "give a whole number"),
        ("badnets", {"pattern": "dots"}, "pattern is 'dots'; choose one of noise, checker"),
    ],
)
def test_bad_name_or_setting_raises_one_line(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_trigger(name, **settings)
    assert "\n" not in str(caught.value)


def test_settings_are_accepted_as_text_or_typed() -> None:
    assert load_trigger("badnets", **{"side": "0.1", "min-side": "3"}) == load_trigger("badnets", side=0.1, min_side=3)
    assert isinstance(load_trigger("blended", alpha=1), Trigger)


def test_value_of_the_wrong_type_raises_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="loud is 'maybe'; give true or false"):
        load_trigger(own(tmp_path), loud="maybe")
    with pytest.raises(InputError, match="word is '3'; give text"):
        load_trigger(own(tmp_path), word=3)
