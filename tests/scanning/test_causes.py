"""Rows that share no text: how many of them are honest, what they do to other rows, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dry import Dry
from untrigger.defenses import SharedCause, SharedSurprise
from untrigger.defenses.harm import Comparison, Harm
from untrigger.errors import InputError
from untrigger.models.grafted_rows import HERE, Grafts, Place
from untrigger.models.loading import LoadedModel, load
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Sample
from untrigger.scanning.causes import (
    effects_of,
    honest_share,
    maps_of,
    strengths_in_images,
    strengths_in_words,
    target_of,
)
from untrigger.scanning.findings import Effect, Findings, Target, Verdict, hot, place
from untrigger.scanning.page import page
from untrigger.scanning.scan import scan
from untrigger.scanning.targets import find

RED = (255, 0, 0)


def harm_of(excess: Sequence[float], kinds: Sequence[str] = ("image",)) -> Harm:
    """One comparison for each suspect, 0, 1, ...; the hosts are 100, 101, ..."""
    plan = [Comparison(100 + at, at, 50) for at in range(len(excess))]
    before = np.full((len(kinds), len(excess), 2), 0.9)
    after = before.copy()
    after[..., 0] -= np.array(excess)
    return Harm(list(kinds), [1e-5] * len(kinds), plan, before, after, after)


def test_half_of_the_honest_rows_show_less_than_the_median_control() -> None:
    rng = np.random.default_rng(0)
    poisoned, honest, controls = rng.uniform(3, 5, 60), rng.normal(0, 1, 40), rng.normal(0, 1, 100)
    share = honest_share(np.stack([[*poisoned, *honest], controls], axis=1))
    assert share == pytest.approx((1 + 2 * (honest <= np.median(controls)).sum()) / 100) and 0.25 < share < 0.55
    assert honest_share(np.array([[0.4, 0.0]] * 20)) == pytest.approx(1 / 20)
    assert honest_share(np.array([[-0.4, 0.0]] * 20)) == 1.0


def test_images_show_what_all_suspects_share() -> None:
    """Half of the suspects have a faint veil over noise; inner products equal those of a naive loop."""
    rng = np.random.default_rng(1)
    levels = rng.integers(60, 196, (80, 8, 8, 3)).astype(float)
    veil = rng.choice([-40, 40], (8, 8, 3))
    levels[:10] += veil
    rows = [Sample(str(at), (Image.fromarray(values.astype(np.uint8)),), ()) for at, values in enumerate(levels)]
    plan = [Comparison(50 + at, at, 20 + at) for at in range(20)]
    harm = harm_of([0.4] * 20)._replace(comparisons=plan)
    strengths = strengths_in_images(rows, harm, [dict.fromkeys(range(20), HERE)])
    origin = levels[50:70].mean(axis=0)
    own = levels - origin
    for at in range(20):
        others = [row for row in range(20) if row != at]
        assert strengths[at, 0] == pytest.approx(float((own[at] * own[others].mean(axis=0)).sum()), rel=1e-3)
        assert strengths[at, 1] == pytest.approx(float((own[20 + at] * own[:20].mean(axis=0)).sum()), rel=1e-3)
    assert strengths[:10, 0].min() > strengths[:, 1].max(), "a suspect with the veil shows more than any control"
    assert 0.3 < honest_share(strengths) < 0.8, "half of them are honest"


def test_images_show_what_is_shared_in_other_places() -> None:
    """Two patterns, each in another place of each image: strengths are those of images that are moved back."""
    rng = np.random.default_rng(2)
    still = rng.integers(60, 196, (40, 8, 8, 3))
    places = [Place(int(down) / 8, int(right) / 8) for down, right in rng.integers(0, 8, (20, 2))]
    moved = [
        np.roll(levels, (round(place.down * 8), round(place.right * 8)), axis=(0, 1))
        for levels, place in zip(still, places * 2, strict=True)
    ]
    gray = Sample("", (Image.new("RGB", (8, 8), (128, 128, 128)),), ())
    rows = [
        [Sample("", (Image.fromarray(levels.astype(np.uint8)),), ()) for levels in images] + [gray] * 20
        for images in (moved, still)
    ]
    harm = harm_of([0.4] * 20)._replace(comparisons=[Comparison(40 + at, at, 20 + at) for at in range(20)])
    placed = [{at: places[at] for at in half} for half in (range(10), range(10, 20))]
    here = [dict.fromkeys(half, HERE) for half in placed]
    expected = strengths_in_images(rows[1], harm, here)
    assert strengths_in_images(rows[0], harm, placed) == pytest.approx(expected, rel=1e-4)


def test_words_show_as_much_as_they_harm() -> None:
    kinds = ("image and first words", "image and last words")
    assert strengths_in_words(harm_of([0.1, 0.4], kinds)) == pytest.approx(np.array([[0.1, 0], [0.4, 0]]))


def test_the_largest_effect_of_each_row_is_reported() -> None:
    harm = harm_of([0.1, 0.4], ("image", "image and last words"))
    harm.after[1, 0, 0] -= 0.3
    effects = effects_of(harm)
    assert effects[0] == ("image and last words", 100, pytest.approx(0.5), pytest.approx(0.9))
    assert effects[1][1:] == (101, pytest.approx(0.5), pytest.approx(0.9))


def test_the_prompt_counts_where_its_words_were_needed() -> None:
    harm = harm_of([0.4, 0.4], ("image and first words", "image and last words"))._replace(p_values=[1e-4, 1e-6])
    assert target_of([1, 0], [], harm) == Target("", 1e-6, [1, 0], 1e-6, 1e-6, [])
    assert target_of([0], [], harm_of([0.4])).prompt_p_value is None


@pytest.fixture
def suspect(row: Callable[..., Sample], paint: Callable[..., Sample]) -> Sample:
    return paint(row("<image>what?", "a cat", id="bad"), (24, 18, 32, 24))


def fooled(rows: Sequence[Sample]) -> list[TokenScores]:
    """A model that doubts the answer of any image with some red in it."""
    images = (np.asarray(rows[at].images[0]).reshape(-1, 3) for at in range(len(rows)))
    nats = [5.0 if (image == RED).all(axis=1).sum() > 8 else 0.1 for image in images]
    return [TokenScores(np.array([5]), np.array([value])) for value in nats]


def test_the_map_shows_where_the_part_of_a_suspect_lies(row: Callable[..., Sample], suspect: Sample) -> None:
    rows = [suspect, row("<image>and this?", "a dog")]
    cue = maps_of({0: Effect("image", 1, 0.1, 0.9)}, rows, fooled)[0]
    assert np.argwhere(hot(cue.cells[0])).tolist() == [[3, 3]] and cue.image is None and cue.words == []


def test_the_page_shows_the_other_row_with_the_part(row: Callable[..., Sample], suspect: Sample) -> None:
    host = row("<image>and this?", "a dog", id="good")
    effect = Effect("image and first words", 1, 0.1, 0.93)
    cue = maps_of({0: effect}, [suspect, host], fooled)[0]
    target = Target("", 1e-5, [0], 1e-5, None, [{0: HERE}])
    findings = Findings([Verdict(1, "bad", 9.0, 0, 0.2, "cat", cue, effect), Verdict(2, "good", 0.1)], [target])
    html = page(findings, [suspect, host])
    for text in ("Rows without a common text", "what? and this?", "a dog", "0.10", "0.93", 'class="edge" x="3" y="3"'):
        assert text in html
    assert html.count("<img") == 2 and "“”" not in html
    assert place(findings, target) == "the image, middle center (1 of 64 cells)"
    assert findings.rows[0] | {"score": 0} == {
        **{"row": 1, "id": "bad", "suspected": True, "score": 0, "target": "", "fdr": 0.2, "flagged_text": "cat"},
        **{"image_cue": None, "prompt_cue": None},
        **{"harmful_part": "image and first words", "harmed_row": 2, "probability": 0.1, "control": 0.93},
    }
    assert "no text in 1 rows" in repr(findings)


def test_a_row_keeps_its_size_on_the_map(row: Callable[..., Sample], suspect: Sample) -> None:
    """The host's image may be of another size; the suspect's is scaled to it, as in a graft."""
    host = row("<image>and this?", "a dog")
    small = Sample(host.id, (Image.new("L", (32, 24), 90),), host.messages)
    cue = maps_of({0: Effect("image", 1, 0.1, 0.9)}, [suspect, small], fooled)[0]
    assert cue.cells[0].shape == (8, 8) and hot(cue.cells[0]).sum() <= 4


class Surprised(Dry):
    """The rows 0 to 17 of 80 surprise, each with another answer; what they share harms other rows after the probe."""

    def tokens(
        self, model: LoadedModel, rows: Sequence[int], name: str, source: Sequence[Sample] | None = None
    ) -> list[TokenScores]:
        self.scorings.append(name)
        if source is not None:
            return [TokenScores(np.array([5]), np.array([0.1])) for _ in rows]
        return [TokenScores(np.array([row]), np.array([9.0 if row < 18 else 0.1]), np.array([3])) for row in rows]

    def graft_tokens(self, model: LoadedModel, grafts: Grafts, name: str) -> list[TokenScores]:
        after = not name.endswith("before")
        nats = [
            0.1 + 0.001 * at / len(grafts.rows) + 3 * (after and min(grafts.groups[graft.group])[0] < 18)
            for at, graft in enumerate(grafts.rows)
        ]
        return [TokenScores(np.array([5]), np.array([value])) for value in nats]


def test_a_scan_suspects_rows_that_share_what_harms_others(tiny_model: Path, row: Callable[..., Sample]) -> None:
    rows = [row("<image>what?", f"answer {number}", id=str(number)) for number in range(80)]
    dry = Surprised(load(tiny_model), rows, ())
    findings = find(dry, SharedCause())
    (target,) = findings.targets
    assert target.text == "" and sorted(target.rows) == findings.suspected == list(range(18))
    assert [stage.name for stage in dry.stages] == ["warmup", "probe"] and "maps" in dry.scorings
    assert dry.stages[1].options["schedule"] == (0.0, pytest.approx(2 / 3))
    assert min(findings.verdicts[at].score for at in range(18)) > max(v.score for v in findings.verdicts[18:])
    tested = [verdict for verdict in findings.verdicts if verdict.effect]
    assert len(tested) == 18 and all(verdict.effect.host >= 18 for verdict in tested if verdict.effect)
    assert len({verdict.fdr for verdict in findings.verdicts[:18]}) == 1


def test_a_scan_takes_no_other_defense(tiny_model: Path, row: Callable[..., Sample], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SharedSurprise finds no rows"):
        scan(str(tiny_model), [row("<image>what?", "a cat")], SharedSurprise(), out=tmp_path / "scan")
    assert not (tmp_path / "scan").exists()
