"""DiPS end to end on small networks, and everything a training may meet that no picture of the benchmark shows."""
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from wsol_nb import cams
from wsol_nb import dips as chapter
from wsol_nb.comparison import ChosenMap
from wsol_nb.core import SettingsError, generator
from wsol_nb.datasets import FewViews, Images, Item, Split
from wsol_nb.decoders import Remembered
from wsol_nb.dips import SETTINGS, Dips, class_features, harvest_settings, make_dips, make_scorer, train_class_head
from wsol_nb.evaluation import evaluate
from wsol_nb.experiments import CrfSettings, finished, sampling_of, scorer_settings
from wsol_nb.losses import crf_strength
from wsol_nb.models import as_backbone, attention_maps, build
from wsol_nb.proposals import AttentionMaps, Candidates, ProposalImages, Scorer, harvest, join
from wsol_nb.reports import Run, record
from wsol_nb.samplers import UNKNOWN, Sampling, seed_hits
from wsol_nb.training import best_file, fit

CONFIG = replace(SETTINGS["toy"], size=32, resize=36, batch_size=4, epochs=1, crf_weight=0., class_blocks=2, seeds=8, class_epochs=2,
                 num_workers=0, crops=2, more_maps=("seed_expansion",))


def vit(**settings):
    torch.manual_seed(0)
    fixed = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=0, dynamic_img_size=True)
    return as_backbone(VisionTransformer(**fixed | settings))


def dips(n_classes=3, **settings):
    network = vit()
    torch.manual_seed(0)
    return Dips(n_classes, network, **{"class_blocks": 2, "crf": CrfSettings(0.), "sampling": sampling_of(CONFIG)} | settings)


class Colour(nn.Module):
    """How red, green, blue a picture is."""
    def __init__(self):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(9.))

    def forward(self, images):
        return self.sharpness * images.mean((2, 3))


def split_of(folder, count=8, paint=None):
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


def training(split, model, config=CONFIG, kind=FewViews):
    more = {"crops": config.crops} if kind is FewViews else {}
    images = kind(split, config.size, config.resize, True, config.seed, model.backbone.mean, model.backbone.std, **more)
    found = harvest(split, model.attention, Scorer(Colour()), harvest_settings(config), quiet=True)
    return ProposalImages(images, found, config.keep, config.seed)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_training_changes_the_heads_and_nothing_else(tmp_path):
    model = dips()
    before = weights(model)
    fit(model, training(split_of(tmp_path), model), CONFIG)
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"class_head", "localization_head"}


def test_the_same_seed_gives_the_same_scores(tmp_path):
    split, found = split_of(tmp_path), []
    for seed in (0, 0, 1):
        model = dips()
        fit(model, training(split, model, replace(CONFIG, seed=seed)), replace(CONFIG, seed=seed))
        result = evaluate(model, Images(split, 32, mean=model.backbone.mean, std=model.backbone.std), quiet=True)
        found.append((result.scores(), weights(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][k], v) for k, v in found[1][1].items())
    assert not all(torch.equal(found[0][1][k], v) for k, v in found[2][1].items())


def test_remembering_changes_nothing_but_the_time(tmp_path):
    """A cold memory and one that has seen every view give the same weights; without one they differ by rounding only."""
    split, found = split_of(tmp_path), []
    warm = Remembered(None)
    for memory in (Remembered(None), warm, warm, None):
        model = dips()
        model.memory = memory
        history = fit(model, training(split, model), replace(CONFIG, epochs=2))
        found.append((history.rows[-1]["loss"], weights(model)))
    assert found[1][0] == found[0][0] == found[2][0]
    assert all(torch.equal(found[1][1][k], v) for k, v in found[2][1].items())
    assert found[3][0] == pytest.approx(found[0][0], rel=.05)
    assert warm.missed < warm.asked


def test_seeds_lie_where_the_crop_put_the_box(tmp_path):
    """Whatever crop and flip: object seeds of a harvest with a perfect scorer lie in the drawn box of the crop."""
    model = dips(sampling=Sampling(seeds=8, dilation=1, foreground=.5))
    drawn = training(split_of(tmp_path), model)
    for epoch in range(4):
        drawn.set_epoch(epoch)
        batch = torch.utils.data.default_collate([drawn[i] for i in range(len(drawn))])
        seeds = model.seeds(model.encode(batch["image"]), batch)
        x0, y0, x1, y1 = batch["box"].T[:, :, None]
        b, y, x = (seeds == 1).nonzero().T
        assert len(b) and bool(((x >= x0[b, 0]) & (x <= x1[b, 0]) & (y >= y0[b, 0]) & (y <= y1[b, 0])).all())
        hits = seed_hits(seeds, (seeds == 1).long())
        assert hits[0, 0] == hits[0, 1] == len(b)


@pytest.mark.parametrize("paint", [
    lambda i, pixels: np.full_like(pixels, 200) if i % 2 else pixels,                 # one colour
    lambda i, pixels: np.zeros_like(pixels),                                          # all black
    lambda i, pixels: pixels[:5, :7] if i == 0 else pixels,                           # smaller than a patch
], ids=("one colour", "black", "tiny"))
def test_odd_pictures_do_not_stop_a_training(tmp_path, paint):
    model = dips()
    history = fit(model, training(split_of(tmp_path, paint=paint), model), CONFIG)
    assert np.isfinite(history.rows[-1]["loss"])
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 32, 32))
    assert out.maps.isfinite().all()


def test_a_flat_map_is_a_zero_map():
    """A head that says the same everywhere gives a map of zeros, whose box is [0, 0, 0, 0]; nothing raises."""
    model = dips().eval()
    for module in model.localization_head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).maps.abs().max() == 0


def test_boxes_that_cover_the_picture_leave_no_background():
    model = dips().train()
    batch = {"image": torch.randn(2, 3, 32, 32), "raw": torch.rand(2, 3, 32, 32), "label": torch.tensor([0, 1]),
             "box": torch.tensor([[0, 0, 31, 31]] * 2), "boxes": torch.tensor([[[0, 0, 31, 31]]] * 2), "map": torch.tensor([0, 1])}
    assert set(model.seeds(model.encode(batch["image"]), batch).unique().tolist()) == {UNKNOWN, 1}
    sum(model.loss(batch).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.localization_head.parameters())


def test_training_on_boxes_that_cover_every_picture(tmp_path):
    """No background is left to draw from: the map learns "object", nothing becomes NaN and nothing raises."""
    model = dips()
    drawn = training(split_of(tmp_path), model)
    whole = np.array([(0, 0, item.width - 1, item.height - 1) for item in drawn.images.split], np.int32)
    drawn = ProposalImages(drawn.images, join([Candidates(box[None], np.array([0]), np.array([1.])) for box in whole]), CONFIG.keep)
    history = fit(model, drawn, CONFIG)
    assert np.isfinite(history.rows[-1]["loss"])
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_class_with_one_picture(tmp_path):
    """One red, one green and six blue pictures: class head, harvest, training and evaluation take it."""
    items = split_of(tmp_path).items
    split = Split("train", [replace(item, label=min(i, 2)) for i, item in enumerate(items)], ["red", "green", "blue"])
    assert np.bincount(split.labels).tolist() == [1, 1, 6]
    model = dips()
    images = Images(split, 32, 36, True, 0, model.backbone.mean, model.backbone.std)
    train_class_head(model.class_head, *class_features(model, images), epochs=2)
    assert np.isfinite(fit(model, training(split, model), CONFIG).rows[-1]["loss"])
    result = evaluate(model, Images(split, 32, mean=model.backbone.mean, std=model.backbone.std), quiet=True)
    assert 0 <= result.scores()["Top-1 loc"] <= result.scores()["MaxBoxAcc"] <= 100


@pytest.mark.parametrize("damage", (b"", b"not an archive", None), ids=("empty", "text", "cut"))
def test_a_damaged_cache_of_proposals_is_made_again(tmp_path, damage):
    split, model = split_of(tmp_path, count=4), dips()
    scorer, folder = Scorer(Colour()), tmp_path / "kept"
    first = harvest(split, model.attention, scorer, harvest_settings(CONFIG), folder, quiet=True)
    files = list(folder.rglob("*.npz"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:100] if damage is None else damage)
    with pytest.warns(UserWarning, match="is made again"):
        again = harvest(split, model.attention, scorer, harvest_settings(CONFIG), folder, quiet=True)
    assert np.array_equal(first.boxes, again.boxes) and np.array_equal(first.scores, again.scores)
    assert all(file.stat().st_size > 100 for file in folder.rglob("*.npz"))


@pytest.mark.parametrize("network", ("swin", "beit"))
def test_networks_without_a_class_token_of_their_own_can_be_asked_where_they_look(network):
    """Rows EsViT and SimMIM of table 2.4 on tiny networks of random weights: maps of all heads and their mean, one of them chosen."""
    torch.manual_seed(0)
    bodies = {"swin": lambda: SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(1, 2), num_heads=(2, 4),
                                              num_classes=0),
              "beit": lambda: Beit(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=0, use_abs_pos_emb=False,
                                   use_rel_pos_bias=True)}
    asked = AttentionMaps(as_backbone(bodies[network]()).eval(), attention_maps, "all_heads_and_mean")
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = asked(pictures)
        out = ChosenMap(asked, Scorer(Colour()))(pictures, torch.tensor([0, 2]))
    assert found.shape == (2, 5, 32, 32) and found.isfinite().all() and found.amax((2, 3)).allclose(torch.ones(2, 5))
    assert all(any(torch.allclose(out.maps[i], m, atol=1e-5) for m in found[i]) for i in range(2))


def test_a_picture_that_does_not_fit_the_patches_is_a_clear_error():
    with pytest.raises(SettingsError, match="multiples of its patches"):
        dips()(torch.zeros(1, 3, 30, 30))


def test_one_step_at_full_size():
    """ViT-S/16 with random weights, 200 classes, a batch of two at 224 pixels, CRF included."""
    config = replace(SETTINGS["cub"], pretrained=False)
    torch.manual_seed(0)
    model = make_dips(config, 200).train()
    assert model.crf.settings.weight == 2e-9
    box = torch.tensor([[40, 40, 180, 180], [10, 20, 100, 200]])
    batch = {"image": torch.randn(2, 3, 224, 224), "raw": torch.rand(2, 3, 224, 224), "label": torch.tensor([3, 199]), "box": box,
             "boxes": box[:, None], "map": torch.tensor([0, 4])}
    terms = model.loss(batch)
    assert list(terms) == ["seeds", "crf", "cls"]
    sum(terms.values()).backward()
    assert sum(p.grad is not None for p in model.parameters()) == len(list(model.localization_head.parameters())) + 2
    assert all(p.grad is None for p in model.backbone.parameters())


def test_the_crf_term_means_the_same_at_every_size():
    large, small = (make_dips(replace(SETTINGS["toy"], size=size), 3) for size in (96, 48))
    assert small.crf.settings.weight == pytest.approx(16 * large.crf.settings.weight)
    assert crf_strength(96).sigma_xy == 2 * crf_strength(48).sigma_xy


def test_class_head_learns_from_few_views_and_is_frozen(tmp_path):
    split, model = split_of(tmp_path, count=12), dips()
    images = Images(split, 32, 36, True, 0, model.backbone.mean, model.backbone.std)
    features, labels = class_features(model, images, views=2)
    assert features.shape == (24, 96) and features.dtype == torch.float16 and labels.tolist() == [0, 1, 2] * 8
    assert not torch.equal(features[:12], features[12:])
    train_class_head(model.class_head, features, labels, epochs=60, lr=.2)
    assert (model.class_head(features.float()).argmax(1) == labels).float().mean() > .9
    assert [p.requires_grad for p in model.class_head.parameters()] == [False, False]
    assert "cls" not in model.loss(torch.utils.data.default_collate([training(split, model)[i] for i in range(4)]))


def test_scorers():
    assert scorer_settings(SETTINGS["cub"]).backbone == "resnet50"
    assert scorer_settings(SETTINGS["mini_teldrone"]).dataset == "mini_teldrone"
    assert scorer_settings(replace(SETTINGS["folder"], dataset="folder:/x")).dataset == "folder:/x"
    assert scorer_settings(SETTINGS["toy"]).epochs == SETTINGS["toy"].scorer_epochs
    data = type("Few", (), {"classes": ["a", "b"], "key": "toy"})()
    with pytest.raises(SettingsError, match="1,000 classes of ILSVRC, toy has 2"):
        make_scorer(replace(SETTINGS["toy"], scorer="imagenet"), data, dips())
    probe = make_scorer(replace(SETTINGS["toy"], scorer="probe"), data, dips())
    assert probe(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def test_the_chosen_map_ignores_maps_that_are_flat():
    chosen = ChosenMap(dips().attention, Scorer(Colour()))
    out = chosen(torch.randn(3, 3, 32, 32, generator=generator("chosen")))
    assert out.maps.shape == (3, 32, 32) and 0 <= out.maps.min() and out.maps.max() <= 1 + 1e-6


def test_build_knows_dips():
    model = build("dips", 5, vit(), crf=CrfSettings(0.), class_blocks=2)
    out = model(torch.randn(2, 3, 64, 32))
    assert out.logits.shape == (2, 5) and out.maps.shape == (2, 64, 32) and not model.needs_label
    with pytest.raises(SettingsError, match="class_blokcs"):
        build("dips", 5, vit(), class_blokcs=2)


def test_a_finished_run_comes_back(tmp_path, monkeypatch):
    """Figures show methods of other notebooks from their result file and checkpoint; what is not there is None."""
    monkeypatch.setenv("WSOL_REPORTS", str(tmp_path))
    data, run = SimpleNamespace(key="toy", classes=["a", "b"]), Run("cam", "toy")
    assert finished("CAM", "cam", data) is None
    rows = [{"epoch": e, "MaxBoxAcc": 10. + e, "best_threshold": .1 + e} for e in (0, 1)]
    record(run, "full", cams.SETTINGS["toy"], [], 1., history=rows)
    assert finished("CAM", "cam", data) is None                   # a result, but no checkpoint
    model, folder = build("cam", 2, "mini_cnn", pretrained=False), run.checkpoints("full", 0) / "code-data"
    folder.mkdir(parents=True)
    safetensors.torch.save_file(model.state_dict(), best_file(folder, "MaxBoxAcc"))
    found = finished("CAM", "cam", data)
    assert (found.threshold, found.model.training, found.config["dataset"]) == (1.1, False, "toy")
    assert torch.equal(found.model.classifier.weight, model.classifier.weight)


def test_published_files_are_found_in_every_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WSOL_DATA", f"{tmp_path / 'first'}{os.pathsep}{tmp_path / 'second'}")
    asked = {}
    monkeypatch.setattr(chapter, "backbone", lambda name, **settings: asked.update(settings, name=name) or vit())
    with pytest.raises(SettingsError, match="no file checkpoints/moco_v3_vit_base.pth beside the data sets"):
        chapter.zero_shot_maps("MoCoV3")
    file = tmp_path / "second" / "checkpoints" / "moco_v3_vit_base.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    chapter.zero_shot_maps("MoCoV3")
    assert asked == {"name": "vit_base_patch16_224", "pretrained": True, "checkpoint": file}
    chapter.zero_shot_maps("SimMIM", pretrained=False)
    assert asked == {"name": "beit_base_patch16_224", "pretrained": False, "checkpoint": None}
