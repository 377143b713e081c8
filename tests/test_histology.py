"""Readers of GLaS and CAMELYON on small fixtures in their original layouts, whole and damaged; eroded masks"""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from wsol_nb import datasets, histology
from wsol_nb.core import DataError, data_path
from wsol_nb.histology import EROSIONS, erode_mask, fully_annotated, mask_error, read_camelyon, read_glas
from wsol_nb.synth import Stream
from wsol_nb.synth_tissue import nests, reduced

ROOT = Path(__file__).parents[1]
HEAD = "name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"
NAMES = [*(f"train_{k}" for k in range(1, 11)), "testA_1", "testA_2", "testB_1", "testB_2"]


def gland_picture(folder, stem, suffix=".bmp", size=(20, 14), mask=True, **options):
    """A noisy picture with two numbered glands"""
    draw = np.random.default_rng(len(stem))
    Image.fromarray(draw.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / f"{stem}{suffix}")
    if mask:
        numbers = np.zeros((size[1], size[0]), np.uint8)
        numbers[2:6, 2:9], numbers[8:12, 5:15] = 1, 2
        Image.fromarray(numbers).save(folder / f"{stem}_anno{suffix}")


def write_grades(folder, rows, end="\r"):
    (folder / "Grade.csv").write_bytes(end.join([HEAD, *rows]).encode())


@pytest.fixture
def glas(tmp_path):
    """Fourteen pictures as released: BMP, rows that end in a bare carriage return"""
    folder = tmp_path / "glas"
    folder.mkdir()
    write_grades(folder, [f"{n},{k}, {('benign', 'malignant')[k % 2]}, healthy" for k, n in enumerate(NAMES)])
    for name in NAMES:
        gland_picture(folder, name)
    return folder


def problems(monkeypatch, root, key):
    monkeypatch.setenv("WSOL_DATA", str(root.parent))
    monkeypatch.setitem(datasets.SOURCES, key, datasets.replace(datasets.SOURCES[key], counts=()))
    return datasets.find_problems(key)[0]


def test_glas_as_released(glas, monkeypatch):
    assert problems(monkeypatch, glas, "glas") == []
    data = datasets.load("glas")
    assert (data.classes, data.evaluation) == (["benign", "malignant"], "masks")
    assert [len(data[s]) for s in data.splits] == [8, 2, 4]
    assert sorted(i.label for i in data["val"]) == [0, 1]
    item = data["test"][0]
    assert (item.id, item.label, item.width, item.height) == ("testA_1.bmp", 0, 20, 14)
    mask = datasets.read_mask(item, datasets.Geometry((20, 14), (0, 0, 20, 14)))
    assert mask.sum() == 4 * 7 + 4 * 10 and mask.max() == 1      # every gland number is foreground


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_line_ends_and_suffixes(tmp_path, end):
    write_grades(tmp_path, ["train_1,1,benign,healthy", "train_2,1, malignant , poorly differentated", "train_3,1,Malignant,x", "testB_1,2, benign, x"], end)
    for name, suffix in (("train_1", ".png"), ("train_2", ".bmp"), ("train_3", ".BMP"), ("testB_1", ".tif")):
        gland_picture(tmp_path, name, suffix)
    data = read_glas(tmp_path, "glas")
    assert {i.id: i.label for s in ("train", "val") for i in data[s]} == {"train_1.png": 0, "train_2.bmp": 1, "train_3.BMP": 1}


def test_glas_may_lie_one_folder_down(glas, tmp_path):
    above = tmp_path / "download"
    above.mkdir()
    glas.rename(above / "Warwick_QU_Dataset_(Released_2016_07_08)")
    assert len(read_glas(above, "glas")["test"]) == 4


def test_a_part_of_glas_is_counted_not_refused(glas):
    (glas / "testA_1.bmp").unlink()
    (glas / "testA_1_anno.bmp").unlink()
    split = read_glas(glas, "glas")["test"]
    assert len(split) == 3 and split.skipped == {"row without a picture": 1}
    for name in ("testA_2", "testB_1", "testB_2"):
        (glas / f"{name}.bmp").unlink()
    with pytest.raises(DataError, match="Grade.csv: the test split is empty"):
        read_glas(glas, "glas")["test"]


DAMAGES = {
    "no mask": (lambda f: (f / "testA_2_anno.bmp").unlink(), "Grade.csv:13: mask", "testA_2_anno.bmp is missing"),
    "mask of another size": (lambda f: Image.new("L", (7, 7)).save(f / "testB_1_anno.bmp"), "Grade.csv:14: mask", "7 × 7 pixels, its picture 20 × 14"),
    "unknown grade": (lambda f: write_grades(f, ["testA_1,1, benig, healthy", "testB_1,1, benign, x"]), "Grade.csv:2: grade 'benig'", "neither benign nor"),
    "name twice": (lambda f: write_grades(f, ["testA_1,1, benign, x"] * 2), "Grade.csv:3: testA_1 is listed twice", "line 2"),
    "row missing": (lambda f: write_grades(f, ["testA_1,1, benign, x"]), "testA_2.bmp: has no row in", "Grade.csv"),
    "two files of a name": (lambda f: gland_picture(f, "testA_1", ".png", mask=False), "testA_1.bmp: is there a second time", "testA_1.png"),
    "cut off": (lambda f: (f / "testA_1.bmp").write_bytes((f / "testA_1.bmp").read_bytes()[:20]), "testA_1.bmp", "unreadable"),
    "no grades": (lambda f: write_grades(f, []), "testA_1.bmp: has no row in", "Grade.csv"),
    "other columns": (lambda f: (f / "Grade.csv").write_text("a,b\n1,2\n"), "Grade.csv:1: expected the columns", "grade (GlaS)"),
    "blank file": (lambda f: (f / "Grade.csv").write_text(""), "Grade.csv:1: expected the columns", ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_glas_names_file_and_line(glas, monkeypatch, damage):
    apply, *wanted = DAMAGES[damage]
    apply(glas)
    with pytest.raises(DataError) as error:
        read_glas(glas, "glas")["test"]
    assert all(text in str(error.value) for text in wanted), error.value
    found = "\n".join(problems(monkeypatch, glas, "glas"))      # and `wsol data check` lists it
    assert all(text in found for text in wanted), found


def write_fold(root, **splits):
    folder = root / "split_0" / "fold_0"
    folder.mkdir(parents=True)
    for name, lines in splits.items():
        (folder / f"{name}_s_0_f_0.csv").write_text("".join(line + "\n" for line in lines))
    return folder


def glas_line(k, mask="", grade=None):
    return f"train_{k}.bmp,train_{k}_anno.bmp,{grade or ('benign', 'malignant')[(k - 1) % 2]}"


def test_glas_follows_a_fold(glas):
    write_fold(glas, train=[glas_line(k) for k in range(1, 6)], valid=[glas_line(k) for k in range(6, 11)])
    data = read_glas(glas, "glas")
    assert sorted(i.id for i in data["val"]) == sorted(f"train_{k}.bmp" for k in range(6, 11)) and len(data["train"]) == 5


@pytest.mark.parametrize("lines, message", [
    ([glas_line(k) for k in range(6, 10)], "Grade.csv:11: train_10 is neither in train nor in val"),
    ([*(glas_line(k) for k in range(6, 11)), glas_line(2)], "valid_s_0_f_0.csv:6: train_2 is in train as well"),
    ([*(glas_line(k) for k in range(6, 11)), glas_line(77)], "valid_s_0_f_0.csv:6: train_77 is not in Grade.csv"),
    ([*(glas_line(k) for k in range(6, 10)), glas_line(10, grade="benign")], "valid_s_0_f_0.csv:5: train_10 is benign here and malignant"),
    ([glas_line(6, grade="fine")], "valid_s_0_f_0.csv:1: class 'fine'"),
    (["train_6.bmp,benign"], "valid_s_0_f_0.csv:1: expected picture,mask,class"),
    ([glas_line(6), glas_line(6)], "valid_s_0_f_0.csv:2: 'train_6.bmp' is listed twice (first in line 1)"),
    ([], "valid_s_0_f_0.csv: the split is empty"),
])
def test_a_wrong_fold_names_file_and_line(glas, lines, message):
    write_fold(glas, train=[glas_line(k) for k in range(1, 6)], valid=lines)
    with pytest.raises(DataError) as error:
        read_glas(glas, "glas")["val"]
    assert message in str(error.value)


def test_fold_0_of_the_survey_applies_to_the_original_list():
    grades = {f"train_{k}": (k, k % 2) for k in range(1, 86)} | {f"testA_{k}": (90 + k, 0) for k in range(80)}
    split = histology.divide(Path("nowhere"), grades, Path("Grade.csv"))
    assert [list(split.values()).count(s) for s in datasets.SPLITS] == [67, 18, 80]      # thesis, section 4.6.6


@pytest.mark.skipif(data_path("glas") is None, reason="no GLaS in WSOL_DATA")
def test_the_real_glas():
    data = datasets.load("glas")
    present = {s: len(data[s]) for s in data.splits}
    skipped = {s: data[s].skipped.get("row without a picture", 0) for s in data.splits}
    assert {s: present[s] + skipped[s] for s in present} == {"train": 67, "val": 18, "test": 80}
    shares = [datasets.read_mask(item, datasets.eval_geometry(64)).mean() for item in data["test"][:8]]
    assert .05 < np.mean(shares) < .9
    assert {item.label for item in data["val"]} == {0, 1}
    assert len(fully_annotated(data, 1)) == 2


def patch(root, name, size=16, value=90):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if "mask" in name else "RGB", (size, size), value if "mask" not in name else 255).save(path)


@pytest.fixture
def camelyon(tmp_path):
    root, lines = tmp_path / "camelyon", {}
    for part, count in (("train", 8), ("valid", 12), ("test", 4)):
        for k in range(count):
            normal, tumour = f"n/{part}/Patch_{k}.png", f"m/{part}/Patch_{k}.png"
            mask = tumour.replace("Patch", "mask")
            for name in (tumour, mask) if k % 2 else (normal,):
                patch(root, name)
            lines.setdefault(part, []).append(f"{tumour},{mask},tumor" if k % 2 else f"{normal},,normal")
    write_fold(root, **lines)
    return root


def rewrite(root, part, change):
    file = root / "split_0" / "fold_0" / f"{part}_s_0_f_0.csv"
    file.write_text(change(file.read_text()))


def test_camelyon_by_csv(camelyon, monkeypatch):
    assert problems(monkeypatch, camelyon, "camelyon") == []
    data = datasets.load("camelyon")
    assert (data.classes, data.evaluation) == (["normal", "metastatic"], "masks")
    assert [len(data[s]) for s in data.splits] == [8, 12, 4]
    batch = [datasets.Images(data["test"], 8)[k] for k in range(4)]
    assert [int(b["mask"].sum()) for b in batch] == [0, 64, 0, 64]      # a normal patch is all background
    chosen = fully_annotated(data, histology.MARKED["camelyon"])
    assert [i.label for i in chosen] == [0] * 6 + [1] * 6
    with pytest.raises(DataError, match="class 'normal' has 6 validation pictures, 7 are needed"):
        fully_annotated(data, 7)


def test_camelyon_by_text_lists_with_the_archives_own_folder(camelyon):
    """The survey's other form: ids begin with camelyon16/, val is valcl, valpx says which masks may be used"""
    for part, name in (("train", "train"), ("valid", "valcl"), ("test", "test")):
        lines = [line.split(",") for line in (camelyon / "split_0/fold_0" / f"{part}_s_0_f_0.csv").read_text().split()]
        write_text(camelyon / "fold-0" / name, lines)
        if part == "train":
            write_text(camelyon / "fold-0" / "valpx", lines[2:4])
    by_csv = read_camelyon(camelyon, "camelyon")
    before = {s: [(i.path, i.label, i.masks) for i in by_csv[s]] for s in by_csv.splits}
    for file in (camelyon / "split_0/fold_0").iterdir():
        file.unlink()
    (camelyon / "split_0/fold_0").rmdir()
    by_text = read_camelyon(camelyon, "camelyon")
    assert {s: [(i.path, i.label, i.masks) for i in by_text[s]] for s in by_text.splits} == before
    chosen = fully_annotated(by_text, 2)
    listed = {"camelyon16/n/train/Patch_2.png", "camelyon16/m/train/Patch_3.png"}
    assert listed <= {i.id for i in chosen} and len(chosen) == 4
    assert {i.id for i in chosen} - listed <= {i.id for i in by_text["val"]}


def write_text(folder, lines):
    folder.mkdir(parents=True)
    full = lambda path: path and f"camelyon16/{path}"
    (folder / "image_ids.txt").write_text("".join(f"{full(p)}\n" for p, _, _ in lines))
    (folder / "class_labels.txt").write_text("".join(f"{full(p)},{int(c == 'tumor')}\n" for p, _, c in lines))
    (folder / "localization.txt").write_text("".join(f"{full(p)},{full(m)},\n" for p, m, _ in lines))


@pytest.mark.parametrize("damage, message", [
    (lambda r: (r / "m/test/mask_3.png").unlink(), "test_s_0_f_0.csv:4: mask"),
    (lambda r: (r / "n/test/Patch_0.png").unlink(), "test_s_0_f_0.csv:1: picture"),
    (lambda r: patch(r, "m/test/mask_1.png", 12), "test_s_0_f_0.csv:2: mask"),
    (lambda r: patch(r, "n/test/Patch_2.png", 12), "test_s_0_f_0.csv:3:"),
    (lambda r: rewrite(r, "test", lambda t: t.replace("m/test/mask_1.png", "")), "test_s_0_f_0.csv:2: 'm/test/Patch_1.png' is metastatic and has no mask"),
    (lambda r: rewrite(r, "test", lambda t: t.replace("tumor", "cancer")), "test_s_0_f_0.csv:2: class 'cancer'"),
    (lambda r: rewrite(r, "test", lambda t: t + t), "test_s_0_f_0.csv:5: 'n/test/Patch_0.png' is listed twice (first in line 1)"),
    (lambda r: rewrite(r, "test", lambda t: ""), "test_s_0_f_0.csv: the split is empty"),
])
def test_damaged_camelyon_names_file_and_line(camelyon, monkeypatch, damage, message):
    damage(camelyon)
    with pytest.raises(DataError) as error:
        read_camelyon(camelyon, "camelyon")["test"]
    assert message in str(error.value)
    assert message in "\n".join(problems(monkeypatch, camelyon, "camelyon"))


def test_camelyon_without_a_fold(tmp_path):
    with pytest.raises(DataError, match="no fold is there.*camelyon16.grand-challenge.org"):
        read_camelyon(tmp_path, "camelyon")


def test_training_patches_need_no_masks(camelyon):
    rewrite(camelyon, "train", lambda text: "".join(f"{line.split(',')[0]},,{line.split(',')[2]}\n" for line in text.split()))
    assert not any(item.masks for item in read_camelyon(camelyon, "camelyon")["train"])


def test_datasets_does_not_import_the_readers():
    code = "import sys, wsol_nb.datasets; print([m for m in sys.modules if m.startswith('wsol_nb.')])"
    found = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert "wsol_nb.datasets" in found.stdout and "histology" not in found.stdout and "synth" not in found.stdout


@pytest.mark.parametrize("seed", range(3))
def test_erosion_keeps_to_its_target_and_error_is_half_of_it(seed):
    truth = [reduced(nests(Stream("erosion", seed, k), 96, .35)) > 0 for k in range(3)]
    errors = []
    for level in EROSIONS:
        eroded = [erode_mask(mask, level / 100) for mask in truth]
        for small, mask in zip(eroded, truth):
            removed = 100 * (1 - small.sum() / mask.sum())
            assert level - .2 <= removed <= level + 1e-9 and small.any() and not (small & ~mask).any()
        errors.append(mask_error(eroded, truth))
        assert abs(errors[-1] - level / 2) <= .2
    assert (np.diff(errors) > 0).all()


def test_stronger_erosion_lies_deeper():
    """What remains is farther from the outline on average"""
    mask = np.zeros((60, 60), bool)
    mask[10:50, 5:55] = True
    depth = ndimage.distance_transform_edt(mask)
    means = [depth[erode_mask(mask, level / 100)].mean() for level in EROSIONS]
    assert (np.diff(means) > 0).all()
    assert depth[mask & ~erode_mask(mask, .3)].max() <= depth[erode_mask(mask, .3)].min() + 2
