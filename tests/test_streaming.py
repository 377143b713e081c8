"""Clips through a model: what is written, what is refused, and how much is held meanwhile."""
import csv
import json
import tracemalloc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from wsol_nb import cams, cli, streaming
from wsol_nb.core import DataError, Localization, SettingsError
from wsol_nb.models import build
from wsol_nb.streaming import Localizer, Source, complete, find_trained, load_localizer, localize_clip, open_clip, stream
from wsol_nb.training import best_file, weight_bytes


class Red(nn.Module):
    """Maps of how red a picture is."""
    needs_label = False

    def __init__(self):
        super().__init__()
        self.backbone = type("", (), {"mean": (0., 0., 0.), "std": (1., 1., 1.)})()
        self.gain = nn.Parameter(torch.tensor(1.))

    def forward(self, images, labels=None):
        red = (self.gain * images[:, 0] - images[:, 1]).clamp(min=0)
        return Localization(torch.stack([1 - red.amax((1, 2)), red.amax((1, 2))], 1), red)


def walk(count, height=48, width=64):
    for k in range(count):
        frame = np.full((height, width, 3), 60, np.uint8)
        x, y = 4 + k % (width - 24), 6 + k % (height - 24)
        frame[y:y + 16, x:x + 16] = 220, 40, 40
        yield frame


@pytest.fixture
def localizer():
    return Localizer(Red(), 32, .5, ["nothing", "square"])


def test_no_frame_is_kept(localizer):
    """While a long clip runs, no more frames are alive than a handful."""
    given = []

    class Frame(np.ndarray):
        pass

    def frames():
        for frame in walk(60):
            frame = frame.view(Frame)
            given.append(weakref.ref(frame))
            assert sum(one() is not None for one in given) <= 8 + 2
            yield frame

    assert sum(1 for _ in stream(frames(), localizer, batch=4)) == 60


def test_memory_does_not_grow_with_the_clip(localizer, tmp_path):
    def held(count):
        tracemalloc.start()
        localize_clip(Source("walk", walk(count, 120, 160), 10., count), localizer, tmp_path / "b.csv", tmp_path / "b.gif", quiet=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak
    held(10)
    short, long = held(20), held(120)
    assert long - short < .25 * 100 * 120 * 160 * 3, (short, long)      # a quarter of what the further frames would take


def test_an_error_in_the_middle_leaves_nothing(localizer, tmp_path):
    def broken():
        yield from walk(5)
        raise DataError("frame 5 is broken")
    with pytest.raises(DataError, match="frame 5"):
        localize_clip(Source("x", broken()), localizer, tmp_path / "b.csv", tmp_path / "b.gif", quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [.3, .6, .95])
def test_cut_gif(localizer, tmp_path, cut):
    localize_clip(Source("walk", walk(12), 10.), localizer, video=tmp_path / "a.gif", quiet=True)
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(data[:int(cut * len(data))])
    with pytest.raises(DataError, match="cut.gif"):
        list(open_clip(tmp_path / "cut.gif").frames)
    kept = list(open_clip(tmp_path / "cut.gif", partial=True).frames)
    assert 0 < len(kept) < 12 and kept[0].shape == (48, 64, 3)


def test_gif_plays_with_the_right_rate_and_pictures(localizer, tmp_path):
    localize_clip(Source("walk", walk(5), 20.), localizer, video=tmp_path / "a.gif", quiet=True)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.info["duration"], image.info["loop"]) == (5, 50, 0)
    source = open_clip(tmp_path / "a.gif")
    assert source.fps == 20.
    assert abs(list(source.frames)[4][40, 40].astype(int) - 60).max() <= 6


def test_what_is_no_clip(tmp_path):
    (tmp_path / "text.gif").write_text("no picture")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name, message in (("text.gif", "unreadable"), ("empty.mp4", "0 bytes"), ("folder", "holds no picture"), ("none.mp4", "does not exist")):
        with pytest.raises(DataError, match=message):
            list(open_clip(tmp_path / name).frames)


def test_without_a_decoder_videos_are_refused_and_folders_work(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "DECODERS", {"no_such_decoder": None})
    (tmp_path / "clip.mp4").write_bytes(b"something")
    with pytest.raises(SettingsError, match=r"wsol_nb\[video\]"):
        open_clip(tmp_path / "clip.mp4")
    (tmp_path / "frames").mkdir()
    Image.fromarray(next(walk(1))).save(tmp_path / "frames" / "0.png")
    assert len(list(open_clip(tmp_path / "frames").frames)) == 1


@pytest.mark.parametrize("name", ["av", "cv2"])
def test_video_files(localizer, tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    monkeypatch.setattr(streaming, "DECODERS", {name: streaming.DECODERS[name]})
    speed = localize_clip(Source("walk", walk(30), 10.), localizer, video=tmp_path / "a.mp4", quiet=True)
    assert speed.frames == 30
    source = open_clip(tmp_path / "a.mp4")
    frames = list(source.frames)
    assert (len(frames), frames[0].shape, round(source.fps)) == (30, (48, 64, 3), 10)
    assert abs(frames[3][9 + 8, 7 + 8].astype(int) - (220, 40, 40)).max() < 40       # colours in the right order
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[:len(data) // 2])
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    for broken in ("cut.mp4", "noise.mp4"):
        with pytest.raises(DataError, match=broken):
            list(open_clip(tmp_path / broken).frames)


@pytest.mark.parametrize("name", ["av", "cv2"])
@pytest.mark.parametrize("cut", [.9, .7, .5])
def test_video_whose_end_is_missing(localizer, tmp_path, monkeypatch, name, cut):
    """An AVI says at its front how many frames there are: it opens, gives what it has, and ends with an error."""
    pytest.importorskip(name)
    monkeypatch.setattr(streaming, "DECODERS", {name: streaming.DECODERS[name]})
    data, path, seen = avi(tmp_path / "a.avi", 60), tmp_path / "cut.avi", []
    assert len(list(open_clip(tmp_path / "a.avi").frames)) == 60
    path.write_bytes(data[:int(cut * len(data))])
    with pytest.raises(DataError, match=r"cut\.avi: .*cut off"):
        seen.extend(open_clip(path).frames)
    assert 60 * cut - 6 < len(seen) < 60 * cut + 4 and seen[0].shape == (48, 64, 3)
    assert len(list(open_clip(path, partial=True).frames)) == len(seen)
    with pytest.raises(DataError, match="cut off"):
        localize_clip(path, localizer, tmp_path / "b.csv", tmp_path / "b.gif", quiet=True)
    assert not (tmp_path / "b.csv").exists() and not (tmp_path / "b.gif").exists()


def avi(path, count):
    """Bytes of a film of single JPEG pictures, its header and the number of frames at the front."""
    cv2 = pytest.importorskip("cv2")
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10., (64, 48))
    for frame in walk(count):
        film.write(np.ascontiguousarray(frame[..., ::-1]))
    film.release()
    return path.read_bytes()


@pytest.mark.parametrize("stated, allowed", [(30, 2), (1000, 20)])
def test_so_many_frames_may_be_missing(stated, allowed):
    """The tolerance of `complete`: two frames, or 2 % of a long clip, are no error; one more is."""
    frames = lambda count: complete("clip", (np.zeros((1, 1, 3), np.uint8) for _ in range(count)), stated)
    assert sum(1 for _ in frames(stated - allowed)) == stated - allowed
    with pytest.raises(DataError, match=f"states {stated} frames"):
        list(frames(stated - allowed - 1))


@pytest.fixture
def trained(tmp_path):
    """A result file and weights, as a notebook leaves them."""
    torch.manual_seed(0)
    model = build("cam", 3, "mini_cnn", pretrained=False)
    config = replace(cams.SETTINGS["toy"], dataset="nowhere", size=32, select="cls")
    about = {"epoch": 1, "settings": {**config.__dict__, "model": "CAM"}}
    folder = tmp_path / "toy" / "checkpoints" / "01_cams" / "toy-full-seed0" / "abc"
    folder.mkdir(parents=True)
    best_file(folder, "cls").write_bytes(weight_bytes(model, about))
    result = tmp_path / "toy" / "results" / "01_cams" / "toy-full-seed0.json"
    result.parent.mkdir(parents=True)
    history = [{"epoch": 0, "cls": 10., "best_threshold": .9}, {"epoch": 1, "cls": 30., "best_threshold": .25}]
    result.write_text(json.dumps({"scores": [], "commit": "", "device": "", "settings": about["settings"], "history": history}))
    return model, result, best_file(folder, "cls")


def test_a_model_from_either_file(trained):
    model, result, weights = trained
    for path in (result, weights):
        found = load_localizer(path)
        assert (found.size, found.threshold, found.classes) == (32, .25, ["class 0", "class 1", "class 2"])
        image = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(found.model(image).maps, model.eval()(image).maps)
    assert load_localizer(weights, .7).threshold == .7
    result.unlink()
    with pytest.raises(SettingsError, match="--threshold"):
        load_localizer(weights)
    weights.unlink()
    with pytest.raises(DataError, match="no trained model"):
        find_trained(weights)


@pytest.mark.parametrize("method, settings", [
    ("dips", dict(backbone="mini_sst", class_blocks=2)), ("ts_cam", dict(backbone="mini_sst")),
    ("ted_loc", dict(backbone="mini_eva", decoder="lite", widths=[16])), ("trcam_v", dict(backbone="mini_sst", inputs="both", class_blocks=2)),
    ("tcam", dict(backbone="mini_cnn")), ("acol", dict(backbone="mini_cnn", width=16))])
def test_methods_come_back_from_their_weights(tmp_path, method, settings):
    own = {k: v for k, v in settings.items() if k != "backbone"}
    model = build(method, 5, settings["backbone"], pretrained=False, **own).eval()
    header = {"settings": settings | {"model": type(model).__qualname__, "size": 96, "dataset": "nowhere", "anchors": "qr"}}
    path = tmp_path / "best-x.safetensors"
    path.write_bytes(weight_bytes(model, header))
    found = load_localizer(path, .5)
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert len(found.classes) == 5 and torch.allclose(found.model(image).maps, model(image).maps, atol=1e-5)


def test_command(trained, tmp_path, capsys):
    _, result, _ = trained
    (tmp_path / "clip").mkdir()
    for k, frame in enumerate(walk(4)):
        Image.fromarray(frame).save(tmp_path / "clip" / f"{k}.png")
    out, film = tmp_path / "boxes.csv", tmp_path / "out.gif"
    assert cli.main(["localize", str(tmp_path / "clip"), "--model", str(result), "--out", str(out), "--video", str(film)]) == 0
    assert "frames per second" in capsys.readouterr().out
    rows = list(csv.DictReader(open(out)))
    assert [row["frame"] for row in rows] == ["0", "1", "2", "3"] and set(rows[0]) >= {"x0", "y1", "class", "probability"}
    assert all(0 <= int(r["x0"]) <= int(r["x1"]) < 64 and 0 <= int(r["y0"]) <= int(r["y1"]) < 48 for r in rows)
    assert Image.open(film).n_frames == 4
    assert cli.main(["localize", str(tmp_path / "clip"), "--model", str(result)]) == 2
    assert "nothing to write" in capsys.readouterr().err
    assert cli.main(["localize", str(tmp_path / "none.gif"), "--model", str(result), "--out", str(out)]) == 1
    assert "does not exist" in capsys.readouterr().err
    Image.fromarray(next(walk(1, 30, 30))).save(tmp_path / "clip" / "9.png")
    assert cli.main(["localize", str(tmp_path / "clip"), "--model", str(result), "--out", str(tmp_path / "new.csv")]) == 1
    assert "30 × 30" in capsys.readouterr().err and not (tmp_path / "new.csv").exists()


def test_frames_of_own_clips(localizer, tmp_path, capsys):
    (tmp_path / "in" / "square").mkdir(parents=True)
    localize_clip(Source("walk", walk(6), 10.), localizer, video=tmp_path / "in" / "square" / "a.gif", quiet=True)
    assert cli.main(["data", "frames", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--every", "2"]) == 0
    assert len(list((tmp_path / "out" / "square" / "a").glob("*.png"))) == 3
    (tmp_path / "in" / "square" / "b.gif").write_bytes(b"GIF89a")
    assert cli.main(["data", "frames", str(tmp_path / "in"), "--out", str(tmp_path / "out2")]) == 1
    assert "b.gif" in capsys.readouterr().out
    assert cli.main(["data", "frames", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
