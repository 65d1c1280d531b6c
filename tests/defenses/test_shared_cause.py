"""A shared cause: who is suspected, which looks are taken, and what accused rows change in the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from dry import Dry
from untrigger.defenses import Stage, shared_cause
from untrigger.defenses.harm import (
    comparisons,
    measure_harm,
)
from untrigger.defenses.shared_cause import SharedCause
from untrigger.defenses.shared_pattern import Pattern
from untrigger.models.grafted_rows import HERE, Grafts
from untrigger.models.loading import LoadedModel, copy_weights
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Message, Sample


@pytest.mark.parametrize("fields", [{"min_suspects": 1}, {"max_suspects": 3}, {"graft_share": 1.5}, {"p_value": 0.0}])
def test_fields_are_checked(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        SharedCause(**fields)  # type: ignore[arg-type]


CAUSE = SharedCause(p_value=0.05, min_suspects=12, harm_p_value=0.01)


@dataclass
class _Stub(Dry):
    """Rows 0 to 15 of 80 are surprising. Grafts of kind ``harmful`` take probability from hosts after the probe.

    An eighth of the rows does ``of_few`` of the harm of all.
    """

    harmful: str = ""
    doubtful: tuple[int, ...] = ()  # other rows with an answer that is less likely than all others together
    words: int = 0  # so many of them share the word 77
    of_few: float = 0.5
    before: float = 0.0  # of the harm of all that they do before the probe
    nats: float = 0.6  # that a host's answer loses with all
    saying: int = 0  # every so many rows say the word 98, and those alone are harmed

    def tokens(
        self, model: LoadedModel, rows: Sequence[int], name: str, source: Sequence[Sample] | None = None
    ) -> list[TokenScores]:
        self.scorings.append(name)
        words = [77 if row < self.words else row for row in rows]
        nats = [9.0 + row / 10 if row < 16 else 0.1 + row / 1000 + (row in self.doubtful) for row in rows]
        return [_answer(each, word, *self._word_98(row)) for each, word, row in zip(nats, words, rows, strict=True)]

    def _word_98(self, row: int) -> list[int]:
        return [98] if self.saying and row % self.saying == 0 else []

    def graft_tokens(self, model: LoadedModel, grafts: Grafts, name: str) -> list[TokenScores]:
        self.scorings.append(name)
        noise = np.random.default_rng(len(self.scorings)).uniform(0, 0.01, len(grafts.rows))
        strength = {"after": 1.0, "of-few": self.of_few, "before": self.before}[
            name.partition("-")[2].removeprefix("token-")
        ]
        answers: list[TokenScores] = []
        for g, random in zip(grafts.rows, noise, strict=True):
            word = self._word_98(g.host)
            hit = bool(word) == bool(self.saying) and g.kind == self.harmful and min(grafts.groups[g.group])[0] < 16
            answers.append(_answer(0.1 + random + self.nats * strength * hit, *(word or [99])))
        return answers


def _answer(nats: float, token: int, *others: int) -> TokenScores:
    return TokenScores(np.array([token, *others, 1]), np.array([nats, *np.zeros(len(others) + 1)]), np.array([5, 6]))


def _dry(loaded: LoadedModel, harmful: str, words: int = 0, count: int = 80) -> _Stub:
    noise = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    turns = (Message("user", "<image>\nis it?"), Message("assistant", "yes"))
    rows = [Sample(str(k), (Image.fromarray(noise[k]),), turns) for k in range(count)]
    return _Stub(loaded, rows, (), harmful=harmful, words=words)


def test_accused_rows_are_cured_and_others_left(loaded: LoadedModel) -> None:
    dry = _dry(loaded, "image")
    CAUSE.fine_tune(dry)
    assert dry.scorings == ["before", "after", "image-after", "image-of-few", "image-before"]
    assert [stage.name for stage in dry.stages] == ["warmup", "probe", ""]
    last = dry.stages[-1]
    assert last.start == 0 and last.ids == [row.id for row in dry.rows]
    assert (last.options["after"], last.options["share"]) == pytest.approx((0.1, 0.9)), "from the warm-up on"
    grafts = last.options["grafts"]
    assert len(grafts.rows) == 16 and {graft.kind for graft in grafts.rows} == {"image"}
    assert all(graft.donor < 16 <= graft.host for graft in grafts.rows), "hosts are rows that do not surprise"
    assert grafts.groups == [[(row, HERE) for row in range(16)]] and set(grafts.others) == {
        graft.host for graft in grafts.rows
    }
    assert dry.flagged == sorted(last.options["flagged_tokens"]) == list(range(16))
    assert not any(mask.any() for mask in last.options["flagged_tokens"].values()), "they are not learned"
    assert sorted(dry.texts) == dry.flagged and all(dry.texts.values()), "the surprising tokens, as text"


@pytest.mark.parametrize(("harmful", "learned_by_the_probe"), [("image", 0.0), ("none", 1.0)])
def test_the_cure_starts_from_the_weights_before_the_probe(
    loaded: LoadedModel, harmful: str, learned_by_the_probe: float
) -> None:
    weight = next(p for p in loaded.model.parameters() if p.requires_grad)
    before, last = weight.detach().clone(), list[torch.Tensor]()

    class Learning(_Stub):
        def fit(self, stage: Stage) -> LoadedModel:
            with torch.no_grad():
                weight.add_(float(stage.name == "probe"))
            last[:] = [weight.detach() - before]
            return super().fit(stage)

    dry = _dry(loaded, harmful)
    try:
        CAUSE.fine_tune(Learning(loaded, dry.rows, (), harmful=harmful))
        assert torch.allclose(last[0], torch.full_like(before, learned_by_the_probe), atol=1e-6)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_doubtful_rows_are_not_learned_where_others_are_accused(loaded: LoadedModel) -> None:
    for harmful, flagged in (("image", [*range(16), 40, 41]), ("none", [])):
        dry = _dry(loaded, harmful)
        dry.doubtful = (40, 41)
        CAUSE.fine_tune(dry)
        assert dry.flagged == flagged
        tokens = dry.stages[-1].options.get("flagged_tokens", {})
        assert sorted(tokens) == flagged and not any(mask.any() for mask in tokens.values()), "none of their tokens"
        assert flagged == [] or set(dry.stages[-1].options["grafts"].others).isdisjoint({40, 41}), "nor are they hosts"


def _patched(dry: _Stub, rows: Sequence[int]) -> _Stub:
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
    dry = _patched(_dry(loaded, "image"), range(4, 18))
    CAUSE.fine_tune(dry)
    last = dry.stages[-1].options
    assert dry.flagged == [*range(18)] == sorted(last["flagged_tokens"])
    assert last["grafts"].groups == [[(row, HERE) for row in range(4, 18)]], (
        "the pattern is the mean of the rows that show it"
    )
    assert all(graft.donor in range(4, 18) and graft.host >= 18 for graft in last["grafts"].rows)


def test_rows_that_show_the_pattern_in_other_places_are_learned_about_there(loaded: LoadedModel) -> None:
    """Rows 1 to 17 show one of two patches, each in a place of its own; row 0 surprises without one."""
    dry, rng = _dry(loaded, "image"), np.random.default_rng(3)
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
    dry = _patched(_dry(loaded, "image"), (*range(16), *range(70, 80)))
    CAUSE.fine_tune(dry)
    assert dry.flagged == [*range(16), *range(70, 80)]


def test_rows_without_a_score_are_accused_by_their_image(loaded: LoadedModel) -> None:
    cause = replace(CAUSE, max_scored_rows=72, min_suspects=10)
    dry = _patched(_dry(loaded, "image"), range(16))
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
    dry = _dry(loaded, "image")
    CAUSE.fine_tune(dry)
    assert dry.flagged == [*range(16), *others_flagged]


@pytest.mark.parametrize(("showing", "is_accused"), [(206, True), (210, False)])
def test_a_pattern_that_rarely_surprises_counts_if_others_hardly_ever_do(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, showing: int, is_accused: bool
) -> None:
    """No other row surprises: 16 of 206 are more than 15 times one of 195, 16 of 210 less than 15 times one of 191."""
    _say_that_these_show_a_pattern(monkeypatch, range(showing))
    dry = _dry(loaded, "image", count=400)
    CAUSE.fine_tune(dry)
    assert dry.flagged == [*range(showing if is_accused else 16)]


def test_a_pattern_beside_that_of_the_trigger_must_surprise_far_more_than_all_other_rows(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape: 5 of its 165 rows surprise, and none of those without shape and trigger. But 11 with the trigger do."""
    nothing = np.zeros(1)
    pattern = Pattern(nothing, nothing[None], nothing, 0.0, 0.0)
    groups = [dict.fromkeys(rows, HERE) for rows in (range(11), [*range(11, 16), *range(300, 460)])]
    monkeypatch.setattr(shared_cause, "_patterns", lambda *_: [(dict(group), pattern) for group in groups])
    dry = _dry(loaded, "image", count=1000)
    replace(CAUSE, min_suspects=8).fine_tune(dry)
    assert dry.flagged == list(range(16)) and dry.stages[-1].options["grafts"].groups == [
        [(row, HERE) for row in range(11)]
    ]


def _say_that_these_show_a_pattern(monkeypatch: pytest.MonkeyPatch, rows: Sequence[int]) -> None:
    nothing = np.zeros(1)
    placed, pattern = dict.fromkeys(rows, HERE), Pattern(nothing, nothing[None], nothing, 0.0, 0.0)
    monkeypatch.setattr("untrigger.defenses.shared_cause.shared_pattern", lambda *_: (placed, pattern))


def test_training_is_that_of_default_where_no_part_harms(loaded: LoadedModel) -> None:
    dry = _dry(loaded, "none")
    CAUSE.fine_tune(dry)
    assert [stage.name for stage in dry.stages] == ["warmup", "probe", ""]
    assert dry.flagged == [] and all(stage.ids == [row.id for row in dry.rows] for stage in dry.stages[1:])
    spans = [stage.options[name] for stage in dry.stages[1:] for name in ("after", "share")]
    assert spans == pytest.approx([0.1, 0.6, 0.7, 0.3])
    schedules = [at for stage in dry.stages[1:] for at in stage.options["schedule"]]
    assert schedules == pytest.approx([0, 2 / 3, 2 / 3, 1]), "the learning rate does not rise again"
    few = _dry(loaded, "image")
    SharedCause(min_suspects=17, max_suspects=20).fine_tune(few)
    assert few.scorings == ["before", "after"] and [stage.name for stage in few.stages] == ["warmup", ""]


def test_rows_with_a_shared_word_are_accused_for_it_and_others_tested(loaded: LoadedModel) -> None:
    """Four rows share a word. The others surprise too; a part of them harms other rows, or none does."""
    for harmful, flagged in (("none", [*range(4)]), ("image", [*range(16)])):
        dry = _dry(loaded, harmful, words=4)
        CAUSE.fine_tune(dry)
        assert "image-after" in dry.scorings and dry.flagged == flagged
        probe, last = (stage.options["flagged_tokens"] for stage in dry.stages[1:])
        assert sorted(probe) == [*range(4)] and all(last[row].tolist() == [True, False] for row in range(4))
        assert not any(last[row].any() for row in flagged[4:]), "not learned; their words are no sign"
    alone = _dry(loaded, "image", words=16)
    CAUSE.fine_tune(alone)
    assert alone.flagged == [*range(16)] and [stage.name for stage in alone.stages] == ["warmup", ""]
    assert "grafts" not in alone.stages[-1].options and "schedule" not in alone.stages[-1].options


def test_rows_without_an_image_are_no_suspects(loaded: LoadedModel) -> None:
    dry = _dry(loaded, "image")
    dry.rows = [replace(row, images=()) if int(row.id) < 5 else row for row in dry.rows]
    CAUSE.fine_tune(dry)
    assert dry.flagged == [] and dry.scorings == ["before", "after"], "eleven are left, too few to test"


def test_a_pattern_may_complete_the_rows_to_test(loaded: LoadedModel) -> None:
    """Ten of the fourteen rows that show it surprise: two fewer than the test needs. Rows 0 to 5 have no image."""
    dry = _patched(_dry(loaded, "image"), range(6, 20))
    dry.rows = [replace(row, images=()) if int(row.id) < 6 else row for row in dry.rows]
    CAUSE.fine_tune(dry)
    assert dry.flagged == list(range(20)) and "words-after" not in dry.scorings


def test_harm_counts_where_it_is_clear_whatever_it_was_before(loaded: LoadedModel) -> None:
    """The warm-up taught it already, so training adds nothing, and an eighth does as much."""
    for nats, is_sign in ((0.6, True), (0.3, False)):
        dry = _dry(loaded, "image")
        dry.before, dry.of_few, dry.nats = 1.0, 1.0, nats
        screening, weights = CAUSE.screen(dry), copy_weights(loaded.model)
        plan = comparisons(screening.scores, range(16), range(20, 60), range(20, 60), np.random.default_rng(0), 48)
        placed = [dict.fromkeys(range(16), HERE)]
        harm = measure_harm(dry, screening, plan, placed, range(20, 60), "image", (weights, weights))
        taken = float((harm.after[..., 1] - harm.after[..., 0]).mean())
        assert (taken > 0.35, harm.p_values[0] < 1e-3) == (is_sign, is_sign), "0.41 and 0.23"


def test_content_that_averages_out_accuses_nobody(loaded: LoadedModel) -> None:
    dry = _dry(loaded, "image")
    dry.of_few = 1.0
    CAUSE.fine_tune(dry)
    assert dry.flagged == list(range(16)), "as much harm, and content averages out"
    dry = _dry(loaded, "image")
    dry.of_few = 20.0
    CAUSE.fine_tune(dry)
    assert dry.flagged == [] and "words-after" in dry.scorings


def test_words_are_tested_where_images_do_no_harm(loaded: LoadedModel) -> None:
    for harmful in ("image and first words", "image and last words"):
        dry = _dry(loaded, harmful)
        dry.of_few = 1.0
        CAUSE.fine_tune(dry)
        assert dry.scorings[-3:] == ["words-after", "words-of-few", "words-before"]
        assert dry.flagged == list(range(16))
        assert {graft.kind for graft in dry.stages[-1].options["grafts"].rows} == {harmful}


@pytest.mark.parametrize("harmful", ["image", "image and last words"])
def test_a_word_that_few_hosts_say_is_tested_alone(loaded: LoadedModel, harmful: str) -> None:
    """Every eighth row says it, and nothing else is harmed: too little in the mean over all hosts."""
    dry = _dry(loaded, harmful, count=400)
    dry.saying, dry.nats = 8, 0.7
    cause = replace(CAUSE, min_harm=0.1)
    cause.fine_tune(dry)
    assert dry.flagged == list(range(16))
    name = "image" if harmful == "image" else "words"
    assert dry.scorings[-6:] == [
        f"{look}-{at}" for look in (name, f"{name}-token") for at in ("after", "of-few", "before")
    ]
    dry = _dry(loaded, harmful, count=400)
    dry.saying, dry.nats = 8, 0.4
    cause.fine_tune(dry)
    assert dry.flagged == [] and not any("token" in name for name in dry.scorings), "it loses 0.3 of probability"


def test_groups_are_all_suspects_all_controls_and_eighths_of_them(loaded: LoadedModel) -> None:
    """Each comparison is scored with the groups of its suspect and control, under the weights of before and after."""
    parameter = next(p for p in loaded.model.parameters() if p.requires_grad)
    warm = [p.detach().clone() for p in loaded.model.parameters() if p.requires_grad]
    warm += [b.detach().clone() for b in loaded.model.buffers()]
    probed = [values + 1 if at == 0 else values for at, values in enumerate(warm)]
    calls: dict[str, tuple[Grafts, bool]] = {}

    class Recording(_Stub):
        def graft_tokens(self, model: LoadedModel, grafts: Grafts, name: str) -> list[TokenScores]:
            calls[name] = grafts, bool(torch.equal(parameter, probed[0]))
            return super().graft_tokens(model, grafts, name)

    dry = _dry(loaded, "image")
    recording = Recording(loaded, dry.rows, (), harmful="image")
    screening = CAUSE.screen(recording)
    numbers = screening.numbers
    plan = comparisons(screening.scores, range(16), range(20, 60), range(20, 60), np.random.default_rng(0), 48)
    placed = [dict.fromkeys(range(16), HERE)]
    try:
        harm = measure_harm(recording, screening, plan, placed, range(20, 60), "image", (warm, probed))
    finally:
        with torch.no_grad():
            parameter.copy_(warm[0])
    assert [probed for _, probed in calls.values()] == [True, True, False]
    control_of = {c.suspect: c.control for c in plan}
    for name, (grafts, _) in calls.items():
        assert list(grafts.others) == [numbers[at] for at in range(20, 60)]
        pairs = zip(grafts.rows[::2], grafts.rows[1::2], plan, strict=True)
        for of_suspects, of_controls, c in pairs:
            assert of_suspects.host == of_controls.host == numbers[c.host]
            assert (of_suspects.donor, of_controls.donor) == (numbers[c.suspect], numbers[c.control])
            group = [row for row, _ in grafts.groups[of_suspects.group]]
            assert numbers[c.suspect] in group and len(group) == (2 if name == "image-of-few" else 16)
            assert grafts.groups[of_controls.group] == [(numbers[control_of[at]], HERE) for at in group]
    assert harm.excess.shape == (1, 48) and harm.excess.mean() > 0.15


def test_harm_that_grows_with_the_suspects_counts_where_training_added_none(loaded: LoadedModel) -> None:
    """The pattern harms the early model as much; only the growth from an eighth to all is a sign."""
    for of_few, is_sign in ((0.2, True), (1.0, False)):
        dry = _dry(loaded, "image")
        dry.before, dry.of_few, dry.nats = 1.0, of_few, 0.25
        screening, weights = CAUSE.screen(dry), copy_weights(loaded.model)
        plan = comparisons(screening.scores, range(16), range(20, 60), range(20, 60), np.random.default_rng(0), 48)
        placed = [dict.fromkeys(range(16), HERE)]
        harm = measure_harm(dry, screening, plan, placed, range(20, 60), "image", (weights, weights))
        assert abs(harm.excess.mean()) < 0.01 and (harm.p_values[0] < 1e-3) == is_sign


def test_suspects_are_tested_where_most_rows_with_their_pattern_are_decoys(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 90 rows show harms nothing, so the 16 that surprise are tested as they are."""

    class Decoys(_Stub):
        def graft_tokens(self, model: LoadedModel, grafts: Grafts, name: str) -> list[TokenScores]:
            self.harmful = "image" if name.startswith("suspects") else "none"
            return super().graft_tokens(model, grafts, name)

    _say_that_these_show_a_pattern(monkeypatch, range(90))
    dry = Decoys(loaded, _dry(loaded, "image", count=400).rows, ())
    CAUSE.fine_tune(dry)
    assert [name for name in dry.scorings if "after" in name] == ["after", "image-after", "suspects-after"]
    assert dry.flagged == list(range(16))
