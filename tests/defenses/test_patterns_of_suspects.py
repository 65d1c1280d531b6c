"""A shared cause: rows that show what suspects' images share take their place, if these surprise often enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dry_cause import CAUSE, CauseStub, dry_of
from untrigger.defenses import shared_cause
from untrigger.defenses.shared_pattern import Pattern
from untrigger.models.grafted_rows import HERE, Grafts
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores

ANY = Pattern(np.zeros(1), np.zeros((1, 1)), np.zeros(1), 0.0, 0.0)  # where it is does not matter


def _patched(dry: CauseStub, rows: Sequence[int]) -> CauseStub:
    """The same with a checkerboard on the images of these rows."""
    board = Image.fromarray((np.indices((8, 4)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
    changed = list(dry.rows)
    for row in rows:
        image = changed[row].images[0].copy()
        image.paste(board)
        changed[row] = replace(changed[row], images=(image,))
    dry.rows = changed
    return dry


def test_rows_that_show_the_pattern_of_suspects_are_accused_and_others_not_learned(loaded: LoadedModel) -> None:
    """Rows 4 to 17 show it, twelve of which surprise; rows 0 to 3 surprise without it."""
    dry = _patched(dry_of(loaded, "image"), range(4, 18))
    CAUSE.fine_tune(dry)
    last = dry.stages[-1].options
    assert dry.flagged == [*range(18)] == sorted(last["flagged_tokens"])
    assert last["grafts"].groups == [[(row, HERE) for row in range(4, 18)]], (
        "the pattern is the mean of the rows that show it"
    )
    assert all(graft.donor in range(4, 18) and graft.host >= 18 for graft in last["grafts"].rows)


def test_rows_that_show_the_pattern_in_other_places_are_learned_about_there(loaded: LoadedModel) -> None:
    """Rows 1 to 17 show one of two patches, each in a place of its own; row 0 surprises without one."""
    dry, rng = dry_of(loaded, "image"), np.random.default_rng(3)
    patches, places = rng.integers(0, 256, (2, 12, 12, 3)), rng.integers(0, 52, (18, 2))
    levels = rng.normal(128, 12, (80, 64, 64, 3))
    for row in range(1, 18):
        down, right = places[row]
        levels[row, down : down + 12, right : right + 12] = patches[int(row >= 9)]
    images = levels.clip(0, 255).astype(np.uint8)
    dry.rows = [replace(row, images=(Image.fromarray(images[at]),)) for at, row in enumerate(dry.rows)]
    replace(CAUSE, min_suspects=6).fine_tune(dry)
    last = dry.stages[-1].options
    assert dry.flagged == [*range(18)] == sorted(last["flagged_tokens"])
    groups = sorted([[row for row, _ in group] for group in last["grafts"].groups])
    assert groups == [[*range(1, 9)], [*range(9, 18)]]
    place_of = {row: place for group in last["grafts"].groups for row, place in group}
    for first, row in ((1, 7), (10, 15)):
        steps = [(place_of[row][axis] - place_of[first][axis]) * 64 % 64 for axis in (0, 1)]
        assert steps == ((places[row] - places[first]) % 64).tolist()
    assert all(graft.place == place_of[graft.donor] for graft in last["grafts"].rows)


def test_rows_whose_images_are_not_held_are_accused_by_them(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many scored rows the patterns are sought among believed rows, suspects and some others."""
    monkeypatch.setattr(shared_cause, "COMPARISONS", 20)  # 40 believed rows
    monkeypatch.setattr(shared_cause, "_HELD", 40 + 16)
    dry = _patched(dry_of(loaded, "image"), (*range(16), *range(70, 80)))
    CAUSE.fine_tune(dry)
    assert dry.flagged == [*range(16), *range(70, 80)]


def test_rows_without_a_score_are_accused_by_their_image(loaded: LoadedModel) -> None:
    cause = replace(CAUSE, max_scored_rows=72, min_suspects=10)
    dry = _patched(dry_of(loaded, "image"), range(16))
    cause.fine_tune(dry)
    masks = dry.stages[-1].options["flagged_tokens"]
    unscored = set(range(80)).difference(cause.screen(dry).numbers)
    assert len(unscored) == 8 and unscored & set(range(16)), "some of the rows that show it have no score"
    assert dry.flagged == [*range(16)] == sorted(dry.texts)
    assert all(len(masks[row]) and not masks[row].any() for row in dry.flagged), "no token of theirs is learned"
    assert min(dry.scores[row] for row in dry.flagged) > max(dry.scores[row] for row in range(16, 80))


@pytest.mark.parametrize(("surprising", "others_flagged"), [(10, []), (13, [*range(30, 65)])])
def test_a_pattern_of_rows_that_surprise_no_more_often_than_others_accuses_none_of_them(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, surprising: int, others_flagged: list[int]
) -> None:
    """A watermark lies on 35 other rows. Of the rows without it nearly as many surprise as ten of 45; thirteen are more
    than twice as many.
    """
    _say_that_these_show_a_pattern(monkeypatch, [*range(surprising), *range(30, 65)])
    dry = dry_of(loaded, "image")
    CAUSE.fine_tune(dry)
    assert dry.flagged == [*range(16), *others_flagged]


@pytest.mark.parametrize(("showing", "is_accused"), [(206, True), (210, False)])
def test_a_pattern_that_rarely_surprises_counts_if_others_hardly_ever_do(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, showing: int, is_accused: bool
) -> None:
    """No other row surprises: 16 of 206 are more than 15 times one of 195, 16 of 210 less than 15 times one of 191."""
    _say_that_these_show_a_pattern(monkeypatch, range(showing))
    dry = dry_of(loaded, "image", count=400)
    CAUSE.fine_tune(dry)
    assert dry.flagged == [*range(showing if is_accused else 16)]


def test_a_pattern_beside_that_of_the_trigger_must_surprise_far_more_than_all_other_rows(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape: 5 of its 165 rows surprise, and none of those without shape and trigger. But 11 with the trigger do."""
    groups = [dict.fromkeys(rows, HERE) for rows in (range(11), [*range(11, 16), *range(300, 460)])]
    monkeypatch.setattr(shared_cause, "_patterns", lambda *_: [(dict(group), ANY) for group in groups])
    dry = dry_of(loaded, "image", count=1000)
    replace(CAUSE, min_suspects=8).fine_tune(dry)
    assert dry.flagged == list(range(16)) and dry.stages[-1].options["grafts"].groups == [
        [(row, HERE) for row in range(11)]
    ]


def _say_that_these_show_a_pattern(monkeypatch: pytest.MonkeyPatch, rows: Sequence[int]) -> None:
    placed = dict.fromkeys(rows, HERE)
    monkeypatch.setattr(shared_cause, "shared_pattern", lambda *_: (placed, ANY))


def test_a_pattern_may_complete_the_rows_to_test(loaded: LoadedModel) -> None:
    """Ten of the fourteen rows that show it surprise: two fewer than the test needs. Rows 0 to 5 have no image."""
    dry = _patched(dry_of(loaded, "image"), range(6, 20))
    dry.rows = [replace(row, images=()) if int(row.id) < 6 else row for row in dry.rows]
    CAUSE.fine_tune(dry)
    assert dry.flagged == list(range(20)) and "words-after" not in dry.scorings


def test_suspects_are_tested_where_most_rows_with_their_pattern_are_decoys(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 90 rows show harms nothing, so the 16 that surprise are tested as they are."""

    class Decoys(CauseStub):
        def graft_tokens(self, model: LoadedModel, grafts: Grafts, name: str) -> list[TokenScores]:
            self.harmful = "image" if name.startswith("suspects") else "none"
            return super().graft_tokens(model, grafts, name)

    _say_that_these_show_a_pattern(monkeypatch, range(90))
    dry = Decoys(loaded, dry_of(loaded, "image", count=400).rows, ())
    CAUSE.fine_tune(dry)
    assert [name for name in dry.scorings if "after" in name] == ["after", "image-after", "suspects-after"]
    assert dry.flagged == list(range(16))
