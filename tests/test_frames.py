"""Learning from frames: regions, labels, losses and CorLoc against plain code, and one visit per shot and epoch."""
import math

import numpy as np
import pytest
import torch

from wsol_nb.baselines.tcam import temporal_max
from wsol_nb.core import SettingsError
from wsol_nb.frames import PixelLosses, RegionRule, ShotFrames, bright, densest, draw_labels, find_regions
from wsol_nb.losses import UNKNOWN, barrier_strength, log_barrier, size_loss
from wsol_nb.datasets import Item, Split


def regions_of(mask):
    """Connected regions (4 neighbours), by flood fill."""
    left, found = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        todo, region = [left.pop()], set()
        while todo:
            y, x = todo.pop()
            region.add((y, x))
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            todo += near
        found.append(region)
    return found


def naive_densest(mask, values, min_area):
    found = regions_of(mask)
    if not found:
        return mask
    best = max(found, key=lambda r: np.mean([values[p] for p in r]))
    if len(best) < min_area * mask.size:
        best = max(found, key=len)
    out = np.zeros_like(mask)
    out[tuple(np.array(sorted(best)).T)] = True
    return out


@pytest.mark.parametrize("seed", range(20))
def test_densest_region_is_the_plain_search(seed):
    draws = np.random.default_rng(seed)
    values = draws.random((14, 17)).astype(np.float32)
    mask = values > draws.uniform(.3, .8)
    area = draws.choice([0., .05, .1])
    assert np.array_equal(densest(mask, values, area), naive_densest(mask, values, area))


def test_two_blobs_of_the_specification():
    maps = torch.zeros(1, 10, 10)
    maps[0, 1:4, 1:4], maps[0, 5:9, 5:9] = .9, .6
    assert bright((255 * maps[0]).byte().numpy()).sum() == 9 + 16
    assert torch.equal(find_regions(maps, RegionRule(min_area=.05)), maps == .9)
    assert torch.equal(find_regions(maps, RegionRule(min_area=.10)), maps == .6)


@pytest.mark.parametrize("region", ["densest", "all"])
def test_labels_lie_where_they_may(region):
    torch.manual_seed(0)
    maps = torch.nn.functional.avg_pool2d(torch.rand(4, 1, 40, 40), 7, 1, 3)[:, 0]
    maps = (maps - maps.amin((1, 2), keepdim=True)) / (maps.amax((1, 2), keepdim=True) - maps.amin((1, 2), keepdim=True))
    rule = RegionRule(seeds=6, dilation=1, region=region)
    allowed = find_regions(maps, rule)
    for k in range(10):
        labels = draw_labels(maps, rule, torch.Generator().manual_seed(k))
        assert (allowed | (labels != 1)).all()
        for one, drawn in zip(maps, labels):
            assert (drawn == 1).sum() <= 6 and (drawn == 0).sum() <= 6
            assert one[drawn == 0].max() <= one.flatten().kthvalue(160).values      # the weakest tenth


def test_pixels_both_claim_are_unknown():
    """Object and background drawn side by side: where their squares meet, nobody knows."""
    maps = torch.tensor([[[0., 1., 0., 1.], [1., 0., 1., 0.], [0., 1., 0., 1.], [1., 0., 1., 0.]]])
    labels = draw_labels(maps, RegionRule(seeds=8, background=.5, foreground=1., region="all"), torch.Generator().manual_seed(0))
    assert (labels == UNKNOWN).all()


def test_barrier_values_and_schedule_of_the_specification():
    assert log_barrier(torch.tensor([-100., -1., 0., .5]), 1.).tolist() == pytest.approx([-4.605170, 0., 1., 1.5], abs=1e-6)
    assert log_barrier(torch.tensor([-.25, 0., 1.]), 2.).tolist() == pytest.approx([.693147, 1.193147, 3.193147], abs=1e-6)
    losses = PixelLosses(crf=0.)
    for finished, t in ((0, 1.), (10, 1.104622), (100, 2.704814), (232, 10.), (1000, 10.)):
        losses.set_epoch(finished + 1)
        assert losses.t == pytest.approx(t, abs=1e-5) == pytest.approx(barrier_strength(finished), abs=1e-5)


def test_size_term_pulls_towards_equal_areas():
    probs = torch.zeros(1, 2, 10, 10)
    probs[:, 1, :, :2], probs[:, 0, :, 2:] = 1, 1
    assert size_loss(probs, 1.).item() == pytest.approx(-(math.log(80) + math.log(20)) / 2)
    logits = torch.zeros(1, 2, 10, 10, requires_grad=True)
    with torch.no_grad():
        logits[:, 0] = 2.
    PixelLosses(pal=0., crf=0.)(logits, torch.full((1, 10, 10), UNKNOWN), torch.zeros(1, 3, 10, 10))["asl"].backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


def test_losses_refuse_weights_that_cannot_teach():
    for weights in ((-1., 0., 0.), (0., 0., 0.)):
        with pytest.raises(SettingsError, match="one of them above"):
            PixelLosses(*weights)


@pytest.mark.parametrize("mode, sides", [("before", (1, 0)), ("after", (0, 1)), ("both", (1, 1))])
@pytest.mark.parametrize("window", [0, 1, 3, 9])
def test_temporal_fusion_is_the_plain_loop(mode, sides, window):
    maps = np.random.default_rng(0).random((7, 3, 4))
    found = temporal_max(maps, window, mode)
    for t in range(7):
        near = [s for s in range(7) if t - sides[0] * window <= s <= t + sides[1] * window]
        assert np.array_equal(found[t], np.max([maps[s] for s in near], 0))


class Noted:
    def __init__(self, split):
        self.split = split

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return {"index": index, "shot": self.split[index].shot}


def test_an_epoch_visits_each_shot_once():
    boxes = np.zeros((0, 4), np.int64)
    items = [Item(f"{s}/{i}", s % 2, 8, 8, boxes, None, shot=str(s)) for s, n in enumerate((5, 1, 9, 2)) for i in range(n)]
    frames, other = (ShotFrames(Noted(Split("train", items, ["a", "b"])), 1, 0) for _ in range(2))
    seen = set()
    for epoch in range(60):
        frames.set_epoch(epoch)
        visits = [frames[i] for i in range(len(frames))]
        assert sorted(v["shot"] for v in visits) == ["0", "1", "2", "3"]
        seen |= {v["index"] for v in visits}
        other.set_epoch(epoch)                                      # the epoch alone decides, not what came before
        assert [other[i]["index"] for i in range(4)] == [v["index"] for v in visits]
    assert len(seen) == 17
