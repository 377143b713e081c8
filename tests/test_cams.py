"""What the cells of chapter 1 cannot show: published sizes, many architectures, models left as they were after errors"""

import warnings

import cv2
import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from wsol_nb import models
from wsol_nb.cams import CAM
from wsol_nb.cam_family import (METHODS, Query, ZeroShot, default_layer, excitation_shares_at, explain, layer_name, left_as_found,
                          token_grid)
from wsol_nb.core import SettingsError

warnings.filterwarnings("ignore", category=UserWarning)
FAST = {"ss_cam": {"n_noisy": 2, "max_channels": 3}, "is_cam": {"steps": 2, "max_channels": 3}, "score_cam": {"max_channels": 3},
        "smooth_grad_cam_pp": {"n_noisy": 2}}


def vit(**settings):
    return VisionTransformer(**dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5) | settings)


def state(model):
    "Everything an explanation must leave alone"
    hooks = [len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    return ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
            [p.grad is None for p in model.parameters()], hooks, [v.clone() for v in model.state_dict().values()])


def same(before, after):
    return before[:4] == after[:4] and all(torch.equal(a, b) for a, b in zip(before[4], after[4]))


# ---------------------------------------------------------------- CAM

@pytest.mark.parametrize("name, n_classes, count", [
    ("resnet50", 200, 23_917_832), ("resnet50", 1000, 25_557_032), ("vgg16", 200, 19_639_304), ("vgg16", 1000, 20_459_304),
    ("inception_v3", 200, 25_687_976), ("inception_v3", 1000, 26_507_976)])
def test_parameters(name, n_classes, count):
    with torch.device("meta"):
        model = CAM(n_classes, models.backbone(name, pretrained=False))
        answer = model(torch.zeros(2, 3, 224, 224), torch.zeros(2, dtype=torch.long))
    assert sum(p.numel() for p in model.parameters()) == count
    assert answer.logits.shape == (2, n_classes) and answer.maps.shape == (2, 28, 28)


@pytest.mark.parametrize("name, size", [("mini_cnn", 48), ("resnet50", 32), ("inception_v3", 80)])
def test_mean_of_the_map_is_the_logit(name, size):
    torch.manual_seed(0)
    model = CAM(4, models.backbone(name, pretrained=False)).eval().double()      # random Inception logits are in the 100,000s
    images = torch.randn(2, 3, size, size, dtype=torch.double)
    with torch.no_grad():
        logits = model.logits(images)
        for c in range(4):
            mean = model.raw_maps(images, torch.tensor([c, c])).mean((1, 2)) + model.classifier.bias[c]
            assert torch.allclose(mean, logits[:, c], atol=1e-5)
        answer = model(images)
        assert torch.equal(answer.maps, model(images, logits.argmax(1)).maps)      # without labels: the predicted class


def test_parameter_groups_cover_every_parameter_once():
    model = CAM(4, models.backbone("mini_cnn", pretrained=False))
    groups = model.param_groups(.01, 1e-4)
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters())
    fast = next(group for group in groups if any(p is model.classifier.weight for p in group["params"]))
    assert fast["lr"] == pytest.approx(.1)


# ---------------------------------------------------------------- the gradient family

@pytest.mark.parametrize("name, package", [("grad_cam", "GradCAM"), ("xgrad_cam", "XGradCAM"), ("layer_cam", "LayerCAM")])
def test_equal_to_the_whole_package(name, package):
    "Our reading and the package's own pipeline, enlarged in the package's way"
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    torch.manual_seed(0)
    model, images = torchvision.models.resnet18(num_classes=6).eval(), torch.randn(2, 3, 128, 96)
    engine = getattr(pytorch_grad_cam, package)(model, [model.layer4])
    expected = engine(images, [ClassifierOutputTarget(1), ClassifierOutputTarget(4)])
    engine.activations_and_grads.release()
    ours = explain(name, model, images, [1, 4]).numpy()
    for a, b in zip(ours, expected):
        large = cv2.resize(a, (96, 128))
        assert np.abs((large - large.min()) / (large - large.min()).max() - b).max() < 1e-4


ZOO = {   # timm name: settings, size, default layer, map
    "resnet18": ({}, 64, "layer4", (2, 2)),
    "convnext_atto": ({}, 64, "stages", (2, 2)),
    "mobilenetv3_small_050": ({}, 64, "blocks", (2, 2)),
    "densenet121": ({}, 64, "features", (2, 2)),
    "regnetx_002": ({}, (64, 96), "s4", (2, 3)),
    "pvt_v2_b0": ({}, 64, "stages", (2, 2)),
    "vit_tiny_patch16_224": ({"depth": 2}, 224, "blocks.1.norm1", (14, 14)),
    "vit_small_patch14_reg4_dinov2": ({"depth": 2, "img_size": (70, 98)}, (70, 98), "blocks.1.norm1", (5, 7)),
    "deit_tiny_distilled_patch16_224": ({"depth": 2}, 224, "blocks.1.norm1", (14, 14)),
    "eva02_tiny_patch14_224": ({"depth": 2}, 224, "blocks.1.norm1", (16, 16)),
    "vit_tiny_r_s16_p8_224": ({"depth": 2}, 224, "blocks.1.norm1", (7, 7)),         # a CNN stem under the transformer
    "cait_xxs24_224": ({"depth": 2}, 224, "blocks_token_only.1.norm1", (14, 14)),    # class token joins late
    "swin_tiny_patch4_window7_224": ({"depths": (1, 1, 1, 1)}, 224, "layers.3.blocks.0.norm1", (7, 7)),
    "nest_tiny": ({}, 224, "levels", (14, 14)),                                      # blocks of tokens: not a grid
}


@pytest.mark.parametrize("name", ZOO)
def test_default_layer(name):
    settings, size, layer, grid = ZOO[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **settings)
    images = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    before = state(model)
    maps = explain("grad_cam", model, images)
    assert same(before, state(model)) and maps.shape[1:] == grid
    assert layer_name(model, default_layer(model.eval(), images[:1])) == layer


def test_methods_of_this_package():
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    for backbone, grid in [(models.backbone("mini_cnn", pretrained=False), (4, 4)), (models.as_backbone(vit(reg_tokens=2)), (4, 4))]:
        model = CAM(5, backbone)
        for name in METHODS:
            if "excitation" in name and hasattr(backbone, "tokens"):
                continue
            before = state(model)
            maps = explain(name, model, images, [0, 1], **FAST.get(name, {}))
            assert same(before, state(model)) and maps.shape[1:] == grid and 0 <= maps.min() and maps.max() <= 1


def test_open_clip():
    import open_clip
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(
        embed_dim=16, vision_cfg=dict(image_size=(32, 48), layers=2, width=32, patch_size=8, head_width=16),
        text_cfg=dict(context_length=8, vocab_size=16, width=16, heads=2, layers=1))
    model = ZeroShot(clip, torch.randn(3, 16)).eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        cosine = model(images) / clip.logit_scale.exp()
    assert cosine.abs().max() <= 1 + 1e-5
    for name in ("grad_cam", "grad_cam_pp", "xgrad_cam", "layer_cam", "score_cam"):
        assert explain(name, model, images, 1, **FAST.get(name, {})).shape == (2, 4, 6)


def test_pruned_tokens_are_refused():
    "144 of 196 patches would fold to 12×12, in the wrong places"
    with pytest.raises(SettingsError, match="145 tokens do not fit a 224×224 picture.*14×14 with 1 or 0 more"):
        token_grid(VisionTransformer(embed_dim=24, depth=1, num_heads=3), 145, (224, 224))


@pytest.mark.parametrize("call", [
    dict(method="grad_cam", layer="head"), dict(method="grad_cam", labels=[7, 0]), dict(method="excitation_bp", layer="blocks.0.norm1"),
    dict(method="score_cam", form="nonsense"), dict(method="is_cam", layer="fc_norm")])
def test_model_is_left_as_found_after_an_error(call):
    model = vit().train()
    model.head.weight.requires_grad_(False)
    before = state(model)
    with pytest.raises((SettingsError, ValueError)):
        explain(call.pop("method"), model, torch.randn(2, 3, 32, 32), **call)
    assert same(before, state(model))


def test_gradients_of_the_user_survive():
    model = CAM(3, models.backbone("mini_cnn", pretrained=False))
    images = torch.randn(2, 3, 32, 32)
    model.loss({"image": images, "label": torch.tensor([0, 1])}).backward()
    stored = [p.grad.clone() for p in model.parameters()]
    for name in METHODS:
        explain(name, model, images, **FAST.get(name, {}))
    assert all(torch.equal(p.grad, kept) for p, kept in zip(model.parameters(), stored))


def test_result_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    model, images = CAM(3, models.backbone("mini_cnn", pretrained=False)), torch.randn(3, 3, 32, 32)
    for name in METHODS:
        together = explain(name, model, images, [0, 1, 2], **FAST.get(name, {}))
        alone = torch.cat([explain(name, model, images[i:i + 1], [i], **FAST.get(name, {})) for i in range(3)])
        assert torch.allclose(together, alone, atol=1e-4), name


def test_frozen_part_without_gradients_is_named():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            with torch.no_grad():
                features = self.encoder(x)
            return self.head(features.mean((2, 3)))
    with pytest.raises(SettingsError, match="do not depend on layer 'encoder'"):
        explain("grad_cam", Frozen(), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("name, layer", [("resnet18", "layer3"), ("vgg11_bn", "features.20"), ("densenet121", "features.denseblock4"),
                                         ("inception_v3", "Mixed_7b")])
def test_excitation_shares_never_grow(name, layer):
    "What reaches a layer is a probability: not negative, at most 1 in sum, and not nothing"
    torch.manual_seed(0)
    settings = {"init_weights": True} if name == "inception_v3" else {}
    model = getattr(torchvision.models, name)(num_classes=5, **settings).eval()
    images = torch.rand(2, 3, *((128, 128) if name == "inception_v3" else (64, 64)))
    with left_as_found(model):
        shares, weighted = excitation_shares_at(Query(model, images, torch.tensor([0, 3]), model.get_submodule(layer)))
    total = shares.sum((1, 2, 3))
    assert weighted > 0 and shares.min() >= 0 and (total <= 1 + 1e-3).all() and (total > .05).all()
    assert explain("contrastive_excitation_bp", model, images, layer=layer).isfinite().all()
