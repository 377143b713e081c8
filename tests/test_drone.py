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
from wsol_nb.drone import SETTINGS, VARIANTS, DipsDrone, NamedBy, harvest_settings, make_drone
from wsol_nb.evaluation import evaluate
from wsol_nb.experiments import CrfSettings, MapSettings, remembering, seed_precision
from wsol_nb.models import as_backbone, backbone, build
from wsol_nb.proposals import Candidates, ProposalImages, Scorer, harvest, join
from wsol_nb.samplers import UNKNOWN, Sampling
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
    attention = MapSettings().of(vit())
    torch.manual_seed(0)
    return DipsDrone(3, backbone("mini_cnn", pretrained=False), Colour(), attention,
                     **{"crf": CrfSettings(0.), "sampling": Sampling(seeds=8, exclude="none")} | settings).train()


def batch_of(count=3, size=32):
    torch.manual_seed(1)
    box = torch.tensor([[2, 2, 20, 20]] * count)
    return {"image": torch.randn(count, 3, size, size), "raw": torch.rand(count, 3, size, size), "label": torch.arange(count) % 3,
            "box": box, "boxes": box[:, None], "map": torch.zeros(count, dtype=torch.long)}


def split_of(folder, count=6, paint=None):
    """Noise with a coloured square each; `paint` may change the pixels of picture i."""
    items = []
    for i in range(count):
        draws = np.random.default_rng(i)
        pixels = draws.integers(90, 130, (40, 48, 3), np.uint8)
        x, y = draws.integers(0, 20, 2)
        pixels[y:y + 18, x:x + 18] = np.eye(3)[i % 3] * 255
        pixels = pixels if paint is None else paint(i, pixels)
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        items.append(Item(path.name, i % 3, pixels.shape[1], pixels.shape[0], np.array([(x, y, x + 17, y + 17)]), path))
    return Split("train", items, ["red", "green", "blue"])


def training(split, model, proposals=None):
    images = Images(split, CONFIG.size, CONFIG.resize, True, 0, model.backbone.mean, model.backbone.std)
    found = proposals or harvest(split, model.attention, Scorer(Colour()), harvest_settings(CONFIG), quiet=True)
    return ProposalImages(images, found, 3)


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
    before = {k: v.clone() for k, v in model.state_dict().items()}
    transformer = {k: v.clone() for k, v in model.attention.backbone.state_dict().items()}
    history = fit(model, training(split, model), CONFIG)
    assert np.isfinite(history.rows[-1]["loss"])
    assert {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])} == {"localizer"}
    assert all(torch.equal(v, transformer[k]) for k, v in model.attention.backbone.state_dict().items())


def test_the_transformer_is_no_part_of_the_model():
    assert not any("attention" in name for name in drone().state_dict())
    model = DipsDrone(3, backbone("mini_cnn", pretrained=False), Colour(), crf=CrfSettings(0.))
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


@pytest.mark.parametrize("paint", [
    lambda i, pixels: np.full_like(pixels, 200) if i % 2 else pixels,                 # one colour
    lambda i, pixels: np.zeros_like(pixels),                                          # all black
    lambda i, pixels: pixels[:5, :7] if i == 0 else pixels,                           # smaller than a patch
], ids=("one colour", "black", "tiny"))
def test_odd_pictures_do_not_stop_a_training(tmp_path, paint):
    model = drone()
    history = fit(model, training(split_of(tmp_path, paint=paint), model), CONFIG)
    assert np.isfinite(history.rows[-1]["loss"])
    assert all(p.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 32, 32)).maps.isfinite().all()


def test_training_on_boxes_that_cover_every_picture(tmp_path):
    """Unlike in chapter 2 background may come from inside a box: seeds of both kinds are left, and nothing becomes NaN."""
    split, model = split_of(tmp_path), drone()
    whole = [np.array([(0, 0, item.width - 1, item.height - 1)], np.int32) for item in split]
    drawn = training(split, model, join([Candidates(box, np.array([0]), np.array([1.])) for box in whole]))
    batch = torch.utils.data.default_collate([drawn[i] for i in range(3)])
    assert set(model.pixel_labels(batch).unique().tolist()) == {UNKNOWN, 0, 1}
    assert np.isfinite(fit(model, drawn, CONFIG).rows[-1]["loss"])
    assert all(p.isfinite().all() for p in model.parameters())


def test_pictures_without_boxes_and_a_class_with_one_picture(tmp_path):
    """As on drone pictures: one red site, and green and blue pictures of which no true box is known."""
    items = split_of(tmp_path).items
    split = Split("train", [replace(item, label=min(i, 1), boxes=item.boxes if i == 0 else item.boxes[:0]) for i, item in enumerate(items)],
                  ["red", "green", "blue"])
    assert np.bincount(split.labels).tolist() == [1, 5]
    model = drone(empty_class=1)
    drawn = training(split, model)
    assert np.isfinite(fit(model, drawn, CONFIG).rows[-1]["loss"])
    right = seed_precision(model, drawn, batch_size=2)                # of the red picture alone
    assert all(0 <= share <= 100 for share in right)
    result = evaluate(model, Images(split, 32, mean=model.backbone.mean, std=model.backbone.std), quiet=True)
    assert 0 <= result.scores()["MaxBoxAcc"] <= 100


@pytest.mark.parametrize("damage", (b"", None), ids=("empty", "cut"))
def test_a_damaged_cache_of_proposals_is_made_again(tmp_path, damage):
    split, model = split_of(tmp_path, count=3), drone()
    about = model.attention, Scorer(Colour()), harvest_settings(CONFIG), tmp_path / "kept"
    first = harvest(split, *about, quiet=True)
    for file in (tmp_path / "kept").rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:100] if damage is None else damage)
    with pytest.warns(UserWarning, match="is made again"):
        again = harvest(split, *about, quiet=True)
    assert np.array_equal(first.boxes, again.boxes) and np.array_equal(first.scores, again.scores)


def test_the_same_seed_gives_the_same_scores(tmp_path):
    split, found = split_of(tmp_path), []
    for seed in (0, 0, 1):
        model = drone()
        fit(model, training(split, model), replace(CONFIG, seed=seed))
        found.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(found[0][k], v) for k, v in found[1].items())
    assert not all(torch.equal(found[0][k], v) for k, v in found[2].items())


def test_remembered_attention_gives_the_same_seeds(tmp_path):
    """Half precision moves a map by rounding; a memory that has seen a picture gives its first answer again."""
    model, memories = drone(), {}
    remembering(model, replace(CONFIG, remember=.01), memories)
    other = remembering(drone(), replace(CONFIG, remember=.02), memories)
    assert other.memory is model.memory and model.memory.limit == 2e7
    plain, first, again = drone().attended(batch_of()), model.attended(batch_of()), other.attended(batch_of())
    assert torch.equal(first, again) and torch.allclose(plain, first, atol=.01)
    assert (model.memory.asked, model.memory.missed) == (6, 3)


def test_any_classifier_names_the_same_boxes(tmp_path):
    """Table I-5 with another classifier: boxes stay, names change."""
    split, model = split_of(tmp_path), drone().eval()
    images = Images(split, 32, mean=model.backbone.mean, std=model.backbone.std)
    named = NamedBy(model, build("cam", 3, "mini_cnn", pretrained=False).eval())
    ours, theirs = (evaluate(m, images, quiet=True) for m in (model, named))
    assert ours.scores()["MaxBoxAcc"] == theirs.scores()["MaxBoxAcc"]
    assert not torch.equal(ours.logits, theirs.logits)
    with pytest.raises(SettingsError, match="depend on a class"):
        NamedBy(build("cam", 3, "mini_cnn", pretrained=False), model)


def test_one_step_at_full_size():
    """ResNet50 U-Net, ViT-S/16 and a ResNet50 classifier with random weights: a training step at 224 pixels, CRF included."""
    torch.manual_seed(0)
    model = make_drone(replace(SETTINGS["cub"], pretrained=False), 200, "resnet50").train()
    assert (model.crf.settings, model.attention.backbone.channels) == (CrfSettings(2e-9, 15., 100.), 384)
    box = torch.tensor([[40, 40, 180, 180]])
    batch = {"image": torch.randn(1, 3, 224, 224), "raw": torch.rand(1, 3, 224, 224), "label": torch.tensor([199]), "box": box,
             "boxes": box[:, None], "map": torch.tensor([4])}
    terms = model.loss(batch)
    assert list(terms) == ["seeds", "cls", "crf"] and all(term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.localizer.parameters() if p.requires_grad)
    assert all(p.grad is None for p in (*model.classifier.parameters(), *model.attention.backbone.parameters()))
