"""A shared cause: who is suspected, which looks are taken, and what accused rows change in the training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dry_cause import CAUSE, CauseStub, dry_of
from untrigger.defenses import Stage
from untrigger.defenses.shared_cause import SharedCause
from untrigger.models.grafted_rows import HERE
from untrigger.models.loading import LoadedModel


@pytest.mark.parametrize("fields", [{"min_suspects": 1}, {"max_suspects": 3}, {"graft_share": 1.5}, {"p_value": 0.0}])
def test_fields_are_checked(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        SharedCause(**fields)  # type: ignore[arg-type]


def test_accused_rows_are_cured_and_others_left(loaded: LoadedModel) -> None:
    dry = dry_of(loaded, "image")
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

    class Learning(CauseStub):
        def fit(self, stage: Stage) -> LoadedModel:
            with torch.no_grad():
                weight.add_(float(stage.name == "probe"))
            last[:] = [weight.detach() - before]
            return super().fit(stage)

    dry = dry_of(loaded, harmful)
    try:
        CAUSE.fine_tune(Learning(loaded, dry.rows, (), harmful=harmful))
        assert torch.allclose(last[0], torch.full_like(before, learned_by_the_probe), atol=1e-6)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_doubtful_rows_are_not_learned_where_others_are_accused(loaded: LoadedModel) -> None:
    for harmful, flagged in (("image", [*range(16), 40, 41]), ("none", [])):
        dry = dry_of(loaded, harmful)
        dry.doubtful = (40, 41)
        CAUSE.fine_tune(dry)
        assert dry.flagged == flagged
        tokens = dry.stages[-1].options.get("flagged_tokens", {})
        assert sorted(tokens) == flagged and not any(mask.any() for mask in tokens.values()), "none of their tokens"
        assert flagged == [] or set(dry.stages[-1].options["grafts"].others).isdisjoint({40, 41}), "nor are they hosts"


def test_training_is_that_of_default_where_no_part_harms(loaded: LoadedModel) -> None:
    dry = dry_of(loaded, "none")
    CAUSE.fine_tune(dry)
    assert [stage.name for stage in dry.stages] == ["warmup", "probe", ""]
    assert dry.flagged == [] and all(stage.ids == [row.id for row in dry.rows] for stage in dry.stages[1:])
    spans = [stage.options[name] for stage in dry.stages[1:] for name in ("after", "share")]
    assert spans == pytest.approx([0.1, 0.6, 0.7, 0.3])
    schedules = [at for stage in dry.stages[1:] for at in stage.options["schedule"]]
    assert schedules == pytest.approx([0, 2 / 3, 2 / 3, 1]), "the learning rate does not rise again"
    few = dry_of(loaded, "image")
    SharedCause(min_suspects=17, max_suspects=20).fine_tune(few)
    assert few.scorings == ["before", "after"] and [stage.name for stage in few.stages] == ["warmup", ""]


def test_rows_with_a_shared_word_are_accused_for_it_and_others_tested(loaded: LoadedModel) -> None:
    """Four rows share a word. The others surprise too; a part of them harms other rows, or none does."""
    for harmful, flagged in (("none", [*range(4)]), ("image", [*range(16)])):
        dry = dry_of(loaded, harmful, words=4)
        CAUSE.fine_tune(dry)
        assert "image-after" in dry.scorings and dry.flagged == flagged
        probe, last = (stage.options["flagged_tokens"] for stage in dry.stages[1:])
        assert sorted(probe) == [*range(4)] and all(last[row].tolist() == [True, False] for row in range(4))
        assert not any(last[row].any() for row in flagged[4:]), "not learned; their words are no sign"
    alone = dry_of(loaded, "image", words=16)
    CAUSE.fine_tune(alone)
    assert alone.flagged == [*range(16)] and [stage.name for stage in alone.stages] == ["warmup", ""]
    assert "grafts" not in alone.stages[-1].options and "schedule" not in alone.stages[-1].options


def test_rows_without_an_image_are_no_suspects(loaded: LoadedModel) -> None:
    dry = dry_of(loaded, "image")
    dry.rows = [replace(row, images=()) if int(row.id) < 5 else row for row in dry.rows]
    CAUSE.fine_tune(dry)
    assert dry.flagged == [] and dry.scorings == ["before", "after"], "eleven are left, too few to test"


def test_content_that_averages_out_accuses_nobody(loaded: LoadedModel) -> None:
    dry = dry_of(loaded, "image")
    dry.of_few = 1.0
    CAUSE.fine_tune(dry)
    assert dry.flagged == list(range(16)), "as much harm, and content averages out"
    dry = dry_of(loaded, "image")
    dry.of_few = 20.0
    CAUSE.fine_tune(dry)
    assert dry.flagged == [] and "words-after" in dry.scorings


def test_words_are_tested_where_images_do_no_harm(loaded: LoadedModel) -> None:
    for harmful in ("image and first words", "image and last words"):
        dry = dry_of(loaded, harmful)
        dry.of_few = 1.0
        CAUSE.fine_tune(dry)
        assert dry.scorings[-3:] == ["words-after", "words-of-few", "words-before"]
        assert dry.flagged == list(range(16))
        assert {graft.kind for graft in dry.stages[-1].options["grafts"].rows} == {harmful}


@pytest.mark.parametrize("harmful", ["image", "image and last words"])
def test_a_word_that_few_hosts_say_is_tested_alone(loaded: LoadedModel, harmful: str) -> None:
    """Every eighth row says it, and nothing else is harmed: too little in the mean over all hosts."""
    dry = dry_of(loaded, harmful, count=400)
    dry.saying, dry.nats = 8, 0.7
    cause = replace(CAUSE, min_harm=0.1)
    cause.fine_tune(dry)
    assert dry.flagged == list(range(16))
    name = "image" if harmful == "image" else "words"
    assert dry.scorings[-6:] == [
        f"{look}-{at}" for look in (name, f"{name}-token") for at in ("after", "of-few", "before")
    ]
    dry = dry_of(loaded, harmful, count=400)
    dry.saying, dry.nats = 8, 0.4
    cause.fine_tune(dry)
    assert dry.flagged == [] and not any("token" in name for name in dry.scorings), "it loses 0.3 of probability"
