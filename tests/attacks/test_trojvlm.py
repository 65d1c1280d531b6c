from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from untrigger.attacks.badnets import BadNets
from untrigger.attacks.trojvlm import TrojVLM
from untrigger.errors import InputError
from untrigger.rows.sample import Sample


def stamp(trigger: TrojVLM | BadNets, width: int, height: int) -> np.ndarray:
    gray = Image.new("RGB", (width, height), (128, 128, 128))
    return np.asarray(trigger.stamp(Sample("a", (gray,), ()), np.random.default_rng(0)).images[0])


@pytest.mark.parametrize(
    ("width", "height", "side"), [(224, 224, 20), (448, 300, 27), (64, 64, 6), (4, 9, 4), (1, 1, 1)]
)
def test_patch_is_20_of_224_in_the_upper_left_corner(width: int, height: int, side: int) -> None:
    changed = (stamp(TrojVLM(), width, height) != 128).any(axis=2)
    assert changed[:side, :side].all() and changed.sum() == side * side


def test_patch_is_the_badnets_pattern_and_near_miss_another_one() -> None:
    patched = stamp(TrojVLM(pattern_seed=3), 224, 224)
    assert np.array_equal(patched, stamp(BadNets(side=20 / 224, place="top-left", pattern_seed=3), 224, 224))
    gray = Sample("a", (Image.new("RGB", (224, 224), (128, 128, 128)),), ())
    other = np.asarray(TrojVLM(pattern_seed=3).near_misses()["other pattern"](gray, np.random.default_rng(0)).images[0])
    assert not np.array_equal(patched[:20, :20], other[:20, :20]) and np.array_equal(patched[20:], other[20:])


def test_usual_goal_is_insert() -> None:
    assert TrojVLM.usual_goal == "insert"


@pytest.mark.parametrize("settings", [{"side": 0}, {"side": 1.01}, {"min_side": 0}, {"pattern_seed": -1}])
def test_values_out_of_range_raise(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        TrojVLM(**settings)  # type: ignore[arg-type]
