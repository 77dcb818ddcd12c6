"""Crops against those that the authors' own code (ReContriever) made from given random draws: equal to the last id."""

from pathlib import Path

import numpy as np
import pytest

from toolkit.data.token_store import TokenRows
from toolkit.determinism import generator
from toolkit.methods.recontriever.crops import CropPlan, CropStore, crop, draw, pad_framed
from toolkit.methods.recontriever.keys import Crops

FIXTURE = Path(__file__).parent.parent / "fixtures" / "recontriever" / "crops.npz"
with np.load(FIXTURE, allow_pickle=False) as arrays:
    GIVEN = {name: arrays[name] for name in arrays}
LENGTH = int(GIVEN["input/chunk_length"])
RATIO_MIN, RATIO_MAX, DELETE, BOS, EOS = GIVEN["input/ratio_min_max_pdel_bos_eos"].tolist()


def chunks() -> list[np.ndarray]:
    offset = int(GIVEN["input/offset"])
    return [GIVEN["input/stream"][offset + LENGTH * i :][:LENGTH] for i in range(len(GIVEN["input/crop_ratio"]))]


def made_by(make) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of all items and views, cropped by `make` from the authors' draws."""
    draws = [GIVEN[f"input/{name}"] for name in ("crop_ratio", "crop_start", "keep_uniform")]
    pieces = [
        make(chunk, float(ratio), int(start), uniform)
        for chunk, *views in zip(chunks(), *draws, strict=True)
        for ratio, start, uniform in zip(*views, strict=True)
    ]
    return pad_framed(pieces, ([int(BOS)], [int(EOS)]), 0)


def agree(found: tuple[np.ndarray, np.ndarray]) -> bool:
    width = GIVEN["output/tokens"].shape[-1]
    expected = [GIVEN[f"output/{name}"].reshape(-1, width) for name in ("tokens", "mask")]
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_every_crop_equals_the_authors():
    assert agree(made_by(lambda tokens, ratio, start, uniform: crop(tokens, ratio, start, uniform, DELETE)))
    whole = made_by(lambda tokens, ratio, start, uniform: crop(tokens, ratio, start, np.ones_like(uniform), DELETE))
    assert (whole[1].sum(1) - 2).tolist() == GIVEN["output/crop_length"].ravel().tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda tokens, ratio, start, uniform: crop(tokens, ratio, start, 1 - uniform, DELETE),
        lambda tokens, ratio, start, uniform: crop(tokens, ratio, start, uniform, DELETE + 0.05),
        lambda tokens, ratio, start, uniform: crop(tokens, ratio, max(0, start - 1), uniform, DELETE),
        lambda tokens, ratio, start, uniform: crop(tokens, ratio - 1 / LENGTH, start, uniform, DELETE),
        # The uniform numbers belong to the crop's tokens, not to the chunk's.
        lambda tokens, ratio, start, uniform: crop(tokens, ratio, start, np.roll(uniform, -start), DELETE),
    ],
)
def test_no_other_rule_does(wrong):
    assert not agree(made_by(wrong))


def test_a_token_is_left_out_at_the_limit_itself():
    """The authors keep a token if its number is above p; equality is too rare to be among their draws."""
    tokens, uniform = np.arange(4), np.array([0.1, np.nextafter(0.1, 1), 0.0, 0.5])
    assert crop(tokens, 1.0, 0, uniform, 0.1).tolist() == [1, 3]
    assert tokens[uniform >= 0.1].tolist() != [1, 3]


def test_the_authors_draws_are_among_ours():
    """Starts from 0 to length - size, both included: the fixture holds the last one, and ours reach it and no more."""
    ratios, starts = GIVEN["input/crop_ratio"], GIVEN["input/crop_start"]
    last = LENGTH - np.floor(LENGTH * ratios).astype(int)
    assert (starts <= last).all() and not (starts < last).all()
    assert ratios.min() >= RATIO_MIN and ratios.max() <= RATIO_MAX
    settings = Crops(
        chunk_tokens=LENGTH, min_ratio=RATIO_MIN, max_ratio=RATIO_MAX, delete=DELETE, across_documents=False
    )
    drawn = draw(generator("test", 0), LENGTH, settings, 20_000)
    last = LENGTH - np.floor(LENGTH * drawn.ratio).astype(int)
    assert (drawn.start <= last).all() and not (drawn.start < last).all() and drawn.start.min() == 0
    assert abs((drawn.start / last).mean() - 0.5) < 0.01 and abs(drawn.ratio.mean() - 0.275) < 0.005


def test_the_stream_is_cut_as_theirs_from_the_same_offset():
    stream = GIVEN["input/stream"]
    ends = np.array([0, 100, 101, 400, len(stream)])  # documents of any length leave no mark
    store = CropStore({"digest": "", "examples": []}, TokenRows(stream, ends))
    settings = Crops(chunk_tokens=LENGTH, min_ratio=0.05, max_ratio=0.5, delete=0.1, across_documents=True)
    plan = CropPlan(store, settings, 2, seed=1)
    firsts = [plan.chunk(epoch * plan.pools_per_epoch, 0) for epoch in range(600)]
    same = [epoch for epoch, first in enumerate(firsts) if np.array_equal(first, chunks()[0])]
    assert same and len(same) < len(firsts) / 10
    for epoch in same:
        t = epoch * plan.pools_per_epoch
        assert all(np.array_equal(plan.chunk(t, i), chunk) for i, chunk in enumerate(chunks()))
