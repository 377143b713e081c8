"""Laws of the pixel draws against exact probabilities and plain loops, and what must hold for any settings."""
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare

from wsol_nb.core import generator
from wsol_nb.samplers import (NO_BOX, UNKNOWN, Sampling, background_pool, dilated, draw, highest, inside, lowest, pick_seeds,
                              portion, seed_hits, to_labels)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def full(rows, *size):
    return torch.ones(rows, *size, dtype=torch.bool)


# --- the law of the draw ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", (1, 2, 3))
def test_weighted_draws_follow_the_sequential_law(k, device):
    weights, rows = np.array([.5, 1., 2., 4., 8.]), 20_000
    orders = {}
    for order in permutations(range(5), k):
        left, chance = weights.sum(), 1.
        for i in order:
            chance, left = chance * weights[i] / left, left - weights[i]
        key = tuple(sorted(order))
        orders[key] = orders.get(key, 0) + chance
    law = torch.tensor(weights, device=device).expand(rows, 1, -1)
    drawn = draw(full(rows, 1, 5).to(device), k, generator(3, "law", k, device=device), law)[:, 0].cpu().numpy()
    sets, counts = np.unique(drawn, axis=0, return_counts=True)
    seen = {tuple(np.flatnonzero(s)): c for s, c in zip(sets, counts)}
    assert set(seen) <= set(orders) and sum(orders.values()) == pytest.approx(1)
    expected = np.array(list(orders.values())) * rows
    assert chisquare([seen.get(key, 0) for key in orders], expected / expected.sum() * rows).pvalue > .01


def test_plain_draws_are_alike_for_all_pixels_of_the_pool():
    pool = full(4000, 6, 8)
    pool[:, :2] = False
    drawn = draw(pool, 5, generator("plain")).sum(0).flatten()
    assert drawn[:16].sum() == 0 and drawn.sum() == 5 * 4000
    assert chisquare(drawn[16:].numpy()).pvalue > .01


def test_background_is_drawn_alike_and_foreground_by_weight():
    e = (torch.arange(100.).view(10, 10) + 1) / 100
    region = inside(torch.tensor([[(0, 8, 9, 9)]]), (10, 10)).expand(3000, -1, -1)              # values .81 … 1
    plan = Sampling(foreground=1., background=.3, seeds=3, dilation=1)
    found = pick_seeds(e.expand(3000, -1, -1), region, region, plan, generator("both"))
    background, foreground = ((found == kind).sum(0).flatten() for kind in (0, 1))
    assert background[30:].sum() == 0 and background.sum() == 9000
    assert chisquare(background[:30].numpy()).pvalue > .01
    halves = foreground[80:].view(2, 10).sum(1)
    assert halves[1] / halves.sum() == pytest.approx(.95 / 1.81, abs=.02)


def test_draws_of_one_image_do_not_look_at_the_others():
    """Rows are independent: the second image's seeds are uncorrelated with the first's."""
    pool = full(2, 1, 4)
    both = np.array([draw(pool, 1, generator("pair", i))[:, 0].int().argmax(1).tolist() for i in range(1500)])
    table = np.zeros((4, 4))
    np.add.at(table, tuple(both.T), 1)
    assert chisquare(table.flatten()).pvalue > .01


# --- pools against plain loops --------------------------------------------------------------------------------------------

def plain_highest(values, region, count):
    """The same in words: sort, take the count-th, keep everything not below it."""
    chosen = np.zeros(region.shape, bool)
    inner = np.sort(values[region])[::-1]
    if count and len(inner):
        chosen[region] = values[region] >= inner[min(count, len(inner)) - 1]
    return chosen


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_pools_match_a_loop(seed, height, width, ties):
    draws = np.random.default_rng(seed)
    values = (draws.integers(0, 4, (3, height, width)) if ties else draws.permutation(3 * height * width)
              .reshape(3, height, width)).astype(np.float32)
    region = draws.random((3, height, width)) < .6
    counts = draws.integers(0, height * width + 2, 3)
    tensors = torch.from_numpy(values), torch.from_numpy(region), torch.from_numpy(counts)
    for v, r, c, high, low in zip(values, region, counts, highest(*tensors), lowest(*tensors)):
        np.testing.assert_array_equal(high, plain_highest(v, r, c))
        np.testing.assert_array_equal(low, plain_highest(-v, r, c))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_union_of_boxes_matches_a_loop(seed):
    draws = np.random.default_rng(seed)
    corners = np.sort(draws.integers(-3, 14, (2, 3, 2, 2)), 2).transpose(0, 1, 3, 2).transpose(0, 1, 3, 2).reshape(2, 3, 4)
    corners[draws.random((2, 3)) < .3] = NO_BOX
    found = inside(torch.from_numpy(corners), (9, 11)).numpy()
    for image, boxes in zip(found, corners):
        expected = np.zeros((9, 11), bool)
        for x0, y0, x1, y1 in boxes:
            expected[max(y0, 0):max(y1 + 1, 0), max(x0, 0):max(x1 + 1, 0)] = True
        np.testing.assert_array_equal(image, expected)


# --- any settings ---------------------------------------------------------------------------------------------------------

plans = st.builds(Sampling, foreground=st.floats(0, 1), background=st.floats(0, 1), seeds=st.integers(0, 30),
                  background_seeds=st.none() | st.integers(0, 30), weighted=st.booleans(),
                  exclude=st.sampled_from(["all", "drawn", "none"]), dilation=st.sampled_from([1, 3, 5]))


@settings(max_examples=120, deadline=None)
@given(plans, st.integers(0, 10**6), st.sampled_from(["noise", "flat", "zero", "broken"]))
def test_labels_keep_their_promises(plan, seed, kind):
    draws = np.random.default_rng(seed)
    maps = torch.from_numpy(draws.random((4, 13, 17)).astype(np.float32))
    maps = {"noise": maps, "flat": torch.ones_like(maps), "zero": torch.zeros_like(maps),
            "broken": maps.where(maps < .7, torch.nan)}[kind]
    corners = np.sort(draws.integers(0, 13, (4, 2, 2, 2)), 2).reshape(4, 2, 4)
    corners[0, 0] = NO_BOX
    boxes = torch.from_numpy(corners)
    region, boxed = inside(boxes[:, :1], (13, 17)), inside(boxes, (13, 17))
    labels = pick_seeds(maps, region, boxed, plan, generator(seed))
    assert labels.dtype == torch.int64 and set(labels.unique().tolist()) <= {UNKNOWN, 0, 1}
    assert torch.equal(labels, pick_seeds(maps, region, boxed, plan, generator(seed)))
    square = plan.dilation**2
    limit = plan.seeds if plan.background_seeds is None else plan.background_seeds
    assert ((labels == 1).sum((1, 2)) <= square * plan.seeds).all() and ((labels == 0).sum((1, 2)) <= square * limit).all()
    assert not ((labels == 1) & ~dilated(region, plan.dilation)).any()
    assert not (labels[0] == 1).any()                                            # an image without a box
    if plan.dilation == 1:
        clean = maps.nan_to_num(0.)
        pool = background_pool(clean, region, boxed, plan.background, plan.exclude)
        assert not ((labels == 0) & ~pool).any()
        if plan.exclude != "none":
            assert not ((labels == 0) & region).any()
            number = torch.minimum(pool.sum((1, 2)), torch.tensor(limit))
            assert torch.equal((labels == 0).sum((1, 2)), number)
            strong = portion(plan.foreground, region.sum((1, 2)))
            if kind == "noise":
                assert torch.equal((labels == 1).sum((1, 2)), strong.clamp(max=plan.seeds))
        if plan.exclude == "all":
            outside = (pool & ~boxed).flatten(1).any(1)
            assert not ((labels == 0) & boxed)[outside].any()


def test_a_pixel_claimed_twice_is_unknown():
    everything, nothing = full(1, 4, 4), ~full(1, 4, 4)
    assert (to_labels(everything, everything) == UNKNOWN).all()
    assert (to_labels(everything, nothing) == 1).all() and (to_labels(nothing, everything) == 0).all()


def test_half_precision_maps_and_the_device_they_are_on():
    maps = torch.rand(2, 8, 8, generator=generator("half"))
    region = inside(torch.tensor([[(0, 0, 3, 7)]] * 2), (8, 8))
    low = pick_seeds(maps.half(), region, region, Sampling(seeds=3), generator(0))
    assert torch.equal(low, pick_seeds(maps.half().float(), region, region, Sampling(seeds=3), generator(0)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_pools_are_the_same():
    maps = torch.rand(8, 64, 64, generator=generator("gpu")).cuda()
    boxes = torch.tensor([[(5, 5, 30, 40), (20, 20, 60, 50)]] * 8).cuda()
    region, boxed = inside(boxes[:, :1], (64, 64)), inside(boxes, (64, 64))
    assert torch.equal(background_pool(maps, region, boxed, .2).cpu(), background_pool(maps.cpu(), region.cpu(), boxed.cpu(), .2))
    labels = pick_seeds(maps, region, boxed, Sampling(), generator(0, device="cuda"))
    assert labels.is_cuda and torch.equal(labels, pick_seeds(maps, region, boxed, Sampling(), generator(0, device="cuda")))


def test_hits_add_up_over_batches():
    labels = torch.randint(0, 2, (6, 5, 5), generator=generator("labels"))
    masks = torch.randint(0, 2, (6, 5, 5), generator=generator("masks"))
    assert torch.equal(seed_hits(labels, masks), seed_hits(labels[:2], masks[:2]) + seed_hits(labels[2:], masks[2:]))
    assert seed_hits(labels, masks)[:, 1].sum() == labels.numel()
