"""Interfaces of the defenses: presets, views, terms, and ranges of fields."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from untrigger.defenses import (
    ABL,
    BYE,
    BYORN,
    CROW,
    PRESETS,
    CleanTuning,
    CrossView,
    Defense,
    FinePruning,
    PatchAug,
    Plain,
    SharedCause,
    SharedSurprise,
    StepDefense,
    TwoView,
    preset_of,
)
from untrigger.defenses.base import part, patch_view
from untrigger.losses import objective
from untrigger.models.forward import Pair
from untrigger.rows.sample import select_rows
from untrigger.views.patches import PATCH_VIEWS, PatchView, ViewMix


def pair(n: int = 5) -> Pair:
    make = torch.Generator().manual_seed(0)
    logits, view_logits = torch.randn(2, n, 7, generator=make).unbind()
    hidden, view_hidden = torch.randn(2, n, 3, generator=make).unbind()
    return Pair(torch.arange(n), logits, view_logits, hidden, view_hidden, torch.zeros(n, dtype=torch.long))


IN_A_STEP: dict[str, type[StepDefense]] = {
    "plain": Plain,
    "patch-aug": PatchAug,
    "two-view": TwoView,
    "paper": CrossView,
}
STAGED: dict[str, type[Defense]] = {
    "default": SharedCause,
    "words": SharedSurprise,
    "abl": ABL,
    "byorn": BYORN,
    "bye": BYE,
    "crow": CROW,
    "clean-tuning": CleanTuning,
    "fine-pruning": FinePruning,
}


def test_presets_are_those_of_the_command_line() -> None:
    assert {**IN_A_STEP, **STAGED} == PRESETS and next(iter(PRESETS)) == "default"
    assert [cls().paired is not None for cls in IN_A_STEP.values()] == [False, False, True, True]
    assert [cls().replaced is not None for cls in IN_A_STEP.values()] == [False, True, False, False]
    assert [cls().has_loss for cls in IN_A_STEP.values()] == [False, False, True, True]
    assert not any(issubclass(cls, StepDefense) for cls in STAGED.values())
    assert [name for name, cls in PRESETS.items() if cls.runs_in_host] == ["default", "words", *IN_A_STEP]
    assert [name for name, cls in PRESETS.items() if cls.needs_clean_rows] == ["crow", "clean-tuning", "fine-pruning"]
    assert [preset_of(cls()) for cls in PRESETS.values()] == list(PRESETS)


@pytest.mark.parametrize("name", [f.name for f in fields(CrossView) if f.name.endswith("weight")])
def test_one_weight_alone_needs_views_and_leaves_other_terms_zero(name: str) -> None:
    zero = dict.fromkeys((f.name for f in fields(CrossView) if f.name.endswith("weight")), 0.0)
    assert CrossView(**zero).paired is None
    defense = CrossView(**(zero | {name: 2.0}), margin=0.6, bound=-1.0, entropy_high=0.1)
    assert defense.paired is not None
    terms = defense.terms(pair())
    active = {key for key, value in terms.items() if torch.any(value != 0)}
    term = {"view": "ce_view", "output": "separation", "feature": "feature_separation", "entropy": "entropy_band"}
    assert active == {"ce", term[name.removesuffix("_weight")]}


def test_terms_are_the_weighted_equations_per_token() -> None:
    p = pair()
    d = CrossView(margin=0.6, bound=-0.2, entropy_low=0.3, entropy_high=0.9)
    terms = d.terms(p)
    expected = {
        "ce": objective.token_nll(p.logits, p.target),
        "ce_view": 0.5 * objective.token_nll(p.view_logits, p.target),
        "separation": 0.5 * objective.separation(objective.js(p.logits, p.view_logits), 0.6),
        "feature_separation": 0.1 * objective.feature_separation(p.hidden, p.view_hidden, -0.2),
        "entropy_band": 0.1 * objective.entropy_band(objective.entropy(p.logits), 0.3, 0.9),
    }
    assert terms.keys() == expected.keys()
    for key, value in expected.items():
        assert terms[key].shape == (5,)
        torch.testing.assert_close(terms[key], value, rtol=1e-6, atol=1e-7)
    two = TwoView(view_weight=0.25).terms(p)
    torch.testing.assert_close(two["ce_view"], 0.25 * objective.token_nll(p.view_logits, p.target))


@pytest.mark.parametrize("defense", [Plain(), PatchAug()])
def test_unpaired_defenses_have_no_loss(defense: StepDefense) -> None:
    assert not defense.has_loss
    with pytest.raises(NotImplementedError, match=type(defense).__name__):
        defense.step(torch.nn.Identity(), {})


def test_a_share_of_rows_rounds_up_without_floating_point_errors() -> None:
    assert [part(0.4, 2000), part(0.4, 24), part(0.01, 5), part(0.0, 9), part(1.0, 9)] == [800, 10, 1, 0, 9]
    assert 0.07 * 100 > 7 and part(0.07, 100) == 7


def test_picked_rows_are_opened_on_access() -> None:
    opened: list[int] = []

    class Rows(list[int]):
        def __getitem__(self, index: Any) -> Any:
            opened.append(index)
            return super().__getitem__(index)

    some = select_rows(Rows(range(10, 20)), [7, 2, 5])  # type: ignore[arg-type]
    assert len(some) == 3 and opened == []
    assert (some[0], some[-1], list(some[1:])) == (17, 15, [12, 15]) and opened == [7, 5, 2, 5]


@pytest.mark.parametrize("name", [cls.__name__.lower() for cls in PATCH_VIEWS])
def test_patch_view_builds_every_view_by_name(name: str) -> None:
    view = patch_view(name, 0.2, 0.4)
    assert isinstance(view, PatchView)
    assert (type(view).__name__.lower(), view.patch, view.ratio) == (name, 0.2, 0.4)


def test_the_mix_draws_from_all_views() -> None:
    mix = patch_view("mix", 0.25, 0.5)
    assert isinstance(mix, ViewMix)
    assert [type(v) for v in mix.views] == list(PATCH_VIEWS)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert len({mix(image, np.random.default_rng(i)).tobytes() for i in range(30)}) > len(PATCH_VIEWS)


BAD: list[tuple[type[Defense], dict[str, Any]]] = [
    *[
        (CrossView, {f"{name}_weight": bad})
        for name in ("view", "output", "feature", "entropy")
        for bad in (-0.1, np.nan)
    ],
    (CrossView, {"margin": -0.1}),
    (CrossView, {"margin": np.nan}),
    (CrossView, {"bound": 1.1}),
    (CrossView, {"bound": -1.1}),
    (CrossView, {"entropy_low": -1.0}),
    (CrossView, {"entropy_low": 2.0, "entropy_high": 1.0}),
    (CrossView, {"view_weight": np.inf}),
    (TwoView, {"view_weight": -1.0}),
    (TwoView, {"view_weight": np.nan}),
    (PatchAug, {"share": 1.5}),
    (PatchAug, {"share": -0.5}),
    *[(ABL, {name: bad}) for name in ("early", "isolated") for bad in (-0.1, 1.1, np.nan)],
    *[(ABL, {name: bad}) for name in ("floor", "passes", "rate") for bad in (-0.1, np.inf)],
    *[(BYORN, {name: bad}) for name in ("suspected", "decay") for bad in (-0.1, 1.1, np.nan)],
    *[(BYE, {"separation": bad}) for bad in (-0.1, np.inf)],
    *[(CROW, {name: bad}) for name in ("weight", "size", "passes", "rate") for bad in (-0.1, np.nan)],
    *[(CleanTuning, {name: bad}) for name in ("passes", "rate") for bad in (-0.1, np.inf)],
    *[(FinePruning, {name: bad}) for name in ("cost", "passes", "rate") for bad in (-0.1, np.nan)],
    (FinePruning, {"cost": 1.1}),
    *[(SharedSurprise, {name: bad}) for name in ("warmup_share", "p_value") for bad in (0.0, 1.0, np.nan)],
    *[
        (SharedSurprise, {name: bad})
        for name in ("min_nll", "iqr_factor", "unlikelihood_weight")
        for bad in (-0.1, np.inf)
    ],
]


@pytest.mark.parametrize(("cls", "bad"), BAD)
def test_refuses_fields_out_of_range_by_name(cls: type[Defense], bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        cls(**bad)


@pytest.mark.parametrize("bad", [{"views": 0}, {"views": 2, "stop_gradient": True}, {"views": 2, "view": "drop"}])
def test_refuses_several_views_with_stop_gradient_or_drop(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"views is \d; it must be at least 1, and 1 with stop_gradient or drop"):
        CrossView(**bad)
    assert cast(Any, CrossView(views=3).paired)[1] == 3


@pytest.mark.parametrize("cls", [CrossView, TwoView, PatchAug])
@pytest.mark.parametrize("bad", [{"view": "nonsense"}, {"patch": 0.0}, {"patch": 2.0}, {"ratio": -0.1}, {"ratio": 1.1}])
def test_refuses_bad_views_before_the_first_batch(cls: type[StepDefense], bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad.values())) if "view" in bad else next(iter(bad))):
        defense = cls(**bad)
        _ = defense.paired, defense.replaced
