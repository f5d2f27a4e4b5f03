"""Whole runs: what they print, write and return, how they continue, and how they fail.

The networks are of one convolution.
"""

import math
import os
import re
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from scripts import (
    CPU,
    FAKE_GPU,
    METHODS,
    arguments,
    assert_same_state,
    checkpoint,
    data_of,
    labelled_pictures,
    picture,
    small_model,
    tiny,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cmsf_semi
import cmsf_ssl
import mnn
import msf
from msf import build_backbone  # the real one: the tests of this file have a small one in its place

pytestmark = pytest.mark.usefixtures("small_networks")


# ---- what a run learns, prints, writes and returns


def stripes(args, is_train):
    """A split of 512 images of stripes: of any colour and phase, and in eight directions, which are
    the labels."""
    torch.manual_seed(is_train)
    labels = torch.arange(512) % 8
    direction = labels.view(-1, 1, 1) * math.pi / 8
    phase = 2 * math.pi * torch.rand(512, 1, 1)
    color = torch.rand(512, 3, 1, 1)
    x = torch.arange(16.0)
    y = x[:, None]
    waves = torch.sin(x * direction.cos() + y * direction.sin() + phase)[:, None]
    return (255 * color * (1 + waves) / 2).byte(), None, labels


@pytest.mark.parametrize("script", METHODS)
def test_training_learns(script, monkeypatch):
    """At first, images of one colour are neighbours; in the end, those of one direction."""
    monkeypatch.setattr(script, "load_split", stripes)
    changes = {"jitter": (0.8, 0.8, 0.8, 0.5), "gray": 0.2, "rotation": 0.0, "topk": 2}
    changes |= {"batch_size": 64, "bank_size": 512, "ema": 0.95, "epochs": 48, "warmup_epochs": 2.0}
    if script is cmsf_semi:
        changes["labels"] = "50pct"
    script.main(replace(script.RECIPES["digits"], run_name="a", **changes))
    curve = EventAccumulator("runs/a").Reload().Scalars("knn")
    # Without the optimiser's steps, BatchNorm's statistics alone bring 15.
    assert curve[0].value < 50 and curve[-1].value > curve[0].value + 22


@pytest.mark.parametrize("script", METHODS)
def test_a_run_leaves_what_it_promises(script, capsys):
    labelled_pictures(each=12)  # three steps an epoch
    args = tiny(script, run_name=None, log_every=2, knn_every=1)
    result = script.main(args)
    assert 0 < result["loss"] < 4 and result["knn"] == 100  # red and blue pictures
    last = Path(result["checkpoint"])
    # To the microsecond: runs that start together have folders of their own.
    name = rf"{script.__name__}-folder-0-\d{{8}}-\d{{6}}-\d{{6}}"
    assert re.fullmatch(name, last.parent.name)
    run = torch.load(last, weights_only=True)
    assert run["epoch"] == 2 and run["images"] == 24 and run["args"] == vars(args)
    backbone = torch.load(last.with_name("backbone.pt"), weights_only=True)
    names = [name for name in run["model"] if name.startswith("online.0.")]
    assert names == [f"online.0.{name}" for name in backbone]
    for name, weight in backbone.items():
        assert torch.equal(weight, run["model"][f"online.0.{name}"])

    events = EventAccumulator(str(last.parent)).Reload()
    for tag in ("loss", "purity", "spread", "lr", "images_per_s"):
        # Every second step of an epoch, and its last.
        assert [event.step for event in events.Scalars(tag)] == [2, 3, 5, 6]
    assert [event.step for event in events.Scalars("knn")] == [0, 3, 6]

    lines = capsys.readouterr().out.splitlines()
    assert "24 training images (24 labelled), 24 test images (24 labelled)" in lines
    epoch = r"epoch 1/2  step 3/3  loss \S+  purity \S+  .* \d+ images/s  \d:\d\d:\d\d left"
    assert any(re.fullmatch(epoch, line) for line in lines)
    assert lines[-1].endswith(f"python eval_linear.py --checkpoint {last}")


@pytest.mark.parametrize("script", [msf, cmsf_ssl, mnn])
def test_pictures_without_labels_train_and_what_cannot_be_measured_is_left_out(script, capsys):
    for i in range(16):
        picture(f"photos/{i}.jpg")
    result = script.main(tiny(script))
    assert math.isfinite(result["loss"]) and result["knn"] is None
    lines = capsys.readouterr().out.splitlines()
    assert "purity and k-NN accuracy are not measured: they need labels, train/CLASS/" in lines
    assert not any(re.search(r"%|purity \d|nan", line) for line in lines)
    assert "purity" not in EventAccumulator("runs/a").Reload().Tags()["scalars"]


@pytest.mark.parametrize("script", [msf, cmsf_ssl, mnn])
def test_without_the_classes_in_val_the_purity_is_measured_alone(script, capsys):
    labelled_pictures()
    Path("photos/val/cat").rename("photos/val/lion")
    Path("photos/val/dog").rename("photos/val/wolf")
    assert script.main(tiny(script))["knn"] is None
    text = capsys.readouterr().out
    assert "reading 16 image files into memory" in text and "16 test images (0 labelled)" in text
    assert "the k-NN accuracy is not measured: it needs val/" in text and "purity 0." in text


def test_the_bounds_themselves_are_allowed():
    changes = {"flip": 1.0, "gray": 1.0, "blur": 1.0, "ema": 1.0, "jitter": (1.0,) * 4}
    msf.check_args(tiny(msf, crop_scale=(1.0, 1.0), **changes), 1)


def test_doubtful_arguments_are_said_in_the_first_lines(capsys):
    labelled_pictures()
    msf.main(tiny(msf, bank_size=64, warmup_epochs=2.0))
    lines = capsys.readouterr().out.splitlines()[:6]
    assert "--bank-size is above 16: the bank holds several embeddings of an image" in lines
    warmup = "--warmup-epochs 2 of 2 epochs: the learning rate only rises (fine for a trial)"
    assert warmup in lines


@pytest.mark.parametrize(
    "stem, side", [("imagenet", 2), ("small", 8), ("small-pool", 4), ("small-stride", 4)]
)
def test_the_stems_for_small_images_keep_their_resolution(stem, side):
    """Sides of the last of the four stages' images, of a view of 64 pixels."""
    backbone, _ = build_backbone("resnet10", stem)
    shapes = []
    backbone.layer4.register_forward_hook(lambda net, inputs, output: shapes.append(output.shape))
    backbone(torch.rand(2, 3, 64, 64))
    assert shapes == [(2, 512, side, side)]


# ---- k-NN and learning rate


@pytest.mark.parametrize("n", [40, 110])  # k is 12, and 20
def test_knn_accuracy_equals_loops(n):
    """20 images vote, and no more than a class has on average."""
    images = (torch.rand(n + 40, 3, 16, 16) * 255).byte()
    labels = torch.randint(0, 3, (n + 40,))
    labels[::7] = -1  # neither voted on nor voting
    train = data_of(images[:n], labels[:n])
    test = data_of(images[n:], labels[n:])
    k = min(20, math.ceil((train.labels >= 0).sum().item() / 3))
    features = torch.nn.functional.normalize(msf.standardize(images / 255).flatten(1), dim=1)
    correct = []
    for i in range(n, n + 40):
        order = (features[:n] @ features[i]).argsort(descending=True).tolist()
        votes = [labels[j].item() for j in order if labels[j] >= 0][:k]
        answer = max(range(3), key=lambda label: (votes.count(label), -label))
        if labels[i] >= 0:
            correct.append(answer == labels[i])
    expected = 100 * sum(correct).item() / len(correct)
    pixels = torch.nn.Flatten()  # a backbone whose features are the pixels
    assert msf.knn_accuracy(pixels, train, test, 0, 1) == pytest.approx(expected)


def test_the_learning_rate_rises_and_falls():
    args = replace(msf.RECIPES["digits"], lr=0.8, warmup_epochs=2.0, epochs=10)
    rates = [msf.learning_rate(step, 5, args) for step in range(1, 51)]
    for i in range(10):
        assert rates[i] == pytest.approx(0.8 * (i + 1) / 10)
    for i in range(10, 50):
        assert rates[i] == pytest.approx(0.4 * (1 + math.cos(math.pi * (i - 10) / 40)))


def test_a_warm_up_of_nearly_the_whole_run_ends_at_the_highest_rate():
    args = replace(msf.RECIPES["digits"], lr=0.8, warmup_epochs=1.9, epochs=2)
    rates = [msf.learning_rate(step, 5, args) for step in range(1, 11)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.8)


# ---- the same command continues


@pytest.mark.parametrize(
    "script, changes",
    [
        (msf, {}),
        (msf, {"image_size": 96, "num_workers": 1}),
        (cmsf_ssl, {}),
        (cmsf_ssl, {"constraint": "kmeans", "images_per_cluster": 4}),
        (cmsf_semi, {"labels": "50pct"}),
        (mnn, {}),
    ],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(script, changes, monkeypatch, capsys):
    """Bit for bit, with bank, caches, clusters, classifier and optimizer."""
    labelled_pictures(side=100)
    args = tiny(script, epochs=3, **changes)
    script.main(replace(args, run_name="whole"))

    def stop_in_the_second_epoch(n, epoch, *given, order=script.epoch_order):
        if epoch == 1:
            raise KeyboardInterrupt
        return order(n, epoch, *given)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped"):
        patch.setattr(script, "epoch_order", stop_in_the_second_epoch)
        script.main(args)
    assert checkpoint()["epoch"] == 1
    script.main(args)
    assert "continuing after epoch 1 of 3" in capsys.readouterr().out
    assert_same_state(checkpoint("whole"), checkpoint())


def test_changed_arguments_are_printed_and_count(capsys):
    labelled_pictures()
    msf.main(tiny(msf))
    msf.main(tiny(msf, epochs=3, weight_decay=0.25))
    lines = capsys.readouterr().out.splitlines()
    changes = ["--epochs is now 3, was 2", "--weight-decay is now 0.25, was 0.0005"]
    assert [line for line in lines if " is now " in line] == changes
    assert checkpoint()["optimizer"]["param_groups"][0]["weight_decay"] == 0.25


# ---- failures


@pytest.fixture
def trained():
    """A run of two epochs on 16 pictures. Whatever then fails, its checkpoint stays."""
    labelled_pictures()
    msf.main(tiny(msf))
    before = Path("runs/a/last.pt").read_bytes()
    yield
    assert Path("runs/a/last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "script, changes, message",
    [
        (msf, {"bank_size": 24}, "last.pt does not fit: .*--bank-size is now 24, was 16.* Choose"),
        (mnn, {}, "last.pt is of another script or version"),
        (cmsf_ssl, {}, "last.pt is of another script or version"),
        (msf, {"epochs": 1}, "last.pt has 2 epochs, more than --epochs 1"),
        (msf, {"data_dir": "half"}, "last.pt was trained on 16 .* there are 8: restore"),
        (msf, {"lr": 1e38}, "weights not finite by step 6, lr .*; lower --lr"),
    ],
)
def test_what_cannot_go_on_is_answered_by_one_line(script, changes, message, trained):
    labelled_pictures("half", each=4)
    with pytest.raises(SystemExit, match=rf"^[^\n]*{message}[^\n]*$"):
        script.main(tiny(script, **{"epochs": 3} | changes))


def test_a_full_disk_is_named(trained):
    os.symlink("/dev/full", "runs/a/last.tmp")
    with pytest.raises(SystemExit, match=r"^\[Errno 28\] No space left on device[^\n]*$"):
        msf.main(tiny(msf, epochs=3))


@pytest.mark.parametrize("size, num_workers", [(16, 1), (96, 0)])
def test_an_unreadable_training_picture_is_named(size, num_workers):
    labelled_pictures(side=120)
    whole = Path("photos/train/cat/1.jpg").read_bytes()
    Path("photos/train/cat/1.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match=r"^.*cannot read photos/train/cat/1.jpg: [^\n]*$"):
        msf.main(tiny(msf, image_size=size, num_workers=num_workers))


def test_a_test_picture_that_becomes_unreadable_loses_no_training(monkeypatch):
    """The run ends after its last checkpoint; the same command goes on to the evaluation."""
    labelled_pictures(side=120)
    args = tiny(msf, image_size=96, epochs=1)

    def order_and_break_a_picture(*given, order=msf.epoch_order):
        Path("photos/val/dog/3.jpg").write_bytes(b"not a picture")
        return order(*given)

    monkeypatch.setattr(msf, "epoch_order", order_and_break_a_picture)
    with pytest.raises(SystemExit, match=r"cannot read photos/val/dog/3.jpg: [^\n]*$"):
        msf.main(args)
    assert checkpoint()["epoch"] == 1
    picture("photos/val/dog/3.jpg", 120, "blue")
    assert msf.main(args)["knn"] is not None


def without_shared_memory(path):
    """Raises what a worker does in a container with 64 MiB of /dev/shm."""
    raise RuntimeError("unable to allocate shared memory (shm): No space left on device (28)")


def without_any_shared_memory(path):
    raise OSError(28, "No space left on device")  # as where a loader starts its workers


def killed(path):
    os.kill(os.getpid(), signal.SIGKILL)


def bug(path):
    raise RuntimeError("shapes do not match")


HINT = r"^Reading images failed; .*--num-workers .*docker run --shm-size=8g.\n"


@pytest.mark.parametrize(
    "read_image, error, message",
    [
        (without_shared_memory, SystemExit, HINT + r"(?s:.*)No space left on device \(28\)$"),
        (without_any_shared_memory, SystemExit, r"No space left .*docker run --shm-size=8g\)$"),
        (killed, SystemExit, HINT + "DataLoader worker .* exited"),
        (bug, RuntimeError, "shapes do not match"),
    ],
)
def test_readers_without_memory_are_explained_and_a_bug_keeps_its_traceback(
    read_image, error, message, monkeypatch
):
    labelled_pictures(side=120)
    monkeypatch.setattr(msf, "read_image", read_image)
    with pytest.raises(error, match=message):
        msf.main(tiny(msf, image_size=96, num_workers=1))


def test_pictures_are_read_under_any_start_method(monkeypatch):
    """spawn: as on macOS and Windows, where workers get what they need by pickling."""
    labelled_pictures(side=100)
    loader = partial(msf.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr(msf, "DataLoader", loader)
    data = msf.ImageData(tiny(msf, image_size=96, num_workers=1), is_train=True, device=CPU)
    (crops,) = data.batches(torch.arange(16)[None], num_crops=2)
    assert crops[0].shape == (16, 3, 96, 96)


@pytest.mark.parametrize(
    "scripts, world_size, changes, message",
    [
        (METHODS, 1, {"epochs": 0}, "--epochs must be at least 1"),
        (METHODS, 1, {"run_name": "runs/a"}, "--run-name is the name of a folder in runs/"),
        (METHODS, 1, {"run_name": ".."}, "--run-name is the name of a folder in runs/"),
        (METHODS, 1, {"topk": 9}, "need --topk <= --batch-size"),
        (METHODS, 1, {"bank_size": 7}, "need --topk <= --batch-size"),
        (METHODS, 8, {}, "--batch-size must be at least 2 for each process"),
        (METHODS, 3, {}, "--batch-size must be at least 2 for each process"),
        (METHODS, 1, {"num_workers": -1}, "--num-workers must not be negative"),
        (METHODS, 1, {"lr": -0.1}, "--lr must not be negative"),
        (METHODS, 1, {"knn_every": 0}, "--knn-every must be at least 1"),
        (METHODS, 1, {"ema": 2.0}, "--ema must be from 0 to 1"),
        (METHODS, 1, {"flip": 50.0}, "--flip must be from 0 to 1"),
        (METHODS, 1, {"gray": 20.0}, "--gray must be from 0 to 1"),
        (METHODS, 1, {"blur": 50.0}, "--blur must be from 0 to 1"),
        (METHODS, 1, {"crop_scale": (20.0, 100.0)}, "--crop-scale: need 0 < least"),
        (METHODS, 1, {"crop_scale": (1.0, 0.2)}, "--crop-scale: need 0 < least"),
        (METHODS, 1, {"jitter": (2.0, 0.0, 0.0, 0.0)}, "--jitter: need four numbers"),
        ([cmsf_ssl], 1, {"num_candidates": 4}, "need --topk <= --num-candidates <= --bank-size"),
        ([cmsf_semi], 1, {"confidence": 1.5}, "--confidence: need a probability"),
        ([mnn], 1, {"bn_splits": 3}, "--bn-splits must divide --batch-size into parts of 2 or"),
        ([mnn], 4, {"bn_splits": 2}, "--bn-splits must be 1, or a multiple of the 4 processes"),
        ([mnn], 1, {"lam": 1.1}, "--lam: need random, or a number from 0 to 1"),
    ],
)
def test_arguments_that_cannot_train_are_answered_by_one_line(
    scripts, world_size, changes, message, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for script in scripts:
        with pytest.raises(SystemExit) as caught:
            script.main(tiny(script, **changes))
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [2, 7, 300])
def test_the_values_that_are_said_to_fit_do_fit(n):
    """The recipe for small folders, on too few pictures."""
    args = replace(msf.RECIPES["small-folder"], batch_size=512)
    train = data_of(None, [-1] * n)
    with pytest.raises(SystemExit) as caught:
        msf.check_data(args, train, train, 1)
    for name, value in re.findall(r"--([a-z-]+) (\d+)", str(caught.value).partition("try ")[2]):
        args = replace(args, **{name.replace("-", "_"): int(value)})
    msf.check_args(args, 1)
    (line,) = msf.check_data(args, train, train, 1)[1:]
    assert "not measured" in line  # no other advice


# ---- the command line


@pytest.mark.parametrize("script", METHODS)
def test_the_data_set_chooses_a_recipe_and_what_is_given_wins(script, monkeypatch, capsys):
    words = "x --lr 0.5 --dataset=stl10 --jitter 0 0.1 0.2 0.3 --no-amp"
    monkeypatch.setattr(sys, "argv", words.split())
    changes = {"lr": 0.5, "jitter": (0.0, 0.1, 0.2, 0.3), "amp": False}
    assert script.parse_args() == replace(script.RECIPES["stl10"], **changes)

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", [*words.split(), "--help"])
    with pytest.raises(SystemExit):
        script.parse_args()
    text = capsys.readouterr().out
    assert "highest learning rate of SGD (default: 0.06)" in text
    assert re.findall(r"(Run|Views|Training) options", text) == ["Run", "Views", "Training"]


# ---- on a GPU, shown without one by fake tensors, which have a device and no numbers


class OneDevice(TorchDispatchMode):
    """Fails where two devices meet: a host that copies from unpinned memory waits for the GPU. What
    waits for a number (item, nonzero) is refused by fake tensors themselves."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
        if "copy" not in str(function) and "index_put" not in str(function):
            # Other functions take a number of the host's as it is.
            tensors = [tensor for tensor in tensors if tensor.dim() > 0]
        assert len({tensor.device for tensor in tensors}) <= 1, f"{function} between devices"
        return result


@FAKE_GPU
@pytest.mark.parametrize("script", METHODS)
def test_views_and_step_never_wait_for_the_device(script, monkeypatch):
    changes = {}
    if script is mnn:
        changes = {"lam": "random", "norm_layer": partial(mnn.SplitBatchNorm, splits=8)}
    model = small_model(script, bank_size=640, num_images=1000, **changes)
    model.bank.pushed = 700  # the bank is full
    args = replace(script.RECIPES["imagenet"], image_size=16, rotation=10.0)
    randperm = torch.randperm

    def randperm_on_the_host(n, device=None):
        if device is not None:
            return randperm(n, device=device)
        with unset_fake_temporarily():  # the host reads the order of the colour operations
            return randperm(n)

    monkeypatch.setattr(torch, "randperm", randperm_on_the_host)
    with FakeTensorMode():
        state = {}
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
            state[name] = fake.requires_grad_(value.requires_grad)
        images = torch.empty(64, 3, 16, 16, device="cuda")
        labels = torch.empty(64, dtype=torch.int64, device="cuda")
        with OneDevice():
            weak = script.weak_view(script.random_crop(images, args), args)
            strong = script.strong_view(script.random_crop(images, args), args)
            batch = arguments(script, weak, strong, labels, labels)
            loss, metrics = functional_call(model, state, batch)
        assert loss.device.type == "cuda"
        assert {value.device.type for value in metrics.values()} == {"cuda"}
