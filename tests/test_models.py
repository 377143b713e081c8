"""Backbones, methods and counts: what no notebook cell can show, and everything `build` promises about every method."""
import importlib.resources
import importlib.util
import subprocess
import sys
import time

import huggingface_hub
import pytest
import safetensors.torch
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from wsol_nb import models
from wsol_nb.core import Localization, SettingsError
from wsol_nb.models import as_backbone, attention_maps, backbone, build, count, find_method, load_checkpoint, methods

COUNTS = {"resnet50": ((23_917_832, 25_557_032), (19.18, 6.26)),
          "vgg16": ((19_639_304, 20_459_304), (23.21, 16.27)),
          "inception_v3": ((25_687_976, 26_507_976), (20.63, 6.22))}     # averages before it classifies, see models.ipynb


def meta(make, *args, **settings):
    with torch.device("meta"):
        return make(*args, **settings)


def tiny_vit(**settings):
    torch.manual_seed(0)
    return VisionTransformer(**dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3) | settings).eval()


def tiny_eva():
    torch.manual_seed(0)
    return Eva(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, use_rot_pos_emb=True, swiglu_mlp=True,
               num_reg_tokens=2, dynamic_img_size=True).eval()


# --- published counts -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("network", COUNTS)
@pytest.mark.parametrize("large", (True, False))
def test_cam_has_the_published_parameters_and_operations(network, large):
    parameters, macs = COUNTS[network]
    settings = dict(backbone=network, pretrained=False, backbone_settings={"large_map": large})
    model = meta(build, "cam", 200, **settings)
    found = count(model, 224)
    assert (found.parameters, round(found.macs / 1e9, 2)) == (parameters[0], macs[0 if large else 1])
    assert model(torch.zeros(1, 3, 224, 224, device="meta")).maps.shape[1:] == ((28, 28) if large else (14, 14))
    if large:
        assert count(meta(build, "cam", 1000, **settings), 224).parameters == parameters[1]


@pytest.mark.parametrize("n_classes, parameters", [(1000, 25_122_664), (200, 22_357_064)])
def test_ts_cam_has_the_published_parameters(n_classes, parameters):
    model = meta(build, "ts_cam", n_classes, backbone="deit_small_patch16_224", pretrained=False)
    assert count(model, 224).parameters == parameters


def test_dips_has_the_published_parameters_and_operations():
    """1.616 M and 2.396 G: what the model trains for 200 classes, and what it computes beyond its encoder."""
    model = meta(build, "dips", 200, backbone="vit_small_patch16_224.dino", pretrained=False)
    whole, encoder = count(model, 224), count(meta(backbone, "vit_small_patch16_224.dino", pretrained=False), 224)
    assert (whole.trainable, whole.macs - encoder.macs) == (1_616_020, 2_395_709_440)
    assert (whole.parameters - encoder.parameters, whole.products - encoder.products) == (1_616_020, 0)


def test_ted_loc_is_near_the_published_parameters():
    """569.67 M are printed; the reference decoder comes within 0.03 % of them."""
    found = count(meta(build, "ted_loc", 200, pretrained=False, decoder="ref"), 448)
    assert (found.parameters, found.trainable) == (569_799_873, 265_744_641)
    assert found.parameters == pytest.approx(569.67e6, rel=3e-4)


def test_drones_with_their_classifier_have_the_published_parameters_and_operations():
    """58.078 M and 31.895 G."""
    found = count(meta(build, "dips_drone", 1000, backbone="resnet50", pretrained=False), 224)
    assert (found.parameters, found.trainable, found.macs) == (58_078_282, 32_521_250, 31_894_616_064)


def test_frozen_encoder_of_dips():
    encoder = meta(backbone, "vit_small_patch16_224.dino", pretrained=False).requires_grad_(False)
    found = count(encoder, 224)
    assert (found.parameters, found.trainable) == (21_665_664, 0)


def test_counting_leaves_no_trace_even_after_an_error():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout().eval()

        def forward(self, images):
            self.norm(images)
            raise ZeroDivisionError

    model = Breaks()
    with pytest.raises(ZeroDivisionError):
        count(model, 8)
    assert (model.training, model.norm.training, model.dropout.training) == (True, True, False)
    assert not model.norm._forward_hooks and model.norm.num_batches_tracked == 0
    assert torch.backends.mha.get_fastpath_enabled()


# --- every method there is --------------------------------------------------------------------------------------------

def test_known_methods():
    assert "ts_cam" in methods()
    lines = models._shipped_methods()
    for name, target in lines.items():
        module = target.partition(":")[0]
        path = importlib.util.find_spec(module).origin
        assert f'"{target}"' in open(path, encoding="utf-8").read(), f"{name} is registered outside {module}"


@pytest.mark.parametrize("name", methods())
def test_every_method_keeps_the_contract(name):
    method = find_method(name)
    assert isinstance(method.needs_label, bool) and isinstance(method.default_backbone, str)
    for promised in ("forward", "loss", "param_groups"):
        assert callable(getattr(method, promised))


@pytest.mark.parametrize("name", ("cam", "ts_cam"))
def test_methods_stand_on_a_tiny_transformer(name):
    model = build(name, 3, tiny_vit(reg_tokens=4)).eval()
    batch = {"image": torch.randn(2, 3, 32, 32), "label": torch.tensor([0, 2])}
    out = model(batch["image"], batch["label"])
    assert isinstance(out, Localization) and out.logits.shape == (2, 3) and out.maps.shape == (2, 4, 4)
    assert out.maps.min() >= 0 and out.maps.max() <= 1
    loss = model.loss(batch)
    (sum(loss.values()) if isinstance(loss, dict) else loss).backward()
    groups = model.param_groups(lr=.01, weight_decay=0.)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


def test_build_imports_only_what_it_builds():
    code = ("import sys, wsol_nb.models as m; m.methods(); "
            "early = [k for k in sys.modules if k.startswith(('wsol_nb.baselines', 'wsol_nb.cams'))]; "
            "model = m.build('ts_cam', 2, 'mini_sst', pretrained=False); "
            "print(early, type(model).__name__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().splitlines()[-1:] == ["[] TSCAM"], done.stderr


# --- transformers -----------------------------------------------------------------------------------------------------

def test_a_grid_of_any_size_changes_nothing_at_the_native_one():
    fixed, free = as_backbone(tiny_vit()), as_backbone(tiny_vit(dynamic_img_size=True))
    free.load_state_dict(fixed.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(fixed(images), free(images))
    assert free(torch.randn(1, 3, 64, 40)).shape == (1, 48, 8, 5)


@pytest.mark.parametrize("make", (tiny_vit, tiny_eva))
def test_attention_leaves_the_network_as_it_was(make):
    network, images = as_backbone(make()), torch.randn(2, 3, 32, 32)
    before = network(images)
    with attention_maps(network) as outer:
        with attention_maps(network) as inner:
            network(images)
        assert len(inner) == len(outer) == 2
        assert all(torch.equal(a, b) for a, b in zip(inner, outer))
        network(images)
        assert len(outer) == 2, "only the last pass is kept"
    assert torch.equal(network(images), before)
    T = 16 + network.n_prefix
    assert outer[0].shape == (2, 3, T, T)
    assert torch.allclose(outer[0].sum(-1), torch.ones(2, 3, T), atol=1e-5)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())


def test_gradients_flow_through_recorded_attention():
    network = as_backbone(tiny_vit())
    with attention_maps(network) as seen:
        features = network(torch.randn(1, 3, 32, 32))
    gradient = torch.autograd.grad(features.square().sum(), seen[0])[0]
    assert gradient.shape == seen[0].shape and gradient.abs().sum() > 0


def test_registers_and_distillation_tokens_are_no_patches():
    eva = as_backbone(tiny_eva())
    assert (eva.n_prefix, eva.n_registers, eva.has_class_token) == (3, 2, True)
    distilled = meta(backbone, "deit_tiny_distilled_patch16_224", pretrained=False)
    assert (distilled.n_prefix, distilled.n_registers) == (2, 1)
    assert distilled(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 192, 14, 14)


def test_networks_in_their_own_form():
    registered = meta(backbone, "convnext_atto", pretrained=False)
    assert registered(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 320, 7, 7)
    swin = meta(backbone, "swin_tiny_patch4_window7_224", pretrained=False)
    assert swin(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 768, 7, 7)
    assert (swin.stride, swin.input_size) == (32, 224)
    beit = meta(backbone, "beit_base_patch16_224", pretrained=False)
    assert (beit(torch.zeros(1, 3, 224, 224, device="meta")).shape, beit.has_class_token) == ((1, 768, 14, 14), True)
    with pytest.raises(SettingsError, match="not a grid"):
        gmlp = meta(backbone, "gmlp_s16_224", pretrained=False)
        gmlp(torch.zeros(1, 3, 224, 224, device="meta"))


# --- weights ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ("resnet18", "deit_tiny_patch16_224", "open_clip:ViT-B-32"))
def test_no_network_is_a_clear_error_within_seconds(name, monkeypatch, tmp_path):
    monkeypatch.setattr("socket.create_connection", lambda *args, **settings: (_ for _ in ()).throw(OSError("no route")))
    monkeypatch.setattr(models, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(SettingsError) as caught:
        backbone(name)
    assert all(word in str(caught.value) for word in (name, "pretrained=False", "checkpoint=", "HF_HOME"))
    assert time.perf_counter() - start < 15
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_weights_that_are_not_shipped_yet_say_so():
    shipped = importlib.resources.files("wsol_nb") / "weights"
    for name in models.SHIPPED:
        if (shipped / f"{models.DEFAULT_TAGS.get(name, name)}.safetensors").is_file():
            assert backbone(name).name == name
        else:
            with pytest.raises(SettingsError, match="pretrained=False"):
                backbone(name)


def test_checkpoint_of_another_size_is_interpolated_and_of_another_network_refused(tmp_path):
    torch.save(tiny_vit(img_size=64).state_dict(), tmp_path / "large.pt")
    network = as_backbone(tiny_vit())
    load_checkpoint(network, tmp_path / "large.pt")          # 8×8 positions become 4×4
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 48, 4, 4)
    torch.save(tiny_vit(depth=3).state_dict(), tmp_path / "deep.pt")
    with pytest.raises(SettingsError, match=r"12 unknown: blocks\.2\."):
        load_checkpoint(network, tmp_path / "deep.pt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1), "object": nn.Linear(1, 1)}, tmp_path / "objects.pt")
    with pytest.raises(SettingsError, match="tensors only"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "objects.pt")


def test_half_precision_checkpoints_fill_float_networks(tmp_path):
    network = backbone("mini_cnn", pretrained=False)
    half = {k: v.half() if v.is_floating_point() else v for k, v in network.body.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    other = backbone("mini_cnn", checkpoint=tmp_path / "half.safetensors")
    assert next(other.parameters()).dtype == torch.float32
    assert torch.equal(next(other.parameters()), next(network.parameters()).half().float())
