"""Whole runs: what they print, write and return, how they continue, and how they fail."""

import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from scripts import METHODS, small_model, step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_data import knn_data, labelled_pictures, picture
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cmsf_semi
import cmsf_ssl
import mnn
import msf

ROOT = Path(msf.__file__).parent


def tiny(script, **changes):
    """A run of seconds on photos/: 16 pixels, two steps an epoch with labelled_pictures."""
    given = {"dataset": "folder", "data_dir": "photos", "batch_size": 8, "bank_size": 16}
    given |= {"epochs": 2, "warmup_epochs": 0.5, "num_workers": 0, "topk": 5, "run_name": "a"}
    return replace(script.RECIPES["digits"], **given | changes)


def checkpoint(name="a"):
    return torch.load(f"runs/{name}/last.pt", weights_only=True)


def assert_same_state(one, other):
    """Two checkpoints hold the same bits, but for their arguments."""
    for part in ("model", "optimizer", "epoch", "pushed"):
        ours = dict(enumerate(tree_leaves(one[part])))
        theirs = dict(enumerate(tree_leaves(other[part])))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if torch.is_tensor(value):
                assert torch.equal(value, theirs[name]), (part, name)
            else:
                assert value == theirs[name], (part, name)


# ---- what a run prints, writes and returns


@pytest.mark.parametrize("script", METHODS)
def test_a_run_leaves_what_it_promises(script, capsys):
    labelled_pictures()
    args = tiny(script, run_name=None, log_every=1, knn_every=1)
    result = script.main(args)
    assert 0 < result["loss"] < 4 and result["knn"] == 100  # red and blue pictures
    last = Path(result["checkpoint"])
    run = torch.load(last, weights_only=True)
    assert run["epoch"] == 2 and run["images"] == 16 and run["args"] == vars(args)
    backbone, _ = script.build_backbone(args.arch, args.stem)
    backbone.load_state_dict(torch.load(last.with_name("backbone.pt"), weights_only=True))

    events = EventAccumulator(str(last.parent)).Reload()
    for tag in ("loss", "spread", "lr", "images_per_s"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4]
    assert events.Scalars("purity")[-1].step == 4  # in mnn.py, the first step has no neighbours
    assert [event.step for event in events.Scalars("knn")] == [0, 2, 4]
    assert "args/text_summary" in events.Tags()["tensors"]

    lines = capsys.readouterr().out.splitlines()
    assert "16 training images (16 labelled), 16 labelled test images" in lines
    assert sum("k-NN accuracy 100.00%" in line for line in lines) == 3
    number = r"[\d.e-]+"
    epoch = (
        rf"epoch 1/2  step 2/2  loss {number}  purity {number}  .*  \d+ images/s  \d:\d\d:\d\d left"
    )
    assert sum(bool(re.fullmatch(epoch, line)) for line in lines) == 1
    assert lines[-1].endswith(f"python eval_linear.py --checkpoint {last}")


@pytest.mark.parametrize("script", [msf, cmsf_ssl, mnn])
def test_pictures_without_labels_train_and_what_cannot_be_measured_is_left_out(script, capsys):
    for i in range(16):
        picture(f"photos/{i}.jpg")
    result = script.main(tiny(script))
    assert math.isfinite(result["loss"]) and result["knn"] is None
    lines = capsys.readouterr().out.splitlines()
    assert "no training image has a label: no purity and no k-NN accuracy" in lines
    assert not any(re.search(r"%|purity \d|nan", line) for line in lines)
    tags = EventAccumulator("runs/a").Reload().Tags()["scalars"]
    assert "loss" in tags and "purity" not in tags and "knn" not in tags


@pytest.mark.parametrize("script", METHODS)
def test_without_val_there_is_no_accuracy_but_a_purity(script, capsys):
    labelled_pictures()
    Path("photos/val").rename("elsewhere")
    assert script.main(tiny(script))["knn"] is None
    output = capsys.readouterr().out
    assert "no test image has a label: no k-NN accuracy" in output and "  purity " in output


@pytest.mark.parametrize("script", METHODS)
def test_every_run_without_a_name_has_a_folder_of_its_own(script):
    labelled_pictures()
    args = tiny(script, run_name=None, epochs=1)
    checkpoints = {script.main(args)["checkpoint"] for _ in range(3)}
    assert len(checkpoints) == 3 == len(os.listdir("runs"))


def test_doubtful_arguments_are_said_in_the_first_lines(capsys):
    labelled_pictures()
    msf.main(tiny(msf, bank_size=64, warmup_epochs=2.0))
    lines = capsys.readouterr().out.splitlines()[:4]
    assert "--bank-size is above 16: the bank holds several embeddings of an image" in lines
    assert "--warmup-epochs is as long as the run: the learning rate never falls" in lines


# ---- k-NN


class Pixels(torch.nn.Module):
    """A backbone whose features are the pixels."""

    def forward(self, images):
        return images.flatten(1)


def test_knn_accuracy_equals_loops():
    images = (torch.rand(150, 3, 16, 16) * 255).byte()
    labels = torch.randint(0, 3, (150,))
    labels[::7] = -1  # neither voted on nor voting
    train = knn_data(images[:110], labels[:110])
    test = knn_data(images[110:], labels[110:])
    features = torch.nn.functional.normalize(msf.standardize(images / 255).flatten(1), dim=1)
    correct = []
    for i in range(110, 150):
        order = (features[:110] @ features[i]).argsort(descending=True).tolist()
        voting = [labels[j].item() for j in order if labels[j] >= 0][:20]
        answer = max(range(3), key=lambda label: (voting.count(label), -label))
        if labels[i] >= 0:
            correct.append(answer == labels[i])
    expected = 100 * sum(correct).item() / len(correct)
    assert msf.knn_accuracy(Pixels(), train, test, 0, 1) == pytest.approx(expected)


def test_no_more_neighbours_vote_than_a_class_has():
    images = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    images[:2, 0] = 255  # two red ones against four black ones
    train = knn_data(images, [0, 0, 1, 1, 1, 1])
    assert msf.knn_accuracy(Pixels(), train, knn_data(images[:1], [0]), 0, 1) == 100


def test_the_learning_rate_rises_and_falls():
    args = replace(msf.RECIPES["digits"], lr=0.8, warmup_epochs=2.0, epochs=10)
    rates = [msf.learning_rate(step, 5, args) for step in range(1, 51)]
    assert rates[0] == pytest.approx(0.08) and rates[9] == rates[10] == 0.8
    assert rates[30] == pytest.approx(0.4) and rates[49] < 0.002
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


# ---- the same command continues


@pytest.mark.parametrize("script", METHODS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(script, monkeypatch):
    labelled_pictures()
    args = tiny(script, epochs=3)
    script.main(replace(args, run_name="whole"))

    def stop_in_the_second_epoch(n, epoch, *given, order=script.epoch_order):
        if epoch == 1:
            raise KeyboardInterrupt
        return order(n, epoch, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "epoch_order", stop_in_the_second_epoch)
        script.main(args)
    assert checkpoint()["epoch"] == 1
    script.main(args)
    assert_same_state(checkpoint("whole"), checkpoint())


@pytest.mark.parametrize("script", METHODS)
def test_the_command_of_a_finished_run_evaluates_it(script):
    labelled_pictures()
    first = script.main(tiny(script))
    before = checkpoint()
    again = script.main(tiny(script))
    assert again["knn"] == first["knn"] and again["checkpoint"] == first["checkpoint"]
    assert_same_state(before, checkpoint())


def test_changed_arguments_are_printed_and_count(capsys):
    labelled_pictures()
    msf.main(tiny(msf))
    capsys.readouterr()
    msf.main(tiny(msf, epochs=3, weight_decay=0.25, momentum=0.5))
    lines = capsys.readouterr().out.splitlines()
    assert "continuing after epoch 2" in lines
    changed = [line for line in lines if " is now " in line]
    assert changed == [
        "--epochs is now 3, was 2",
        "--momentum is now 0.5, was 0.9",
        "--weight-decay is now 0.25, was 0.0005",
    ]
    group = checkpoint()["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["momentum"]) == (0.25, 0.5)


def test_a_run_does_not_continue_on_another_number_of_images():
    labelled_pictures()
    msf.main(tiny(msf))
    before = Path("runs/a/last.pt").read_bytes()
    Path("photos/train/cat/3.jpg").unlink()
    with pytest.raises(
        SystemExit, match=r"^runs/a/last.pt was trained on 16 .*there are 15: restore[^\n]*$"
    ):
        msf.main(tiny(msf, epochs=3))
    assert Path("runs/a/last.pt").read_bytes() == before


@pytest.mark.parametrize("change", [{"bank_size": 24}, {"arch": "resnet18"}, {"stem": "imagenet"}])
def test_a_run_does_not_continue_with_another_network(change):
    labelled_pictures()
    msf.main(tiny(msf))
    with pytest.raises(
        SystemExit, match=r"^runs/a/last.pt is of another script, or has another --arch, [^\n]*$"
    ):
        msf.main(tiny(msf, epochs=3, **change))


def start(script, args, processes=1):
    """The script as a user starts it, with these arguments, in processes of its own."""
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words += [str(ROOT / f"{script.__name__}.py"), "--dataset", args.dataset]
    recipe = script.RECIPES[args.dataset]
    for name, value in vars(args).items():
        if value != getattr(recipe, name):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_all(process):
    """Kill a process and, before it, what it has started: torchrun's processes outlive it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in map(int, children):
        os.kill(pid, signal.SIGKILL)
    process.kill()


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", METHODS)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(script, processes):
    labelled_pictures(each=64)
    args = tiny(script, epochs=12)
    for kill in range(5):
        process = start(script, args, processes)
        for line in process.stdout:
            if re.match(rf"epoch {2 * kill + 1}/12 .* loss", line):
                break
        delay = torch.rand(()).item()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            kill_all(process)
        process.communicate()
        assert 1 <= checkpoint()["epoch"] < 12
    for given in (args, replace(args, run_name="whole")):
        output, _ = start(script, given, processes).communicate()
        assert "To evaluate this run:" in output, output
    assert_same_state(checkpoint("whole"), checkpoint())


# ---- failures


def test_what_is_not_finite_stops_the_run_and_the_checkpoint_stays():
    labelled_pictures()
    msf.main(tiny(msf))
    before = Path("runs/a/last.pt").read_bytes()
    with pytest.raises(
        SystemExit, match=r"^loss or weights not finite: step 6, lr .*; lower --lr$"
    ):
        msf.main(tiny(msf, lr=1e38, epochs=3))
    assert Path("runs/a/last.pt").read_bytes() == before


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("size", [16, 96])
def test_an_unreadable_training_picture_is_named(size, num_workers):
    labelled_pictures(side=120)
    whole = Path("photos/train/cat/1.jpg").read_bytes()
    Path("photos/train/cat/1.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match=r"^.*cannot read photos/train/cat/1.jpg: [^\n]*$"):
        msf.main(tiny(msf, image_size=size, num_workers=num_workers))


def test_an_unreadable_test_picture_loses_no_training(monkeypatch):
    """The run ends after its last checkpoint; the same command goes on to the evaluation."""
    labelled_pictures(side=120)
    args = tiny(msf, image_size=96, epochs=1)
    knn_accuracy = msf.knn_accuracy
    monkeypatch.setattr(msf, "knn_accuracy", lambda *given: None)  # before the first step
    msf.main(replace(args, run_name="whole"))
    half = Path("photos/val/dog/3.jpg").read_bytes()[:500]
    Path("photos/val/dog/3.jpg").write_bytes(half)

    calls = []

    def at_the_end_only(*given):
        calls.append(given)
        return None if len(calls) == 1 else knn_accuracy(*given)

    monkeypatch.setattr(msf, "knn_accuracy", at_the_end_only)
    with pytest.raises(SystemExit, match=r"cannot read photos/val/dog/3.jpg: [^\n]*$"):
        msf.main(args)
    assert checkpoint()["epoch"] == 1
    assert_same_state(checkpoint("whole"), checkpoint())
    picture("photos/val/dog/3.jpg", 120, "blue")
    monkeypatch.setattr(msf, "knn_accuracy", knn_accuracy)
    assert msf.main(args)["knn"] is not None


def test_a_test_picture_that_cannot_be_read_stops_a_run_before_its_first_step():
    labelled_pictures(side=120)
    Path("photos/val/dog/3.jpg").write_bytes(b"not a picture")
    with pytest.raises(SystemExit, match=r"cannot read photos/val/dog/3.jpg: [^\n]*$"):
        msf.main(tiny(msf, image_size=96))


def test_too_little_shared_memory_is_explained(monkeypatch):
    """What a worker raises in a container with 64 MiB of /dev/shm."""
    labelled_pictures(side=120)

    def out_of_memory(crops):
        raise RuntimeError("unable to allocate shared memory (shm): No space left on device (28)")

    monkeypatch.setattr(torch, "stack", out_of_memory)
    with pytest.raises(SystemExit) as caught:
        msf.main(tiny(msf, image_size=96, num_workers=1))
    first, *cause = str(caught.value).splitlines()
    assert "--num-workers" in first and "docker run --shm-size" in first
    assert "No space left on device" in cause[-1]


def test_a_reader_that_is_killed_is_explained(monkeypatch):
    labelled_pictures(side=120)
    monkeypatch.setattr(msf, "read_image", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SystemExit) as caught:
        msf.main(tiny(msf, image_size=96, num_workers=1))
    first, *cause = str(caught.value).splitlines()
    assert "--num-workers" in first and "DataLoader worker" in cause[-1]


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(monkeypatch):
    labelled_pictures()
    msf.main(tiny(msf))
    before = Path("runs/a/last.pt").read_bytes()
    os.symlink("/dev/full", "runs/a/last.tmp")
    with pytest.raises(SystemExit, match=r"^\[Errno 28\] No space left on device[^\n]*$"):
        msf.main(tiny(msf, epochs=3))
    assert Path("runs/a/last.pt").read_bytes() == before


def test_a_bug_in_a_reader_keeps_its_traceback(monkeypatch):
    labelled_pictures(side=120)
    monkeypatch.setattr(msf, "pil_to_tensor", lambda view: torch.zeros(3).view(7))
    with pytest.raises(RuntimeError, match="shape"):
        msf.main(tiny(msf, image_size=96, num_workers=1))


def test_other_errors_keep_their_traceback(monkeypatch):
    labelled_pictures()

    def bug(*given):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(msf, "weak_view", bug)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        msf.main(tiny(msf))


def test_pictures_are_read_under_any_start_method(monkeypatch):
    """spawn: as on macOS and Windows, where workers get what they need by pickling."""
    labelled_pictures(side=100)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
    multiprocessing.set_start_method("spawn")
    try:
        args = tiny(msf, image_size=96, num_workers=1)
        data = msf.ImageData(args, is_train=True, device=torch.device("cpu"))
        (crops,) = data.batches(torch.arange(16)[None], crops=2)
        assert crops[0].shape == (16, 3, 96, 96)
    finally:
        multiprocessing.set_start_method("fork", force=True)


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"topk": 0}, "--topk must be at least 1"),
        ({"topk": 9}, "need --topk <= --batch-size (rows of the first step) <= --bank-size"),
        ({"bank_size": 7}, "need --topk <= --batch-size (rows of the first step) <= --bank-size"),
        (
            {"batch_size": 1, "topk": 1},
            "--batch-size: need 2 or more for each of 1 equal",
        ),
        (
            {"batch_size": 32, "bank_size": 64},
            "--batch-size is above the 16 training images; try ",
        ),
    ],
)
def test_arguments_that_cannot_train_are_answered_by_one_line(script, changes, message):
    labelled_pictures()
    with pytest.raises(SystemExit) as caught:
        script.main(tiny(script, **changes))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_a_batch_that_does_not_divide_among_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="--batch-size: need 2 or more for each of 3 equal"):
        msf.main(tiny(msf))


def test_one_image_is_too_few():
    picture("photos/a.jpg")
    with pytest.raises(SystemExit, match="^1 training images are too few$"):
        msf.main(tiny(msf))


@pytest.mark.parametrize("n", [2, 7, 30, 300])
def test_the_values_that_are_said_to_fit_do_fit(n):
    """The recipe for small folders, on too few pictures."""
    args = replace(msf.RECIPES["small-folder"], batch_size=512)
    train = knn_data(None, [-1] * n)
    with pytest.raises(SystemExit) as caught:
        msf.check_data(args, train, train, 1)
    words = re.search(r"try (.*)", str(caught.value))[1].split()
    batch_size, bank_size, topk = map(int, words[1::2])
    args = replace(args, batch_size=batch_size, bank_size=bank_size, topk=topk)
    msf.check_args(args, 1)
    msf.check_data(args, train, train, 1)


# ---- the command line


@pytest.mark.parametrize("script", METHODS)
def test_help_shows_the_values_of_the_data_set(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", [script.__name__, "--dataset", "cifar10", "--help"])
    with pytest.raises(SystemExit):
        script.parse_args()
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().out)
    for field in fields(script.Args):
        option = rf"--(no-)?{field.name.replace('_', '-')}[ ,]"
        assert re.search(option + r".*? [a-zA-Z(]{2,} .*?\(default: ", text), field.name
    for part in ("(default: cifar10)", "(default: 0.06)", "(default: 4096)", "(default: resnet18)"):
        assert part in text


@pytest.mark.parametrize("script", METHODS)
def test_what_is_given_wins_over_the_recipe(script, monkeypatch):
    words = [
        "x",
        "--lr",
        "0.5",
        "--dataset=stl10",
        "--jitter",
        "0",
        "0.1",
        "0.2",
        "0.3",
        "--no-amp",
    ]
    monkeypatch.setattr(sys, "argv", words)
    args = script.parse_args()
    changes = {"lr": 0.5, "jitter": (0.0, 0.1, 0.2, 0.3), "amp": False}
    assert args == replace(script.RECIPES["stl10"], **changes)


@pytest.mark.parametrize("script", METHODS)
def test_a_copied_file_says_what_it_needs(script):
    """`uv run` reads these lines."""
    text = Path(script.__file__).read_text()
    header = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.M)[1]
    needed = re.search(r"dependencies = \[(.*)\]", header)[1].replace('"', "").split(", ")
    assert sorted(needed) == sorted((ROOT / "requirements.txt").read_text().split())


# ---- several processes


def train_in_eval_mode(rank, world_size, folder):
    """Five steps of each script; BatchNorm in eval mode: no image depends on another."""
    if world_size > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    for script in METHODS:
        torch.manual_seed(0)
        model = small_model(script, bank_size=20, num_images=40).eval()
        if script is mnn:
            model.lam = 0.4  # else every process draws its own
        parallel_model = Step(script, model)
        if world_size > 1:
            parallel_model = torch.nn.parallel.DistributedDataParallel(parallel_model)
            parallel_model.broadcast_buffers = False
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.SGD(weights, 0.05, 0.9)
        share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        for number in range(5):
            torch.manual_seed(number)
            weak, strong = torch.rand(2, 8, 3, 16, 16)
            labels = torch.randint(0, 3, (8,))
            indices = 8 * number + torch.arange(8)
            batch = (weak[share], strong[share], labels[share], indices[share])
            loss, _ = parallel_model(*batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_target()
        if script is cmsf_semi:
            model.train_classifier()
        if script is cmsf_ssl:
            model.update_clusters(images_per_cluster=5)
        torch.save(model.state_dict(), f"{folder}/{script.__name__}-{world_size}-{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    torch.multiprocessing.spawn(train_in_eval_mode, (2, str(tmp_path)), nprocs=2)
    train_in_eval_mode(0, 1, str(tmp_path))
    for script in METHODS:
        one = torch.load(f"{script.__name__}-1-0.pt")
        first = torch.load(f"{script.__name__}-2-0.pt")
        second = torch.load(f"{script.__name__}-2-1.pt")
        for name, value in one.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("script", METHODS)
def test_two_processes_train_and_measure_and_one_goes_on(script):
    """As torchrun starts them; the test images do not divide by two. The bank carries over."""
    labelled_pictures()
    Path("photos/val/cat/0.jpg").unlink()
    args = tiny(script, knn_every=1, bank_size=32)
    output, _ = start(script, args, processes=2).communicate()
    assert "training on 2 x cpu, writing to runs/a" in output, output
    assert output.count("k-NN accuracy") == 3
    assert output.count("To evaluate this run:") == 1
    two = checkpoint()
    assert two["pushed"] == 32

    script.main(replace(args, epochs=3))
    one = checkpoint()
    assert one["pushed"] == 48
    rows = one["model"]["bank.embeddings"]
    assert torch.equal(rows[16:], two["model"]["bank.embeddings"][16:])  # the second epoch's
    assert not torch.equal(rows[:16], two["model"]["bank.embeddings"][:16])
    if script is cmsf_ssl:  # u' of the third epoch is u of the second
        indices = one["model"]["bank.indices"][:16]
        assert torch.equal(one["model"]["bank.others"][:16], two["model"]["cache"][indices])


# ---- on a GPU


class Step(torch.nn.Module):
    """A model with the same arguments for every script."""

    def __init__(self, script, model):
        super().__init__()
        self.script = script
        self.model = model

    def forward(self, *batch):
        return step(self.script, self.model, *batch)


class NoCopies(TorchDispatchMode):
    """Fails on a copy between devices: a host that copies from unpinned memory waits for the GPU.
    What waits for a number (item, nonzero) is refused by fake tensors themselves."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "copy" in str(function):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
            assert len({tensor.device for tensor in tensors}) == 1, f"{function} between devices"
        return result


@pytest.mark.parametrize("script", METHODS)
def test_views_and_step_never_wait_for_the_device(script, monkeypatch):
    """Shown without a GPU by fake tensors, which have a device and no numbers."""
    model = small_model(script, bank_size=640, num_images=1000)
    model.bank.pushed = 700  # the bank is full
    args = replace(script.RECIPES["imagenet"], image_size=16, rotation=10.0)
    randperm = torch.randperm

    def randperm_on_the_host(n, device=None):
        if device is not None:
            return randperm(n, device=device)
        with unset_fake_temporarily():  # the order of the colour operations
            return randperm(n)

    monkeypatch.setattr(torch, "randperm", randperm_on_the_host)
    with FakeTensorMode():
        state = {}
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
            state[f"model.{name}"] = fake.requires_grad_(value.requires_grad)
        images = torch.empty(64, 3, 16, 16, device="cuda")
        labels = torch.empty(64, dtype=torch.int64, device="cuda")
        with NoCopies():
            weak = script.weak_view(script.random_crop(images, args), args)
            strong = script.strong_view(script.random_crop(images, args), args)
            batch = (weak, strong, labels, labels)
            loss, metrics = functional_call(Step(script, model), state, batch)
        assert loss.device.type == "cuda"
        assert {value.device.type for value in metrics.values()} == {"cuda"}


def test_a_copy_between_devices_would_be_seen():
    with FakeTensorMode(), NoCopies(), pytest.raises(AssertionError, match="between devices"):
        torch.empty(3, device="cuda").new_tensor([1.0, 2.0])
