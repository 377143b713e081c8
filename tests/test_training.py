"""Training under attack: kills, full disks, several processes; what no notebook cell can show.

Run as a script, this file is the training program that the tests start, kill and restart.
"""
import contextlib
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from wsol_nb.core import Localization, OutputError, override, seed_everything
from wsol_nb.training import (Checkpoints, DivergedError, TrainConfig, best_file, fit, load_best, make_optimizer,
                              read_state, read_weights, weights_info)

CONFIG = TrainConfig(batch_size=8, epochs=5, lr=.05, schedule="cosine", warmup_epochs=1, clip_norm=2., size=4, resize=4)

ONE_STEP = override(CONFIG, {"batch_size": 40, "epochs": 1, "schedule": "constant", "warmup_epochs": 0., "clip_norm": None,
                             "momentum": 0., "weight_decay": 0., "head_factor": 1.})


class Noise(Dataset):
    "Noisy pictures of three classes; the noise comes from the global generator, as in careless data sets"
    def __init__(self, count=40):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        image = torch.randn(1, 4, 4)
        image[0, i % 3] += 1
        return {"image": image, "label": i % 3}


class Net(nn.Module):
    "Normalization with running statistics, dropout and a head that learns ten times as fast"
    def __init__(self, width=32, norm=nn.BatchNorm1d, dropout=.3):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, width), norm(width), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(width, 3)

    def forward(self, images, labels=None):
        return Localization(self.head(self.body(images)), images.mean(1).sigmoid())

    def loss(self, batch):
        logits = self(batch["image"]).logits
        return {"cls": F.cross_entropy(logits, batch["label"]), "size": .01 * logits.square().mean()}

    def param_groups(self, lr, weight_decay, head_factor=10.):
        return [{"params": self.body.parameters(), "lr": lr, "weight_decay": weight_decay},
                {"params": self.head.parameters(), "lr": lr * head_factor, "weight_decay": 0.}]


def make(**settings):
    seed_everything(0)
    return Net(**settings)


def scores(model, epoch):
    "A score that depends on every weight, one that is best early and one that is best at the end"
    total = sum(p.double().sum().item() for p in model.parameters())
    return {"wild": math.sin(50 * total), "early": epoch % 2, "late": epoch}


KEEP = ("wild", "early", "late")


def train(folder, config=CONFIG, validate=scores, keep=KEEP, **settings):
    model = make(**settings)
    return model, fit(model, Noise(), config, validate, keep if folder else (), folder)


def result(folder):
    "Everything a run leaves: the bytes of the last and the best weights, and the history"
    last = read_state(Checkpoints(folder).file(CONFIG.epochs, ".pt"))
    files = [Checkpoints(folder).file(CONFIG.epochs, ".safetensors"), *(best_file(folder, name) for name in KEEP)]
    return [path.read_bytes() for path in files], last["rows"]


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


# --- the programs -----------------------------------------------------------------------------------------------------


def in_child(work, seconds=None):
    "Run `work` in a forked process, kill it after `seconds`; returns its exit code, negative for a signal"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying(target, name, count, half=False):
    "Replace a function by one whose `count`-th call kills the process, before or (half) in the middle of its work"
    original, calls = getattr(target, name), [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            if half:
                original(args[0], args[1][:len(args[1]) // 2])
            die()
        return original(*args, **kwargs)
    setattr(target, name, wrapper)


def count_links(folder):
    "How often a whole training gives a file a best-of name"
    original, calls = os.link, []
    os.link = lambda *args: (calls.append(args), original(*args))
    train(folder)
    os.link = original
    return len(calls)


def program_kill(folder):
    "Kill a training at many moments, continue it each time; prints a line per kill"
    folder = Path(folder)
    links = count_links(folder / "links")        # and what is slow the first time is done before the clock runs
    start = time.perf_counter()
    assert in_child(lambda: train(folder / "whole")) == 0
    seconds = time.perf_counter() - start
    expected, kills = result(folder / "whole"), 0

    def check(place, what, code):
        nonlocal kills
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), code
        assert in_child(lambda: train(place)) == 0, what
        assert result(place) == expected, f"killed {what}: the result differs"
        assert names(place) == names(folder / "whole"), f"killed {what}: {names(place)}"
        print("same after kill", what, "code", code, flush=True)

    # inside the writing of a checkpoint: half a file on disk, before a rename, before a link, before the tidying up
    for target, name, count, half in [
            (Path, "write_bytes", 5, True), (Path, "write_bytes", 6, True), (os, "replace", 1, False), (os, "replace", 8, False),
            (os, "replace", 9, False), (os, "link", 4, False), (os, "link", links, False), (Path, "unlink", 4, False)]:
        place = folder / f"{name}-{count}"

        def work():
            dying(target, name, count, half)
            train(place)
        code = in_child(work)
        assert code == -signal.SIGKILL, (name, count, code)
        check(place, f"in {name} call {count}", code)

    # at random moments, twice each
    draw = random.Random(0)
    for i in range(6):
        place, moments = folder / f"random-{i}", [draw.uniform(.1, .7) * seconds, draw.uniform(.05, .4) * seconds]
        codes = [in_child(lambda: train(place), moment) for moment in moments]
        check(place, "at " + ", ".join(f"{m:.3f} s" for m in moments), min(codes))
    print("kills", kills)


def program_disk(folder):
    "A disk that fills up: files may not grow beyond a limit"
    folder = Path(folder)

    def limited(limit):
        def validate(model, epoch):
            if epoch == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return scores(model, epoch)
        return validate

    def full(limit, place):
        try:
            train(place, validate=limited(limit))
        except OutputError as error:
            print("message:", error)
            return
        raise AssertionError("no error")

    train(folder / "whole")
    sizes = {p.suffix: p.stat().st_size for p in (folder / "whole").iterdir()}
    assert sizes[".safetensors"] < sizes[".pt"], sizes
    between = sizes[".safetensors"] + 100                      # room for the weights, not for the state
    for limit in (1000, between):
        place = folder / f"limit-{limit}"
        assert in_child(lambda: full(limit, place)) == 0
        print("left:", *names(place))
        assert names(place) == names_until(folder, 1), names(place)
        assert in_child(lambda: train(place)) == 0             # space again: continue
        assert result(place) == result(folder / "whole")

    def never(place):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        full(1000, place)
    assert in_child(lambda: never(folder / "never")) == 0
    assert names(folder / "never") == []


def names_until(folder, last):
    "What a run stopped after an epoch leaves"
    class Stop(Exception):
        pass

    def validate(model, epoch):
        if epoch > last:
            raise Stop
        return scores(model, epoch)
    place = Path(folder) / f"until-{last}"
    with contextlib.suppress(Stop):
        train(place, validate=validate)
    return names(place)


class Drawing(Net):
    "Notes how many images a step had and what it drew"
    drawn = []

    def loss(self, batch):
        self.drawn.append((len(batch["label"]), torch.rand(()).item()))
        return super().loss(batch)


def program_ranks(folder):
    "What each of two processes sees; started by torchrun"
    folder, rank = Path(folder), os.environ["RANK"]
    plain = dict(norm=nn.LayerNorm, dropout=0.)
    model, history = train(folder / "whole", **plain)

    def validate(model, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return scores(model, epoch)
    with contextlib.suppress(KeyboardInterrupt):
        train(folder / "resumed", validate=validate, **plain)
    again, same = train(folder / "resumed", **plain)
    noisy = Drawing(dropout=.5)
    fit(noisy, Noise(), override(CONFIG, {"epochs": 1}))
    try:
        train(None, override(CONFIG, {"batch_size": 7}))
        message = "no error"
    except ValueError as error:
        message = str(error)
    torch.save({"weights": model.state_dict(), "rows": history.rows, "again": again.state_dict(), "same": same.rows,
                "noisy": {n: p.detach() for n, p in noisy.named_parameters()}, "drawn": noisy.drawn, "message": message},
               folder / f"rank{rank}.pt")


def program_notebook(folder):
    "Train here, then in two processes forked from here, as a notebook does"
    from accelerate import notebook_launcher
    train(None, override(CONFIG, {"epochs": 1}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notebook_launcher(ranks_in_notebook, (folder,), num_processes=2, use_port=str(port))


def ranks_in_notebook(folder):
    train(folder, norm=nn.LayerNorm, dropout=0.)
    (Path(folder) / f"rank-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}").touch()


if __name__ == "__main__":
    programs = {"kill": program_kill, "disk": program_disk, "ranks": program_ranks, "notebook": program_notebook}
    programs[sys.argv[1]](sys.argv[2])


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    "Equal bits are promised for the CPU"
    if torch.accelerator.is_available():
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def start(*command, seconds=120):
    "Run this file as a program on the CPU; returns its output"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def test_killed_training_ends_with_the_same_bits(tmp_path):
    out = start(__file__, "kill", tmp_path)
    assert out.count("same after kill") == 14
    assert int(out.split("kills")[-1]) >= 10               # eight planned, and random moments that hit a living process


def test_full_disk_is_one_clear_error_and_leaves_whole_checkpoints(tmp_path):
    messages = [line for line in start(__file__, "disk", tmp_path).splitlines() if line.startswith("message:")]
    assert len(messages) == 3
    assert "cannot write" in messages[0] and "epoch-0002.safetensors: File too large" in messages[0]
    assert "epoch-0002.pt: File too large" in messages[1]
    assert "epoch-0000.safetensors: File too large" in messages[2]


def test_two_processes_train_like_one(tmp_path):
    start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, __file__, "ranks", tmp_path)
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    for key in ("weights", "again", "noisy"):
        assert all(torch.equal(first[key][n], second[key][n]) for n in first[key]), key
    assert first["rows"] == second["rows"]
    assert all(torch.equal(first["weights"][n], first["again"][n]) for n in first["weights"])      # resumed
    assert first["rows"] == first["same"]
    assert [n for n, _ in first["drawn"]] == [n for n, _ in second["drawn"]] == [4] * 5            # half a batch each
    assert not {d for _, d in first["drawn"]} & {d for _, d in second["drawn"]}                     # dropout of their own
    assert "must be a multiple of the number of processes (2)" in first["message"]

    alone, history = train(None, norm=nn.LayerNorm, dropout=0.)
    moved = make(norm=nn.LayerNorm, dropout=0.).state_dict()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5)
        assert (value - moved[name]).abs().max() > 1e-3    # and that is not because nothing was learned
    for row, other in zip(history.rows[1:], first["rows"][1:]):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4) and row["lr"] == other["lr"]


def test_training_can_be_handed_to_the_notebook_launcher(tmp_path):
    start(__file__, "notebook", tmp_path)
    assert {"rank-0-of-2", "rank-1-of-2", "epoch-0005.safetensors"} <= set(names(tmp_path))


def test_workers_change_nothing_and_live_through_the_training():
    class Counting(Noise):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"worker": os.getpid()}

    seen = set()

    class Watching(Net):
        def loss(self, batch):
            seen.update(batch["worker"].tolist())
            return super().loss(batch)

    def weights(num_workers):
        seen.clear()
        seed_everything(0)
        model = Watching()
        fit(model, Counting(), override(CONFIG, {"num_workers": num_workers}))
        return model.state_dict()

    expected = weights(0)
    assert seen == {os.getpid()}
    found = weights(2)
    assert len(seen) == 2 and os.getpid() not in seen       # two processes for all five epochs
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_head_learns_ten_times_as_fast_and_weight_decay_follows_the_groups():
    groups = make_optimizer(make(), override(CONFIG, {"lr": .02, "weight_decay": .5})).param_groups
    assert [g["lr"] for g in groups] == pytest.approx([.02, .2])
    assert [g["weight_decay"] for g in groups] == [.5, 0.]

    before, model = make().state_dict(), make()
    config = override(ONE_STEP, {"lr": .01})
    fit(model, Noise(), config)
    faster = make()
    fit(faster, Noise(), override(config, {"head_factor": 10.}))
    for name, value in before.items():
        if name.startswith("head"):
            torch.testing.assert_close(faster.state_dict()[name] - value, 10 * (model.state_dict()[name] - value))
        else:
            assert torch.equal(faster.state_dict()[name], model.state_dict()[name])


def test_clipping_bounds_the_step():
    config = override(ONE_STEP, {"lr": 1., "clip_norm": 1e-3})
    model, before = make(), dict(make().named_parameters())
    fit(model, Noise(), config)
    moved = math.sqrt(sum((p - before[n]).square().sum().item() for n, p in model.named_parameters()))
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_divergence_names_place_term_and_parameter(tmp_path):
    class Exploding(Net):
        def loss(self, batch):
            terms = super().loss(batch)
            if self.epoch == 3 and 0 in batch["index"]:
                terms["size"] = terms["size"] / 0.
            return terms

        def set_epoch(self, epoch):
            self.epoch = epoch

    class Indexed(Noise):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"index": i}

    def run():
        seed_everything(0)
        with pytest.raises(DivergedError) as error:
            fit(Exploding(), Indexed(), CONFIG, folder=tmp_path)
        return str(error.value)

    message = run()
    assert "epoch 3, step " in message and "loss size = inf" in message and "cls" not in message
    assert "first parameter with a non-finite gradient: body.1.weight" in message
    assert run() == message                                   # resumed after epoch 2, it fails at the same place
    assert Checkpoints(tmp_path).epochs(".pt") == [2, 1]
    assert all(v.isfinite().all() for v in read_weights(tmp_path / "epoch-0002.safetensors").values())

    class Weak(Net):                                          # finite loss, infinite gradient: d sqrt(x)/dx at 0
        def loss(self, batch):
            return super().loss(batch)["cls"] + (self.head.bias * 0.).square().sum().sqrt()

    with pytest.raises(DivergedError, match="epoch 1, step 1: the loss is finite, its gradient is not; "
                                            "first parameter with a non-finite gradient: head.bias"):
        fit(Weak(), Noise(), CONFIG)


def test_best_epochs_and_ties(tmp_path):
    values = {"up": [0, 1, 2, 3, 4, 5], "tie": [3, 7, 1, 7, 7, 0], "start": [9, 8, 9, 1, 1, 1],
              "odd name/Top-1": [math.nan, 1, 4, 4, 2, 2]}
    states = []

    def validate(model, epoch):
        states.append({n: v.clone() for n, v in model.state_dict().items()})
        return {name: v[epoch] for name, v in values.items()}

    history = fit(make(), Noise(), CONFIG, validate, tuple(values), tmp_path)
    best = {"up": 5, "tie": 1, "start": 0, "odd name/Top-1": 2}
    for name, epoch in best.items():
        assert history.best(name) == (epoch, values[name][epoch])
        found = load_best(make(), tmp_path, name).state_dict()
        assert all(torch.equal(found[n], states[epoch][n]) for n in found)
        assert weights_info(best_file(tmp_path, name))["epoch"] == epoch
    linked = tmp_path / "best-odd-name-Top-1.safetensors"
    assert linked.samefile(tmp_path / "epoch-0002.safetensors")      # no second copy
    assert Checkpoints(tmp_path).epochs(".pt") == [5, 4]
    assert Checkpoints(tmp_path).epochs(".safetensors") == [5, 4, 2, 1, 0]


def test_file_systems_without_hard_links_get_copies(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not here")
    monkeypatch.setattr(os, "link", no_links)
    train(tmp_path)
    assert best_file(tmp_path, "late").read_bytes() == (tmp_path / "epoch-0005.safetensors").read_bytes()
    assert not best_file(tmp_path, "late").samefile(tmp_path / "epoch-0005.safetensors")


def test_a_finished_run_is_not_repeated_and_not_written_to(tmp_path):
    model, history = train(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = Net()
    assert fit(again, Noise(), CONFIG, lambda *_: pytest.fail("validated again"), KEEP, tmp_path) == history
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_half_precision_on_the_cpu_trains():
    seen = []

    class Looking(Net):
        def loss(self, batch):
            seen.append(self.head(torch.zeros(1, 32)).dtype)
            return super().loss(batch)

    seed_everything(0)
    config = override(CONFIG, {"lr": .005})
    history = fit(Looking(), Noise(), override(config, {"mixed_precision": "bf16"}))
    assert set(seen) == {torch.bfloat16}
    _, exact = train(None, config)
    for row, other in zip(history.rows[1:], exact.rows[1:]):
        assert row["loss"] == pytest.approx(other["loss"], rel=.05) and row["loss"] != other["loss"]
