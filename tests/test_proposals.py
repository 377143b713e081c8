"""Reading transformers without a trace, and a harvest that survives kills, company, damage and odd pictures."""
import functools
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer as ClipTower
from PIL import Image
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader

from wsol_nb.core import DataError, OutputError, SettingsError, generator
from wsol_nb.datasets import Images, Item, Split
from wsol_nb.metrics import box_iou
from wsol_nb.models import as_backbone, attention_maps
from wsol_nb.proposals import (NOTHING, AttentionMaps, Blur, Candidates, Harvest, ProposalImages, Scorer, best_maps, evaluating,
                               harvest, in_parts, join, propose, quality, read_attention, score_regions, split_key, weights_hash)
from wsol_nb.samplers import NO_BOX, Sampling, inside, pick_seeds, seed_hits

ROOT = Path(__file__).resolve().parents[1]


def vit(**settings):
    torch.manual_seed(0)
    fixed = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, dynamic_img_size=True)
    return as_backbone(VisionTransformer(**fixed | settings))


def eva():
    torch.manual_seed(0)
    return as_backbone(Eva(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, use_rot_pos_emb=True,
                           swiglu_mlp=True, num_reg_tokens=2, dynamic_img_size=True))


def clip():
    torch.manual_seed(0)
    return as_backbone(ClipTower(32, 8, width=48, layers=2, heads=4, mlp_ratio=4., output_dim=16))


class Colour(nn.Module):
    """Three classes: how red, green, blue a picture is."""
    def __init__(self):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(9.))

    def forward(self, images):
        return self.sharpness * images.mean((2, 3))


def square_split(folder, count=6, side=64, object_side=24):
    """Noise with a saturated square each, class = its colour; boxes are exact."""
    items = []
    for i in range(count):
        draws = np.random.default_rng(i)
        pixels = draws.integers(90, 130, (side, side + 16, 3), np.uint8)
        x, y = draws.integers(0, side - object_side, 2)
        pixels[y:y + object_side, x:x + object_side] = np.eye(3)[i % 3] * 255
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        items.append(Item(path.name, i % 3, side + 16, side, np.array([(x, y, x + object_side - 1, y + object_side - 1)]), path))
    return Split("train", items, ["red", "green", "blue"])


class Saturation:
    """Maps without a network: how saturated a pixel is, its opposite, and nothing."""
    names, mean, std = ("saturated", "grey", "flat"), (0., 0., 0.), (1., 1., 1.)

    def __call__(self, images):
        on = images.amax(1) - images.amin(1)
        return torch.stack([on, 1 - on, torch.ones_like(on)], 1)

    def key(self):
        return "saturation"


@pytest.fixture
def squares(tmp_path):
    (tmp_path / "images").mkdir()
    return square_split(tmp_path / "images")


def kept_in(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


# --- reading ----------------------------------------------------------------------------------------------------------------

def state(network):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())
    fused = [m.fused_attn for m in network.modules() if hasattr(m, "fused_attn")]
    return hooks, fused, [m.training for m in network.modules()], weights_hash(network)


@pytest.mark.parametrize("make", (vit, eva, clip, functools.partial(vit, reg_tokens=3),
                                  functools.partial(vit, qk_norm=True)))
def test_reading_leaves_no_trace(make):
    network, x = make().train(), torch.randn(2, 3, 32, 32, generator=generator("x"))
    before = state(network)
    maps = AttentionMaps(network, attention_maps, more=("seed_expansion", "token_cut"))
    found = maps(x)
    assert state(network) == before and all(p.grad is None for p in network.parameters())
    assert found.shape == (2, 7, 32, 32) and len(maps.names) == 7
    assert found.isfinite().all() and found.min() >= 0 and (found.amax((2, 3)) > .999).all()
    reading = read_attention(network, attention_maps, x, keys=True)
    network.eval()
    with attention_maps(network) as seen, torch.no_grad():
        network(x)
    torch.testing.assert_close(reading.heads.flatten(2), seen[-1][:, :, 0, network.n_prefix:])
    assert reading.keys.shape == (2, 16, 48)


@pytest.mark.parametrize("make", (vit, clip))
def test_the_keys_are_those_attention_was_computed_from(make):
    """Queries times keys through a softmax must give the attention that was read."""
    network, x = make().eval(), torch.rand(1, 3, 32, 32, generator=generator("x"))
    last = [m for m in network.modules() if isinstance(m, nn.MultiheadAttention) or hasattr(m, "k_norm")][-1]
    inputs = []
    hook = last.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    reading = read_attention(network, attention_maps, x, keys=True)
    hook.remove()
    one = isinstance(last, nn.MultiheadAttention)
    weight, bias = (last.in_proj_weight, last.in_proj_bias) if one else (last.qkv.weight, last.qkv.bias)
    query = (inputs[-1] @ weight[:48].T + bias[:48])[0, 0].view(4, 12)
    keys = reading.keys[0].view(16, 4, 12)
    logits = torch.einsum("hd,nhd->hn", query, keys) / 12**.5
    shares = reading.heads[0].flatten(1)
    torch.testing.assert_close(logits.softmax(1), shares / shares.sum(1, keepdim=True), atol=1e-5, rtol=1e-3)


def test_an_interrupted_reading_leaves_no_trace():
    network = vit().train()
    before = state(network)
    for images in (torch.rand(1, 3, 30, 30), torch.rand(1, 4, 32, 32)):
        with pytest.raises((SettingsError, RuntimeError, AssertionError)):
            AttentionMaps(network, attention_maps, more=("token_cut",))(images)
        assert state(network) == before


def test_448_pixels_give_28_by_28_cells():
    network = vit(img_size=56, patch_size=16, depth=1)
    maps = AttentionMaps(network, attention_maps, "mean")
    x = torch.rand(1, 3, 448, 448, generator=generator("x"))
    assert maps.read(x).heads.shape[2:] == (28, 28) and maps(x).shape == (1, 1, 448, 448)


def test_keys_of_maps_follow_weights_and_settings():
    def key(change=lambda n: None, network=None, **settings):
        network = network or vit()
        change(network)
        return AttentionMaps(network, attention_maps, **settings).key()

    def nudge(network):
        with torch.no_grad():
            network.body.blocks[1].attn.qkv.weight[0, 0] += 1e-6

    same = key()
    assert same == key()
    others = [key(nudge), key(exponent=.5), key(maps="mean"), key(more=("seed_expansion",)),
              key(network=vit(num_heads=6), maps="mean")]
    assert all(other != same for other in others) and len({str(o) for o in others}) == len(others)


# --- scores -----------------------------------------------------------------------------------------------------------------

def test_scores_do_not_depend_on_who_shares_the_batch():
    raw = torch.rand(3, 3, 40, 40, generator=generator("raw"))
    boxes = torch.randint(40, (20, 2, 2), generator=generator("boxes")).sort(1).values.flatten(1)
    owner, classes = torch.arange(20) % 3, torch.tensor([0, 2, 1])
    scorer = Scorer(Colour())
    with evaluating(scorer.model):
        all_at_once = score_regions(scorer, raw, Blur()(raw), boxes, owner, classes)
        for chunk in (1, 7):
            torch.testing.assert_close(score_regions(scorer, raw, Blur()(raw), boxes, owner, classes, chunk), all_at_once)
        for i in (0, 11):
            alone = raw[owner[i]][None]
            mine = score_regions(scorer, alone, Blur()(alone), boxes[i:i + 1], torch.tensor([0]), classes[owner[i]][None])
            torch.testing.assert_close(mine, all_at_once[i:i + 1])


def test_the_object_comes_first(squares):
    """Among the square, everything else and nothing, the square of the right colour scores highest."""
    found = harvest(squares, Saturation(), Scorer(Colour()), Harvest(size=32), quiet=True)
    assert (found.maps[found.first[:-1]] == 0).all() and found.names == Saturation.names
    assert all((np.diff(found[i].scores) <= 0).all() for i in range(6))
    measured = quality(found, squares, k=1)
    assert measured["recall"] == 100 and measured["precision"] == 100
    assert quality(found, squares)["precision"] < 100
    images = Images(squares, 32, mean=(0.,) * 3, std=(1.,) * 3)
    batch = next(iter(DataLoader(images, 6)))
    chosen = best_maps(Saturation()(batch["image"]), batch["raw"], Scorer(Colour()), batch["label"])
    assert chosen.tolist() == [0] * 6


@pytest.mark.parametrize("size", (32, 50, 128))
def test_boxes_are_in_original_pixels(squares, size):
    found = harvest(squares, Saturation(), Scorer(Colour()), Harvest(size=size), quiet=True)
    for i, item in enumerate(squares):
        assert box_iou(found[i].boxes[:1], item.boxes)[0, 0] > (.8 if size < 64 else .9), (size, found[i].boxes[0], item.boxes)


def test_batches_change_nothing(squares, tmp_path):
    maps, scorer, settings = AttentionMaps(vit(), attention_maps, more=("token_cut",)), Scorer(Colour()), Harvest(size=32)
    one = harvest(squares, maps, scorer, settings, quiet=True, batch_size=1)
    other = harvest(squares, maps, scorer, settings, tmp_path / "kept", quiet=True, batch_size=4, part=3)
    np.testing.assert_array_equal(one.first, other.first)
    for i in range(6):
        assert sorted(map(tuple, one[i].boxes.tolist())) == sorted(map(tuple, other[i].boxes.tolist()))
        np.testing.assert_allclose(one[i].scores, other[i].scores, atol=1e-5)
    assert weights_hash(vit()) == weights_hash(maps.backbone)


# --- odd pictures -----------------------------------------------------------------------------------------------------------

def test_pictures_of_one_colour_have_no_proposals_and_are_counted(tmp_path):
    split = square_split(tmp_path, 3)
    Image.new("RGB", (80, 64), (60, 60, 60)).save(split[1].path)
    maps = lambda images: images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    maps.mean, maps.std = Saturation.mean, Saturation.std
    found = harvest(split, maps, Scorer(Colour()), Harvest(size=32), quiet=True)
    assert found.empty.tolist() == [1] and quality(found, split)["without"] == 1
    training = ProposalImages(Images(split, 32), found)
    assert (len(training), training.skipped, [training[i]["index"] for i in range(2)]) == (2, 1, [0, 2])


def test_pictures_of_one_colour_pass_a_transformer():
    maps = AttentionMaps(vit(), attention_maps, more=("seed_expansion", "token_cut"))(torch.zeros(1, 3, 32, 32))
    assert maps.isfinite().all()
    assert len(propose(maps, torch.zeros(1, 3, 32, 32), Scorer(Colour()), torch.tensor([0]))) == 1


@pytest.mark.parametrize("size", ((1, 1), (3, 200), (5, 4)))
def test_tiny_and_narrow_pictures(tmp_path, size):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).save(path)
    split = Split("train", [Item("a", 0, size[1], size[0], np.zeros((0, 4), int), path)], ["only"])
    found = harvest(split, AttentionMaps(vit(), attention_maps), Scorer(Colour()), Harvest(size=32), quiet=True)
    boxes = found[0].boxes
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= boxes[:, :2]).all() and (boxes[:, 2:] < (size[1], size[0])).all()
    item = ProposalImages(Images(split, 32, 40, train=True), found)[0]
    box = item["box"].tolist()
    assert box == list(NO_BOX) or (box[0] <= box[2] and box[1] <= box[3])        # the crop may have lost it


def test_boxes_that_cover_everything_leave_object_seeds_only(tmp_path):
    split = square_split(tmp_path, 1)
    whole = join([Candidates(np.array([(0, 0, 79, 63)]), np.array([0]), np.array([1.]))])
    item = ProposalImages(Images(split, 32, 40, train=True), whole)[0]
    region = inside(item["box"][None, None], (32, 32))
    labels = pick_seeds(torch.rand(1, 32, 32), region, inside(item["boxes"][None], (32, 32)), Sampling(), generator(0))
    assert (labels == 1).any() and not (labels == 0).any()


def test_a_scorer_of_other_classes_is_refused(squares):
    few = replace_labels(squares, 5)
    with pytest.raises(SettingsError, match="knows 3 classes, the images have class 5"):
        harvest(few, Saturation(), Scorer(Colour()), Harvest(size=32), quiet=True)


def replace_labels(split, label):
    return Split(split.name, [replace(item, label=label) for item in split], split.classes)


# --- kept on disk -----------------------------------------------------------------------------------------------------------

def test_another_setting_weight_label_or_picture_is_another_harvest(squares, tmp_path):
    kept, scorer, settings = tmp_path / "kept", Scorer(Colour()), Harvest(size=32)
    run = lambda split=squares, scorer=scorer, settings=settings: harvest(split, Saturation(), scorer, settings, kept, quiet=True)
    run()
    run()
    assert len(list(kept.iterdir())) == 1
    changed = Colour()
    with torch.no_grad():
        changed.sharpness += .1
    run(scorer=Scorer(changed))
    run(settings=replace(settings, min_size=.1))
    run(settings=replace(settings, blur=Blur(kernel=11)))
    run(split=replace_labels(squares, 0))
    Image.new("RGB", (80, 64)).save(squares[0].path)
    run()
    assert len(list(kept.iterdir())) == 6
    assert split_key(squares)["images"] == 6


def test_a_damaged_file_is_made_again(squares, tmp_path):
    run = lambda: harvest(squares, Saturation(), Scorer(Colour()), Harvest(size=32), tmp_path / "kept", quiet=True, part=2)
    good = run()
    file = next((tmp_path / "kept").rglob("proposals.npz"))
    for damage in (file.read_bytes()[:100], b"", b"not a file of numpy" * 9):
        file.write_bytes(damage)
        with pytest.warns(UserWarning, match="is damaged"):
            again = run()
        np.testing.assert_array_equal(again.boxes, good.boxes)
    (file.parent / "part-2-00000000.npz").write_bytes(b"half")
    file.unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        np.testing.assert_array_equal(run().scores, good.scores)
    assert kept_in(tmp_path / "kept") == ["proposals.npz", "settings.json"]


def test_an_unreadable_picture_stops_the_harvest_and_its_repair_goes_on(squares, tmp_path):
    asked = []

    class Counting(Saturation):
        def __call__(self, images):
            asked.append(len(images))
            return super().__call__(images)

    bytes_of = squares[4].path.read_bytes()
    run = lambda: harvest(squares, Counting(), Scorer(Colour()), Harvest(size=32), tmp_path / "kept", quiet=True, part=1)
    key_of_whole = split_key(squares)
    squares[4].path.write_bytes(bytes_of[:300])
    with pytest.raises(DataError, match="4.png"):
        run()
    done = sum(asked)
    squares[4].path.write_bytes(bytes_of)
    assert split_key(squares) == key_of_whole
    assert len(run()) == 6 and sum(asked) - done == 6            # its key covered the damaged file: another harvest
    assert done < 6


def test_a_folder_that_cannot_be_written_is_named(squares, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        harvest(squares, Saturation(), Scorer(Colour()), Harvest(size=32), tmp_path / "file", quiet=True)


WORKER = """
import sys, time
from pathlib import Path
import numpy as np
from wsol_nb.proposals import Candidates, in_parts

def make(images):
    time.sleep(.1)
    with open(sys.argv[2], "a") as log:
        log.writelines(f"{i}\\n" for i in images)
    return [Candidates(np.full((i % 3, 4), i), np.full(i % 3, i), np.full(i % 3, i / 100)) for i in images]

print("ready", flush=True)
sys.stdin.readline()
found = in_parts(Path(sys.argv[1]), 60, make, ["a"], part=2, quiet=True)
print(found.boxes.sum())
"""


def test_killed_and_in_company(tmp_path):
    """Of three processes on one harvest one is killed; the others share the work and agree."""
    folder, logs = tmp_path / "kept", [tmp_path / f"{name}.log" for name in "abc"]
    processes = [subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(log)], cwd=ROOT, text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"}) for log in logs]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    deadline = time.monotonic() + 30
    while not list(folder.glob("part-*")) and time.monotonic() < deadline:
        time.sleep(.02)
    processes[0].send_signal(signal.SIGKILL)
    outputs = [process.communicate(timeout=60) for process in processes]
    expected = sum(4 * i * (i % 3) for i in range(60))
    assert [(p.returncode, out.strip()) for p, (out, _) in zip(processes[1:], outputs[1:])] == [(0, str(expected))] * 2, outputs
    made = [sorted(map(int, log.read_text().split())) if log.exists() else [] for log in logs]
    assert set().union(*made) == set(range(60))
    assert len(made[1]) < 60 and len(made[2]) < 60                                   # neither did everything
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = in_parts(folder, 60, lambda images: pytest.fail("made again"), part=2, quiet=True)
    assert found.counts.tolist() == [i % 3 for i in range(60)] and found[5].maps.tolist() == [5, 5]
    assert [p.name for p in folder.iterdir() if not p.name.startswith(".")] == ["proposals.npz"]


def test_old_leftovers_are_removed_and_fresh_ones_left_to_their_writers(tmp_path):
    for name, age in (("old", 7200), ("fresh", 0)):
        path = tmp_path / f".{name}.npz"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    in_parts(tmp_path, 2, lambda images: [NOTHING] * len(images), quiet=True)
    assert kept_in(tmp_path) == [".fresh.npz", "proposals.npz"]


# --- into training ----------------------------------------------------------------------------------------------------------

def test_from_pictures_to_seeds(squares):
    """Harvest, draw, crop, flip, sample: object seeds lie on the square, background seeds off it."""
    source = Saturation()
    found = harvest(squares, source, Scorer(Colour()), Harvest(size=32), quiet=True)
    training = ProposalImages(Images(squares, 48, 56, train=True, mean=source.mean, std=source.std), found, k=1)
    hits = torch.zeros(2, 2, dtype=torch.long)
    for epoch in range(4):
        training.set_epoch(epoch)
        batch = next(iter(DataLoader(training, 6)))
        maps = source(batch["image"])[torch.arange(6), batch["map"]]
        region, boxed = inside(batch["box"][:, None], (48, 48)), inside(batch["boxes"], (48, 48))
        labels = pick_seeds(maps, region, boxed, Sampling(exclude="drawn", seeds=20), generator(0, epoch))
        hits += seed_hits(labels, maps > .5)
    right, drawn = hits.T
    assert (drawn > 200).all() and (right / drawn > .95).all()


def test_draws_depend_on_seed_epoch_and_image_alone(squares):
    found = harvest(squares, AttentionMaps(vit(), attention_maps), Scorer(Colour()), Harvest(size=32, min_size=0.), quiet=True)
    make = lambda seed=0: ProposalImages(Images(squares, 32, 40, train=True), found, k=20, seed=seed)
    drawn = lambda images, epoch: (images.set_epoch(epoch), [(int(i["map"]), *i["box"].tolist()) for i in images])[1]
    assert drawn(make(), 3) == drawn(make(), 3)
    assert drawn(make(), 3) != drawn(make(), 4) and drawn(make(), 3) != drawn(make(1), 3)
    loader = DataLoader(make(), 2, num_workers=1)
    loader.dataset.set_epoch(3)
    assert [(int(m), *b) for batch in loader for m, b in zip(batch["map"], batch["box"].tolist())] == drawn(make(), 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(squares):
    run = lambda device: harvest(squares, AttentionMaps(vit().to(device), attention_maps, more=("token_cut", "seed_expansion")),
                                 Scorer(Colour().to(device)), Harvest(size=32), quiet=True)
    slow, fast = run("cpu"), run("cuda")
    agree = [sorted(map(tuple, slow[i].boxes.tolist())) == sorted(map(tuple, fast[i].boxes.tolist())) for i in range(6)]
    assert np.mean(agree) > .8                                  # a grey level may fall to the other side of a threshold


def test_the_benchmark_runs(monkeypatch, tmp_path, capsys):
    options = "--size 48 --images 2 --boxes 2 --repeats 1".split()
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--json", str(tmp_path / "out.json")])
    runpy.run_path(str(ROOT / "benchmarks" / "bench_proposals.py"), run_name="__main__")
    assert "dense ÷ batched" in capsys.readouterr().out and (tmp_path / "out.json").exists()
