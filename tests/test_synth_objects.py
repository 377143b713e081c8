"""Objects of the embedded benchmark: the same pixels everywhere, twins that the real readers read, features that are small parts"""
import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from test_synth import measure, run, same
from wsol_nb import datasets, synth
from wsol_nb import synth_objects as objects
from wsol_nb.core import SettingsError

REFERENCE = Path(__file__).with_name("synth_objects_reference.json")
SHOTS = [("mini_ilsvrc", "train", 0, 0), ("mini_ilsvrc", "val", 5, 0), ("mini_ilsvrc", "test", 7, 0), ("mini_ilsvrc", "test", 11, 0),
         ("mini_ilsvrc", "pretrain", 28, 1), ("mini_openimages", "val", 2, 0), ("mini_openimages", "test", 27, 0),
         ("mini_teldrone", "train", 4, 0), ("mini_teldrone", "test", 20, 0)]
TWINS = ("mini_ilsvrc", "mini_openimages", "mini_teldrone")
POOL = objects.ObjectSet("pool", objects.OBJECTS, (), tuple((v, k) for k, kind in objects.POOL_KINDS.items() for v in kind.variants))


@pytest.mark.parametrize("number", range(len(SHOTS)))
def test_pixels_are_those_of_the_reference(number):
    """After a wanted change raise `ObjectSet.version` and run this file"""
    same(json.loads(REFERENCE.read_text())[number], measure(*SHOTS[number]))


def test_pixels_are_the_same_in_another_process():
    shots = [("mini_ilsvrc", "test", 8), ("mini_openimages", "train", 4), ("mini_teldrone", "val", 2)]
    code = ("import json, sys; from wsol_nb import synth\n"
            "for name, split, index in json.loads(sys.argv[1]):\n"
            "    p = synth.recipe_of(name).content.render(split, index)\n"
            "    print(synth.digest(p.image, p.parts, p.instances))")
    pictures = [synth.recipe_of(name).content.render(split, index) for name, split, index in shots]
    for seed in "1", "2":
        output, errors = run(code, json.dumps(shots), env={"PYTHONHASHSEED": seed}).communicate()
        assert output.split() == [synth.digest(p.image, p.parts, p.instances) for p in pictures], errors


def test_two_shots_show_one_individual():
    content = synth.recipe_of("mini_ilsvrc").content
    looks = [[objects.kind_target(content.scene, "fish", "red-crested", synth.Stream("who"), synth.Stream("pose", shot)) for shot in (0, 1)],
             [objects.kind_target(content.scene, "fish", "red-crested", synth.Stream("other"), synth.Stream("pose", 0))] * 2]
    colours = [[s.colour for s in target.shapes if s.part == "object"] for target in (*looks[0], looks[1][0])]
    assert colours[0] == colours[1] != colours[2] and looks[0][0].texture == looks[0][1].texture != looks[1][0].texture
    assert np.abs(looks[0][0].shapes[0].points - looks[0][1].shapes[0].points).max() > 3
    assert not np.array_equal(content.render("pretrain", 1, 0).image, content.render("pretrain", 1, 1).image)


def small(name, **counts):
    """The recipe of a twin with fewer pictures"""
    recipe = synth.recipe_of(name)
    return recipe._replace(content=dataclasses.replace(recipe.content, counts=tuple(counts.items())))


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Every twin, written small: name -> data set as its reader gives it, recipe"""
    folder, found = tmp_path_factory.mktemp("twins"), {}
    with pytest.MonkeyPatch.context() as patch:
        for name in TWINS:
            recipe = small(name, train=15, val=10, test=30)
            patch.setitem(synth.MAKERS, name, recipe)
            source = datasets.SOURCES[name]
            found[name] = source.read(synth.make(name, folder), name, evaluation=source.evaluation, twin_of=source.twin_of), recipe.content
    return found


@functools.cache
def render(name, split, index):
    return synth.recipe_of(name).content.render(split, index)


def number_of(item):
    """Files are numbered like pictures"""
    return int(re.findall(r"\d+", Path(item.id).stem)[-1])


def pairs(twins, name, split):
    """(item, picture) of a split"""
    return [(item, render(name, split, number_of(item))) for item in twins[name][0][split]]


@pytest.mark.parametrize("name", TWINS)
def test_reader_gets_the_pictures(twins, name):
    data, content = twins[name]
    assert data.classes == content.classes and data.twin_of == name.removeprefix("mini_")
    for split, count in content.counts:
        assert len(data[split]) == count
        for item, picture in pairs(twins, name, split):
            assert item.label == content.label(number_of(item))
            assert (item.width, item.height) == picture.image.shape[:2]
            assert np.array_equal(np.asarray(datasets.read_image(item.path)), picture.image)


@pytest.mark.parametrize("name", ["mini_ilsvrc", "mini_teldrone"])
def test_reader_gets_the_boxes(twins, name):
    for split in "val", "test":
        for item, picture in pairs(twins, name, split):
            seen = [np.argwhere(picture.instances == number)[:, ::-1] for number in (1, 2)]
            boxes = [[*s.min(0), *s.max(0)] for number, s in enumerate(seen) if len(s) >= (30 if number else 1)]
            assert item.boxes.tolist() == boxes
    assert not any(len(item.boxes) for item in twins[name][0]["train"])


def test_some_pictures_have_two_boxes_or_none(twins):
    assert {len(item.boxes) for item in twins["mini_ilsvrc"][0]["test"]} == {1, 2}
    for item in twins["mini_teldrone"][0]["test"]:
        assert len(item.boxes) == (1 if item.label == 0 else 0)


def test_ours_beside_the_real_layout(twins):
    data, _ = twins["mini_ilsvrc"]
    for split, folder in (("train", "train"), ("test", "val")):
        for item, picture in pairs(twins, "mini_ilsvrc", split)[:4]:
            path = item.path.relative_to(data.root)
            assert path.parts[0] == folder
            assert np.array_equal(np.asarray(Image.open(data.root / "part_maps" / path)), picture.parts)
            assert np.array_equal(np.asarray(Image.open(data.root / "segmentations" / path)), picture.instances)


def test_reader_gets_masks_and_ignore_masks(twins):
    ignored, counts = 0, set()
    for item, picture in pairs(twins, "mini_openimages", "test"):
        masks = [np.asarray(Image.open(path)) > 0 for path in item.masks]
        for number, mask in enumerate(masks, 1):
            assert np.array_equal(mask, picture.instances == number)
        left = datasets.read_mask(item, datasets.eval_geometry(96))
        counts.add(len(masks))
        assert np.array_equal(left == 1, np.any(masks, 0))
        if len(masks) == 1 and (picture.instances == 2).any():
            ignored += 1
            assert (left[picture.instances == 2] == 255).all()
    assert counts == {1, 2} and ignored


def test_no_photograph_serves_two_splits():
    for name in TWINS:
        for other in TWINS:      # nor one split of this set and another split of that one
            used = {}
            for content in (synth.recipe_of(name).content, synth.recipe_of(other).content):
                for split, photographs in content.photographs:
                    for photograph in photographs:
                        assert used.setdefault(photograph, split) == split and photograph in synth.SOURCES[split]


@pytest.mark.parametrize("content", [synth.recipe_of("mini_ilsvrc").content, POOL], ids=["mini_ilsvrc", "pool"])
def test_features_are_seen_and_small(content):
    """Of every class; what is visible in a picture, not what was drawn. A box of the feature alone must be no box of the thing"""
    for label, name in enumerate(content.classes):
        pictures = [content.render("pretrain", label + k * len(content.classes)) for k in range(6)]
        wholes = [picture.instances == 1 for picture in pictures]
        features = [whole & (picture.parts == synth.PART_ID["feature"]) for whole, picture in zip(wholes, pictures)]
        seen = [feature.any() for feature in features]
        assert np.mean(seen) >= .8, name
        assert .01 < np.median([f.sum() / w.sum() for f, w in zip(features, wholes)]) < .4, name
        assert np.median([box_area(f) / box_area(w) for f, w, s in zip(features, wholes, seen) if s]) < .3, name


def box_area(mask):
    ys, xs = np.nonzero(mask)
    return (np.ptp(xs) + 1) * (np.ptp(ys) + 1)


def test_hue_does_not_tell_the_kind():
    """Less than a fifth of the spread of either colour difference lies between kinds"""
    content = synth.recipe_of("mini_ilsvrc").content
    means, kinds = [], []
    for index in range(75):
        picture = render("mini_ilsvrc", "pretrain", index)
        red, green, blue = picture.image[(picture.instances == 1) & (picture.parts != synth.PART_ID["feature"])].mean(0)
        means.append((red - green, blue - (red + green) / 2))
        kinds.append(content.kinds[content.label(index)][1])
    means, kinds = np.array(means), np.array(kinds)
    between = np.concatenate([np.repeat(means[kinds == k].mean(0, keepdims=True), (kinds == k).sum(), 0) for k in set(kinds)]).var(0)
    assert (between / means.var(0)).max() < .2


def test_evaluation_and_pool_share_no_kind():
    assert not set(objects.EVALUATION_KINDS) & set(objects.POOL_KINDS) and len(objects.POOL_KINDS) >= 8
    evaluated = {kind for name in TWINS for _, kind in synth.recipe_of(name).content.kinds}
    assert not evaluated & set(objects.POOL_KINDS)
    for name in TWINS:
        assert {w for c in synth.recipe_of(name).content.classes for w in c.split()} <= set(objects.class_words())


def test_recipes_elsewhere_are_found_when_used():
    code = "import sys; from wsol_nb import synth; assert 'wsol_nb.synth_objects' not in sys.modules; print(synth.recipe_of('mini_ilsvrc').content.key)"
    assert run(code).communicate()[0].strip() == "mini_ilsvrc"
    with pytest.raises(SettingsError, match="did you mean 'mini_ilsvrc'"):
        synth.recipe_of("mini_ilsvr")
    assert set(TWINS) <= set(datasets.makeable())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    REFERENCE.write_text(json.dumps([measure(*shot) for shot in SHOTS]) + "\n")
