"""The embedded benchmark: the same pixels everywhere, and data sets that are whole or absent"""
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsol_nb import synth
from wsol_nb.core import DataError, OutputError
from wsol_nb.datasets import read_cub, read_openimages, read_image

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).with_name("synth_reference.json")
SHOTS = [("mini_cub", "train", 0, 0), ("mini_cub", "val", 7, 0), ("mini_cub", "test", 11, 0), ("mini_cub", "test", 595, 0),
         ("mini_cub", "pretrain", 3, 1), ("toy", "test", 5, 0), ("toy_masks", "val", 4, 0), ("toy_masks", "test", 9, 0)]


def measure(name, split, index, shot):
    """What is known of a picture: exact fingerprint, box, area, part sizes and an 8×8 thumbnail"""
    picture = synth.recipe_of(name).content.render(split, index, shot)
    side = len(picture.image) // 8
    thumbnail = picture.image.reshape(8, side, 8, side, 3).mean((1, 3)).round().astype(int)
    parts = {str(p): int((picture.parts == p).sum()) for p in np.unique(picture.parts) if p}
    return {"shot": [name, split, index, shot], "digest": synth.digest(picture.image, picture.parts), "box": list(picture.box()),
            "parts": parts, "thumbnail": thumbnail.ravel().tolist()}


def run(code, *arguments, **settings):
    """A Python process with the package on its path"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **settings.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **settings)


MAKE = "import sys; from wsol_nb.synth import make; make(sys.argv[1], sys.argv[2])"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return synth.make("toy", tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("number", range(len(SHOTS)))
def test_pixels_are_those_of_the_reference(number):
    """Exact where the drawing libraries are the same; else nearly so. After a wanted change raise `synth.VERSION` and run this file"""
    same(json.loads(REFERENCE.read_text())[number], measure(*SHOTS[number]))


def same(known, found):
    """Two results of `measure` are of one picture"""
    assert known["shot"] == found["shot"]
    if known["digest"] == found["digest"]:
        return
    assert np.abs(np.subtract(known["box"], found["box"])).max() <= 1
    for part in {*known["parts"], *found["parts"]}:
        sizes = known["parts"].get(part, 0), found["parts"].get(part, 0)
        assert abs(sizes[0] - sizes[1]) <= 3 + .03 * max(sizes), part
    difference = np.abs(np.subtract(known["thumbnail"], found["thumbnail"]))
    assert difference.mean() <= .5 and difference.max() <= 6


def test_pixels_are_the_same_in_another_process():
    code = ("import sys; from wsol_nb import synth; p = synth.MAKERS['mini_cub'].content.render('test', 11); "
            "print(synth.digest(p.image, p.parts))")
    for seed in "1", "2":
        process = run(code, env={"PYTHONHASHSEED": seed})
        assert process.communicate()[0].strip() == measure("mini_cub", "test", 11, 0)["digest"]


def test_order_does_not_matter():
    content = synth.MAKERS["mini_cub"].content
    forth = [synth.digest(content.render("val", k).image) for k in range(4)]
    back = [synth.digest(content.render("val", k).image) for k in reversed(range(4))]
    assert forth == back[::-1] and len(set(forth)) == 4


def test_no_photograph_serves_two_splits_and_all_are_credited():
    names = [name for group in synth.SOURCES.values() for name in group]
    assert len(names) == len(set(names))
    credited = re.findall(r"^\| (\w+) \| `", (ROOT / "ATTRIBUTION.md").read_text(), re.M)
    assert set(credited) == set(synth.PHOTOGRAPHS) == set(names)


def test_reader_gets_the_boxes_of_the_masks(toy):
    data = read_cub(toy, "toy")
    assert [len(data[s]) for s in ("train", "val", "test")] == [48, 16, 24]
    assert len(data.classes) == 4
    for split in "train", "val", "test":
        for index, item in enumerate(sorted(data[split], key=lambda i: i.id.split("_")[-1])):
            mask = np.asarray(Image.open(toy / "segmentations" / item.id)) > 0
            ys, xs = np.nonzero(mask)
            assert item.boxes.tolist() == [[xs.min(), ys.min(), xs.max(), ys.max()]]
            picture = synth.MAKERS["toy"].content.render(split, index)
            assert item.label == synth.MAKERS["toy"].content.label(index)
            assert np.array_equal(np.asarray(read_image(item.path)), picture.image)
            assert np.array_equal(np.asarray(Image.open(toy / "part_maps" / item.id)), picture.parts)


def test_reader_gets_masks_and_ignore_masks(tmp_path):
    data = read_openimages(synth.make("toy_masks", tmp_path), "toy_masks")
    assert data.classes == synth.MAKERS["toy_masks"].content.classes
    assert not any(item.masks for item in data["train"])
    counts = [len(item.masks) for split in ("val", "test") for item in data[split]]
    ignored = [np.asarray(Image.open(item.ignore)).any() for split in ("val", "test") for item in data[split]]
    assert set(counts) == {1, 2} and 0 < sum(ignored) < len(ignored)


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != "toy")


def test_two_processes_at_once(tmp_path, toy):
    both = [run(MAKE, "toy", tmp_path) for _ in range(2)]
    for process in both:
        assert process.wait() == 0, process.stderr.read()
    assert leftovers(tmp_path) == []
    assert synth.read_stamp(tmp_path / "toy")["checksum"] == synth.read_stamp(toy)["checksum"]
    assert len(read_cub(tmp_path / "toy", "toy")["test"]) == 24


def test_two_processes_without_locks(tmp_path, toy):
    code = MAKE.replace("make(sys", "import wsol_nb.synth as s; s.fcntl = None; make(sys")
    both = [run(code, "toy", tmp_path) for _ in range(2)]
    for process in both:
        assert process.wait() == 0, process.stderr.read()
    assert leftovers(tmp_path) == []
    assert synth.read_stamp(tmp_path / "toy")["checksum"] == synth.read_stamp(toy)["checksum"]


def test_killed_while_drawing(tmp_path, toy):
    process = run(MAKE, "toy", tmp_path)
    deadline = time.time() + 60
    while not list(tmp_path.glob(".toy.making-*/part_maps/*/*.png")) and time.time() < deadline:
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "toy").exists()
    assert list(tmp_path.glob(".toy.making-*"))
    synth.make("toy", tmp_path)
    assert leftovers(tmp_path) == []
    assert synth.read_stamp(tmp_path / "toy")["checksum"] == synth.read_stamp(toy)["checksum"]


def test_disk_full_leaves_nothing(tmp_path):
    code = ("import resource, sys; from wsol_nb.core import OutputError; from wsol_nb.synth import make\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
            "try: make('toy', sys.argv[1])\nexcept OutputError as error: print(error)")
    output, errors = run(code, tmp_path).communicate()
    assert "cannot write" in output and "toy" in output, errors
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        synth.make("toy", tmp_path / "file" / "below")


def test_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="was not written by the generator"):
        synth.make("toy", tmp_path, force=True)
    assert (tmp_path / "toy" / "mine.txt").read_text() == "precious"


def test_helpers_draw_the_same(tmp_path, toy, monkeypatch):
    helpers = synth._helpers
    monkeypatch.setattr(synth.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(synth, "_helpers", lambda name, folder, pictures: helpers(name, folder, 10_000))
    synth.make("toy", tmp_path)
    assert synth.read_stamp(tmp_path / "toy")["checksum"] == synth.read_stamp(toy)["checksum"]
    assert leftovers(tmp_path) == []


def test_dead_helper_is_replaced(tmp_path, toy, monkeypatch):
    def die(name, folder, pictures):      # one that claimed a chunk and never drew it
        (folder / ".claim-50").touch()
        return []
    monkeypatch.setattr(synth, "_helpers", die)
    synth.make("toy", tmp_path)
    assert synth.read_stamp(tmp_path / "toy")["checksum"] == synth.read_stamp(toy)["checksum"]


def test_found_in_another_data_root(tmp_path, toy, monkeypatch):
    monkeypatch.setenv("WSOL_DATA", os.pathsep.join([str(tmp_path), str(toy.parent)]))
    assert synth.make("toy") == toy
    assert list(tmp_path.iterdir()) == []


def test_stale_set_in_another_root_is_drawn_at_home(tmp_path, monkeypatch):
    old = synth.make("toy", tmp_path / "old")
    stamp = synth.read_stamp(old)
    stamp["settings"]["generator"] -= 1
    (old / "synth.json").write_text(json.dumps(stamp))
    monkeypatch.setenv("WSOL_DATA", os.pathsep.join([str(tmp_path / "home"), str(tmp_path / "old")]))
    assert synth.make("toy") == tmp_path / "home" / "toy"
    assert synth.read_stamp(old) == stamp


def few(name):
    """The recipe of a twin with a dozen pictures"""
    recipe = synth.recipe_of(name)
    if hasattr(recipe.content, "videos"):
        videos = tuple((split, count if split == "val" else 1) for split, count in recipe.content.videos)
        less = {"videos": videos, "classes": recipe.content.classes[:1], "shots": 1, "frames": 2}
    else:
        less = {"counts": tuple((split, 4) for split, _ in recipe.content.counts)}
    return recipe._replace(content=dataclasses.replace(recipe.content, **less))


def child(work):
    """The id of a forked process that does `work` and ends"""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return process


def files(folder):
    """Path -> bytes of every file with pixels or text; MATLAB's and the stamp hold the time"""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and p.suffix != ".mat" and p.name != "synth.json"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", sorted(key for key in synth.MAKERS if key.startswith("mini_")))
def test_twin_is_whole_or_absent(name, tmp_path, monkeypatch):
    """Made by two processes at once, by one after a killed one, and again after it was deleted: always the same"""
    recipe, root = few(name), tmp_path / "root"
    monkeypatch.setitem(synth.MAKERS, name, recipe)
    ended = [os.waitpid(process, 0)[1] for process in [child(lambda: synth.make(name, root)) for _ in range(2)]]
    assert ended == [0, 0] and [p.name for p in root.iterdir()] == [name]
    known, stamp = files(root / name), synth.read_stamp(root / name)
    assert stamp["pictures"] == len(recipe.jobs) > 0

    shutil.rmtree(root / name)
    last = recipe.jobs[-1]
    def die(content, folder, *job):
        if job == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return recipe.picture(content, folder, *job)
    die.__name__ = recipe.picture.__name__
    def dying():
        synth.MAKERS[name] = recipe._replace(picture=die)
        synth.make(name, root)
    assert os.WTERMSIG(os.waitpid(child(dying), 0)[1]) == signal.SIGKILL
    assert not (root / name).exists() and list(root.glob(f".{name}.making-*"))

    for _ in range(2):
        synth.make(name, root)
        assert [p.name for p in root.iterdir()] == [name]
        assert synth.read_stamp(root / name)["checksum"] == stamp["checksum"] and files(root / name) == known
        shutil.rmtree(root / name)


if __name__ == "__main__":
    REFERENCE.write_text(json.dumps([measure(*shot) for shot in SHOTS]) + "\n")
