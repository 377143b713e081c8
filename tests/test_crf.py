"""The dense CRF loss against a double loop, finite differences and its own laws; the fast way against the full sum."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from wsol_nb.core import DataError, SettingsError, generator
from wsol_nb.crf_loss import DenseCRFLoss, colour_axis, filter_cpu, filter_exact, filter_fast, filter_grid, spatial_terms
from wsol_nb.synth import SCENES, BirdSet, photograph

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
BIRDS = BirdSet("test_crf", SCENES["standard"], ())


def grid_filter(colours, signals, sigma_rgb, sigma_xy):
    """The way of a GPU, on any device."""
    axis = type(colour_axis(sigma_rgb))(*(part.to(signals.device) for part in colour_axis(sigma_rgb)))
    terms = tuple(part.to(signals.device) for part in spatial_terms(tuple(signals.shape[-2:]), sigma_xy))
    return filter_grid(colours, signals, axis, terms)


FILTERS = {"exact": filter_exact, "fast": filter_fast, "torch": grid_filter}


def picture(name, height, width):
    """3×H×W in 0–255."""
    image = photograph(name) if name != "drawn" else None
    pixels = BIRDS.render("test", 1).image if image is None else np.array(image.resize((width, height)))
    found = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    return F.interpolate(found[None], (height, width), mode="area")[0]


def pictures(height, width):
    black, white = picture("china", height, width), picture("coffee", height, width)
    black[:, :height // 2] = 0
    white[:, :, width // 3:] = 255
    plain = [picture(name, height, width) for name in ("chelsea", "flower", "hubble", "drawn")]
    return plain + [black, white, torch.full((3, height, width), 93.), torch.zeros(3, height, width)]


def maps(height, width):
    """3×2×H×W: a soft disc, a sharp one, a softmax of noise."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    disc = 8 * (.6 - torch.hypot(y + .1, x - .15))
    noise = 2 * torch.randn(height, width, generator=generator("maps"))
    probs = torch.stack([disc.sigmoid(), (disc > 0).float(), noise.sigmoid()])
    return torch.stack([1 - probs, probs], 1)


def random_input(batch=2, height=9, width=12, channels=2, dtype=torch.float32):
    made = generator("input", batch, height, width, channels)
    images = torch.rand(batch, 3, height, width, generator=made, dtype=torch.float64).to(dtype)
    return images, torch.rand(batch, channels, height, width, generator=made, dtype=torch.float64).softmax(1).to(dtype)


def value_and_gradient(loss, images, probs, roi=None):
    leaf = probs.detach().clone().requires_grad_()
    value = loss(images, leaf, roi)
    value.backward()
    return value.detach(), leaf.grad


# --- the full sum -------------------------------------------------------------------------------------------------------

def double_loop(images, probs, sigma_rgb, sigma_xy):
    total, (batch, _, height, width) = 0., images.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]
    for image, signal in zip((255 * images).tolist(), probs.tolist()):
        for a, b in pixels:
            for c, d in pixels:
                colour = sum((channel[a][b] - channel[c][d])**2 for channel in image) / sigma_rgb**2
                place = ((a - c)**2 + (b - d)**2) / sigma_xy**2
                total -= math.exp(-(colour + place) / 2) * sum(s[a][b] * s[c][d] for s in signal)
    return total / batch


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-12), (torch.float32, 1e-5)))
def test_exact_mode_is_the_double_loop(dtype, tolerance):
    images, probs = random_input(2, 4, 6, 3, dtype)
    images = .4 + .2 * images
    for sigma_rgb, sigma_xy in ((15., 100.), (30., 2.)):
        loss = DenseCRFLoss(sigma_rgb, sigma_xy, 1., mode="exact")
        assert loss(images, probs).item() == pytest.approx(double_loop(images, probs, sigma_rgb, sigma_xy), rel=tolerance)


def test_exact_mode_does_not_depend_on_how_rows_are_cut(monkeypatch):
    images, probs = random_input(1, 13, 11)
    whole = filter_exact(255 * images, probs, 40., 5.)
    monkeypatch.setattr("wsol_nb.crf_loss.CHUNK", 1000)
    torch.testing.assert_close(filter_exact(255 * images, probs, 40., 5.), whole)


@pytest.mark.parametrize("form", ("neg", "paper"))
@pytest.mark.parametrize("scale", (1., .5))
def test_gradient_is_that_of_finite_differences(form, scale):
    images, probs = random_input(2, 4, 6, 2, torch.float64)
    roi = torch.rand(2, 4, 6, generator=generator("roi")) < .7
    loss = DenseCRFLoss(40., 5., scale, mode="exact", form=form, match_lattice=True, compensate_scale=True)
    assert torch.autograd.gradcheck(lambda p: 3 * loss(images, p, roi), probs.requires_grad_())


def test_values_by_hand():
    grey = torch.tensor([0., 15 / 255], dtype=torch.float64).expand(1, 3, 1, 2)
    probs = torch.tensor([[[[.25, .75]], [[.75, .25]]]], dtype=torch.float64)
    value, gradient = value_and_gradient(DenseCRFLoss(scale=1., mode="exact"), grey, probs)
    assert value.item() == pytest.approx(-1.417339, abs=1e-6)
    assert gradient[0, 1, 0].tolist() == pytest.approx([-1.611560, -.834679], abs=1e-6)
    assert DenseCRFLoss(scale=1., mode="exact", form="paper")(grey, probs).item() == pytest.approx(1.028899, abs=1e-6)
    flat, half = torch.full((1, 3, 2, 2), .5), torch.full((1, 2, 2, 2), .5)
    for form, sign in (("neg", -1), ("paper", 1)):
        assert DenseCRFLoss(scale=1., mode="exact", form=form)(flat, half).item() == pytest.approx(sign * 7.9996, abs=1e-5)


# --- laws that hold in every mode ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FILTERS)
def test_filter_is_symmetric(name):
    images, probs = random_input(2, 21, 33, 2)
    a, b = probs[:, :1], torch.randn(2, 1, 21, 33, generator=generator("b"))
    left, right = ((u * FILTERS[name](255 * images, v, 15., 12.)).double().sum() for u, v in ((a, b), (b, a)))
    assert left.item() == pytest.approx(right.item(), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("name", FILTERS)
def test_filter_does_not_care_for_the_order_of_colours_and_channels(name):
    images, probs = random_input(2, 17, 15, 3)
    whole = FILTERS[name](255 * images, probs, 15., 12.)
    turned = FILTERS[name](255 * images[:, [2, 0, 1]], probs[:, [1, 2, 0]], 15., 12.)
    torch.testing.assert_close(turned, whole[:, [1, 2, 0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("fast", "torch"))
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from((5., 10., 15., 20., 80., 1000.)), st.floats(.2, 3.), st.integers(1, 5))
def test_any_size_and_width_agrees_with_the_full_sum(name, height, width, sigma_rgb, relative, channels):
    images, _ = random_input(1, height, width)
    signals = torch.rand(1, channels, height, width, generator=generator(height, width))
    colours = F.avg_pool2d(F.pad(255 * images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    sigma_xy = max(height, width) * relative
    exact, fast = (FILTERS[way](colours, signals, sigma_rgb, sigma_xy) for way in ("exact", name))
    assert fast.shape == exact.shape
    assert (fast - exact).norm() <= .04 * exact.norm()


@pytest.mark.parametrize("mode", ("exact", "fast"))
def test_constant_maps_on_a_flat_picture_count_the_pairs(mode):
    images, probs = torch.full((1, 3, 24, 32), .7), torch.full((1, 2, 24, 32), .5)
    value, gradient = value_and_gradient(DenseCRFLoss(15., 1e6, 1., mode), images, probs)
    pixels = 24 * 32
    assert value.item() == pytest.approx(-pixels**2 / 2, rel=1e-4)
    torch.testing.assert_close(gradient, torch.full_like(gradient, -pixels), rtol=1e-3, atol=0)
    zero = torch.zeros_like(probs)
    assert value_and_gradient(DenseCRFLoss(mode=mode), images, zero)[1].abs().max() == 0


@pytest.mark.parametrize("mode", ("exact", "fast"))
def test_forms_differ_by_a_constant_and_teach_the_same(mode):
    images, _ = random_input(2, 16, 20)
    values, gradients = [], []
    for seed in (1, 2):
        logits = torch.randn(2, 2, 16, 20, generator=generator(seed))
        pair = []
        for form in ("neg", "paper"):
            leaf = logits.clone().requires_grad_()
            value = DenseCRFLoss(30., 20., 1., mode, form)(images, leaf.softmax(1))
            value.backward()
            pair.append((value.item(), leaf.grad))
        values.append(pair[1][0] - pair[0][0])
        gradients.append([gradient for _, gradient in pair])
        assert pair[1][0] >= 0
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    for negative, paper in gradients:
        torch.testing.assert_close(negative, paper, rtol=1e-3, atol=1e-3 * negative.abs().max().item())


@pytest.mark.parametrize("mode", ("exact", "fast"))
def test_value_falls_with_the_fourth_power_of_the_scale(mode):
    images, probs = picture("china", 48, 64)[None] / 255, maps(48, 64)[:1]
    smooth = F.interpolate(F.interpolate(images, scale_factor=1 / 8, mode="area"), (48, 64), mode="bilinear")
    full, half, repaired = (DenseCRFLoss(15., 30., scale, mode, compensate_scale=repair)(smooth, probs).item()
                            for scale, repair in ((1., False), (.5, False), (.5, True)))
    assert half / full == pytest.approx(1 / 16, rel=.1)
    assert repaired == pytest.approx(16 * half)


@pytest.mark.parametrize("mode", ("exact", "fast"))
def test_match_lattice_and_gradient_from_above_are_factors(mode):
    images, probs = random_input()
    value, gradient = value_and_gradient(DenseCRFLoss(mode=mode), images, probs)
    scaled, scaled_gradient = value_and_gradient(lambda *a: -2e-3 * DenseCRFLoss(mode=mode, match_lattice=True)(*a), images, probs)
    assert scaled.item() == pytest.approx(-1.2e-3 * value.item())
    torch.testing.assert_close(scaled_gradient, -1.2e-3 * gradient)


@pytest.mark.parametrize("mode", ("exact", "fast"))
def test_images_of_a_batch_do_not_meet(mode):
    images, probs = random_input(3, 14, 18)
    loss = DenseCRFLoss(mode=mode)
    value, gradient = value_and_gradient(loss, images, probs)
    alone = [value_and_gradient(loss, images[i:i + 1], probs[i:i + 1]) for i in range(3)]
    assert value.item() == pytest.approx(sum(v.item() for v, _ in alone) / 3, rel=1e-5)
    torch.testing.assert_close(gradient, torch.cat([g for _, g in alone]) / 3, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ("exact", "fast"))
@pytest.mark.parametrize("form", ("neg", "paper"))
def test_pixels_outside_the_region_have_no_part(mode, form):
    images, probs = random_input(2, 12, 16)
    roi = torch.rand(2, 12, 16, generator=generator("region")) < .6
    loss = DenseCRFLoss(scale=1., mode=mode, form=form)
    value, gradient = value_and_gradient(loss, images, probs, roi)
    assert (gradient.masked_select(~roi[:, None]) == 0).all() and (gradient.masked_select(roi[:, None]) != 0).all()
    other = torch.where(roi[:, None], probs, torch.rand(probs.shape))
    painted = torch.where(roi[:, None], images, torch.rand(images.shape))
    assert loss(painted, other, roi).item() == pytest.approx(value.item(), rel=1e-4)
    assert loss(images, probs, torch.ones(2, 12, 16)).item() == pytest.approx(loss(images, probs).item(), rel=1e-5)
    assert loss(images, probs, torch.zeros(2, 12, 16)).item() == 0
    assert loss(images, probs, roi[:, None]).item() == value.item()


# --- near enough --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ("fast", "torch"))
@pytest.mark.parametrize("size, sigma_rgb, sigma_xy", (((40, 40), 15., 40.), ((64, 40), 10., 100.), ((48, 64), 20., 11.),
                                                      ((40, 40), 10., 7.2)))      # the last ones: 224 pixels and σ 40
def test_fast_is_as_near_as_promised(name, size, sigma_rgb, sigma_xy):
    signals = maps(*size).flatten(0, 1)[None]
    for colours in pictures(*size):
        exact, fast = (FILTERS[way](colours[None], signals, sigma_rgb, sigma_xy).double().view(3, -1) for way in ("exact", name))
        flat = signals.double().view(3, -1)
        assert ((flat * fast).sum(1) / (flat * exact).sum(1) - 1).abs().max() < .02
        assert ((fast - exact).norm(dim=1) / exact.norm(dim=1)).max() < .04
        assert F.cosine_similarity(fast, exact, 1).min() > .999


@pytest.mark.parametrize("name", ("fast", "torch"))
def test_fast_is_as_near_as_promised_at_training_size(name):
    """112 pixels, the side of a picture of 224 at half scale, where the sum is over 157 million pairs."""
    colours, signals = picture("china", 112, 112)[None], maps(112, 112)[:1, 1:]
    exact, fast = (FILTERS[way](colours, signals, 15., 100.).double().flatten() for way in ("exact", name))
    assert fast @ signals.double().flatten() == pytest.approx((exact @ signals.double().flatten()).item(), rel=.02)
    assert (fast - exact).norm() < .04 * exact.norm()
    assert F.cosine_similarity(fast, exact, 0) > .999


def test_loss_is_as_near_as_promised_at_half_scale():
    images = torch.stack(pictures(63, 97)[:3]) / 255
    exact, fast = (value_and_gradient(DenseCRFLoss(mode=mode), images, maps(63, 97)) for mode in ("exact", "fast"))
    assert fast[0].item() == pytest.approx(exact[0].item(), rel=.02)
    assert (fast[1] - exact[1]).norm() < .04 * exact[1].norm()


# --- how it is called ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ("exact", "fast"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_changes_nothing(device, mode, dtype):
    images, logits = (t.to(device) for t in random_input(2, 20, 24))
    weight = torch.eye(2, device=device, requires_grad=True)
    loss = DenseCRFLoss(mode=mode)

    def run():
        probs = torch.einsum("ck,bkhw->bchw", weight, logits).float().softmax(1)
        return loss(images, probs)
    plain = run()
    with torch.autocast(device, dtype=dtype):
        mixed = loss(images, torch.einsum("ck,bkhw->bchw", weight.detach(), logits).softmax(1).detach())
        exactly = loss(images, logits)
    assert mixed.dtype == exactly.dtype == torch.float32
    assert exactly.item() == pytest.approx(loss(images, logits).item(), rel=1e-6)
    assert mixed.item() == pytest.approx(plain.item(), rel=.02)


@pytest.mark.parametrize("mode", ("exact", "fast"))
@pytest.mark.parametrize("form", ("neg", "paper"))
@pytest.mark.parametrize("inside", (True, False))
def test_gradient_under_autocast_is_that_of_float32(mode, form, inside):
    """From the same float32 probabilities, whether `backward` is called inside the block or after it."""
    images, probs = random_input(2, 20, 24)
    loss = DenseCRFLoss(mode=mode, form=form)
    value, gradient = value_and_gradient(loss, images, probs)
    leaf = probs.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16      # the block does what it is for
        mixed = loss(images, leaf)
        if inside:
            mixed.backward()
    if not inside:
        mixed.backward()
    assert leaf.grad.dtype == torch.float32 and mixed.item() == pytest.approx(value.item(), rel=1e-6)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_gradients_have_the_type_of_the_probabilities(dtype):
    images, probs = random_input()
    value, gradient = value_and_gradient(DenseCRFLoss(), images, probs.to(dtype))
    assert gradient.dtype == dtype and torch.isfinite(gradient).all()
    assert value.item() == pytest.approx(DenseCRFLoss()(images, probs).item(), rel=.01)


@pytest.mark.parametrize("mode", ("exact", "fast"))
def test_layout_in_memory_does_not_matter(mode):
    images, probs = random_input(2, 12, 16)
    value, gradient = value_and_gradient(DenseCRFLoss(mode=mode), images, probs)
    for change in (lambda t: t.contiguous(memory_format=torch.channels_last),
                   lambda t: t.mT.contiguous().mT,
                   lambda t: t.repeat_interleave(2, 3)[..., ::2]):
        again, again_gradient = value_and_gradient(DenseCRFLoss(mode=mode), change(images), change(probs))
        assert again.item() == pytest.approx(value.item(), rel=1e-5)
        torch.testing.assert_close(again_gradient, gradient)
    wide, wide_gradient = value_and_gradient(DenseCRFLoss(mode=mode), images[:1].expand(2, -1, -1, -1), probs)
    assert torch.isfinite(wide) and torch.isfinite(wide_gradient).all()


def test_threads_give_the_same():
    images, probs = random_input(5, 20, 24, 3)
    axis, terms, before = colour_axis(15.), spatial_terms((20, 24), 5.), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(filter_cpu(255 * images, probs, axis, terms))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("mode", ("exact", "fast"))
def test_an_empty_batch_costs_nothing_and_keeps_the_graph(mode):
    value, gradient = value_and_gradient(DenseCRFLoss(mode=mode), torch.rand(0, 3, 8, 8), torch.rand(0, 2, 8, 8))
    assert value.item() == 0 and gradient.shape == (0, 2, 8, 8)


@pytest.mark.parametrize("mode", ("exact", "fast"))
def test_one_pixel_one_channel_one_grey_level(mode):
    assert DenseCRFLoss(scale=1., mode=mode)(torch.ones(1, 3, 1, 1), torch.full((1, 1, 1, 1), .5)).item() == pytest.approx(-.25, rel=1e-3)


def test_no_gradient_reaches_the_images():
    images, probs = random_input()
    images.requires_grad_()
    DenseCRFLoss()(images, probs.requires_grad_()).backward()
    assert images.grad is None and probs.grad is not None


@pytest.mark.parametrize("mode", ("exact", "fast"))
def test_a_second_derivative_is_refused(mode):
    images, probs = random_input()
    (first,) = torch.autograd.grad(DenseCRFLoss(mode=mode)(images, probs.requires_grad_()), probs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_maps_that_are_not_numbers_stay_visible():
    images, probs = random_input()
    probs[0, 0, 3, 3] = math.nan
    for mode in ("exact", "fast"):
        assert torch.isnan(DenseCRFLoss(mode=mode)(images, probs))


@pytest.mark.parametrize("wrong, message", (
    (lambda i: i * 255, "values from"), (lambda i: i - .5, "undo the normalisation"), (lambda i: i * math.nan, "NaN"),
    (lambda i: i / 0, "infinite"), (lambda i: (i * 255).byte(), "floating point"), (lambda i: i[:, :1], "B×3×H×W"),
    (lambda i: i[0], "B×3×H×W"), (lambda i: i[..., 1:], "resize the maps"), (lambda i: i[:1], "probs must be")))
def test_bad_images_are_refused(wrong, message):
    images, probs = random_input()
    with pytest.raises(ValueError, match=message) as caught:
        DenseCRFLoss()(wrong(images), probs)
    assert isinstance(caught.value, DataError)


def test_one_bad_pixel_is_found_wherever_it_is():
    images, probs = random_input(1, 9, 9)
    for bad in (math.nan, 1.01, -.01):
        for y in range(9):                       # half of the rows are passed over by nearest scaling
            broken = images.clone()
            broken[0, 1, y, 3] = bad
            with pytest.raises(ValueError, match="images"):
                DenseCRFLoss()(broken, probs)


@pytest.mark.parametrize("bad", ({"sigma_rgb": 0.}, {"sigma_xy": -1.}, {"scale": math.nan}, {"mode": "lattice"}, {"form": "pos"},
                                 {"sigma_rgb": .5}))
def test_bad_settings_are_refused(bad):
    with pytest.raises(SettingsError):
        DenseCRFLoss(**bad)


@pytest.mark.parametrize("form", ("neg", "paper"))
def test_machine_code_and_torch_agree(monkeypatch, form):
    """The way of a GPU in place of that of a CPU, through the whole loss, and with a region."""
    images, probs = random_input(3, 24, 30)
    roi = torch.rand(3, 24, 30, generator=generator("region")) < .8
    here, used = value_and_gradient(DenseCRFLoss(form=form), images, probs, roi), []
    monkeypatch.setattr("wsol_nb.crf_loss.filter_cpu", lambda *parts: used.append(1) or filter_grid(*parts))
    there = value_and_gradient(DenseCRFLoss(form=form), images, probs, roi)
    assert used and there[0].item() == pytest.approx(here[0].item(), rel=1e-4)
    torch.testing.assert_close(there[1], here[1], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree():
    images, probs = random_input(3, 24, 30)
    here, there = (value_and_gradient(DenseCRFLoss(), images.to(d), probs.to(d)) for d in ("cpu", "cuda"))
    assert there[0].item() == pytest.approx(here[0].item(), rel=1e-4)
    torch.testing.assert_close(there[1].cpu(), here[1], rtol=1e-3, atol=1e-4)
