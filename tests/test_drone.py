"""The three terms of appendix I on small networks, and training end to end."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from wsol_nb.core import SettingsError
from wsol_nb.datasets import Images, Item, Split
from wsol_nb.drone import SETTINGS, VARIANTS, DipsDrone, harvest_settings, make_drone
from wsol_nb.models import as_backbone, attention_maps, backbone, build
from wsol_nb.proposals import AttentionMaps, ProposalImages, Scorer, harvest
from wsol_nb.samplers import Sampling
from wsol_nb.training import fit

CONFIG = replace(SETTINGS["toy"], size=32, resize=36, batch_size=4, epochs=1, crf_weight=0., seeds=8, crops=0)


class Colour(nn.Module):
    """How red, green, blue a picture is."""
    def __init__(self):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(9.))

    def forward(self, images):
        return self.sharpness * images.mean((2, 3))


def vit(**settings):
    torch.manual_seed(0)
    fixed = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=4, num_classes=0, dynamic_img_size=True)
    return as_backbone(VisionTransformer(**fixed | settings))


def drone(**settings):
    attention = AttentionMaps(vit(), attention_maps)
    torch.manual_seed(0)
    return DipsDrone(3, backbone("mini_cnn", pretrained=False), Colour(), attention,
                     **{"crf_weight": 0., "sampling": Sampling(seeds=8, exclude="none")} | settings).train()


def batch_of(count=3, size=32):
    torch.manual_seed(1)
    box = torch.tensor([[2, 2, 20, 20]] * count)
    return {"image": torch.randn(count, 3, size, size), "raw": torch.rand(count, 3, size, size), "label": torch.arange(count) % 3,
            "box": box, "boxes": box[:, None], "map": torch.zeros(count, dtype=torch.long)}


def split_of(folder, count=6):
    items = []
    for i in range(count):
        draws = np.random.default_rng(i)
        pixels = draws.integers(90, 130, (40, 48, 3), np.uint8)
        x, y = draws.integers(0, 20, 2)
        pixels[y:y + 18, x:x + 18] = np.eye(3)[i % 3] * 255
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        items.append(Item(path.name, i % 3, 48, 40, np.array([(x, y, x + 17, y + 17)]), path))
    return Split("train", items, ["red", "green", "blue"])


def gradients(mask):
    model = drone(mask=mask)
    model.loss(batch_of())["cls"].backward()
    return {name: float(p.grad.abs().sum()) for name, p in model.localizer.named_parameters()}


def test_class_term_reaches_every_stage_of_the_localizer_through_the_predicted_map():
    found = gradients("predicted")
    for stage in ("encoder.body.stem", "encoder.body.block1", "encoder.body.block3", "blocks.0", "blocks.3", "out"):
        assert sum(v for name, v in found.items() if name.startswith(stage)) > 0, stage


def test_class_term_of_the_official_scripts_has_no_gradient():
    assert set(gradients("attention").values()) == {0.}


def test_class_term_is_the_classifier_on_the_masked_picture():
    model, batch = drone(), batch_of()
    model.eval()
    mask = model.localizer(batch["image"]).softmax(1)[:, 1:]
    expected = nn.functional.cross_entropy(model.classifier(batch["image"] * mask), batch["label"])
    assert model.class_term(batch["image"], batch["label"], mask[:, 0], None).item() == pytest.approx(expected.item(), abs=1e-6)


def test_training_moves_the_localizer_alone(tmp_path):
    split, model = split_of(tmp_path), drone()
    images = Images(split, CONFIG.size, CONFIG.resize, True, 0, model.backbone.mean, model.backbone.std)
    found = harvest(split, model.attention, Scorer(Colour()), harvest_settings(CONFIG), quiet=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    transformer = {k: v.clone() for k, v in model.attention.backbone.state_dict().items()}
    history = fit(model, ProposalImages(images, found, 3), CONFIG)
    assert np.isfinite(history.rows[-1]["loss"])
    assert {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])} == {"localizer"}
    assert all(torch.equal(v, transformer[k]) for k, v in model.attention.backbone.state_dict().items())


def test_the_transformer_is_no_part_of_the_model():
    assert not any("attention" in name for name in drone().state_dict())
    model = DipsDrone(3, backbone("mini_cnn", pretrained=False), Colour(), crf_weight=0.)
    assert model.eval()(torch.randn(1, 3, 40, 56)).maps.shape == (1, 40, 56)
    with pytest.raises(SettingsError, match="give it `attention`"):
        model.loss(batch_of())


def test_a_transformer_with_its_own_normalisation_sees_its_own_picture():
    """The same raw picture, whatever the localizer's mean: maps follow the transformer's statistics."""
    model, batch = drone(), batch_of()
    model.attention.backbone.mean = (.5, .5, .5)
    batch["image"] = torch.full_like(batch["image"], 7.)              # must not be looked at
    expected = model.attention((batch["raw"] - .5) / torch.tensor(model.attention.backbone.std).view(3, 1, 1), batch["map"])
    assert torch.allclose(model.attended(batch), expected, atol=1e-5)


def test_settings_make_models():
    for name in ("no_cls", "no_crf", "code_mask"):
        model = make_drone(replace(SETTINGS["toy"], **VARIANTS[name]), 3, Colour())
        terms = model.loss(batch_of(2, 96))
        assert set(terms) == {"seeds", "cls", "crf"} - ({"no_cls": {"cls"}, "no_crf": {"crf"}}.get(name, set()))
    with torch.device("meta"):
        large = build("dips_drone", 2, pretrained=False)
    assert sum(p.numel() for p in large.parameters() if p.requires_grad) == 32_521_250
