"""Losses on random inputs: against plain loops, in half precision, and where a training would break."""
import math

import pytest
import torch

from wsol_nb.core import SettingsError
from wsol_nb.losses import UNKNOWN, barrier_strength, crf_strength, log_barrier, partial_cross_entropy, size_loss


def random_labels(shape, seed, share=.3):
    torch.manual_seed(seed)
    labels = torch.randint(0, 2, shape)
    return labels.masked_fill(torch.rand(shape) > share, UNKNOWN)


def naive_cross_entropy(logits, labels):
    """The formula, pixel by pixel."""
    probs, terms = logits.softmax(1), []
    for b, y, x in (labels != UNKNOWN).nonzero().tolist():
        terms.append(-math.log(probs[b, int(labels[b, y, x]), y, x]))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("seed", range(3))
def test_partial_cross_entropy_is_its_formula(seed):
    labels = random_labels((3, 5, 7), seed)
    logits = torch.randn(3, 2, 5, 7, dtype=torch.float64)
    assert partial_cross_entropy(logits, labels).item() == pytest.approx(naive_cross_entropy(logits, labels), abs=1e-5)


def test_an_image_without_labels_adds_nothing():
    labels = random_labels((2, 6, 6), 0)
    labels[1] = UNKNOWN
    logits = torch.randn(2, 2, 6, 6)
    assert partial_cross_entropy(logits, labels).item() == pytest.approx(partial_cross_entropy(logits[:1], labels[:1]).item())


def test_a_batch_without_labels_keeps_the_training_alive():
    """The optimizer steps, and nothing moves: with the stock operator every weight would be NaN."""
    network = torch.nn.Conv2d(3, 2, 1)
    before = [p.clone() for p in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), .1)
    loss = partial_cross_entropy(network(torch.randn(2, 3, 4, 4)), torch.full((2, 4, 4), UNKNOWN))
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))


def test_losses_are_safe_under_autocast():
    """Areas above 65,504 pixels overflow half precision; the sums are taken in float32."""
    probs = torch.full((1, 2, 400, 400), .5, dtype=torch.float16)
    assert size_loss(probs, 1.).item() == pytest.approx(-math.log(80_000), abs=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = partial_cross_entropy(torch.randn(1, 2, 4, 4, dtype=torch.bfloat16), random_labels((1, 4, 4), 1))
    assert loss.dtype == torch.float32


def test_barrier_and_size_gradients_are_those_of_the_formula():
    f = torch.tensor([-3., -.5, -1e-3, 0., 2.], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: log_barrier(v, 3.), f)
    probs = torch.rand(2, 2, 3, 3, dtype=torch.float64).requires_grad_(True)
    size = lambda p: log_barrier(-p.sum((2, 3)), 2.).mean(0).sum() / 2
    assert size_loss(probs.detach(), 2.).item() == pytest.approx(size(probs).item(), abs=1e-6)


def test_barrier_grows_towards_a_wall():
    """Outside, a larger t costs more; deep inside it costs less."""
    costs = [log_barrier(torch.tensor([.5, -.5]), t) for t in (1., 2., 5., 10.)]
    assert all(a[0] < b[0] for a, b in zip(costs, costs[1:]))
    assert all(a[1] > b[1] for a, b in zip(costs, costs[1:]))


def test_strength_needs_no_state():
    t = 1.
    for epoch in range(300):
        assert barrier_strength(epoch) == pytest.approx(t, rel=1e-9)
        t = min(1.01 * t, 10)


def test_crf_strength_composes():
    weight, sigma = crf_strength(96)
    assert crf_strength(224, weight, sigma, reference=96) == pytest.approx((2e-9, 100.))
    with pytest.raises(SettingsError, match="one pixel"):
        crf_strength(-3)
