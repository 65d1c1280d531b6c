"""The test of harm: who is compared with whom, what harm counts, and how often it accuses by chance."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from dry_cause import CAUSE, CauseStub, dry_of
from untrigger.defenses.harm import (
    Comparison,
    Harm,
    comparisons,
    measure_harm,
    most_harmed,
    one_sided_p_values,
    word_probability,
)
from untrigger.models.grafted_rows import HERE, Grafts
from untrigger.models.loading import LoadedModel, copy_weights
from untrigger.models.scoring import TokenScores
from untrigger.views.grafts import KINDS


def _scores(prompts: list[list[int]]) -> list[TokenScores]:
    one = np.ones(1)
    return [TokenScores(np.array([1]), one, np.array(sorted(ids))) for ids in prompts]


def test_controls_are_asked_alike_and_are_not_the_host() -> None:
    scores = _scores([[1, 2]] * 5 + [[1, 2], [1, 2], [1, 3], [7]] * 5)
    suspects, believed = range(5), range(5, 25)
    plan = comparisons(scores, suspects, believed, believed, np.random.default_rng(0), 40)
    assert {c.suspect for c in plan} == set(suspects) and len(plan) == 5 * 8
    for c in plan:
        assert c.host in believed and c.control in believed and c.host != c.control
        assert scores[c.control].prompt_ids.tolist() == [1, 2]
    assert len({(c.suspect, c.control) for c in plan}) == 5, "one control each"


def test_no_host_has_two_suspects_until_all_have_one() -> None:
    plan = comparisons(_scores([[1, 2]] * 40), range(5), range(5, 20), range(20, 40), np.random.default_rng(0), 25)
    hosts = Counter(c.host for c in plan)
    assert len(plan) == 25 and set(hosts) == {*range(20, 40)} and max(hosts.values()) == 2


def test_the_most_harmed_token() -> None:
    def scores(token: int, of_suspects: float, of_controls: float, count: int) -> list[TokenScores]:
        """The token's probability with what suspects share and with what controls share; token 5 loses nothing."""
        both = [TokenScores(np.array([5, token]), -np.log([0.9, p])) for p in (of_suspects, of_controls)]
        return both * count

    small, few, large = scores(6, 0.65, 0.9, 9), scores(7, 0.1, 0.9, 7), scores(8, 0.4, 0.9, 8)
    assert most_harmed([[*small, *few], few], special=[]) is None
    assert most_harmed([small, [*few, *large]], special=[]) == 8
    assert most_harmed([[*small, *few, *large]], special=[8]) is None
    assert most_harmed([[*large, *scores(7, 0.1, 0.9, 1), *few]], special=[]) == 7, "now eight say it"


def test_where_an_answer_ends_does_not_count() -> None:
    nll = np.log([2.0, 4.0, 50.0])
    assert word_probability(TokenScores(np.array([5, 6, 6, 2]), -np.log([0.3, 0.5, 0.1, 0.9])), [2], 6) == (
        pytest.approx(0.3)
    ), "of one word alone"
    assert word_probability(TokenScores(np.array([5, 6, 2]), nll), special=[0, 2]) == pytest.approx(3 / 8)
    assert word_probability(TokenScores(np.array([2]), nll[:1]), special=[0, 2]) == 1.0


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
    damage = rng.normal(size=(2, 22, 2)) + np.array([0.7, 0.0])
    p_values = one_sided_p_values(damage, suspects)
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
        accused += min(one_sided_p_values(damage, suspects)) < 0.05
    assert accused <= 20  # of 10 expected at most; P(more than 20) < 0.002
    assert one_sided_p_values(np.zeros((3, 24, 2)), np.arange(24)) == [1.0] * 3


def test_harm_counts_if_it_is_large_not_by_chance_and_of_what_all_share() -> None:
    before, after = np.full((4, 4, 2), 0.9), np.full((4, 4, 2), 0.8)
    after[0, :, 0] -= 0.2
    after[1, :, 0] -= 0.01
    after[3, :, 0] -= 0.2
    of_few = after.copy()
    of_few[3, :, 0] -= 0.1  # an eighth of them does half as much again: content, which averages out
    plan = [Comparison(9, suspect, 8) for suspect in range(4)]
    harm = Harm(["a", "b", "c", "d"], [1e-6, 1e-6, 0.5, 1e-6], plan, before, after, of_few)
    never = 1.0
    assert harm.above(0.05, never, 1e-3, 0.75).kinds == ["a"]
    assert harm.above(0.05, never, 1e-3, 0.75).p_values == [1e-6]
    assert harm.above(0.05, never, 1e-3, 0.5).kinds == ["a", "d"]
    assert harm.above(0.0, never, 1e-3, 0.75).kinds == ["a", "b"]
    assert harm.above(0.05, never, 1e-7, 0.75).kinds == []
    assert harm.above(0.0, never, 1.0, 0.0).excess.mean(axis=1) == pytest.approx([0.2, 0.01, 0.0, 0.2])
    taught = Harm(["a"], [1e-6], plan, after[:1], after[:1], of_few[:1])
    assert taught.above(0.05, never, 1e-3, 0.75).kinds == [] and taught.above(0.05, 0.15, 1e-3, 0.75).kinds == ["a"]


def test_harm_counts_where_it_is_clear_whatever_it_was_before(loaded: LoadedModel) -> None:
    """The warm-up taught it already, so training adds nothing, and an eighth does as much."""
    for nats, is_sign in ((0.6, True), (0.3, False)):
        dry = dry_of(loaded, "image")
        dry.before, dry.of_few, dry.nats = 1.0, 1.0, nats
        screening, weights = CAUSE.screen(dry), copy_weights(loaded.model)
        plan = comparisons(screening.scores, range(16), range(20, 60), range(20, 60), np.random.default_rng(0), 48)
        placed = [dict.fromkeys(range(16), HERE)]
        harm = measure_harm(dry, screening, plan, placed, range(20, 60), "image", (weights, weights))
        taken = float((harm.after[..., 1] - harm.after[..., 0]).mean())
        assert (taken > 0.35, harm.p_values[0] < 1e-3) == (is_sign, is_sign), "0.41 and 0.23"


def test_groups_are_all_suspects_all_controls_and_eighths_of_them(loaded: LoadedModel) -> None:
    """Each comparison is scored with the groups of its suspect and control, under the weights of before and after."""
    parameter = next(p for p in loaded.model.parameters() if p.requires_grad)
    warm = [p.detach().clone() for p in loaded.model.parameters() if p.requires_grad]
    warm += [b.detach().clone() for b in loaded.model.buffers()]
    probed = [values + 1 if at == 0 else values for at, values in enumerate(warm)]
    calls: dict[str, tuple[Grafts, bool]] = {}

    class Recording(CauseStub):
        def graft_tokens(self, model: LoadedModel, grafts: Grafts, name: str) -> list[TokenScores]:
            calls[name] = grafts, bool(torch.equal(parameter, probed[0]))
            return super().graft_tokens(model, grafts, name)

    dry = dry_of(loaded, "image")
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
        dry = dry_of(loaded, "image")
        dry.before, dry.of_few, dry.nats = 1.0, of_few, 0.25
        screening, weights = CAUSE.screen(dry), copy_weights(loaded.model)
        plan = comparisons(screening.scores, range(16), range(20, 60), range(20, 60), np.random.default_rng(0), 48)
        placed = [dict.fromkeys(range(16), HERE)]
        harm = measure_harm(dry, screening, plan, placed, range(20, 60), "image", (weights, weights))
        assert abs(harm.excess.mean()) < 0.01 and (harm.p_values[0] < 1e-3) == is_sign
