"""The command `wsol`: exit codes, messages, downloads that break, archives that must not be trusted."""
import contextlib
import functools
import hashlib
import http.server
import json
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsol_nb import cli, datasets
from wsol_nb.cli import download, fetch_one, main
from wsol_nb.core import DataError, OutputError
from wsol_nb.datasets import Download


class Server(http.server.ThreadingHTTPServer):
    """Serves bytes by path; may break off, stall, or not know ranges."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.breaks, self.stall, self.ranges, self.asked = {}, [], 0., True, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(.02,), daemon=True).start()

    def offer(self, name, content, checksum=None, **more):
        self.files[f"/{name}"] = content
        digest = checksum or "sha256:" + hashlib.sha256(content).hexdigest()
        return Download(f"{self.url}/{name}", digest, len(content), more.pop("target", name), **more)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, content = self.server, self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(self.headers["Range"][6:-1]) if server.ranges and self.headers["Range"] else 0
        server.asked.append(start)
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        end = start + server.breaks.pop(0) if server.breaks else len(content)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(content[start:end])
            if server.stall and end < len(content):
                time.sleep(server.stall)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("WSOL_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


CONTENT = np.random.default_rng(0).bytes(2_000_000)


def tar(*members):
    """A compressed archive of (name, content or link target)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            file.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


def names(folder: Path):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.name.endswith(".lock"))


# ---------------------------------------------------------------- downloads

def test_interrupted_and_resumed(server, tmp_path):
    wanted = server.offer("a.bin", CONTENT)
    server.breaks = [700_000]
    with pytest.raises(DataError, match="interrupted after 700,000 of 2,000,000 bytes .* Run the same command again"):
        download(wanted, tmp_path / "a.bin", tries=1)
    assert names(tmp_path) == ["a.bin.part"]
    assert download(wanted, tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.asked == [0, 700_000] and names(tmp_path) == ["a.bin"]
    download(wanted, tmp_path / "a.bin")
    assert len(server.asked) == 2                                     # what is there and right is not fetched again


def test_server_without_ranges(server, tmp_path):
    wanted = server.offer("a.bin", CONTENT)
    server.ranges, server.breaks = False, [700_000]
    assert download(wanted, tmp_path / "a.bin", pause=0).read_bytes() == CONTENT
    assert server.asked == [0, 0]


def test_part_of_another_file(server, tmp_path):
    wanted = server.offer("a.bin", CONTENT)
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match="it was deleted"):
        download(wanted, tmp_path / "a.bin")
    assert names(tmp_path) == []
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1_999_999)          # longer than what the server has now
    server.files["/a.bin"] = CONTENT[:1000]
    shorter = replace(wanted, checksum="sha256:" + hashlib.sha256(CONTENT[:1000]).hexdigest())
    with pytest.raises(DataError):
        download(shorter, tmp_path / "a.bin", tries=2, pause=0)
    assert names(tmp_path) in ([], ["a.bin.part"]) and (tmp_path / "a.bin").exists() is False


def test_wrong_checksum_leaves_nothing(server, tmp_path):
    for kind in ("md5:" + "0" * 32, "sha256:" + "0" * 64):
        with pytest.raises(DataError, match="expected 0000.*it was deleted"):
            download(server.offer("a.bin", CONTENT, kind), tmp_path / "a.bin")
        assert names(tmp_path) == []


def test_no_server_and_no_file(server, tmp_path):
    with pytest.raises(DataError, match="answers 404"):
        download(replace(server.offer("a.bin", CONTENT), url=f"{server.url}/gone"), tmp_path / "a.bin")
    with pytest.raises(DataError, match="interrupted after 0 of"):
        download(replace(server.offer("a.bin", CONTENT), url="http://127.0.0.1:9/a"), tmp_path / "a.bin", tries=2, pause=0)
    server.breaks, server.stall = [1000], 3.
    with pytest.raises(DataError, match="interrupted after 1,000 of 2,000,000 bytes .*timed out"):
        download(server.offer("a.bin", CONTENT), tmp_path / "b.bin", tries=1, timeout=.5)


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit")
def test_full_disk(server, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with limited(), pytest.raises(OutputError, match="cannot write .*a.bin: File too large. Free disk space"):
        download(server.offer("a.bin", CONTENT), tmp_path / "one" / "a.bin")
    assert names(tmp_path / "one") == []
    zeros = server.offer("set.tgz", tar(("SET/a.bin", bytes(2_000_000))), target="SET", unpack=True)      # small until unpacked
    with limited(), pytest.raises(OutputError, match="cannot write .*SET: File too large"):
        fetch_one(zeros, tmp_path / "two")
    assert names(tmp_path / "two") == [".SET.archive"]                # complete and checked: the next call only unpacks
    asked = len(server.asked)
    fetch_one(zeros, tmp_path / "two")
    assert names(tmp_path / "two") == ["SET", "SET/a.bin"] and len(server.asked) == asked


@pytest.mark.parametrize("member", [("../evil.txt", b"x"), ("/evil.txt", b"x"), ("SET/../../evil.txt", b"x"), ("SET/link", "/etc"), ("SET/link", "a")])
def test_archive_that_leads_outside(server, tmp_path, member):
    archive = server.offer("set.tgz", tar(("SET/a.txt", b"a"), member), target="SET", unpack=True)
    with pytest.raises(DataError, match="refused to unpack"):
        fetch_one(archive, tmp_path / "in")
    assert names(tmp_path) == ["in"]                                  # nothing inside, nothing outside
    with pytest.raises(DataError, match="the archive holds no OTHER"):
        fetch_one(replace(server.offer("b.tgz", tar(("SET/a.txt", b"a")), target="OTHER"), unpack=True), tmp_path / "in")
    assert names(tmp_path) == ["in"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_and_resumed(server, tmp_path):
    wanted = server.offer("a.bin", CONTENT)
    server.breaks, server.stall = [1_000_000], 30.
    code = f"from pathlib import Path\nfrom wsol_nb.cli import download\nfrom wsol_nb.datasets import Download\ndownload({wanted!r}, Path({str(tmp_path / 'a.bin')!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    part = tmp_path / "a.bin.part"
    deadline = time.time() + 60
    while time.time() < deadline and not (part.exists() and part.stat().st_size >= 700_000):
        time.sleep(.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert 0 < have < len(CONTENT) and not (tmp_path / "a.bin").exists()
    assert download(wanted, tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.asked == [0, have]


# ---------------------------------------------------------------- commands

def jpeg(size=(20, 10)):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(out, "jpeg")
    return out.getvalue()


def cub_archive():
    """Two images in CUB's layout, packed like the original."""
    text = {"images": ["001.Auk/a.jpg", "001.Auk/b.jpg"], "classes": ["001.Auk"], "image_class_labels": [1, 1], "train_test_split": [1, 0],
            "bounding_boxes": ["0.0 0.0 9.0 9.0"] * 2}
    tables = [(f"CUB_200_2011/{name}.txt", "".join(f"{n} {row}\n" for n, row in enumerate(rows, 1)).encode()) for name, rows in text.items()]
    return tar(("attributes.txt", b""), *tables, *((f"CUB_200_2011/images/{name}", jpeg()) for name in text["images"]))


@pytest.fixture
def little_cub(server, data, monkeypatch):
    """`wsol data fetch cub` from the local server: an archive of two images and the metadata of one validation image."""
    rows = {"image_ids": "001.Auk/c.jpg", "class_labels": "001.Auk/c.jpg,0", "image_sizes": "001.Auk/c.jpg,20,10", "localization": "001.Auk/c.jpg,0,0,9,9"}
    files = [server.offer("CUB.tgz", cub_archive(), target="CUB_200_2011", unpack=True)]
    files += [server.offer(f"{name}.txt", row.encode(), target=f"metadata/val/{name}.txt") for name, row in rows.items()]
    monkeypatch.setitem(datasets.SOURCES, "cub", replace(datasets.SOURCES["cub"], downloads=tuple(files), counts=(1, 1, 1)))


def test_fetch(little_cub, server, data, capsys):
    assert main(["data", "fetch", "cub"]) == 1                        # the images of CUBv2 remain
    out = capsys.readouterr().out
    assert "fetched CUB_200_2011" in out and "cub: val not there yet" in out and "unpack CUBV2.tar" in out
    assert "cub/CUB_200_2011/images/001.Auk/a.jpg" in names(data) and "cub/attributes.txt" not in names(data)
    (data / "cub" / "CUBV2" / "001.Auk").mkdir(parents=True)
    (data / "cub" / "CUBV2" / "001.Auk" / "c.jpg").write_bytes(jpeg())
    asked = len(server.asked)
    assert main(["data", "fetch", "cub"]) == 0
    assert len(server.asked) == asked and "cub: complete in" in capsys.readouterr().out
    assert main(["data", "check", "cub"]) == 0
    assert "cub: 0 problems (train 1, val 1, test 1)" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cub"))
    assert str(data / "cub") in row and row.split()[2:5] == ["1", "1", "1"]


def test_fetch_broken(little_cub, server, data, capsys, monkeypatch):
    monkeypatch.setattr(cli, "download", functools.partial(download, pause=0, tries=1))
    server.breaks = [500]
    assert main(["data", "fetch", "cub"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "wsol: error: " in line]
    assert len(errors) == 1 and "interrupted after 500 of" in errors[0]
    assert main(["data", "fetch", "cub"]) == 1                        # goes on; only CUBv2 is missing now
    assert server.asked[:2] == [0, 500] and (data / "cub" / "CUB_200_2011" / "images.txt").is_file()


def test_check_reports_everything(little_cub, data, capsys):
    main(["data", "fetch", "cub"])
    image = data / "cub" / "CUB_200_2011" / "images" / "001.Auk" / "a.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    table = data / "cub" / "CUB_200_2011" / "bounding_boxes.txt"
    table.write_text("1 0.0 0.0 9.0 9.0\n2 0.0 0.0 90.0 9.0\n")
    capsys.readouterr()
    assert main(["data", "check", "cub"]) == 1
    out = capsys.readouterr().out
    assert "a.jpg: unreadable or truncated image" in out and "bounding_boxes.txt:2: box 0,0,90,9 lies outside" in out
    assert "image_ids.txt:1: image " in out and "cub: " in out.splitlines()[-1] and "problems (train 1, val 1, test 1)" in out


@pytest.mark.parametrize("key, step", [("ilsvrc", "register at https://image-net.org"), ("teldrone", "TelDrone is private"),
                                       ("openimages", "OpenImages_annotations.zip"), ("photos", "name the folder that holds photos/")])
def test_manual_instructions(data, capsys, monkeypatch, key, step):
    monkeypatch.setitem(datasets.SOURCES, key, replace(datasets.SOURCES[key], downloads=()))
    assert main(["data", "fetch", key]) == 1
    assert step in capsys.readouterr().out


def test_list(data, capsys):
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:]] == datasets.available()
    assert "absent: wsol data fetch cub" in out and "(5,994)" in out and not data.exists()


def test_folder_check(tmp_path, capsys):
    (tmp_path / "cat").mkdir()
    for k in range(12):
        (tmp_path / "cat" / f"{k}.jpg").write_bytes(jpeg((90, 80))[:{0: 100, 1: -900}.get(k)])
    (tmp_path / "cat" / "notes.txt").write_text("")
    assert main(["data", "check", f"folder:{tmp_path}"]) == 1
    out = capsys.readouterr().out.replace(os.sep, "/")
    assert "cat/0.jpg: unreadable" in out and "cat/1.jpg: unreadable or truncated" in out
    assert ": 2 problems (train " in out and "skipped 1 × not an image" in out and "skipped 1 × unreadable image" in out


@pytest.mark.parametrize("command, code, message", [
    ("", 2, "usage: wsol"), ("data", 2, "usage: wsol data"), ("dato list", 2, "invalid choice"), ("data check", 2, "NAME"),
    ("data check nonsense", 2, "wsol: error: unknown data set 'nonsense'"), ("data fetch cubb", 2, "did you mean 'cub'?"),
    ("data make cub", 2, "wsol: error: unknown embedded data set 'cub'"), ("data list extra", 2, "unrecognized"),
    ("--help", 0, ""), ("data --help", 0, ""), ("data fetch --help", 0, "")])
def test_usage(data, capsys, command, code, message):
    try:
        given = main(command.split())
    except SystemExit as stop:
        given = stop.code
    errors = capsys.readouterr().err
    assert given == code and message in errors and "Traceback" not in errors


def test_output_that_cannot_be_written(server, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WSOL_DATA", str(tmp_path / "file" / "data"))
    monkeypatch.setitem(datasets.SOURCES, "cub", replace(datasets.SOURCES["cub"], downloads=(server.offer("a.bin", CONTENT),)))
    assert main(["data", "fetch", "cub"]) == 1
    assert capsys.readouterr().err.startswith("wsol: error: cannot write ")


def test_installed_command(data):
    """The entry point, its exit code, and one line on standard error."""
    wsol = Path(sys.executable).with_name("wsol")
    if not wsol.exists():
        pytest.skip("wsol is not installed")
    done = subprocess.run([wsol, "data", "check", "cub"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "is not there" in done.stdout and done.stderr == ""
    done = subprocess.run(f"'{wsol}' data list | true", shell=True, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr


def test_the_checksum_of_a_drawn_set_goes_to_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wsol_nb.datasets.make", lambda name, again=False: tmp_path)
    command = ["data", "make", "toy", "--stamp", str(tmp_path / "stamp.json")]
    assert main(command) == 1 and "synth.json is missing or damaged" in capsys.readouterr().err
    (tmp_path / "synth.json").write_text('{"checksum": "abc"}')
    assert main(command) == 0
    assert json.loads((tmp_path / "stamp.json").read_text()) == {"checksum": "abc"}
