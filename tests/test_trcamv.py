"""TrCAM-V on small networks: what it is taught by, what it reads, and training end to end."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from wsol_nb.clip_cache import PseudoImages, PseudoMaps, as_records, pseudo_maps
from wsol_nb.core import SettingsError
from wsol_nb.datasets import Images, Item, Split
from wsol_nb.frames import PixelLosses, RegionRule, ShotFrames
from wsol_nb.mini_clip import tokenizer_of
from wsol_nb.models import as_backbone, build
from wsol_nb.trcamv import SETTINGS, VARIANTS, ClipSegMaps, Probe, TrCamV, load_clipseg, prepare_class_head
from wsol_nb.training import fit

CONFIG = replace(SETTINGS["toy_video"], size=32, resize=36, batch_size=4, epochs=1, class_epochs=1, crf_weight=0., seeds=4)


def tiny(n_classes=3, **settings):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=0, dynamic_img_size=True)
    return TrCamV(n_classes, as_backbone(vit), **{"class_blocks": 2, "rule": RegionRule(seeds=4), "losses": PixelLosses(crf=0.)} | settings)


def split_of(folder, shots=4, frames=3):
    items = []
    for k in range(shots * frames):
        draws = np.random.default_rng(k)
        pixels = draws.integers(90, 130, (40, 48, 3), np.uint8)
        x, y = draws.integers(0, 20, 2)
        pixels[y:y + 18, x:x + 18] = np.eye(3)[k // frames % 3] * 255
        path = folder / f"{k}.png"
        Image.fromarray(pixels).save(path)
        items.append(Item(path.name, k // frames % 3, 48, 40, np.array([[x, y, x + 17, y + 17]]), path, shot=str(k // frames)))
    return Split("train", items, ["red", "green", "blue"])


def frames_of(folder):
    split = split_of(folder)
    maps = np.random.default_rng(0).random((len(split), 8, 8))
    found = PseudoMaps(as_records(maps, split.labels, split.labels))
    return ShotFrames(PseudoImages(Images(split, 32, 36, train=True), found))


def test_training_end_to_end(tmp_path):
    model, frames = tiny(), frames_of(tmp_path)
    assert len(frames) == 4
    frozen = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    history = fit(model, frames, replace(CONFIG, epochs=2), folder=tmp_path / "run")
    assert {"loss/pal", "loss/asl", "loss/cls"} <= set(history.rows[-1])
    assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.state_dict().items())
    assert model.losses.t == pytest.approx(1.01)             # one epoch was over when the last began


def test_two_stage_trains_the_classification_head_first_and_freezes_it(tmp_path):
    model, frames = tiny(), frames_of(tmp_path)
    head = {k: v.clone() for k, v in model.localization_head.state_dict().items()}
    before = model.class_head.weight.clone()
    prepare_class_head(model, frames, CONFIG)
    assert not torch.equal(model.class_head.weight, before) and not model.class_head.weight.requires_grad
    assert all(torch.equal(v, head[k]) for k, v in model.localization_head.state_dict().items())
    after = model.class_head.weight.clone()
    fit(model, frames, CONFIG)
    assert torch.equal(model.class_head.weight, after)
    assert {name for name, _ in Probe(model).named_parameters()} == {"class_head.weight", "class_head.bias"}


@pytest.mark.parametrize("inputs, channels, parameters", [("patch", 384, 1_308_620), ("both", 390, 1_318_988), ("attention", 1182, 2_687_564)])
def test_head_sizes(inputs, channels, parameters):
    with torch.device("meta"):
        model = build("trcam_v", 10, pretrained=False, inputs=inputs)
        assert model.localization_head(torch.zeros(2, channels, 14, 14)).shape == (2, 2, 224, 224)
    assert sum(p.numel() for p in model.localization_head.parameters()) == parameters


def test_time_is_no_input():
    """A frame has the same map alone and among others."""
    torch.manual_seed(1)
    frames, model = torch.randn(4, 3, 32, 32), tiny().eval()
    with torch.no_grad():
        assert torch.allclose(model(frames).maps[2:3], model(frames[2:3]).maps, atol=1e-5)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_differ_from_full(variant):
    config = replace(SETTINGS["ytov1"], **VARIANTS[variant])
    assert variant == "full" or config != SETTINGS["ytov1"]


def test_clipseg_without_transformers_says_what_to_install(monkeypatch):
    import importlib
    real = importlib.import_module
    def without(name, *more):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *more)
    monkeypatch.setattr("wsol_nb.trcamv.importlib.import_module", without)
    with pytest.raises(SettingsError, match=r"wsol_nb\[clipseg\]"):
        load_clipseg()


def test_clipseg_maps(tmp_path):
    """A small random CLIPSeg: maps follow the prompt, in [0, 1], and go through the cache as CLIP's do."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=49408, eos_token_id=49407,
                max_position_embeddings=77)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8)
    config = transformers.CLIPSegConfig(text_config=text, vision_config=vision, projection_dim=24, reduce_dim=16, extract_layers=[1, 2, 3],
                                        decoder_num_attention_heads=2, decoder_intermediate_size=32)
    teacher = ClipSegMaps(transformers.CLIPSegForImageSegmentation(config), tokenizer_of("ViT-B-32"), ["red", "green", "blue"])
    images = torch.randn(2, 3, 48, 48)
    out = teacher(images, torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3) and out.maps.shape[0] == 2
    assert out.maps.amin((1, 2)).tolist() == [0, 0] and out.maps.amax((1, 2)).tolist() == pytest.approx([1, 1])
    assert torch.allclose(teacher(images[1:], torch.tensor([2])).maps[0], out.maps[1], atol=1e-4)
    assert not torch.allclose(teacher(images, torch.tensor([1, 1])).maps, out.maps)
    assert torch.equal(teacher(images).maps, teacher(images, out.logits.argmax(1)).maps)
    split = split_of(tmp_path, 2, 1)
    found = pseudo_maps(split, teacher, 32, folder=tmp_path / "kept", quiet=True)
    assert len(found) == 2 and found.asked.tolist() == [0, 1]
