"""Readers on fixtures in the original layouts, the errors each kind of damage gives, and what a loader draws."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from wsol_nb import datasets
from wsol_nb.core import DataError, SettingsError, data_path
from wsol_nb.datasets import (FolderItems, Geometry, Images, Item, Split, draw_geometry, eval_geometry, find_problems, load, nearest,
                              read_cub, read_folder, read_ilsvrc, read_metadata, read_openimages, read_wsol, write_metadata)


def picture(path: Path, size=(50, 40), seed=0):
    """A noisy picture, so that JPEG has something to encode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)


def lines(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(str, rows)))


def edit(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new, 1))


def rejected(read, message):
    with pytest.raises(DataError) as caught:
        read()
    assert message in str(caught.value).replace(os.sep, "/"), caught.value


# ---------------------------------------------------------------- CUB

@pytest.fixture
def cub(tmp_path):
    """Three classes; train 6, val 3, test 3 images."""
    base, classes = tmp_path / "cub" / "CUB_200_2011", ["001.Auk", "002.Wren", "003.Gull"]
    names = [f"{c}/{c[4:]}_{k}.jpg" for c in classes for k in range(3)]
    for k, name in enumerate(names):
        picture(base / "images" / name, seed=k)
    tables = {"images": names, "classes": classes, "image_class_labels": [1 + k // 3 for k in range(9)],
              "train_test_split": [int(k % 3 < 2) for k in range(9)], "bounding_boxes": [f"{k}.0 2.0 20.0 30.0" for k in range(9)]}
    for name, rows in tables.items():
        lines(base / f"{name}.txt", [f"{k} {row}" for k, row in enumerate(rows, 1)])
    val = [f"{c}/12{k}.jpg" for k, c in enumerate(classes)]
    for k, name in enumerate(val):
        picture(tmp_path / "cub" / "CUBV2" / name, seed=10 + k)
    meta = tmp_path / "cub" / "metadata" / "val"
    lines(meta / "image_ids.txt", val)
    lines(meta / "class_labels.txt", [f"{v},{k}" for k, v in enumerate(val)])
    lines(meta / "image_sizes.txt", [f"{v},50,40" for v in val])
    lines(meta / "localization.txt", [f"{v},1,2,30,39" for v in val])
    return tmp_path / "cub"


def test_cub(cub):
    ds = read_cub(cub, "cub")
    assert {s: len(ds[s]) for s in ds.splits} == {"train": 6, "val": 3, "test": 3}
    assert ds.classes == ["001.Auk", "002.Wren", "003.Gull"]
    assert ds["test"].labels.tolist() == [0, 1, 2]
    assert ds["test"].boxes()["001.Auk/Auk_2.jpg"].tolist() == [[2, 2, 22, 32]]          # x1 = x + width, as Choe et al.
    assert ds["val"].boxes(100)["002.Wren/121.jpg"].tolist() == [[2, 5, 60, 97]]         # 39·100/40 = 97.5, truncated
    assert (ds["train"][0].width, ds["train"][0].height) == (50, 40)
    assert ds["val"][0].path == cub / "CUBV2" / "001.Auk" / "120.jpg"


def test_cub_other_places(cub):
    for file in (cub / "CUB_200_2011").iterdir():
        file.rename(cub / file.name)
    (cub / "CUBV2").rename(cub / "v2")
    (cub / "CUBV2").mkdir()
    (cub / "v2").rename(cub / "CUBV2" / "images")
    ds = read_cub(cub, "cub")
    assert [len(ds[s]) for s in ds.splits] == [6, 3, 3]


def test_cub_boxes_at_the_border(cub):
    table = cub / "CUB_200_2011" / "bounding_boxes.txt"
    edit(table, "3 2.0 2.0 20.0 30.0", "3 5.0 2.0 46.0 38.0")         # x + width = 51 in a picture 50 wide: rounding, as in the original
    assert read_cub(cub, "cub")["test"][0].boxes.tolist() == [[5, 2, 49, 39]]
    edit(table, "3 5.0 2.0 46.0 38.0", "3 5.0 2.0 47.0 38.0")
    rejected(lambda: read_cub(cub, "cub")["test"], "bounding_boxes.txt:3: box 5,2,52,40 lies outside the image of 50 × 40 pixels")


CUB_DAMAGE = [
    ("images.txt", "2 001.Auk/Auk_1.jpg", "2 001.Auk/Auk_9.jpg", "train", "images.txt:2: image "),
    ("images.txt", "2 001.Auk/Auk_1.jpg", "2", "train", "images.txt:2: expected a number and a value"),
    ("images.txt", "2 001", "1 001", "train", "images.txt:2: number 1 is listed twice (first in line 1)"),
    ("image_class_labels.txt", "3 1", "3 4", "test", "image_class_labels.txt:3: image 3: '4' is not valid"),
    ("image_class_labels.txt", "3 1", "3 2", "test", "image_class_labels.txt:3: label 1 (002.Wren) of '001.Auk/Auk_2.jpg' contradicts"),
    ("image_class_labels.txt", "3 1", "3 x", "test", "image_class_labels.txt:3: image 3: 'x' is not valid"),
    ("image_class_labels.txt", "3 1\n", "", "test", "image_class_labels.txt: has no line for image 3 (001.Auk/Auk_2.jpg)"),
    ("image_class_labels.txt", "9 3", "9 3\n10 3", "test", "image_class_labels.txt:10: number 10 does not occur in images.txt"),
    ("train_test_split.txt", "1 1", "1 2", "train", "train_test_split.txt:1: image 1: '2' is not valid"),
    ("bounding_boxes.txt", "3 2.0 2.0 20.0 30.0", "3 2.0 2.0 20.0", "test", "bounding_boxes.txt:3: image 3: '2.0 2.0 20.0' is not valid"),
    ("bounding_boxes.txt", "3 2.0 2.0 20.0 30.0", "3 2.0 2.0 -9.0 30.0", "test", "bounding_boxes.txt:3: box 2,2,-7,32 has x1 < x0"),
    ("classes.txt", "2 002", "5 002", "test", "classes.txt: classes must be numbered"),
]


@pytest.mark.parametrize("file, old, new, split, message", CUB_DAMAGE)
def test_cub_damage(cub, file, old, new, split, message):
    edit(cub / "CUB_200_2011" / file, old, new)
    rejected(lambda: read_cub(cub, "cub")[split], message)


def test_cub_empty_and_absent(cub, tmp_path):
    table = cub / "CUB_200_2011" / "train_test_split.txt"
    table.write_text(table.read_text().replace(" 0", " 1"))
    rejected(lambda: read_cub(cub, "cub")["test"], "train_test_split.txt: the split is empty, no image is marked as test")
    (cub / "metadata").rename(tmp_path / "away")
    rejected(lambda: read_cub(cub, "cub")["val"], "metadata/val is missing, and with it the val split of 'cub'. To get it, run `wsol data fetch cub`")
    (cub / "CUB_200_2011" / "bounding_boxes.txt").unlink()
    rejected(lambda: read_cub(cub, "cub")["train"], "bounding_boxes.txt: cannot be read")
    (cub / "CUB_200_2011" / "images.txt").unlink()
    rejected(lambda: read_cub(cub, "cub"), "neither images.txt nor CUB_200_2011/images.txt")


# ---------------------------------------------------------------- text metadata

METADATA_DAMAGE = [
    ("image_ids.txt", "002.Wren/121.jpg", "001.Auk/120.jpg", "image_ids.txt:2: '001.Auk/120.jpg' is listed twice (first in line 1)"),
    ("image_ids.txt", "002.Wren/121.jpg", "002.Wren/999.jpg", "class_labels.txt:2: '002.Wren/121.jpg' is not in image_ids.txt"),
    ("image_ids.txt", "\n003.Gull/122.jpg", "", "class_labels.txt:3: '003.Gull/122.jpg' is not in image_ids.txt"),
    ("image_ids.txt", "003.Gull/122.jpg", "003.Gull/122.jpg\n003.Gull/123.jpg", "image_ids.txt:4: '003.Gull/123.jpg' has no line in class_labels"),
    ("image_ids.txt", "003.Gull/122.jpg", "../../122.jpg", "image_ids.txt:3: '../../122.jpg' must be a path below"),
    ("class_labels.txt", "\n003.Gull/122.jpg,2", "\n003.Gull/12", "class_labels.txt:3: expected image_id,label with whole numbers, got '003.Gull/12'"),
    ("class_labels.txt", "122.jpg,2", "122.jpg,3", "class_labels.txt:3: label 3 of '003.Gull/122.jpg' is none of the 3 classes"),
    ("class_labels.txt", "122.jpg,2", "122.jpg,0", "class_labels.txt:3: label 0 (001.Auk) of '003.Gull/122.jpg' contradicts its folder"),
    ("class_labels.txt", "122.jpg,2", "122.jpg,-1", "class_labels.txt:3: label -1"),
    ("image_sizes.txt", "121.jpg,50,40", "121.jpg,50", "image_sizes.txt:2: expected image_id,width,height with whole numbers"),
    ("image_sizes.txt", "121.jpg,50,40", "121.jpg,50,40.0", "image_sizes.txt:2: expected image_id,width,height with whole numbers"),
    ("localization.txt", "121.jpg,1,2,30,39", "121.jpg,1,2,30", "localization.txt:2: expected image_id,x0,y0,x1,y1 in whole pixels"),
    ("localization.txt", "121.jpg,1,2,30,39", "121.jpg,1,2,30.5,39", "localization.txt:2: expected image_id,x0,y0,x1,y1 in whole pixels"),
    ("localization.txt", "121.jpg,1,2,30,39", "121.jpg,31,2,30,39", "localization.txt:2: box 31,2,30,39 has x1 < x0 or y1 < y0"),
    ("localization.txt", "121.jpg,1,2,30,39", "121.jpg,1,2,51,39", "localization.txt:2: box 1,2,51,39 lies outside the image of 50 × 40"),
    ("localization.txt", "121.jpg,1,2,30,39", "121.jpg,-2,2,30,39", "localization.txt:2: box -2,2,30,39 lies outside"),
    ("localization.txt", "002.Wren/121.jpg,", "002.Wren/124.jpg,", "localization.txt:2: '002.Wren/124.jpg' is none of the images"),
    ("localization.txt", "002.Wren/121.jpg,1,2,30,39\n", "", "image_ids.txt:2: '002.Wren/121.jpg' has no box or mask"),
]


@pytest.mark.parametrize("file, old, new, message", METADATA_DAMAGE)
def test_metadata_damage(cub, file, old, new, message):
    edit(cub / "metadata" / "val" / file, old, new)
    rejected(lambda: read_cub(cub, "cub")["val"], message)


def test_metadata_files(cub):
    meta = cub / "metadata" / "val"
    (meta / "localization.txt").write_bytes(b"001.Auk/120.jpg,1,2,30,39\n\x80\x81")
    rejected(lambda: read_cub(cub, "cub")["val"], "localization.txt:2: not text in UTF-8")
    (meta / "localization.txt").write_text("")
    rejected(lambda: read_cub(cub, "cub")["val"], "image_ids.txt:1: '001.Auk/120.jpg' has no box or mask")
    (meta / "class_labels.txt").unlink()
    rejected(lambda: read_cub(cub, "cub")["val"], "class_labels.txt: cannot be read")
    (meta / "image_ids.txt").write_text("\n\n")
    rejected(lambda: read_cub(cub, "cub")["val"], "image_ids.txt: the split is empty")


def test_metadata_without_sizes_or_with_windows_lines(cub):
    meta = cub / "metadata" / "val"
    (meta / "image_sizes.txt").unlink()
    for file in meta.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    split = read_cub(cub, "cub")["val"]
    assert [(i.id, i.width, i.boxes.tolist()) for i in split][1] == ("002.Wren/121.jpg", 50, [[1, 2, 30, 39]])


def test_round_trip(tmp_path):
    draw = np.random.default_rng(0)
    items = []
    for k in range(200):
        width, height = draw.integers(1, 900, 2)
        corners = np.sort(draw.integers(0, (width, height), (draw.integers(0, 4), 2, 2)), axis=1).reshape(-1, 4)
        items.append(Item(f"c{k % 7}/é {k}.jpg", int(k % 7), int(width), int(height), corners, Path(f"/data/c{k % 7}/é {k}.jpg")))
    split = Split("val", items, [f"c{k}" for k in range(7)])
    write_metadata(tmp_path, split)
    again = read_metadata(tmp_path, "val", classes=split.classes)
    assert [(i.id, i.label, i.width, i.height, i.boxes.tolist()) for i in again] == [
        (i.id, i.label, i.width, i.height, i.boxes.tolist()) for i in split]
    assert again.name == "val" and again.boxes(224).keys() == split.boxes().keys()
    write_metadata(tmp_path, again.subset(10))                        # overwrites completely
    assert len(read_metadata(tmp_path / "val")) == 10
    rejected(lambda: write_metadata(tmp_path, Split("x", [Item("a,b.jpg", 0, 1, 1, corners[:0], Path("a,b.jpg"))], ["a"])), "comma")


# ---------------------------------------------------------------- ILSVRC

XML = ("<annotation><folder>val</folder><size><width>50</width><height>40</height><depth>3</depth></size>\n{}</annotation>\n")
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>\n"


@pytest.fixture
def ilsvrc(tmp_path):
    """Two classes; train 5, val 4, test 3 images."""
    root = tmp_path / "ilsvrc"
    for name in ("n02/n02_1.JPEG", "n02/n02_2.JPEG", "n01/n01_10.JPEG", "n01/n01_3.JPEG", "n01/n01_4.JPEG"):
        picture(root / "train" / name)
    (root / "train" / "n01" / ".hidden").write_text("")
    (root / "train" / "n01" / "list.txt").write_text("")
    val = [f"val2/{c}/{k}.jpeg" for c in (0, 1) for k in (0, 1)]
    for name in val:
        picture(root / name)
    test = [f"ILSVRC2012_val_0000000{k}.JPEG" for k in (1, 2, 3)]
    for k, name in enumerate(test):
        picture(root / "val" / name)
        boxes = OBJECT.format("n02" if k else "n01", 0, 0, 49, 39) + (OBJECT.format("n02", 5, 6, 7, 8) if k == 2 else "")
        lines(root / "Annotations" / "CLS-LOC" / "val" / name.replace("JPEG", "xml"), [XML.format(boxes)])
    for split, ids, labels in (("val", val, [0, 0, 1, 1]), ("test", [f"val/{t}" for t in test], [0, 1, 1])):
        lines(root / "metadata" / split / "image_ids.txt", ids)
        lines(root / "metadata" / split / "class_labels.txt", [f"{i},{k}" for i, k in zip(ids, labels)])
        lines(root / "metadata" / split / "image_sizes.txt", [f"{i},50,40" for i in ids])
        lines(root / "metadata" / split / "localization.txt", [f"{i},0,0,49,39" for i in ids] + [f"{ids[2]},5,6,7,8"])
    return root


def test_ilsvrc(ilsvrc):
    ds = read_ilsvrc(ilsvrc, "ilsvrc")
    assert {s: len(ds[s]) for s in ds.splits} == {"train": 5, "val": 4, "test": 3}
    assert ds.classes == ["n01", "n02"] and ds["train"].labels.tolist() == [0, 0, 0, 1, 1]
    assert ds["train"].skipped == {"hidden file": 1, "not an image": 1}
    first = ds["train"][0]
    assert (first.id, first.path, first.width) == ("train/n01/n01_10.JPEG", ilsvrc / "train/n01/n01_10.JPEG", 50)
    assert isinstance(ds["train"].items, FolderItems)
    assert [len(i.boxes) for i in ds["test"]] == [1, 1, 2]
    assert Images(ds["train"], size=16, resize=16, train=True)[4]["label"] == 1


def test_ilsvrc_from_xml(ilsvrc, tmp_path):
    text = read_ilsvrc(ilsvrc, "ilsvrc")["test"]
    (ilsvrc / "metadata" / "test").rename(tmp_path / "away")
    xml = read_ilsvrc(ilsvrc, "ilsvrc")["test"]
    assert [(i.id, i.label, i.width, i.boxes.tolist()) for i in xml] == [(i.id, i.label, i.width, i.boxes.tolist()) for i in text]
    notes = ilsvrc / "Annotations" / "CLS-LOC" / "val"
    note = notes / "ILSVRC2012_val_00000002.xml"
    whole = note.read_text()
    for damage, message in ((whole[:60], "val_00000002.xml:1: is no complete XML"), (whole.replace(">0<", ">0.5<", 1), "no whole number"),
                            (whole.replace("n02", "n03"), "objects of one known class, found n03"), (XML.format(""), "found none"),
                            (whole.replace(">49<", ">59<"), "box 0,0,59,39 lies outside"),
                            (XML.format(OBJECT.format("n01", 1, 1, 2, 2) + OBJECT.format("n02", 1, 1, 2, 2)), "found n01, n02")):
        note.write_text(damage)
        rejected(lambda: read_ilsvrc(ilsvrc, "ilsvrc")["test"], message)
    note.unlink()
    rejected(lambda: read_ilsvrc(ilsvrc, "ilsvrc")["test"], "val_00000002.xml: annotation cannot be read")


def test_ilsvrc_other_places(ilsvrc):
    """The Kaggle archive, ImageNetV2 as it is unpacked today, validation images in class folders, class names."""
    base = ilsvrc / "ILSVRC" / "Data" / "CLS-LOC"
    base.mkdir(parents=True)
    (ilsvrc / "train").rename(base / "train")
    (base / "val" / "n01").mkdir(parents=True)
    (base / "val" / "n02").mkdir()
    for k, file in enumerate(sorted((ilsvrc / "val").iterdir())):
        file.rename(base / "val" / ("n02" if k else "n01") / file.name)
    (ilsvrc / "val").rmdir()
    new = ilsvrc / "imagenetv2-threshold0.7-format-val"
    (ilsvrc / "val2").rename(new)
    pairs = [(f"{c}/{k}.jpeg", f"{c}/{'ab'[k]}{c}ff.jpeg") for c in (0, 1) for k in (0, 1)]
    for old, name in pairs:
        (new / old).rename(new / name)
    rejected(lambda: read_ilsvrc(ilsvrc, "ilsvrc")["val"], "image_ids.txt:1: image ")
    lines(ilsvrc / "metadata" / "val" / "mapping.txt", [f"{old}, {name}" for old, name in pairs])
    lines(ilsvrc / "LOC_synset_mapping.txt", ["n01 tench, Tinca tinca", "n02 goldfish, Carassius auratus"])
    ds = read_ilsvrc(ilsvrc, "ilsvrc")
    assert [len(ds[s]) for s in ds.splits] == [5, 4, 3]
    assert ds.classes[0] == "tench, Tinca tinca"
    assert ds["val"][1].path == new / "0" / "b0ff.jpeg"
    assert ds["test"][1].path.parent.name == "n02"
    (base / "train").rename(ilsvrc / "away")
    assert len(read_ilsvrc(ilsvrc, "ilsvrc").classes) == 2                  # evaluation needs no training images


def test_ilsvrc_damage(ilsvrc):
    edit(ilsvrc / "metadata" / "val" / "class_labels.txt", "val2/1/0.jpeg,1", "val2/1/0.jpeg,0")
    rejected(lambda: read_ilsvrc(ilsvrc, "ilsvrc")["val"], "class_labels.txt:3: label 0 (n01) of 'val2/1/0.jpeg' contradicts its folder")
    lines(ilsvrc / "LOC_synset_mapping.txt", ["n01 tench"])
    rejected(lambda: read_ilsvrc(ilsvrc, "ilsvrc"), "LOC_synset_mapping.txt: training folder n02 is not listed")
    (ilsvrc / "LOC_synset_mapping.txt").unlink()
    (ilsvrc / "train" / "n03").mkdir()
    rejected(lambda: read_ilsvrc(ilsvrc, "ilsvrc")["train"], "train/n03: no image in this class folder")
    (ilsvrc / "train").rename(ilsvrc / "elsewhere")
    rejected(lambda: read_ilsvrc(ilsvrc, "ilsvrc"), "neither training folders nor LOC_synset_mapping.txt")


# ---------------------------------------------------------------- OpenImages

def square(path: Path, box, size=(16, 12)):
    mask = np.zeros(size[::-1], np.uint8)
    x0, y0, x1, y1 = box
    mask[y0:y1 + 1, x0:x1 + 1] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


@pytest.fixture
def openimages(tmp_path):
    """Two classes; train 4, val 2, test 2 images; each evaluated image has two instances and an ignore mask."""
    root = tmp_path / "openimages"
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        ids = [f"{split}/{c}/{k}a.jpg" for c in ("0bt_c3", "01226z") for k in range(count)]
        rows = []
        for id in ids:
            picture(root / id, (32, 24))
            if split != "train":
                base = id.removesuffix(".jpg")
                square(root / f"{base}_m1.png", (0, 0, 5, 5))
                square(root / f"{base}_m2.png", (4, 4, 9, 9))
                square(root / f"{base}_ignore.png", (8, 8, 15, 11))
                rows += [f"{id},{base}_m1.png,{base}_ignore.png", f"{id},{base}_m2.png,"]
        lines(root / "metadata" / split / "image_ids.txt", ids)
        lines(root / "metadata" / split / "class_labels.txt", [f"{i},{int('0bt' in i)}" for i in ids])
        if rows:
            lines(root / "metadata" / split / "localization.txt", rows)
    return root


def test_openimages(openimages):
    ds = read_openimages(openimages, "openimages")
    assert {s: len(ds[s]) for s in ds.splits} == {"train": 4, "val": 2, "test": 2}
    assert ds.evaluation == "masks" and ds.classes == ["01226z", "0bt_c3"]
    item = ds["val"][0]
    assert (len(item.masks), item.ignore.name, item.label, item.width) == (2, "0a_ignore.png", 1, 32)
    batch = Images(ds["val"], size=12)[0]
    expected = np.zeros((12, 16), np.uint8)
    expected[8:, 8:] = 255
    expected[:6, :6] = expected[4:10, 4:10] = 1
    columns = np.arange(12) * 16 // 12
    assert (batch["mask"].numpy() == expected[:, columns]).all()
    lines(openimages / "classes.txt", ["bird", "dog"])
    assert read_openimages(openimages, "openimages").classes == ["bird", "dog"]


OPENIMAGES_DAMAGE = [
    ("0a_m2.png,", "0a_m3.png,", "localization.txt:2: mask file "),
    ("0a_m2.png,", "0a_m2.png,val/0bt_c3/0a_m1.png", "localization.txt:2: 'val/0bt_c3/0a.jpg' has a second ignore mask"),
    ("val/0bt_c3/0a.jpg,val/0bt_c3/0a_m2.png,", "val/0bt_c3/0a.jpg,1,2,3,4", "localization.txt:2: expected image_id,mask,ignore mask"),
    ("val/0bt_c3/0a.jpg,val/0bt_c3/0a_m2.png,", "val/0bt_c3/0a.jpg,val/0bt_c3/0a_m2.p", "localization.txt:2: expected"),
]


@pytest.mark.parametrize("old, new, message", OPENIMAGES_DAMAGE)
def test_openimages_damage(openimages, old, new, message):
    edit(openimages / "metadata" / "val" / "localization.txt", old, new)
    rejected(lambda: read_openimages(openimages, "openimages")["val"], message)


def test_openimages_more_damage(openimages):
    edit(openimages / "metadata" / "val" / "class_labels.txt", "val/01226z/0a.jpg,0", "val/01226z/0a.jpg,1")
    rejected(lambda: read_openimages(openimages, "openimages")["val"], "class_labels.txt:2: label 1 (0bt_c3) of 'val/01226z/0a.jpg' contradicts")
    (openimages / "test" / "0bt_c3" / "0a_m1.png").write_bytes(b"\x89PNG broken")
    split = read_openimages(openimages, "openimages")["test"]
    rejected(lambda: Images(split, size=8)[0], "test/0bt_c3/0a_m1.png: unreadable or truncated image")


# ---------------------------------------------------------------- our layout and a user's folder

def test_teldrone(tmp_path):
    """Pictures without the object have no box."""
    root = tmp_path / "teldrone"
    for name in ("no_site/1.jpg", "site/2.jpg"):
        picture(root / "images" / name)
    for split in ("train", "val", "test"):
        lines(root / "metadata" / split / "image_ids.txt", ["no_site/1.jpg", "site/2.jpg"])
        lines(root / "metadata" / split / "class_labels.txt", ["no_site/1.jpg,0", "site/2.jpg,1"])
        lines(root / "metadata" / split / "image_sizes.txt", ["no_site/1.jpg,50,40", "site/2.jpg,50,40"])
        lines(root / "metadata" / split / "localization.txt", ["site/2.jpg,1,2,3,4"])
    ds = read_wsol(root, "teldrone")
    assert ds.classes == ["no_site", "site"] and list(ds["test"].boxes()) == ["site/2.jpg"]
    rejected(lambda: read_wsol(root, "photos", every=True)["val"], "image_ids.txt:1: 'no_site/1.jpg' has no box")
    lines(root / "classes.txt", ["site", "site"])
    rejected(lambda: read_wsol(root, "teldrone"), "classes.txt:2: class 'site' is listed twice")


def test_folder(tmp_path):
    for k in range(20):
        picture(tmp_path / "cat" / f"{k}.jpg", seed=k)
        picture(tmp_path / "dog" / "more" / f"{k}.PNG", seed=k)
    (tmp_path / "cat" / ".hidden.jpg").write_text("")
    (tmp_path / "cat" / "Thumbs.db").write_text("")
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "loose.jpg")
    lines(tmp_path / "localization.txt", ["cat/3.jpg,0,0,9,9", "dog/more/4.PNG,0,0,50,40"])
    ds = load(f"folder:{tmp_path}")
    assert ds.classes == ["cat", "dog"] and [len(ds[s]) for s in ds.splits] == [24, 6, 10]
    everything = [i.id for s in ds.splits for i in ds[s]]
    assert len(set(everything)) == 40
    assert ds["train"].skipped == {"hidden file": 1, "not an image": 1, "image outside a class folder": 1}
    assert {i: b.tolist() for s in ds.splits for i, b in ds[s].boxes().items()} == {"cat/3.jpg": [[0, 0, 9, 9]], "dog/more/4.PNG": [[0, 0, 49, 39]]}
    assert [[i.id for i in load(f"folder:{tmp_path}")[s]] for s in ds.splits] == [[i.id for i in ds[s]] for s in ds.splits]
    lines(tmp_path / "localization.txt", ["cat/99.jpg,0,0,9,9"])
    rejected(lambda: read_folder(tmp_path, "folder:"), "localization.txt:1: 'cat/99.jpg' is none of the images")


def test_folder_with_given_splits_and_broken_files(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for c in ("cat", "dog"):
            for k in range(count):
                picture(tmp_path / split / c / f"{k}.jpg", seed=k)
    (tmp_path / "train" / "cat" / "0.jpg").write_text("broken")
    ds = read_folder(tmp_path, "folder:")
    assert ds.splits == ("train", "val")
    with pytest.warns(UserWarning, match="1 unreadable of 8 images in train are left out: train/cat/0.jpg"):
        assert len(ds["train"]) == 7
    assert ds["train"].skipped == {"unreadable image": 1} and ds["val"].labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(SettingsError, match="unknown split of folder: 'test'"):
        ds["test"]


def test_folder_errors(tmp_path):
    rejected(lambda: load(f"folder:{tmp_path / 'none'}"), "is no folder")
    rejected(lambda: load(f"folder:{tmp_path}"), "no class folder with images")
    picture(tmp_path / "cat" / "1.jpg")
    rejected(lambda: load(f"folder:{tmp_path}")["val"], "the val split is empty")


# ---------------------------------------------------------------- load, check

def test_load_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("WSOL_DATA", f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}")
    for key in ("cub", "ilsvrc", "openimages", "teldrone", "glas", "camelyon", "ytov1", "ytov2", "clips"):
        with pytest.raises(DataError) as caught:
            load(key)
        message = str(caught.value)
        for part in (str(tmp_path / "a" / key), str(tmp_path / "b" / key), "Expected layout: ", "Size: ", "Licence: ", "To get it, "):
            assert part in message
        assert "\n" not in message
    assert "nonsense" not in datasets.available()
    with pytest.raises(SettingsError, match="unknown data set"):
        load("nonsense")


def test_without_a_generator(monkeypatch):
    monkeypatch.setattr(datasets, "MAKERS", "wsol_nb.no_such_module:MAKERS")
    assert datasets.makeable() == [] and "toy" not in datasets.available()


def test_find_problems(cub, monkeypatch):
    monkeypatch.setenv("WSOL_DATA", str(cub.parent))
    monkeypatch.setitem(datasets.SOURCES, "cub", datasets.replace(datasets.SOURCES["cub"], counts=(6, 3, 3)))
    problems, splits = find_problems("cub")
    assert problems == [] and {name: len(split) for name, split in splits.items()} == {"train": 6, "val": 3, "test": 3}
    images = cub / "CUB_200_2011" / "images"
    data = (images / "001.Auk" / "Auk_0.jpg").read_bytes()
    (images / "001.Auk" / "Auk_0.jpg").write_bytes(data[:len(data) // 2])
    (images / "002.Wren" / "Wren_2.jpg").write_bytes(b"")
    edit(cub / "metadata" / "val" / "localization.txt", "122.jpg,1,2,30,39", "122.jpg,1,2,30,99")
    edit(cub / "metadata" / "val" / "class_labels.txt", "121.jpg,1", "121.jpg,7")
    edit(cub / "metadata" / "val" / "image_sizes.txt", "120.jpg,50,40", "120.jpg,60,40")
    problems, splits = find_problems("cub")
    found = "\n".join(problems).replace(os.sep, "/")
    for part in ("001.Auk/Auk_0.jpg: unreadable or truncated", "002.Wren/Wren_2.jpg: unreadable", "localization.txt:3: box 1,2,30,99",
                 "class_labels.txt:2: label 7", "CUBV2/001.Auk/120.jpg: the image is 50 × 40 pixels, the metadata say 60 × 40"):
        assert part in found
    assert len(splits["train"]) == 6
    (cub / "CUBV2").rename(cub / "away")
    monkeypatch.setitem(datasets.SOURCES, "cub", datasets.replace(datasets.SOURCES["cub"], counts=(9, 9, 9)))
    assert "train has 6 images, expected 9" in "\n".join(find_problems("cub")[0])


def test_image_in_two_splits(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / split / "cat" / "1.jpg")
    root = tmp_path / "set"
    picture(root / "images" / "cat" / "1.jpg")
    for split in ("train", "val"):
        lines(root / "metadata" / split / "image_ids.txt", ["cat/1.jpg"])
        lines(root / "metadata" / split / "class_labels.txt", ["cat/1.jpg,0"])
    assert find_problems(f"folder:{root}")[0] == [f"{root / 'images' / 'cat' / '1.jpg'}: occurs in the splits train and val"]


@pytest.mark.skipif(data_path("photos") is None, reason="WSOL_DATA holds no photos")
def test_photos():
    ds = load("photos")
    assert {s: len(ds[s]) for s in ds.splits} == {"train": 738, "val": 183, "test": 308}
    assert len(ds.classes) == 11 and ds.classes[0] == "airplane"
    assert len(ds["train"].boxes()) == 0 and len(ds["test"].boxes()) == 308


@pytest.mark.skipif("toy" not in datasets.makeable(), reason="no generator")
def test_two_processes_make_one_data_set(tmp_path):
    code = "from wsol_nb.datasets import load; print([len(load('toy')[s]) for s in ('train', 'val', 'test')])"
    both = [subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "WSOL_DATA": str(tmp_path)}, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    answers = [process.communicate(timeout=100)[0].strip().splitlines()[-1] for process in both]
    assert answers[0] == answers[1] and [p.returncode for p in both] == [0, 0]
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["toy"]


# ---------------------------------------------------------------- geometry and images

def test_nearest_is_opencv():
    cv2 = pytest.importorskip("cv2")
    for length in [*range(1, 130), 224, 256, 299, 333, 500, 640, 1024, 1333]:
        row = np.arange(length, dtype=np.float32)[None]
        for new in (1, 7, 96, 224, 256, 448):
            assert (nearest(length, new) == cv2.resize(row, (new, 1), interpolation=cv2.INTER_NEAREST)[0]).all(), (length, new)


def test_mask_follows_the_image():
    """Where a mask is drawn into an image, both must agree after any geometry."""
    draw = np.random.default_rng(0)
    for k in range(100):
        width, height = draw.integers(60, 200, 2)
        mask = np.zeros((height, width), np.uint8)
        x0, y0 = draw.integers(0, (width // 2, height // 2))
        mask[y0:y0 + height // 3, x0:x0 + width // 3] = 1
        where = draw_geometry(torch.Generator().manual_seed(k), 128, 96)
        image = where.image(Image.fromarray(mask * 255)) > 127
        assert np.mean(image != (where.mask(mask) > 0)) < .04
        boxes = where.boxes(np.array([[x0, y0, x0 + width // 3 - 1, y0 + height // 3 - 1]]), (width, height))
        ys, xs = np.nonzero(where.mask(mask))
        if len(xs) > 100:
            assert np.abs(boxes[0] - (xs.min(), ys.min(), xs.max(), ys.max())).max() <= 3
        assert where.map(mask.astype(float)).shape == (96, 96)


def test_draws_cover_the_range():
    drawn = [draw_geometry(torch.Generator().manual_seed(k), 10, 8) for k in range(200)]
    assert {g.crop[:2] for g in drawn} == {(x, y) for x in range(3) for y in range(3)}
    assert 60 < sum(g.flip for g in drawn) < 140
    assert eval_geometry(8) == Geometry((8, 8), (0, 0, 8, 8), False)


def test_epochs_workers_and_cache(cub):
    split = read_cub(cub, "cub")["train"]

    def run(cache=False, start=0, **settings):
        data = Images(split, size=24, resize=32, train=True, seed=5, cache=cache)
        loader, seen = DataLoader(data, batch_size=4, **settings), []
        for epoch in range(start, 3):
            data.set_epoch(epoch)
            seen.append(torch.cat([batch["image"] for batch in loader]))
        return torch.stack(seen)

    plain = run()
    assert plain.shape == (3, 6, 3, 24, 24) and not torch.equal(plain[0], plain[1])
    assert torch.equal(plain, run(cache=True))
    assert torch.equal(plain, run(num_workers=2, persistent_workers=True))
    assert torch.equal(plain[2:], run(start=2))                              # resumed
    assert not torch.equal(plain, torch.stack([run(start=2)[0]] * 3))


def test_geometry_is_what_was_applied(cub):
    split = read_cub(cub, "cub")["train"]
    data = Images(split, size=24, resize=32, train=True, mean=(.5, .5, .5), std=(.25, .25, .25))
    data.set_epoch(4)
    item = data[3]
    expected = data.geometry(3).image(Image.open(split[3].path).convert("RGB"))
    assert torch.equal(item["raw"], torch.from_numpy(expected).permute(2, 0, 1).float() / 255)
    assert torch.allclose(item["image"], (item["raw"] - .5) / .25)
    assert (item["label"], item["index"]) == (1, 3)
    batch = next(iter(DataLoader(Images(split, size=16), batch_size=6)))
    assert batch["label"].tolist() == [0, 0, 1, 1, 2, 2] and batch["index"].dtype == torch.int64 and batch["raw"].shape == (6, 3, 16, 16)


def test_truncated_image_is_never_accepted(cub):
    """Cut at many places, the file is refused by `Images`, cached or not."""
    split = read_cub(cub, "cub")["val"]
    data = split[0].path.read_bytes()
    for share in (.2, .5, .8, .95):
        split[0].path.write_bytes(data[:int(share * len(data))])
        rejected(lambda: Images(split, size=16)[0], "120.jpg: unreadable or truncated image")
        rejected(lambda: Images(split, size=16, cache=True), "120.jpg: unreadable or truncated image")


def test_modes(tmp_path):
    """Grey, palette with transparency, CMYK and RGBA become RGB."""
    for name, image in {"l.png": Image.new("L", (4, 4), 9), "c.jpg": Image.new("CMYK", (4, 4)), "a.png": Image.new("RGBA", (4, 4), (9, 8, 7, 255)),
                        "p.png": Image.new("P", (4, 4))}.items():
        image.save(tmp_path / name, **({"transparency": b"\x00\x01"} if name == "p.png" else {}))
        assert datasets.read_image(tmp_path / name).mode == "RGB"
