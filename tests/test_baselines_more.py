"""NL-CCAM, TS-CAM, SCM, SAT and F-CAM: what they promise alike, on backbones and in situations their notebooks do not show."""
import copy
import importlib
from dataclasses import replace

import pytest
import torch
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from wsol_nb.core import SettingsError
from wsol_nb.experiments import gradient_faults, model_of
from wsol_nb.models import as_backbone, build

NETWORK = {"nl_ccam": "mini_cnn", "ts_cam": "mini_sst", "scm": "mini_sst", "sat": "mini_sst", "f_cam": "mini_cnn"}
FIELD = {"nl_ccam": "vgg16", "ts_cam": "deit_small_patch16_224", "scm": "deit_small_patch16_224", "sat": "deit_small_patch16_224",
         "f_cam": "resnet50"}
LABELLED, MAPS = ("ts_cam", "scm"), {"f_cam": 48}       # maps of a class; side of the maps of 48 pixels, else 6
DATA = ["toy", "toy_masks", "mini_cub", "mini_ilsvrc", "mini_openimages", "mini_teldrone", "photos", "folder", "cub", "ilsvrc", "openimages",
        "teldrone"]


def make(method, network=None, **settings):
    torch.manual_seed(0)
    return build(method, 3, network or NETWORK[method], pretrained=False, **settings)


def tiny_vit(**settings):
    torch.manual_seed(0)
    return as_backbone(VisionTransformer(**dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, reg_tokens=4) | settings))


def tiny_vgg():
    return as_backbone(VGG([8, "M", 16, "M", 16, "M", 24, "M", 512, "M"], mlp_ratio=.01), large_map=False, name="tiny_vgg")


def pictures(count=4, side=48):
    torch.manual_seed(1)
    raw = torch.rand(count, 3, side, side)
    return {"image": (raw - .5) / .25, "raw": raw, "label": torch.arange(count) % 3}


def total(model, batch, seed=0):
    torch.manual_seed(seed)
    loss = model.loss(batch)
    return sum(loss.values()) if isinstance(loss, dict) else loss


def faults(model, batch):
    """Without the biases of non-local blocks that cannot matter, see the notebook."""
    idle = lambda name: name.startswith("blocks.") and name.endswith(("key.bias", "value.bias", "mix.bias"))
    return [name for name in gradient_faults(model, batch) if not idle(name)]


def awake(model):
    """Normalisations that start at 0 hide what stands before them from the first gradient."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


@pytest.mark.parametrize("method", NETWORK)
def test_rows_for_every_data_set(method):
    """A row per data set whose model can be built; masks are judged by PxAP, a user's folder without boxes."""
    rows = importlib.import_module(f"wsol_nb.baselines.{method}").SETTINGS
    assert set(DATA) <= set(rows)
    assert {k for k, c in rows.items() if c.select == "PxAP"} - {"mini_glas", "mini_camelyon"} == {"toy_masks", "mini_openimages", "openimages"}
    assert rows["folder"].select == "cls"
    assert {k: rows[k].backbone for k in ("toy", "mini_cub", "cub", "ilsvrc")} == {
        "toy": NETWORK[method], "mini_cub": NETWORK[method], "cub": FIELD[method], "ilsvrc": FIELD[method]}
    with torch.device("meta"):
        for key in ("toy", "cub"):
            model = model_of(method, replace(rows[key], pretrained=False), 3)
            assert model.backbone.name == rows[key].backbone
            assert model(torch.zeros(1, 3, rows[key].size, rows[key].size)).logits.shape == (1, 3)


@pytest.mark.parametrize("method", NETWORK)
def test_answers(method):
    """Maps in [0, 1] that do not depend on the other pictures, and on the label only where the method says so."""
    model, batch, side = make(method).eval(), pictures(), MAPS.get(method, 6)
    assert model.needs_label == (method in LABELLED)
    with torch.no_grad():
        out, again = (model(batch["image"], batch["label"]) for _ in range(2))
        alone, own = model(batch["image"][:1], batch["label"][:1]), model(batch["image"])
        named, other = (model(batch["image"], labels) for labels in (own.logits.argmax(1), (batch["label"] + 1) % 3))
        assert torch.allclose(model.logits(batch["image"]), out.logits, atol=1e-5)
    assert out.logits.shape == (4, 3) and out.maps.shape == (4, side, side)
    assert 0 <= out.maps.min() and out.maps.max() <= 1 and out.maps.flatten(1).std(1).min() > 0
    assert torch.equal(out.maps, again.maps) and torch.equal(own.maps, named.maps)
    assert torch.allclose(alone.maps, out.maps[:1], atol=1e-4)
    assert torch.equal(out.maps, other.maps) != model.needs_label


@pytest.mark.parametrize("method", NETWORK)
def test_the_loss_leaves_the_batch_alone(method):
    """One seed, one loss; what was handed in is as before; only F-CAM draws; one picture is enough; no hook stays behind."""
    model, batch = make(method).train(), pictures()
    before = {name: value.clone() for name, value in batch.items()}
    losses = [total(copy.deepcopy(model), batch, seed).item() for seed in (0, 0, 1, 2)]
    assert losses[0] == losses[1]
    assert (len(set(losses)) > 1) == (method == "f_cam")
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    assert total(model, pictures(1)).isfinite()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method, network", [("nl_ccam", tiny_vgg), ("nl_ccam", "resnet18"), ("f_cam", "resnet18"), ("scm", tiny_vit), ("sat", tiny_vit)])
def test_gradients_on_other_networks(method, network):
    """Small relatives of the published networks; for transformers one with registers between class token and patches."""
    model = awake(make(method, network() if callable(network) else network)).train()
    assert faults(model, pictures(2, 32 if network is tiny_vit else 64)) == []


@pytest.mark.parametrize("method", NETWORK)
def test_half_precision(method):
    with torch.autocast("cpu", torch.bfloat16):
        model = make(method)
        loss, out = total(model.train(), pictures()), model.eval()(pictures()["image"])
    assert loss.isfinite() and loss.dtype == torch.float32 and out.maps.isfinite().all()


@pytest.mark.parametrize("method", NETWORK)
def test_weights_come_back(method):
    """What a checkpoint holds is all that a map depends on."""
    model, twin, batch = make(method).eval(), build(method, 3, NETWORK[method], pretrained=False).eval(), pictures()
    with torch.no_grad():
        assert not torch.equal(twin(batch["image"]).logits, model(batch["image"]).logits)
        twin.load_state_dict(copy.deepcopy(model.state_dict()))
        assert all(torch.equal(a, b) for a, b in zip(twin(batch["image"]), model(batch["image"])))


def test_vgg_of_nl_ccam_leaks():
    """No convolution besides VGG's own, no plain ReLU, blocks at the last four groups."""
    model = make("nl_ccam", tiny_vgg())
    assert [type(m).__name__ for m in model.backbone.modules() if "ReLU" in type(m).__name__] == ["LeakyReLU"] * 5
    assert [block.value.in_channels for block in model.blocks] == [16, 16, 24, 512] and model.classifier.in_features == 512
    assert model(torch.randn(1, 3, 64, 64)).maps.shape == (1, 4, 4)


def test_spatial_token_is_alone_at_any_size():
    """SAT on registers and on pictures of another size and shape: the map has the patches of the picture and nothing else."""
    model = make("sat", tiny_vit(dynamic_img_size=True), blocks=2).eval()
    with torch.no_grad():
        out = model(torch.randn(2, 3, 40, 64))
    assert out.maps.shape == (2, 5, 8) and list(model.weighted) == [1, 2]


def test_f_cam_learns_nothing_about_classes():
    """Neither weights nor running means of the classifier change in training, whatever mode is asked for."""
    model, batch = make("f_cam").train(), pictures()
    before = model.logits(batch["image"])
    optimizer = torch.optim.SGD(model.param_groups(.1, .1))
    for _ in range(2):
        total(model, batch).backward()
        optimizer.step()
    assert torch.equal(model.logits(batch["image"]), before)
    flat = {**batch, "image": torch.zeros_like(batch["image"])}          # flat maps give background seeds at most
    assert total(model, flat).isfinite()


@pytest.mark.parametrize("method, wrong, message", [
    ("nl_ccam", {"top": 0}, "'top' of nl_ccam"), ("sat", {"area_threshold": 1.5}, "'area_threshold' of sat"), ("sat", {"blocks": 0}, "at least one"),
    ("f_cam", {"erosion": 10}, "an odd number"), ("f_cam", {"seed_maps": "grad_cam"}, "layer_cam"),
    ("f_cam", {"background": 2.}, "between 0 and 1"), ("scm", {"step": 3}, "steps"),
])
def test_settings_that_make_no_sense(method, wrong, message):
    with pytest.raises(SettingsError, match=message):
        make(method, **wrong)


def test_networks_without_such_layers():
    for method, network, message in (("nl_ccam", "convnext_atto", "VggForm"), ("f_cam", "mini_sst", "resnet or mini_cnn"),
                                     ("scm", "mini_cnn", "class token"), ("sat", "mini_cnn", "class token")):
        with pytest.raises(SettingsError, match=message):
            make(method, network)
