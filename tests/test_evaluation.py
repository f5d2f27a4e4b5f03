"""eval_linear.py: the files that it reads, its judges against plain loops, and what it writes."""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import cmsf_semi
import eval_linear
import mnn
import msf

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def resnet18():
    """With statistics that differ from those of a new network."""
    net = torchvision.models.resnet18(num_classes=7)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return net.eval()


def with_prefix(prefix, net):
    return {prefix + name: tensor for name, tensor in net.state_dict().items()}


def numbered(prefix, net, left_out=("fc",)):
    """Children by their numbers, as in MNN's files."""
    names = [name for name, _ in net.named_children() if name not in left_out]
    state = {}
    for name, tensor in net.state_dict().items():
        child, rest = name.split(".", 1)
        if child in names:
            state[f"{prefix}{names.index(child)}.{rest}"] = tensor
    return state


def load(path, prefix=None):
    """The backbone that main would judge."""
    backbone, _ = eval_linear.build_backbone("resnet18", "imagenet")
    tensors = eval_linear.named_tensors(eval_linear.read_file(path))
    tensors = eval_linear.name_numbered(eval_linear.drop_wrappers(tensors, path))
    if prefix is None:
        prefix = eval_linear.find_prefix(tensors, path)
    eval_linear.load_backbone(backbone, tensors, prefix, path)
    return backbone.eval()


def evaluate(**given):
    return eval_linear.main(eval_linear.Args(**given))


# ---- files ----

OPTIMIZER = {"param_groups": [{"lr": np.float64(0.06)}], "state": {0: {"buffer": torch.ones(2)}}}
LAYOUTS = {
    "torchvision": lambda net, other: net.state_dict(),
    "state_dict": lambda net, other: {"state_dict": net.state_dict(), "epoch": 3},
    "nested": lambda net, other: {"a": {"model": {"state_dict": net.state_dict()}}},
    "compiled": lambda net, other: with_prefix("_orig_mod.module.", net),
    "without counters": lambda net, other: {
        name: x for name, x in net.state_dict().items() if "num_batches" not in name
    },
    "MSF, CMSF": lambda net, other: {
        "opt": argparse.Namespace(topk=5, arch="resnet18"),
        "state_dict": with_prefix("encoder_q.module.", net)
        | with_prefix("encoder_t.module.", other),
        "optimizer": OPTIMIZER,
        "epoch": 7,
    },
    "MNN": lambda net, other: {
        "model": numbered("net.net.", net),
        "optimizer": OPTIMIZER,
        "epoch": np.float64(7),
    },
    "MNN without a max-pool": lambda net, other: {
        "model": numbered("module.net.net.", net, left_out=("fc", "maxpool"))
    },
    "DINO": lambda net, other: {
        "student": with_prefix("module.backbone.", other),
        "teacher": with_prefix("backbone.", net),
    },
    "two, of which one is called backbone": lambda net, other: {
        "state_dict": with_prefix("momentum_backbone._orig_mod.", other)
        | with_prefix("backbone._orig_mod.", net)
    },
    "another name": lambda net, other: with_prefix("trunk.deep.", net),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_features(layout):
    net = resnet18()
    torch.save(LAYOUTS[layout](net, resnet18()), "file.pt")
    images = torch.randn(2, 3, 40, 40)
    found = load("file.pt")(images)
    net.fc = nn.Identity()
    assert torch.equal(found, net(images))


def test_a_prefix_chooses_among_several():
    first = resnet18()
    second = resnet18()
    torch.save(with_prefix("a.", first) | with_prefix("b.", second), "two.pt")
    with pytest.raises(
        SystemExit, match=r"several ResNets, \['a.', 'b.'\]: choose one by --prefix"
    ):
        load("two.pt")
    second.fc = nn.Identity()
    images = torch.randn(2, 3, 40, 40)
    assert torch.equal(load("two.pt", "b.")(images), second(images))
    with pytest.raises(SystemExit, match="do not fit"):
        load("two.pt", "c.")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_a_malicious_file_runs_nothing():
    torch.save({"state_dict": resnet18().state_dict(), "epoch": Malicious()}, "bad.pt")
    with pytest.raises(SystemExit, match="bad.pt is refused: it holds a .*system"):
        evaluate(checkpoint="bad.pt")
    assert not Path("was_run").exists()


def test_other_types_are_named():
    torch.save({"state_dict": resnet18().state_dict(), "path": Path("a")}, "typed.pt")
    with pytest.raises(SystemExit, match="typed.pt is refused: it holds a .*Path"):
        evaluate(checkpoint="typed.pt")


@pytest.mark.parametrize("content", [b"", b"no weights here\n", None])
def test_what_is_no_checkpoint_is_refused_in_one_line(content):
    if content is not None:
        Path("file.pt").write_bytes(content)
    with pytest.raises(SystemExit, match="file.pt") as error:
        evaluate(checkpoint="file.pt", dataset="digits")
    assert "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_named():
    net = resnet18()
    incomplete = net.state_dict()
    del incomplete["layer3.1.bn2.weight"]
    torch.save(incomplete, "incomplete.pt")
    with pytest.raises(SystemExit, match=r"1 of 120 tensors do not fit, as \['layer3.1.bn2.weight"):
        load("incomplete.pt")
    torch.save(torchvision.models.resnet34().state_dict(), "deeper.pt")
    with pytest.raises(SystemExit, match="layer1.2.conv1.weight"):
        load("deeper.pt")
    torch.save(net.state_dict() | {"conv1.weight": torch.ones(64, 3, 3, 3)}, "other_stem.pt")
    with pytest.raises(SystemExit, match=r"1 of 120 tensors do not fit, as \['conv1.weight'\]"):
        load("other_stem.pt")
    torch.save(with_prefix("", net) | with_prefix("module.", net), "twice.pt")
    with pytest.raises(SystemExit, match="twice.pt holds some tensors twice"):
        load("twice.pt")
    torch.save({"fc.weight": torch.ones(2, 2)}, "layer.pt")
    with pytest.raises(SystemExit, match="no ResNet among 1 tensors"):
        load("layer.pt")


# ---- our checkpoints ----


def write_checkpoint(script=msf, folder="runs/a", **given):
    """A checkpoint of an untrained network, as main writes it. Returns the model."""
    args = dataclasses.replace(script.RECIPES[given.get("dataset", "digits")], **given)
    backbone, width = script.build_backbone(args.arch, args.stem)
    model = msf.MSF(backbone, width, args.topk, args.bank_size, args.ema)
    Path(folder).mkdir(parents=True)
    state = {"model": model.state_dict(), "pushed": 0, "args": vars(args), "step": 7}
    torch.save(state, f"{folder}/last.pt")
    return model


def completed(run=None, **given):
    return eval_linear.complete_args(eval_linear.Args(**given), run or {})


def test_a_run_brings_its_data_and_network():
    run = vars(dataclasses.replace(msf.RECIPES["folder"], stem="small", rotation=3.0, data_dir="d"))
    args = completed(run, checkpoint="last.pt")
    assert (args.dataset, args.data_dir, args.arch, args.stem) == (
        "folder",
        "d",
        "resnet50",
        "small",
    )
    assert (args.image_size, args.rotation, args.crop_scale) == (224, 3.0, (0.08, 1.0))
    other_data = completed(run, checkpoint="last.pt", dataset="cifar10")
    assert (other_data.stem, other_data.image_size, other_data.data_dir) == ("small", 32, "data")
    assert completed(run, checkpoint="last.pt", image_size=64).image_size == 64


def test_the_labels_of_a_run_are_those_of_its_seed():
    run = vars(dataclasses.replace(cmsf_semi.RECIPES["digits"], label_seed=3))
    assert completed(run, checkpoint="last.pt").label_seed == 3
    assert completed(run, checkpoint="last.pt", label_seed=4).label_seed == 4


def test_stl10_is_judged_at_96_pixels():
    args = completed(vars(msf.RECIPES["stl10"]), checkpoint="last.pt")
    assert args.image_size == 96


@pytest.mark.parametrize("dataset", eval_linear.RECIPES)
def test_protocols(dataset):
    """lr 30 only where it was published."""
    is_raw = dataset in ("cifar10", "cifar100", "stl10", "tinyimagenet")
    args = completed(baseline="random", dataset=dataset)
    assert (args.protocol, args.lr, args.epochs) == (
        ("raw", 30, 100) if is_raw else ("scaled", 0.01, 40)
    )
    assert completed(baseline="raw", dataset=dataset).protocol == "scaled"
    fine_tuned = completed(baseline="random", dataset=dataset, fine_tune=True)
    assert (fine_tuned.lr, fine_tuned.epochs) == (0.001, 20)
    assert args.crop_scale == ((0.6, 1.0) if dataset == "digits" else (0.08, 1.0))
    for name in ("arch", "stem"):  # an untrained network is that which the scripts train
        assert getattr(args, name) == getattr(msf.RECIPES[dataset], name)


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "give --checkpoint, or --baseline"),
        ({"baseline": "raw", "dataset": "digit"}, "unknown --dataset digit, one of digits, "),
        ({"baseline": "raw", "epochs": -1}, "--epochs"),
        ({"baseline": "raw", "fine_tune": True}, "no weights to --fine-tune"),
        ({"baseline": "raw", "batch_size": 0}, "--batch-size must be above 0"),
        ({"baseline": "raw", "lr": math.nan}, "--lr must be above 0"),
        ({"baseline": "raw", "labels": "0pct"}, "--labels 0pct"),
        ({"baseline": "random", "fine_tune": True, "batch_size": 1}, "a step needs 2 or more"),
        ({"baseline": "random", "dataset": "folder", "data_dir": "x"}, "cannot load folder"),
    ],
)
def test_arguments_that_cannot_work_are_refused(given, message):
    with pytest.raises(SystemExit, match=message):
        evaluate(**given)


def test_a_file_from_elsewhere_needs_a_data_set():
    torch.save(resnet18().state_dict(), "net.pth")
    with pytest.raises(SystemExit, match="net.pth: give --dataset, one of digits"):
        evaluate(checkpoint="net.pth")


def own_encoder(arch, stem):
    """Not a ResNet."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 12)), 12


def test_an_encoder_of_ones_own_is_judged(monkeypatch):
    monkeypatch.setattr(msf, "build_backbone", own_encoder)
    monkeypatch.setattr(eval_linear, "build_backbone", own_encoder)
    model = write_checkpoint()
    results = evaluate(checkpoint="runs/a/last.pt", epochs=0)
    train, test = (msf.ImageData(msf.RECIPES["digits"], split, CPU) for split in (True, False))
    backbone = model.online[0].eval()
    assert results["20-NN"] == pytest.approx(msf.knn_accuracy(backbone, train, test, 0, 1))


# ---- judges ----


@pytest.mark.parametrize("k, temperature", [(1, None), (5, None), (9, 0.1)])
def test_knn_votes_against_loops(k, temperature):
    bank = F.normalize(torch.randn(30, 4, dtype=torch.float64), dim=1)
    queries = F.normalize(torch.randn(300, 4, dtype=torch.float64), dim=1)
    labels = torch.randint(0, 4, (30,))
    found = eval_linear.knn_predict(queries, bank, labels, k, temperature)
    for query, prediction in zip(queries, found):
        cosines = [(sum(query * row).item(), i) for i, row in enumerate(bank)]
        votes = [0.0] * 4
        for cosine, i in sorted(cosines, reverse=True)[:k]:
            votes[labels[i]] += math.exp(cosine / temperature) if temperature else 1
        assert prediction == votes.index(max(votes))


class Data:
    """Points [n, 3, 1, 1] in place of images."""

    def __init__(self, points, labels):
        self.args = eval_linear.Args(image_size=1)
        self.points = points
        self.labels = labels

    def batches(self, order, num_crops):
        for indices in order:
            yield [self.points[indices]]


def separable_problem():
    corners = torch.tensor([[1.0, 0.1, 0.1], [0.1, 1.0, 0.1], [0.1, 0.1, 1.0], [1.0, 1.0, 0.1]])
    labels = torch.arange(4).repeat(64)
    points = corners[labels] + 0.1 * torch.rand(256, 3)
    return Data(points.view(-1, 3, 1, 1), labels)


def test_features_are_in_the_order_of_the_indices_also_if_two_processes_compute_them(monkeypatch):
    """The processes run one after the other: the first is given what the second has computed."""
    numbers = torch.arange(1200.0)
    data = Data(numbers.view(-1, 1, 1, 1), labels=None)
    indices = torch.randperm(1200)[:1111]
    second = []

    def keep(part):
        second.append(part)
        return torch.cat([part, part])

    monkeypatch.setattr(eval_linear, "gather", keep)
    eval_linear.outputs(nn.Flatten(), data, indices, rank=1, world_size=2)
    parts = iter(second)
    monkeypatch.setattr(eval_linear, "gather", lambda part: torch.cat([part, next(parts)]))
    found = eval_linear.outputs(nn.Flatten(), data, indices, rank=0, world_size=2)
    assert torch.equal(found.flatten(), numbers[indices])


def test_no_more_neighbors_vote_than_a_class_has_images(monkeypatch):
    monkeypatch.setattr(eval_linear, "standardize", lambda images: images)
    voting = []

    def record(queries, bank, labels, k, temperature=None):
        voting.append(k)
        return labels[:1].expand(len(queries))

    monkeypatch.setattr(eval_linear, "knn_predict", record)
    data = Data(torch.rand(39, 3, 1, 1), torch.arange(39) % 3)
    args = completed(baseline="random", epochs=0)
    eval_linear.judge_frozen(eval_linear.Pixels(), data, data, args, 0, 1)
    assert voting == [1, 13, 39]


@pytest.mark.parametrize("protocol", ["raw", "scaled"])
def test_probes_learn_a_separable_problem(protocol, monkeypatch):
    monkeypatch.setattr(eval_linear, "standardize", lambda images: images)
    train = separable_problem()
    encoder = eval_linear.Encoder(nn.Flatten(), amp=False)
    args = completed(baseline="random", protocol=protocol, rotation=0.0)
    results, _ = eval_linear.judge_frozen(encoder, train, train, args, 0, 1)
    assert results["linear"] == 100


def test_the_scaled_probe_standardises_features_of_unit_norm():
    """By mean and variance of the training images' features."""
    features = torch.rand(50, 3) * torch.tensor([1.0, 2.0, 5.0])
    unit = torch.stack([row / row.norm() for row in features])
    mean = sum(unit) / 50
    std = (sum((row - mean) ** 2 for row in unit) / 50 + 1e-5).sqrt()
    probe = eval_linear.LinearProbe(nn.Identity(), 3, 2, mean, std)
    expected = ((unit - mean) / std) @ probe.head.weight.T + probe.head.bias
    torch.testing.assert_close(probe(features), expected)


@pytest.mark.parametrize(
    "protocol, epochs, expected, settings",
    [
        ("raw", 10, [1.0] * 6 + [0.1] * 2 + [0.01] * 2, (0.9, True, 0.0)),  # 60 and 80 of 100
        ("scaled", 8, [1.0] * 3 + [0.1] * 3 + [0.01] * 2, (0.9, False, 1e-4)),  # 15 and 30 of 40
    ],
)
def test_the_learning_rate_falls_at_the_milestones(
    protocol, epochs, expected, settings, monkeypatch
):
    rates = []
    step = torch.optim.SGD.step

    def record(optimizer):
        group = optimizer.param_groups[0]
        rates.append(group["lr"])
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == settings
        return step(optimizer)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    args = completed(baseline="random", protocol=protocol, epochs=epochs, lr=1.0, batch_size=8)
    train = Data(torch.rand(8, 3, 1, 1), torch.zeros(8, dtype=torch.int64))
    probe = eval_linear.LinearProbe(eval_linear.Pixels(), 3, 2)
    eval_linear.fit(probe, train, torch.arange(8), eval_linear.PROTOCOLS[protocol], args, 0, 1)
    torch.testing.assert_close(rates, expected)


def test_a_probe_leaves_the_encoder_as_it_is(monkeypatch):
    monkeypatch.setattr(eval_linear, "standardize", lambda images: images)
    encoder = eval_linear.Encoder(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3)), amp=False)
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    args = completed(baseline="random", epochs=2, rotation=0.0)
    train = separable_problem()
    eval_linear.judge_frozen(encoder, train, train, args, 0, 1)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_fine_tuning_keeps_the_projector(monkeypatch):
    model = write_checkpoint()
    tensors = eval_linear.named_tensors(eval_linear.read_file("runs/a/last.pt"))
    projector = nn.Sequential(*eval_linear.load_projector(tensors, eval_linear.OWN, "")).eval()
    features = torch.randn(5, 512)
    assert torch.equal(projector(features), model.online[1].eval()(features))
    in_fc = {f"encoder_q.fc.{name}": x for name, x in model.online[1].state_dict().items()}
    other = nn.Sequential(*eval_linear.load_projector(in_fc, "encoder_q.", "")).eval()
    assert torch.equal(other(features), projector(features))

    tuned = []
    monkeypatch.setattr(eval_linear, "write", lambda *given: None)
    monkeypatch.setattr(eval_linear, "judge_fine_tuned", lambda *given: tuned.append(given[0]))
    evaluate(checkpoint="runs/a/last.pt", fine_tune=True)
    behind_the_encoder = tuned[0][1:].eval()
    assert torch.equal(behind_the_encoder(features), projector(features))


def test_fine_tuning_trains_all_weights(monkeypatch):
    monkeypatch.setattr(eval_linear, "standardize", lambda images: images)
    train = separable_problem()
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3, 8))
    projector = [nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)]
    network = nn.Sequential(eval_linear.Encoder(backbone, amp=False), *projector)
    before = [weight.clone() for weight in network.parameters()]
    args = completed(baseline="random", fine_tune=True, lr=0.02, batch_size=64, rotation=0.0)
    results = eval_linear.judge_fine_tuned(network, train, train, args, 0, 1)
    assert results == {"fine-tuned": 100}
    for old, new in zip(before, network.parameters()):
        assert not torch.equal(old, new)


def test_only_the_images_with_given_labels_vote():
    """The same images as in cmsf_semi.py."""
    found = evaluate(baseline="raw", epochs=0, labels="3pct", label_seed=1)
    args = dataclasses.replace(cmsf_semi.RECIPES["digits"], labels="3pct", label_seed=1)
    train, test = (cmsf_semi.ImageData(args, split, CPU) for split in (True, False))
    given = cmsf_semi.choose_labels(args, train)
    voters = (given >= 0).nonzero().squeeze(1)
    right = 0
    bank = F.normalize(train.images[voters].flatten(1).double(), dim=1)
    for image, label in zip(test.images.flatten(1).double(), test.labels):
        right += given[voters[(bank @ image).argmax()]] == label
    assert found["1-NN"] == pytest.approx(100 * right.item() / 360)


# ---- what it writes ----


def test_baselines_take_the_network_and_go_into_files_of_their_own(capsys):
    write_checkpoint(seed=5, arch="resnet18")
    for baseline in (None, "random", "raw"):
        evaluate(checkpoint="runs/a/last.pt", baseline=baseline, epochs=0)
    for name in ("eval", "eval-random", "eval-raw"):
        content = json.loads(Path(f"runs/a/{name}.json").read_text())
        assert set(content["top1"]) == {"1-NN", "20-NN", "200-NN"}
        assert content["args"]["arch"] == "resnet18"
        assert Path(f"runs/a/{name.replace('eval', 'neighbors')}.png").exists()
    raw = json.loads(Path("runs/a/eval-raw.json").read_text())["top1"]
    assert raw["1-NN"] == pytest.approx(95.28, abs=0.01)
    assert "1-NN  95.28%" in capsys.readouterr().out


def test_results_are_printed_where_nothing_can_be_written(monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refuse)
    evaluate(baseline="raw", epochs=0)
    printed = capsys.readouterr().out
    assert "1-NN  95.28%" in printed and "cannot write into runs/raw-digits-0: read-only" in printed


def test_the_picture_frames_right_neighbors_green_and_wrong_ones_red():
    train = Data(torch.zeros(3, 3, 8, 8), torch.tensor([0, 1, -1]))
    test = Data(torch.ones(1, 3, 8, 8), torch.tensor([1]))
    queries = torch.tensor([[1.0, 0.0]])
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])  # the nearest first
    every = torch.arange(3)
    shown = torch.tensor([0])
    picture = eval_linear.draw_neighbors(train, test, every, shown, features, queries)
    frames = [picture[:, 3, x] for x in (3, 77, 151, 225)]  # a tile has 72 pixels and 2 to the next
    red, green, gray = (color.tolist() for color in frames[1:])
    assert red[0] > red[1] and green[1] > green[0] and gray[0] == gray[1]
    assert picture[:, 36, 36].tolist() == [1, 1, 1] and picture[:, 36, 110].tolist() == [0, 0, 0]


def write_images(folder, count, offset=0, size=40):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(offset + i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{i}.png")


def test_images_without_labels_give_a_picture_of_neighbors():
    write_images("photos", 12)
    results = evaluate(baseline="random", dataset="small-folder", data_dir="photos")
    assert results == {}
    assert Path("runs/random-small-folder-0/neighbors-random.png").exists()


def test_two_processes_judge_as_one_does():
    """On seven test images, which two processes do not share evenly."""
    for label in range(2):
        write_images(f"d/train/{label}", 9, offset=100 * label)
        write_images(f"d/val/{label}", 4 - label, offset=1000 + 100 * label)
    write_checkpoint(dataset="small-folder", arch="resnet10", image_size=32, data_dir="d")
    alone = evaluate(checkpoint="runs/a/last.pt", epochs=0, num_workers=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [str(ROOT / "eval_linear.py"), "--checkpoint", "runs/a/last.pt"]
    command += ["--epochs", "2", "--num-workers", "0"]
    subprocess.run(command, check=True, capture_output=True)
    together = json.loads(Path("runs/a/eval.json").read_text())["top1"]
    assert set(together) == {"1-NN", "20-NN", "200-NN", "linear"}
    assert alone == {judge: together[judge] for judge in alone}


def test_a_resnet50_of_torchvision_judges_images_of_224_pixels():
    for label in range(2):
        write_images(f"d/train/{label}", 3, offset=100 * label, size=230)
        write_images(f"d/val/{label}", 2, offset=1000 + 100 * label, size=230)
    torch.save(torchvision.models.resnet50().state_dict(), "resnet50.pth")
    given = {"checkpoint": "resnet50.pth", "dataset": "folder", "data_dir": "d", "num_workers": 0}
    results = evaluate(epochs=1, **given)
    assert set(results) == {"1-NN", "20-NN", "200-NN", "linear"}
    fine_tuned = evaluate(epochs=1, fine_tune=True, **given)  # without a projector
    assert set(fine_tuned) == {"fine-tuned"}


def test_the_checkpoints_of_every_script_have_the_prefix():
    backbone, width = mnn.build_backbone("resnet10", "small-stride")
    models = [
        msf.MSF(backbone, width, 3, 8, 0.9),
        cmsf_semi.CMSF(backbone, width, torch.tensor([0, 1, -1]), 3, 8, 0.9, 0.85),
    ]
    for model in models:
        names = [f"model.{name}" for name in model.state_dict()]
        inside = [name.removeprefix(eval_linear.OWN) for name in names if eval_linear.OWN in name]
        assert inside == list(backbone.state_dict())
