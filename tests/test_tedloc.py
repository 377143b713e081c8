"""TeD-Loc end to end on small networks: what it may learn from, what it needs at test time, and what it refuses."""
import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from timm.models.eva import Eva

from wsol_nb.clip_cache import PseudoImages, PseudoMaps, as_records
from wsol_nb.core import SettingsError, generator
from wsol_nb.datasets import FewViews, Images, Item, Split
from wsol_nb.decoders import Remembered
from wsol_nb.evaluation import evaluate
from wsol_nb.mini_clip import vocabulary
from wsol_nb.models import as_backbone, build, load_clip
from wsol_nb.tedloc import SETTINGS, SeedRule, TedLoc, class_anchors, class_names, draw_seeds, make_ted_loc, seed_pools, teacher
from wsol_nb.training import fit, load_weights, weight_bytes

CONFIG = replace(SETTINGS["toy"], size=32, resize=36, batch_size=4, epochs=1, widths=(16,), seeds=8, crops=2)


def eva():
    torch.manual_seed(0)
    return as_backbone(Eva(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=0, dynamic_img_size=True))


def ted_loc(n_classes=3, **settings):
    network = eva()
    torch.manual_seed(0)
    return TedLoc(n_classes, network, **{"dimension": 16, "widths": (16,), "rule": SeedRule(seeds=8)} | settings)


def split_of(folder, count=8, paint=None):
    """Noise with a coloured square each, and a "CLIP map" that is the square."""
    items, maps = [], []
    for i in range(count):
        draws = np.random.default_rng(i)
        pixels = draws.integers(90, 130, (48, 48, 3), np.uint8)
        x, y = draws.integers(0, 24, 2)
        pixels[y:y + 20, x:x + 20] = np.eye(3)[i % 3] * 255
        pixels = pixels if paint is None else paint(i, pixels)
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        items.append(Item(path.name, i % 3, pixels.shape[1], pixels.shape[0], np.array([(x, y, x + 19, y + 19)]), path))
        maps.append(np.zeros((48, 48)))
        maps[-1][y:y + 20, x:x + 20] = 1
    split = Split("train", items, ["red", "green", "blue"])
    return split, PseudoMaps(as_records(np.stack(maps), split.labels, split.labels))


def training(split, maps, model, config=CONFIG):
    images = FewViews(split, config.size, config.resize, True, config.seed, model.backbone.mean, model.backbone.std, crops=config.crops)
    return PseudoImages(images, maps)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_training_changes_the_decoder_and_nothing_else(tmp_path):
    model = ted_loc()
    before = weights(model)
    fit(model, training(*split_of(tmp_path), model), CONFIG)
    assert {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])} == {"decoder"}


def test_the_same_seed_gives_the_same_weights(tmp_path):
    split, maps = split_of(tmp_path)
    found = []
    for seed in (0, 0, 1):
        model = ted_loc()
        fit(model, training(split, maps, model, replace(CONFIG, seed=seed)), replace(CONFIG, seed=seed))
        found.append(weights(model))
    assert all(torch.equal(found[0][k], v) for k, v in found[1].items())
    assert not all(torch.equal(found[0][k], v) for k, v in found[2].items())


def test_remembering_changes_nothing_but_the_time(tmp_path):
    split, maps = split_of(tmp_path)
    losses = []
    for memory in (Remembered(None), None):
        model = ted_loc()
        model.memory = memory
        losses.append(fit(model, training(split, maps, model), replace(CONFIG, epochs=2)).rows[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=.02)


def test_no_text_encoder_is_needed_for_saved_weights(tmp_path, monkeypatch):
    """Train with text anchors, save; then every way to a CLIP is closed, and the file alone gives the same answers."""
    split, maps = split_of(tmp_path)
    config = replace(CONFIG, names=("red finch", "green finch", "blue finch"))
    model = make_ted_loc(config, class_anchors(config, split.classes, teacher(config)).anchors)
    fit(model, training(split, maps, model), config)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(weight_bytes(model, {}))
    images = Images(split, 32, mean=model.backbone.mean, std=model.backbone.std)
    first = evaluate(model, images, quiet=True)

    def closed(*args, **settings):
        raise AssertionError("a CLIP was asked for")
    for place in ("wsol_nb.mini_clip.open_clip.create_model", "wsol_nb.tedloc.load_clip", "wsol_nb.tedloc.text_anchors",
                  "wsol_nb.anchors.text_features", "open_clip.CLIP.encode_text"):
        monkeypatch.setattr(place, closed)
    again = build("ted_loc", 3, "mini_eva", pretrained=False, dimension=128, widths=(16,))
    load_weights(again, path)
    second = evaluate(again, images, quiet=True)
    assert torch.equal(first.logits, second.logits) and first.scores() == second.scores()
    assert {name.split(".")[0] for name in safetensors.torch.load_file(path)} == {"backbone", "decoder", "anchors"}


def test_seeds_lie_where_the_crop_put_the_object(tmp_path):
    """Whatever crop and flip: with a perfect map, object seeds lie on the square and background seeds outside."""
    model = ted_loc()
    drawn = training(*split_of(tmp_path), model)
    for epoch in range(4):
        drawn.set_epoch(epoch)
        batch = torch.utils.data.default_collate([drawn[i] for i in range(len(drawn))])
        seeds = model.seeds(batch["cam"], (32, 32))
        colours = batch["raw"].amax(1) - batch["raw"].amin(1)
        assert (colours[seeds.objects] > .3).float().mean() > .97 and (colours[seeds.background] < .3).float().mean() > .97
        assert seeds.objects.sum((1, 2)).tolist() == seeds.background.sum((1, 2)).tolist()


def test_draws_are_balanced_for_any_map():
    maps = torch.rand(24, 9, 11, generator=generator("maps")) ** torch.linspace(.2, 9, 24).view(-1, 1, 1)
    maps[0], maps[1], maps[2] = 0, .4, torch.eye(11)[:9]
    for rule in (SeedRule(), SeedRule(.01, .01, 3), SeedRule(1., 1., 500, True)):
        pools, drawn = seed_pools(maps, rule), draw_seeds(maps, rule, generator("draw"))
        counts = drawn.objects.sum((1, 2))
        assert torch.equal(counts, drawn.background.sum((1, 2))) and counts.max() <= rule.seeds
        assert not (drawn.objects & ~pools.objects).any() and not (drawn.background & ~pools.background).any()
        assert counts[:2].tolist() == [0, 0] and not (pools.objects & pools.background).any()


def test_the_image_loss_teaches_the_patch_classifier():
    """The gradient of I_CL flows through the weights a_p into g."""
    model = ted_loc(weights=(0., 0., 1.)).train()
    batch = {"image": torch.randn(2, 3, 32, 32), "label": torch.tensor([0, 1]), "cam": torch.zeros(2, 32, 32)}
    terms = model.loss(batch)
    assert list(terms) == ["icl"]
    terms["icl"].backward()
    assert model.decoder.score.weight.grad.abs().max() > 0


@pytest.mark.parametrize("paint", [lambda i, pixels: np.full_like(pixels, 200), lambda i, pixels: pixels[:5, :7] if i == 0 else pixels],
                         ids=("one colour", "tiny"))
def test_odd_pictures_do_not_stop_a_training(tmp_path, paint):
    split, maps = split_of(tmp_path, paint=paint)
    flat = PseudoMaps(as_records(np.where(np.arange(8)[:, None, None] % 2, maps.maps, np.float16(.5)), split.labels, split.labels))
    model = ted_loc()
    assert np.isfinite(fit(model, training(split, flat, model), CONFIG).rows[-1]["loss"])


def test_nothing_seen_as_object_gives_finite_answers():
    model = ted_loc().eval()
    torch.nn.init.constant_(model.decoder.score.bias, -200.)
    with torch.no_grad():
        out = model(torch.randn(2, 3, 32, 32))
    assert out.maps.max() == 0 and out.logits.isfinite().all()


@pytest.mark.parametrize("backbone, size, dimension, parameters", [
    (None, 448, 768, 569_931_457), ("eva_large_patch14_336.in22k_ft_in22k_in1k", 336, 512, 303_506_432 + 265_744_641)])
def test_published_sizes(backbone, size, dimension, parameters):
    with torch.device("meta"):
        model = build("ted_loc", 200, backbone, pretrained=False, decoder="ref", dimension=dimension)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.anchors.shape == (200, dimension) and model(torch.zeros(1, 3, size, size, device="meta")).logits.shape == (1, 200)


def test_wrong_class_lists_are_clear_errors():
    clip, classes = teacher(CONFIG), ["001.Red_finch", "002.Blue_finch"]
    with pytest.raises(SettingsError, match=r"lists 3 classes, the data set 'toy' has 2 \(001.Red_finch"):
        class_names(replace(CONFIG, names=("red", "blue", "green")), classes)
    with pytest.raises(SettingsError, match="class 1 has an empty name"):
        class_anchors(replace(CONFIG, names=("red", " ")), classes, clip)
    with pytest.raises(SettingsError, match="'red' stands for several classes"):
        class_anchors(replace(CONFIG, names=("red", "Red")), classes, clip)
    with pytest.raises(SettingsError, match="129 classes: use mode 'polar'"):
        class_anchors(CONFIG, vocabulary()[:129], clip)
    assert class_anchors(replace(CONFIG, anchors="none"), vocabulary()[:129], clip).anchors.shape == (129, 128)


def test_a_model_without_text_tower_is_a_clear_error():
    clip = teacher(CONFIG)
    with pytest.raises(SettingsError, match="no text tower"):
        class_anchors(CONFIG, ["red", "blue"], clip._replace(model=clip.model.visual))
    with pytest.raises(SettingsError, match="unknown CLIP 'mini_eva'"):
        teacher(replace(CONFIG, clip="mini_eva"))
    with pytest.raises(SettingsError, match="3 anchors do not fit 2 classes"):
        TedLoc(2, eva(), torch.eye(3, 16))


def test_the_teacher_is_left_as_it_was_found():
    clip = load_clip("mini_clip", False)
    before = weights(clip.model)
    class_anchors(CONFIG, ["red", "blue"], clip)
    assert all(torch.equal(v, before[k]) for k, v in clip.model.state_dict().items())


def write_cub(root, per_class=6):
    """A few drawn pictures in the folder layout of CUB-200-2011 and CUBv2."""
    names = ["001.Red_crested_Blue_Finch", "002.Yellow_crested_Brown_Sparrow", "003.White_winged_Green_Warbler"]
    base, lines, val = root / "cub" / "CUB_200_2011", {k: [] for k in ("images", "labels", "split", "boxes")}, []
    for number in range(per_class * len(names)):
        label, part = number % 3, ("train", "test", "val")[min(number // 3 // 2, 2)]
        draws = np.random.default_rng(number)
        pixels = draws.integers(80, 140, (60, 72, 3), np.uint8)
        x, y = draws.integers(2, 20, 2)
        pixels[y:y + 30, x:x + 36] = (np.eye(3)[label] * 200 + 40).astype(np.uint8)
        name = f"{names[label]}/bird_{number:04}.jpg"
        path = (root / "cub" / "CUBV2" if part == "val" else base / "images") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=95)
        if part == "val":
            val.append((name, label, f"{x},{y},{x + 35},{y + 29}"))
            continue
        n = len(lines["images"]) + 1
        box = f"{x + 1}.0 {y + 1}.0 36.0 30.0"
        for key, text in (("images", name), ("labels", label + 1), ("split", int(part == "train")), ("boxes", box)):
            lines[key].append(f"{n} {text}")
    tables = {"images.txt": lines["images"], "image_class_labels.txt": lines["labels"], "train_test_split.txt": lines["split"],
              "bounding_boxes.txt": lines["boxes"], "classes.txt": [f"{k} {name}" for k, name in enumerate(names, 1)]}
    for file, rows in tables.items():
        (base / file).write_text("\n".join(rows) + "\n")
    folder = root / "cub" / "metadata" / "val"
    folder.mkdir(parents=True)
    for file, rows in (("image_ids", [v[0] for v in val]), ("class_labels", [f"{v[0]},{v[1]}" for v in val]),
                       ("image_sizes", [f"{v[0]},72,60" for v in val]), ("localization", [f"{v[0]},{v[2]}" for v in val])):
        (folder / f"{file}.txt").write_text("\n".join(rows) + "\n")


def test_the_chapter_runs_on_a_data_set_in_the_layout_of_cub(run, reports, tmp_path):
    """The very command of the chapter, `-p dataset cub`, with tiny settings; the result carries their hash."""
    write_cub(tmp_path / "data")
    changes = ("{overrides: {backbone: mini_eva, clip: mini_clip, pretrained: false, size: 48, resize: 52, clip_size: 48, map_size: 40, "
               "background_words: mini, batch_size: 3, epochs: 1, widths: [16], seeds: 5, num_workers: 0}}")
    done = run("papermill", "nbs/03_tedloc.ipynb", tmp_path / "out.ipynb", "-p", "dataset", "cub", "-y", changes, "--no-progress-bar",
               timeout=1800, env={"WSOL_REPORTS": str(reports), "WSOL_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(next((reports / "full/results/03_tedloc").glob("cub-full-seed0-*.json")).read_text())
    rows = {(r["table"], r["method"], r["metric"], r["condition"]): r["value"] for r in result["scores"]}
    assert {t for t, *_ in rows} == {"3.1", "3.2", "3.3", "3.4", "3.5", "03_tedloc"}
    assert rows["3.3", "TeD-Loc", "params_M", ""] > 0
    assert all(0 <= value <= 100 for (table, _, metric, _), value in rows.items() if table != "3.3")
    assert {p.stem for p in (reports / "full/results/03_tedloc").glob("cub-*/figure_3_*.png")} == {f"figure_3_{k}" for k in range(1, 6)}
