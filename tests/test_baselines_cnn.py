"""HaS, ACoL, SPG, ADL and CutMix: what they promise alike, on backbones and in situations their notebooks do not show."""
import copy
import importlib
from dataclasses import replace

import pytest
import torch

from wsol_nb import cams
from wsol_nb.core import SettingsError
from wsol_nb.experiments import gradient_faults, model_of
from wsol_nb.models import at_layers, backbone, build

METHODS = ["has", "acol", "spg", "adl", "cutmix"]
DATA = ["toy", "toy_masks", "mini_cub", "mini_ilsvrc", "mini_openimages", "photos", "folder", "cub", "ilsvrc", "openimages", "teldrone"]
NARROW = {"acol": {"width": 16}, "spg": {"width": 16}}


def make(method, network="mini_cnn", **settings):
    torch.manual_seed(0)
    return build(method, 3, network, pretrained=False, **NARROW.get(method, {}), **settings)


def pictures(count=4, side=48):
    torch.manual_seed(1)
    return {"image": torch.randn(count, 3, side, side), "label": torch.arange(count) % 3}


def total(model, batch, seed):
    torch.manual_seed(seed)
    loss = model.loss(batch)
    return sum(loss.values()) if isinstance(loss, dict) else loss


@pytest.mark.parametrize("method", METHODS)
def test_rows_for_every_data_set(method):
    """A row per data set whose model can be built; masks are judged by PxAP, a user's folder without boxes."""
    module = importlib.import_module(f"wsol_nb.baselines.{method}")
    assert set(DATA) <= set(module.SETTINGS)
    assert {k for k, c in module.SETTINGS.items() if c.select == "PxAP"} == {
        "toy_masks", "mini_openimages", "openimages", "mini_glas", "mini_camelyon"}
    assert module.SETTINGS["folder"].select == "cls"
    assert {k: c.backbone for k, c in module.SETTINGS.items()} == {k: c.backbone for k, c in cams.SETTINGS.items()}
    with torch.device("meta"):
        for key, name in (("toy", "mini_cnn"), ("cub", "resnet50")):
            assert model_of(method, replace(module.SETTINGS[key], pretrained=False), 3).backbone.name == name


@pytest.mark.parametrize("method", METHODS)
def test_answers(method):
    """Maps in [0, 1] that belong to a class and do not depend on the other pictures; chance plays no part at test time."""
    model, batch = make(method).eval(), pictures()
    with torch.no_grad():
        out, again = model(batch["image"], batch["label"]), model(batch["image"], batch["label"])
        alone, own = model(batch["image"][:1], batch["label"][:1]), model(batch["image"])
        named = model(batch["image"], own.logits.argmax(1))
    assert out.logits.shape == (4, 3) and out.maps.shape == (4, 6, 6)
    assert 0 <= out.maps.min() and out.maps.max() <= 1
    assert torch.equal(out.maps, again.maps) and torch.equal(own.maps, named.maps)
    assert torch.allclose(alone.maps, out.maps[:1], atol=1e-4)
    assert not torch.equal(out.maps, model(batch["image"], (batch["label"] + 1) % 3).maps)
    with pytest.raises(ValueError, match="0 … 2"):
        model(batch["image"], torch.full((4,), 3))


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_leaves_the_batch_alone(method):
    """One seed, one loss; what was handed in is as before; methods with chance in them depend on the seed; one picture is enough."""
    model, batch = make(method).train(), pictures()
    before = {name: value.clone() for name, value in batch.items()}
    losses = [total(copy.deepcopy(model), batch, seed).item() for seed in (0, 0, 1, 2, 3)]
    assert losses[0] == losses[1]
    assert (len(set(losses)) > 1) == (method in ("has", "adl", "cutmix"))
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    assert total(model, pictures(1), 0).isfinite()


@pytest.mark.parametrize("method, network", [("spg", "resnet18"), ("adl", "resnet18"), ("spg", "vgg11"), ("adl", "inception_v3")])
def test_gradients_on_other_networks(method, network):
    """The layers a method works at exist in small relatives of the published networks, and every parameter learns."""
    model = make(method, network).train()
    for module in model.modules():      # timm starts the last normalisation of a residual block at 0: its convolutions would wait a step
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    assert gradient_faults(model, pictures(2, 64)) == []


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method):
    with torch.autocast("cpu", torch.bfloat16):
        loss = total(make(method).train(), pictures(), 0)
    assert loss.isfinite() and loss.dtype == torch.float32


def test_layers_are_left_alone_after_an_error():
    """A forward pass that fails inside the block leaves no hook behind, and ADL leaves none on a backbone it shares."""
    network = backbone("mini_cnn", pretrained=False)
    with pytest.raises(ZeroDivisionError), at_layers(network, ["body.block1"], lambda x: 1 / 0):
        network(torch.zeros(1, 3, 32, 32))
    total(make("adl", network).train(), pictures(), 0)
    assert not any(m._forward_hooks for m in network.modules())


@pytest.mark.parametrize("method, wrong, message", [
    ("has", {"drop_rate": 1.5}, "'drop_rate' of has"), ("cutmix", {"beta": 0.}, "'beta' must be above 0"),
    ("cutmix", {"probability": 2.}, "'probability' from 0 to 1"), ("adl", {"threshold": -.1}, "must lie in"),
    ("acol", {"threshold": -1.}, "'threshold' of acol"), ("has", {"grid": 3}, "grid_size"),
])
def test_settings_that_make_no_sense(method, wrong, message):
    with pytest.raises(SettingsError, match=message):
        make(method, **wrong)


def test_networks_without_such_layers():
    for method in ("adl", "spg"):
        with pytest.raises(SettingsError, match="convnext_atto.*ResNetForm"):
            make(method, "convnext_atto")
