"""The test of a shared cause: who is suspected, who is compared with whom, and how often it accuses by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import rankdata

from dry import Dry
from untrigger.defenses import Stage
from untrigger.defenses.harm import Comparison, Harm, comparisons, harm_p_values, most_harmful
from untrigger.defenses.shared_cause import SharedCause
from untrigger.models.grafted_rows import Graft
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Message, Sample
from untrigger.views.grafts import KINDS, SHARED


def _scores(prompts: list[list[int]]) -> list[TokenScores]:
    one = np.ones(1)
    return [TokenScores(np.array([1]), one, np.array(sorted(ids))) for ids in prompts]


def test_controls_are_asked_alike_and_are_not_the_host() -> None:
    scores = _scores([[1, 2]] * 5 + [[1, 2], [1, 2], [1, 3], [7]] * 5)
    suspects, believed = range(5), range(5, 25)
    plan = comparisons(scores, suspects, believed, np.random.default_rng(0), 40)
    assert {c.suspect for c in plan} == set(suspects) and len(plan) == 5 * 8
    for c in plan:
        assert c.host in believed and c.control in believed and c.host != c.control
        assert scores[c.control].prompt_ids.tolist() == [1, 2]


def _naive_p(differences: list[float]) -> float:
    """One-sided Wilcoxon signed-rank test by all sign patterns."""
    values = np.array([value for value in differences if value])
    ranks = rankdata(np.abs(values))
    observed = ranks[values > 0].sum()
    signs = (np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1
    return float((signs @ ranks >= observed - 1e-9).mean())


def test_p_values_equal_those_of_all_sign_patterns() -> None:
    rng = np.random.default_rng(3)
    suspects = np.repeat(np.arange(11), 2)
    damage = rng.normal(size=(len(KINDS), 22, 2)) + np.array([0.7, 0.0])
    p_values = harm_p_values(damage, suspects)
    for p, values in zip(p_values, damage[..., 0] - damage[..., 1], strict=True):
        means = values.reshape(11, 2).mean(axis=1)
        assert p == pytest.approx(min(1.0, len(KINDS) * _naive_p(means.tolist())), rel=1e-6)


def test_chance_accuses_no_more_often_than_it_says() -> None:
    rng = np.random.default_rng(4)
    suspects = np.repeat(np.arange(24), 5)
    accused = 0
    for _ in range(200):
        host = rng.exponential(3, (len(KINDS), len(suspects), 1))  # heavy tails, shared by suspect and control
        damage = host + rng.standard_t(2, (len(KINDS), len(suspects), 2))
        accused += min(harm_p_values(damage, suspects)) < 0.05
    assert accused <= 20  # of 10 expected at most; P(more than 20) < 0.002
    assert harm_p_values(np.zeros((3, 24, 2)), np.arange(24)) == [1.0] * 3


@pytest.mark.parametrize("fields", [{"min_suspects": 1}, {"max_suspects": 3}, {"graft_share": 1.5}, {"p_value": 0.0}])
def test_fields_are_checked(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        SharedCause(**fields)  # type: ignore[arg-type]


CAUSE = SharedCause(p_value=0.05, min_suspects=12, harm_p_value=0.01)


@dataclass
class _Stub(Dry):
    """Rows 0 to 15 of 80 are surprising. Parts of kind ``harmful`` take probability from hosts after the probe."""

    harmful: str = ""
    doubtful: tuple[int, ...] = ()  # other rows with an answer that is less likely than all others together
    words: int = 0  # so many of them share the word 77

    def tokens(
        self, model: LoadedModel, rows: Sequence[int], name: str, source: Sequence[Sample] | None = None
    ) -> list[TokenScores]:
        self.scorings.append(name)
        words = [77 if row < self.words else row for row in rows]
        nats = [9.0 + row / 10 if row < 16 else 0.1 + row / 1000 + (row in self.doubtful) for row in rows]
        return list(map(_answer, nats, words))

    def graft_tokens(self, model: LoadedModel, grafts: Sequence[Graft], name: str) -> list[TokenScores]:
        self.scorings.append(name)
        noise = np.random.default_rng(len(self.scorings)).uniform(0, 0.01, len(grafts))
        is_after = name in ("pilot", "grafts-after")
        hits = [is_after and graft.kind == self.harmful and graft.donor < 16 for graft in grafts]
        return [_answer(0.1 + random + 3 * hit, 99) for random, hit in zip(noise, hits, strict=True)]


def _answer(nats: float, token: int) -> TokenScores:
    return TokenScores(np.array([token, 1]), np.array([nats, 0.0]), np.array([5, 6]))


def _dry(loaded: LoadedModel, harmful: str, words: int = 0) -> _Stub:
    noise = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    turns = (Message("user", "<image>\nis it?"), Message("assistant", "yes"))
    rows = [Sample(str(k), (Image.fromarray(noise[k]),), turns) for k in range(80)]
    return _Stub(loaded, rows, (), harmful=harmful, words=words)


def test_accused_rows_are_cured_and_others_left(loaded: LoadedModel) -> None:
    dry = _dry(loaded, "window 0.5 0.25")
    CAUSE.fine_tune(dry)
    assert dry.scorings == ["before", "after", "pilot", "grafts-after", "grafts-before"]
    assert [stage.name for stage in dry.stages] == ["warmup", "probe", ""]
    last = dry.stages[-1]
    assert last.start == 0 and last.ids == [row.id for row in dry.rows]
    assert (last.options["after"], last.options["share"]) == pytest.approx((0.1, 0.9)), "from the warm-up on"
    grafts = last.options["grafts"]
    assert len(grafts) == 16 and [graft.kind for graft in grafts] == ["window 0.5 0.25", SHARED, SHARED, SHARED] * 4
    assert all(graft.donor < 16 <= graft.host for graft in grafts), "hosts are rows that do not surprise"
    assert dry.flagged == sorted(last.options["flagged_tokens"]) == list(range(16))
    assert not any(mask.any() for mask in last.options["flagged_tokens"].values()), "they are not learned"
    assert sorted(dry.texts) == dry.flagged and all(dry.texts.values()), "the surprising tokens, as text"


@pytest.mark.parametrize(("harmful", "learned_by_the_probe"), [("blend", 0.0), ("none", 1.0)])
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
    for harmful, flagged in (("blend", [*range(16), 40, 41]), ("none", [])):
        dry = _dry(loaded, harmful)
        dry.doubtful = (40, 41)
        CAUSE.fine_tune(dry)
        assert dry.flagged == flagged
        tokens = dry.stages[-1].options.get("flagged_tokens", {})
        assert sorted(tokens) == flagged and not any(mask.any() for mask in tokens.values()), "none of their tokens"
        hosts = {graft.host for graft in dry.stages[-1].options.get("grafts", [])}
        assert hosts.isdisjoint({40, 41}), "and they are not believed"


def test_training_is_that_of_default_where_no_part_harms(loaded: LoadedModel) -> None:
    dry = _dry(loaded, "none")
    CAUSE.fine_tune(dry)
    assert [stage.name for stage in dry.stages] == ["warmup", "probe", ""]
    assert dry.flagged == [] and all(stage.ids == [row.id for row in dry.rows] for stage in dry.stages[1:])
    spans = [stage.options[name] for stage in dry.stages[1:] for name in ("after", "share")]
    assert spans == pytest.approx([0.1, 0.6, 0.7, 0.3])
    schedules = [at for stage in dry.stages[1:] for at in stage.options["schedule"]]
    assert schedules == pytest.approx([0, 2 / 3, 2 / 3, 1]), "the learning rate does not rise again"
    few = _dry(loaded, "window 0.5 0.25")
    SharedCause(min_suspects=17, max_suspects=20).fine_tune(few)
    assert few.scorings == ["before", "after"] and [stage.name for stage in few.stages] == ["warmup", ""]


def test_rows_with_a_shared_word_are_accused_for_it_and_others_tested(loaded: LoadedModel) -> None:
    """Four rows share a word. The others surprise too; a part of them harms other rows, or none does."""
    for harmful, flagged in (("none", [*range(4)]), ("blend", [*range(16)])):
        dry = _dry(loaded, harmful, words=4)
        CAUSE.fine_tune(dry)
        assert "grafts-after" in dry.scorings and dry.flagged == flagged
        probe, last = (stage.options["flagged_tokens"] for stage in dry.stages[1:])
        assert sorted(probe) == [*range(4)] and all(last[row].tolist() == [True, False] for row in range(4))
        assert not any(last[row].any() for row in flagged[4:]), "not learned; their words are no sign"
    alone = _dry(loaded, "blend", words=16)
    CAUSE.fine_tune(alone)
    assert alone.flagged == [*range(16)] and [stage.name for stage in alone.stages] == ["warmup", ""]
    assert "grafts" not in alone.stages[-1].options and "schedule" not in alone.stages[-1].options


def test_rows_without_an_image_are_no_suspects(loaded: LoadedModel) -> None:
    dry = _dry(loaded, "blend")
    dry.rows = [replace(row, images=()) if int(row.id) < 5 else row for row in dry.rows]
    CAUSE.fine_tune(dry)
    assert dry.flagged == [] and dry.scorings == ["before", "after"], "eleven are left, too few to test"


def test_harm_counts_if_it_is_large_and_not_by_chance() -> None:
    before, after = np.full((3, 4, 2), 0.9), np.full((3, 4, 2), 0.8)
    after[0, :, 0] -= 0.2
    after[1, :, 0] -= 0.01
    plan = [Comparison(9, suspect, 8) for suspect in range(4)]
    harm = Harm(["blend", "head", "tail"], [1e-6, 1e-6, 0.5], plan, before, after)
    assert harm.above(0.05, 1e-3).kinds == ["blend"] and harm.above(0.05, 1e-3).p_values == [1e-6]
    assert harm.above(0.0, 1e-3).kinds == ["blend", "head"] and harm.above(0.05, 1e-7).kinds == []
    assert harm.above(0.0, 1.0).excess.mean(axis=1) == pytest.approx([0.2, 0.01, 0.0])


def test_the_pilot_chooses_the_kinds_of_the_largest_mean_difference() -> None:
    probabilities = np.ones((len(KINDS), 4, 2))
    for kind, (suspects, controls) in {5: (0.5, 0.1), 2: (0.9, 0.0), 9: (0.3, 0.0), 1: (0.9, 0.8)}.items():
        probabilities[kind] = 1 - suspects, 1 - controls
    assert most_harmful(probabilities) == [list(KINDS)[at] for at in (2, 5, 9)]


def test_what_the_accused_share_replaces_most_parts_of_an_image_alone(loaded: LoadedModel) -> None:
    for harmful, learned in (
        ("blend", ["blend", SHARED, SHARED, SHARED] * 4),
        ("tail", ["tail"] * 16),
        ("checkerboard 1, head", ["checkerboard 1, head"] * 16),
    ):
        dry = _dry(loaded, harmful)
        CAUSE.fine_tune(dry)
        assert dry.flagged == list(range(16))
        assert [graft.kind for graft in dry.stages[-1].options["grafts"]] == learned
