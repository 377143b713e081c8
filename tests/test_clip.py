"""CLIP maps against plain computations, the vocabulary against every class, anchors, and a cache that survives being killed."""
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from wsol_nb import synth
from wsol_nb.anchors import frame_rows, make_anchors, off_diagonal, polar_factor
from wsol_nb.clip_cache import PseudoImages, pseudo_maps
from wsol_nb.clip_cams import (BACKGROUNDS, CLIP_METHODS, PROMPTS, TEMPLATES, ClipES, UnsupportedTower, clip_maps, clip_tokens,
                               naclip_attention, plain_tower, prompt_names, prompts_of, sclip_attention, text_features)
from wsol_nb.core import SettingsError, generator
from wsol_nb.datasets import NO_BOXES, Images, Item, Split
from wsol_nb.mini_clip import WordTokenizer, mini_clip, tokenizer_of, vocabulary, weights_file
from wsol_nb.models import load_clip
from wsol_nb.pretraining import read_card

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["cat", "dog", "keyboard", "street sign"]


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    vision = dict(image_size=32, layers=3, width=64, patch_size=8, head_width=32)
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)
    return open_clip.CLIP(32, vision, text, quick_gelu=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.get_tokenizer("ViT-B-16")


def pictures(count=2, height=32, width=32, seed=0):
    return torch.rand(count, 3, height, width, generator=generator(seed, "pictures", count, height, width))


def meta(name, **settings):
    with torch.device("meta"):
        config = open_clip.get_model_config(name)
        config["vision_cfg"].update({"timm_model_pretrained": False} if "timm_model_name" in config["vision_cfg"] else {})
        custom = config.pop("custom_text", False)
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
        return kind(**config, **settings)


# --- the tower ------------------------------------------------------------------------------------------------------------

def test_the_parameters_of_the_specification(clip):
    assert sum(p.numel() for p in clip.parameters()) == 1_775_713 and clip.visual.grid_size == (4, 4)


@pytest.mark.parametrize("count", (1, 2, 5))
def test_without_changes_the_tower_by_hand_is_the_tower(clip, count):
    x = pictures(count)
    with torch.no_grad():
        assert (clip_tokens(clip, x).cls - clip.visual(x)).abs().max() < 1e-5


def test_other_sizes_agree_with_a_tower_resized_by_open_clip(clip):
    """open_clip interpolates positions when it loads weights into a tower of another size; here it happens at each call."""
    vision = dict(image_size=64, layers=3, width=64, patch_size=8, head_width=32)
    large = open_clip.CLIP(32, vision, dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2), quick_gelu=True)
    state = {k: v.clone() for k, v in clip.state_dict().items()}
    open_clip.model.resize_pos_embed(state, large, antialias=False)
    large.load_state_dict(state)
    with torch.no_grad():
        assert (clip_tokens(clip, pictures(2, 64, 64)).cls - large.visual(pictures(2, 64, 64))).abs().max() < 1e-4


@pytest.mark.parametrize("name, grid, dims", (("ViT-B-16-quickgelu", (14, 14), 512), ("ViT-L-14", (16, 16), 768)))
def test_the_large_models_have_the_tower_we_need(name, grid, dims):
    with torch.device("meta"):
        found = clip_tokens(meta(name), torch.zeros(1, 3, 224, 224), naclip_attention, reduced=True)
        wide = clip_tokens(meta(name), torch.zeros(1, 3, 224, 448))
    assert (found.grid, tuple(found.patches.shape)) == (grid, (1, grid[0] * grid[1], dims))
    assert wide.grid == (grid[0], 2 * grid[1])


@pytest.mark.parametrize("name", ("EVA02-B-16", "ViT-B-16-SigLIP", "RN50", "coca_ViT-B-32"))
def test_other_towers_are_refused(name):
    with pytest.raises(UnsupportedTower, match="choose a plain ViT"):
        plain_tower(meta(name))


def changed_attention(clip, x, kind, reduced):
    """SCLIP and NACLIP head by head and token by token, on the outputs of open_clip's own first blocks."""
    tower = clip.visual
    tokens = tower._embeds(x)
    for block in tower.transformer.resblocks[:-1]:
        tokens = block(tokens)
    block = tower.transformer.resblocks[-1]
    y, width = block.ln_1(tokens), 32
    q, k, v = (y @ w.T + b for w, b in zip(block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)))
    out = torch.zeros_like(v)
    for b in range(len(x)):
        for h in range(2):
            part = slice(width * h, width * (h + 1))
            for i in range(17):
                qq, kk = q[b, :, part] @ q[b, i, part] / width ** .5, k[b, :, part] @ k[b, i, part] / width ** .5
                if kind == "sclip":
                    weights = qq.softmax(0) + kk.softmax(0)
                else:
                    near = [((i - 1) // 4 - (j - 1) // 4) ** 2 + ((i - 1) % 4 - (j - 1) % 4) ** 2 for j in range(17)]
                    bias = [np.exp(-near[j] / 50) if i and j else 0. for j in range(17)]
                    weights = (kk + torch.tensor(bias, dtype=kk.dtype)).softmax(0)
                out[b, i, part] = weights @ v[b, :, part]
    out = block.attn.out_proj(out)
    if not reduced:
        out = tokens + out
        out = out + block.mlp(block.ln_2(out))
    return tower.ln_post(out) @ tower.proj


@pytest.mark.parametrize("reduced", (False, True))
@pytest.mark.parametrize("kind, attention", (("sclip", sclip_attention), ("naclip", naclip_attention)))
def test_changed_attention_agrees_with_loops(clip, kind, attention, reduced):
    with torch.no_grad():
        found, wanted = clip_tokens(clip, pictures(), attention, reduced), changed_attention(clip, pictures(), kind, reduced)
    torch.testing.assert_close(torch.cat([found.cls[:, None], found.patches], 1), wanted, atol=1e-4, rtol=1e-4)


# --- CLIP-ES --------------------------------------------------------------------------------------------------------------

def plain_clip_es(clip, tokenizer, x, name, background, layers=8):
    """CLIP-ES step by step for one picture, with OpenCV's contours and a graph through the whole tower."""
    cv2 = pytest.importorskip("cv2")
    tower, blocks = clip.visual, clip.visual.transformer.resblocks
    words = [w for w in background if w not in (name, name.split(" ")[-1])]
    with torch.enable_grad():
        tokens, attention = tower._embeds(x[None]), []
        for block in blocks:
            y = block.ln_1(tokens).detach().requires_grad_() if block is blocks[-1] else block.ln_1(tokens)
            attended, weights = block.attn(y, y, y, need_weights=True)
            attention.append(weights[0, 1:, 1:].detach())
            tokens = tokens.detach() + attended
            tokens = tokens + block.mlp(block.ln_2(tokens))
        feature = F.normalize(tower.ln_post(tokens)[0, 1:].mean(0) @ tower.proj, dim=0)
        texts = torch.cat([text_features(clip, tokenizer, [w], "origami") for w in (name, *words)])
        score = (clip.logit_scale.exp() * texts @ feature).softmax(0)[0]
        gradient, = torch.autograd.grad(score, y)
    cam = (y[0, 1:].detach() @ gradient[0, 1:].mean(0)).clamp(min=0)
    cam = cam - cam.min()
    cam = (cam / (cam.max() + 1e-7)).reshape(4, 4).numpy()
    walk = torch.stack(attention[-layers:]).mean(0).double().numpy()
    for _ in range(3):
        walk = walk / walk.sum(0, keepdims=True)
        walk = walk / walk.sum(1, keepdims=True)
    walk = (walk + walk.T) / 2
    walk = walk @ walk
    levels = (cam.astype(np.float64) * 255).astype(np.uint8)
    _, binary = cv2.threshold(levels, int(.4 * levels.max()), 255, cv2.THRESH_BINARY)
    mask = np.zeros((4, 4))
    for contour in cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[-2]:
        a, b, w, h = cv2.boundingRect(contour)
        mask[b:min(b + h, 3), a:min(a + w, 3)] = 1
    refined = ((walk * mask.reshape(1, -1)) @ cam.reshape(-1)).reshape(4, 4)
    low, high = refined.min(), refined.max()
    return score.item(), cam, (refined - low) / (high - low) if high > low else np.zeros((4, 4))


@pytest.mark.parametrize("layers", (8, 2))
def test_clip_es_agrees_with_its_steps(clip, tokenizer, layers):
    x, labels = pictures(8, seed=1), torch.tensor([0, 1, 2, 3] * 2)
    method = ClipES(clip, tokenizer, NAMES, layers=layers)
    assert method.dropped == {"keyboard": ["keyboard"], "street sign": ["sign"]}
    found, maps = method.explain(x, labels), method(x, labels).maps
    informative = 0
    for i in range(8):
        score, cam, refined = plain_clip_es(clip, tokenizer, x[i], NAMES[labels[i]], BACKGROUNDS["released"], layers)
        assert found.scores[i].item() == pytest.approx(score, abs=1e-5)
        np.testing.assert_allclose(found.cams[i], cam, atol=2e-3)
        np.testing.assert_allclose(maps[i], refined, atol=5e-3)
        informative += refined.any()
    assert informative >= 4


def test_a_background_of_nothing_is_an_error(clip, tokenizer):
    with pytest.raises(SettingsError, match="no background word"):
        ClipES(clip, tokenizer, ["cat", "sky"], background=["Sky"])


# --- what all methods promise -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CLIP_METHODS)
def test_given_and_predicted_classes_agree_and_the_model_stays(clip, tokenizer, name):
    x, state = pictures(4), {k: v.clone() for k, v in clip.state_dict().items()}
    with torch.no_grad():
        before, texts = clip.visual(x), clip.encode_text(tokenizer(NAMES))
    for logits in ("own", "plain"):
        method = clip_maps(name, clip, tokenizer, NAMES, logits=logits)
        guessed = method(x)
        answers = guessed.logits.argmax(1)
        given = method(x, torch.tensor([0, 1, 2, 3]))
        right = answers == torch.tensor([0, 1, 2, 3])
        assert torch.equal(method(x, answers).maps, guessed.maps)
        torch.testing.assert_close(given.maps[right], guessed.maps[right], atol=1e-4, rtol=1e-4)
        assert guessed.logits.shape == (4, 4) and guessed.maps.shape == (4, 4, 4) and not guessed.maps.requires_grad
    with pytest.raises(ValueError, match="0 … 3"):
        method(x, torch.tensor([0, 1, 2, 9]))
    with torch.no_grad():
        assert torch.equal(clip.visual(x), before) and torch.equal(clip.encode_text(tokenizer(NAMES)), texts)
    assert all(torch.equal(v, state[k]) for k, v in clip.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in clip.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in clip.modules())


def test_an_image_tower_alone_has_no_words(clip, tokenizer):
    with pytest.raises(SettingsError, match="no text tower"):
        clip_maps("sclip", clip.visual, tokenizer, NAMES)


# --- words ------------------------------------------------------------------------------------------------------------------

def embedded_classes():
    """Class names of every embedded data set, wherever its recipe stands."""
    for key, recipe in synth.MAKERS.items():
        if isinstance(recipe, str):
            module, _, name = recipe.partition(":")
            recipe = getattr(importlib.import_module(module), name)
        yield key, list(recipe.content.classes)


def test_the_small_vocabulary_reads_every_prompt_of_every_embedded_data_set():
    tokenize, seen = WordTokenizer(), 0
    for key, classes in embedded_classes():
        for templates in {*TEMPLATES} if len(classes) < 25 else {"photo", "origami"}:
            texts = [form.format(name) for name in prompt_names(key, classes) for form in TEMPLATES[templates]]
            assert tokenize(texts).shape == (len(texts), 24)
            seen += len(texts)
        assert prompts_of(key).background == "mini"
    assert seen > 1000
    tokenize([word for words in (BACKGROUNDS["mini"], BACKGROUNDS["released"]) for word in words])


def test_tokens_and_words_translate_back_and_forth():
    tokenize = WordTokenizer()
    for word in vocabulary():
        assert tokenize.decode(tokenize(word)[0]) == word
    tokens = tokenize([" ".join(vocabulary()[:22]), "a"])
    assert tokens.argmax(1).tolist() == [23, 2] and tokens.max() == tokenize.vocab_size - 1
    assert len(vocabulary()) <= tokenize.vocab_size - 3


def test_the_first_words_keep_their_numbers():
    """New words go to the end; otherwise trained weights would read other words."""
    assert [WordTokenizer().numbers[w] for w in ("a", "photo", "finch", "metastases", "windowed")] == [1, 31, 89, 439, 508]


@pytest.mark.parametrize("text, message", (("a photo of a zyzzyva", "'zyzzyva'"), ("", "finds no word"), ("a " * 23, "at most 22")))
def test_texts_that_cannot_be_read(text, message):
    with pytest.raises(SettingsError, match=message):
        WordTokenizer()(["a bird", text])


def test_the_small_clip_loads_as_open_clip_loads_it(tmp_path):
    torch.manual_seed(1)
    model = mini_clip(pretrained=False)
    torch.save(model.state_dict(), tmp_path / "small.pt")
    again, _, preprocess = open_clip.create_model_and_transforms("mini_clip", pretrained=str(tmp_path / "small.pt"))
    picture = preprocess(Image.new("RGB", (200, 120), (90, 120, 30)))[None]
    with torch.no_grad():
        assert torch.equal(again.eval().encode_image(picture), model.eval().encode_image(picture))
    pair = load_clip("mini_clip", checkpoint=tmp_path / "small.pt")
    assert pair.model.text_projection.shape == (128, 128) and pair.tokenizer(["a bird"]).shape == (1, 24)
    with pytest.raises(SettingsError, match="does not exist"):
        load_clip("mini_clip", checkpoint=tmp_path / "other.pt")
    with pytest.raises(SettingsError, match="no model 'ViT-B-15'"):
        tokenizer_of("ViT-B-15")
    try:
        assert weights_file().is_file()
    except SettingsError as missing:
        assert "pretrained=False" in str(missing)


def test_prompts_exist():
    for prompts in PROMPTS.values():
        assert prompts.photo in TEMPLATES and prompts.sharp in TEMPLATES and prompts.background in BACKGROUNDS
    assert prompts_of("cub").settings("clip_es") == {"templates": "origami", "background": "released"}
    assert prompts_of("mini_cub").settings("clip") == {"templates": "bird"}


# --- anchors ----------------------------------------------------------------------------------------------------------------

def texts(classes, dims, seed=0):
    return F.normalize(torch.randn(classes, dims, dtype=torch.float64, generator=generator(seed, "texts", classes, dims)), dim=1)


def test_few_classes_become_orthogonal():
    anchors, report = make_anchors(texts(200, 512), "qr")
    assert report.max_cosine < 1e-10 and report.min_to_text > 0 and report.rank == 200
    torch.testing.assert_close(anchors[0].double(), texts(200, 512)[0], atol=1e-7, rtol=0)
    assert off_diagonal(anchors.double()).abs().max() < 1e-6            # kept as float32


def test_many_classes_become_a_tight_frame():
    many = texts(1000, 512)
    with pytest.raises(SettingsError, match="'polar'"):
        make_anchors(many, "qr")
    anchors, report = make_anchors(many, "polar")
    torch.testing.assert_close(anchors.norm(dim=1), torch.ones(1000))
    assert report.rms_cosine == pytest.approx(.0309, abs=2e-4) and report.welch == pytest.approx(.0309, abs=5e-5)
    frame, rows = polar_factor(many), frame_rows(many)
    torch.testing.assert_close(frame.T @ frame, torch.eye(512, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(frame @ frame.T, rows @ rows.T, atol=1e-10, rtol=0)
    assert make_anchors(texts(1000, 768), "polar")[1].rms_cosine == pytest.approx(.0174, abs=2e-4)


@pytest.mark.parametrize("mode", ("qr", "polar", "none", "random"))
def test_two_classes_of_one_name_are_refused(mode):
    same = texts(5, 16)[[0, 1, 2, 1]]
    with pytest.raises(SettingsError, match="'missile' stands for several"):
        make_anchors(texts(3, 16), mode, ["missile", "cat", "Missile "])
    with pytest.raises(SettingsError, match="number 1 and number 3"):
        make_anchors(same, mode)


# --- the cache --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def squares(tmp_path):
    """Eight pictures with a bright square each, in three classes named by known words."""
    for k in range(8):
        pixels = np.full((40, 40, 3), 30 * (k % 3) + 40, np.uint8)
        pixels[5 + k:20 + k, 8:24] = 250
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    return split_of(tmp_path)


WORKER = """
import sys, time
from tests.test_clip import pseudo_maps, small_method, split_of

method = small_method()
method.clip.visual.conv1.register_forward_hook(lambda *_: time.sleep(1))
print("ready", flush=True)
pseudo_maps(split_of(sys.argv[1]), method, 32, folder=sys.argv[2], part=1, quiet=True)
"""


def small_method():
    torch.manual_seed(0)
    return clip_maps("clip", mini_clip(pretrained=False), WordTokenizer(), ["bird", "boat", "car"])


def split_of(folder):
    items = [Item(f"{k}.png", k % 3, 40, 40, NO_BOXES, Path(folder) / f"{k}.png") for k in range(8)]
    return Split("train", items, ["bird", "boat", "car"])


def test_a_killed_cache_goes_on_where_it_stopped(squares, tmp_path):
    kept = tmp_path / "kept"
    command = [sys.executable, "-c", WORKER, str(tmp_path), str(kept)]
    settings = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    first = subprocess.Popen(command, **settings)
    assert first.stdout.readline() == "ready\n", first.stderr.read()
    deadline = time.monotonic() + 60
    while len(list(kept.rglob("part-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in kept.rglob("part-*")}
    assert 2 <= len(done) < 8 and not list(kept.rglob("maps.npy"))
    method, asked = small_method(), []
    method.clip.visual.conv1.register_forward_hook(lambda m, args, out: asked.append(len(out)))
    found = pseudo_maps(squares, method, 32, folder=kept, part=1, quiet=True)
    assert sum(asked) == 8 - len(done)                                     # what was finished is not made again
    np.testing.assert_array_equal(found.asked, squares.labels)
    whole = pseudo_maps(squares, small_method(), 32, quiet=True)
    np.testing.assert_allclose(found.maps.astype(float), whole.maps.astype(float), atol=2e-3)
    assert sorted(p.name for p in next(kept.iterdir()).iterdir() if not p.name.startswith(".")) == ["maps.npy", "settings.json"]


def test_a_damaged_cache_is_made_again_and_every_setting_counts(squares, tmp_path):
    kept, method = tmp_path / "kept", small_method()
    run = lambda method=method, split=squares, **how: pseudo_maps(split, method, **{"size": 32, "folder": kept, "quiet": True} | how)
    good = np.array(run().records)
    file = next(kept.rglob("maps.npy"))
    whole = file.read_bytes()
    for damage in (whole[:-20], b"", whole[:-30] + bytes([whole[-30] ^ 4]) + whole[-29:]):
        file.write_bytes(damage)
        with pytest.warns(UserWarning, match="is damaged"):
            np.testing.assert_array_equal(np.array(run().records), good)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    run(size=40)
    run(labels="predicted")
    run(clip_maps("clip", method.clip, WordTokenizer(), ["bird", "boat", "car"], templates="name"))
    run(clip_maps("sclip", method.clip, WordTokenizer(), ["bird", "boat", "car"]))
    run(clip_maps("clip", method.clip, WordTokenizer(), ["bird", "boat", "truck"]))
    run(split=squares.subset(3))
    with torch.no_grad():
        method.clip.visual.proj.mul_(1.001)
    run()
    assert len(list(kept.iterdir())) == 8
    with pytest.raises(SettingsError, match="2 class names do not fit a split with 3 classes"):
        run(clip_maps("clip", method.clip, WordTokenizer(), ["bird", "boat"]))


def test_a_map_moves_with_its_image(squares):
    """A map that is bright where the picture is stays so through crop and flip."""
    images = Images(squares, 32, 40, train=True)
    found = pseudo_maps(squares, small_method(), 40, quiet=True)
    for k, record in enumerate(found.records):
        record["map"][:] = 0
        record["map"][(5 + k) // 8:(20 + k) // 8, 1:3] = 1                # the square, on a grid of 5×5 cells of 8 pixels
    training, agree = PseudoImages(images, found), []
    for epoch in range(4):
        training.set_epoch(epoch)
        agree += [np.corrcoef(item["cam"].flatten(), item["raw"].mean(0).flatten())[0, 1] for item in map(training.__getitem__, range(8))]
    assert min(agree) > .4 and np.mean(agree) > .7


def test_card_of_mini_clip_gives_every_command_in_order():
    """A card of weights that went on from earlier ones must not pass for the whole of their training."""
    card = read_card("mini_clip")
    commands = card["command"].split(" && ")
    assert all(command.startswith("papermill nbs/pretraining/mini_clip.ipynb ") for command in commands)
    starts = [re.search(r"-p start (\S+)", command)[1] for command in commands]
    assert starts[0] != "mini_clip" and starts[1:] == ["mini_clip"] * (len(starts) - 1)
    assert starts[-1] == card["settings"]["start"]
    if len(commands) > 1:
        assert card["stages"] == {"first": card["before"]["command"], "then": commands[-1]}
        assert card["command"] == " && ".join(card["stages"].values())
        assert all(command.endswith("-p out wsol_nb/weights") for command in commands)      # the next one starts from there
    cells = json.loads((ROOT / "nbs" / "pretraining" / "mini_clip.ipynb").read_text(encoding="utf-8"))["cells"]
    known = re.findall(r"^(\w+) *=", "".join(next(c["source"] for c in cells if "parameters" in c["metadata"].get("tags", []))), re.M)
    assert {name for command in commands for name in re.findall(r"-p (\w+)", command)} <= {*known}
