"""eval_linear.py: the files that it reads, its judges against plain loops, and what it writes."""

import copy
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scripts import CPU, METHODS, data_of, labelled_pictures, picture, small_backbone, small_model
from torch import nn

import cmsf_semi
import eval_linear
import msf


def evaluate(**given):
    return eval_linear.main(eval_linear.Args(**given))


# ---- files


def resnet18():
    """With statistics that differ from those of a new network."""
    net = torchvision.models.resnet18(num_classes=7)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return net.eval()


def prefixed(prefix, net):
    return {prefix + name: tensor for name, tensor in net.state_dict().items()}


def numbered(prefix, net, left_out):
    """Children by their numbers, as in MNN's files."""
    children = [child for name, child in net.named_children() if name not in left_out]
    return prefixed(prefix, nn.Sequential(*children))


def load(path, **given):
    """Backbone, as main judges it, and projector of a file."""
    args = eval_linear.Args(**{"arch": "resnet18", "stem": "imagenet"} | given, checkpoint=path)
    backbone, projector, _ = eval_linear.load_encoder(args, eval_linear.read_file(path))
    return backbone.eval(), nn.Sequential(*projector).eval()


def test_files_of_every_layout_give_the_same_features():
    net = resnet18()
    other = resnet18()
    weights = net.state_dict()
    old_weights = {name: x for name, x in weights.items() if "num_batches" not in name}
    queries_and_targets = prefixed("encoder_q.module.", net) | prefixed("encoder_t.module.", other)
    optimizer = {"param_groups": [{"lr": np.float64(0.06)}], "state": {0: {"b": torch.ones(2)}}}
    layouts = {
        "torchvision": weights,
        "torchvision, without counters": old_weights,
        "MSF, CMSF": {"opt": Namespace(topk=5), "state_dict": queries_and_targets, "epoch": 7},
        "MNN": {"model": numbered("net.net.", net, ["fc"]), "optimizer": optimizer},
        "MNN without a max-pool": {"model": numbered("module.net.net.", net, ["fc", "maxpool"])},
        "DINO": {
            "student": prefixed("module.backbone.", other),
            "teacher": prefixed("backbone.", net),
        },
        "two, of which one is called backbone": prefixed("momentum_backbone._orig_mod.", other)
        | prefixed("backbone._orig_mod.", net),
        "another name": prefixed("trunk.deep.", net),
    }
    images = torch.randn(2, 3, 40, 40)
    net.fc = nn.Identity()
    expected = net(images)
    for name, content in layouts.items():
        torch.save(content, "file.pt")
        backbone, _ = load("file.pt")
        assert torch.equal(backbone(images), expected), name
    torch.save({"a": other.state_dict(), "b": weights}, "file.pt")
    backbone, _ = load("file.pt", prefix="b")
    assert torch.equal(backbone(images), expected)


def assert_refused(content, message, **given):
    torch.save(content, "file.pt")
    with pytest.raises(SystemExit, match=message):
        evaluate(checkpoint="file.pt", **given)


def test_what_does_not_fit_is_named():
    net = resnet18()
    weights = net.state_dict()
    incomplete = net.state_dict()
    del incomplete["layer3.1.bn2.weight"]
    deeper = torchvision.models.resnet34().state_dict()
    other_stem = weights | {"conv1.weight": torch.ones(64, 3, 3, 3)}
    two = prefixed("a.", net) | prefixed("b.", net)
    for content, message in [
        (incomplete, r"1 of 120 tensors do not fit, as \['layer3.1.bn2.weight'\]"),
        (deeper, "layer1.2.conv1.weight"),
        (other_stem, r"1 of 120 tensors do not fit, as \['conv1.weight'\]"),
        (weights | prefixed("module.", net), "holds some tensors twice"),
        (two, r"several ResNets, \['a.', 'b.'\]: choose one by --prefix"),
        ({"fc.weight": torch.ones(2, 2)}, "no ResNet among 1 tensors"),
    ]:
        assert_refused(content, message, dataset="imagenet", arch="resnet18")
    assert_refused(weights, "file.pt: give --dataset, one of digits")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_a_malicious_file_runs_nothing():
    content = {"state_dict": resnet18().state_dict(), "epoch": Malicious()}
    assert_refused(content, "file.pt is refused: it holds a .*system")
    assert not Path("was_run").exists()


def test_what_is_no_checkpoint_is_answered_by_one_line():
    Path("empty").write_bytes(b"")
    Path("text").write_bytes(b"no weights here\n")
    for name in ("empty", "text", "missing"):
        with pytest.raises(SystemExit, match=name) as error:
            evaluate(checkpoint=name, dataset="digits")
        assert "\n" not in str(error.value)


# ---- arguments, and checkpoints of the scripts


def completed(run=None, **given):
    return eval_linear.complete_args(eval_linear.Args(**given), run or {})


def test_a_run_brings_its_data_network_and_labels():
    changes = {"stem": "small", "rotation": 3.0, "data_dir": "d", "label_seed": 3}
    run = vars(replace(cmsf_semi.RECIPES["folder"], **changes))
    args = completed(run, checkpoint="last.pt")
    assert (args.dataset, args.data_dir, args.label_seed) == ("folder", "d", 3)
    assert (args.arch, args.stem, args.image_size, args.rotation) == ("resnet50", "small", 224, 3.0)
    changed = completed(run, checkpoint="last.pt", image_size=64, label_seed=4)
    assert (changed.image_size, changed.label_seed) == (64, 4)
    other_data = completed(run, checkpoint="last.pt", dataset="cifar10")
    assert (other_data.stem, other_data.image_size, other_data.data_dir) == ("small", 32, "data")
    assert completed(vars(replace(msf.RECIPES["digits"], image_size=24))).image_size == 24
    assert completed(vars(msf.RECIPES["stl10"])).image_size == 96  # trained at 64


@pytest.mark.parametrize("dataset", eval_linear.RECIPES)
def test_protocols(dataset):
    """lr 30 only where it was published."""
    is_raw = dataset in ("cifar10", "cifar100", "stl10", "tinyimagenet")
    expected = ("raw", 30, 100) if is_raw else ("scaled", 0.01, 40)
    args = completed(baseline="random", dataset=dataset)
    assert (args.protocol, args.lr, args.epochs) == expected
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
        ({"baseline": "raw", "fine_tune": True}, "no weights to --fine-tune"),
        ({"baseline": "random", "fine_tune": True, "epochs": 0}, "--epochs must be at least 1"),
        ({"baseline": "raw", "lr": math.nan}, "--lr must be above 0"),
        ({"baseline": "random", "fine_tune": True, "batch_size": 1}, "a step needs 2 or more"),
        ({"baseline": "raw", "lr": 1e38, "epochs": 2}, "the loss is not finite in epoch"),
    ],
)
def test_arguments_that_cannot_work_are_refused(given, message):
    with pytest.raises(SystemExit, match=message):
        evaluate(**given)


@pytest.mark.parametrize("script", METHODS)
def test_fine_tuning_begins_with_encoder_and_projector_of_the_run(script, monkeypatch):
    model = small_model(script)
    run = {"model": model.state_dict(), "args": vars(script.RECIPES["digits"])}
    torch.save(run | {"pushed": 0, "step": 7}, "last.pt")
    networks = []

    def no_training(network, *_):
        networks.append(network.eval())
        return {}

    monkeypatch.setattr(eval_linear, "build_backbone", small_backbone)
    monkeypatch.setattr(eval_linear, "judge_fine_tuned", no_training)
    evaluate(checkpoint="last.pt", fine_tune=True)
    images = torch.rand(5, 3, 16, 16)
    expected = model.online.eval()(msf.standardize(images))
    torch.testing.assert_close(networks[0](images), expected)


def test_fine_tuning_keeps_the_projector_in_the_files_of_msf():
    backbone = resnet18()
    backbone.fc = small_model(msf).online[1]
    torch.save(prefixed("encoder_q.", backbone), "file.pt")
    _, projector = load("file.pt", fine_tune=True)
    features = torch.randn(5, 32)
    assert torch.equal(projector(features), backbone.fc.eval()(features))


# ---- judges


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


def test_of_20_no_more_vote_than_a_class_has_and_of_200_the_similar_count_more():
    images = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    images[:2, 0] = 255  # two red ones against four black ones
    train = data_of(images, [0, 0, 1, 1, 1, 1])
    args = completed(baseline="raw", epochs=0)
    test = data_of(images[:1], [0])
    results, _ = eval_linear.judge_frozen(eval_linear.Pixels(), train, test, args, 0, 1)
    assert results == {"1-NN": 100, "20-NN": 100, "200-NN": 100}


def test_only_the_images_with_given_labels_vote():
    """The same images as in cmsf_semi.py."""
    found = evaluate(baseline="raw", epochs=0, labels="3pct", label_seed=1)
    args = replace(cmsf_semi.RECIPES["digits"], labels="3pct", label_seed=1)
    train, test = (cmsf_semi.ImageData(args, split, CPU) for split in (True, False))
    given = cmsf_semi.choose_labels(args, train)
    voters = (given >= 0).nonzero().squeeze(1)
    bank = F.normalize(train.images[voters].flatten(1).double(), dim=1)
    nearest = (test.images.flatten(1).double() @ bank.T).argmax(dim=1)
    right = train.labels[voters[nearest]] == test.labels
    assert found["1-NN"] == pytest.approx(100 * right.double().mean().item())


def images_of_four_colors():
    colors = torch.tensor([[25, 1, 1], [1, 25, 1], [1, 1, 25], [25, 25, 1]])
    labels = torch.arange(4).repeat(64)
    brightness = torch.randint(5, 11, (256, 1))
    images = (colors[labels] * brightness).byte().view(256, 3, 1, 1).expand(-1, -1, 16, 16)
    return data_of(images, labels)


def test_a_probe_learns_and_leaves_the_encoder_as_it_is():
    layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3)]
    encoder = eval_linear.Encoder(nn.Sequential(*layers), amp=False)
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    args = completed(baseline="random", rotation=0.0)
    data = images_of_four_colors()
    results, _ = eval_linear.judge_frozen(encoder, data, data, args, 0, 1)
    assert results["linear"] == 100
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_fine_tuning_trains_all_weights():
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8))
    projector = [nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)]
    network = nn.Sequential(eval_linear.Encoder(backbone, amp=False), *projector)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    args = completed(baseline="random", fine_tune=True, lr=0.02, batch_size=64, rotation=0.0)
    data = images_of_four_colors()
    results = eval_linear.judge_fine_tuned(network, data, data, args, 0, 1)
    assert results == {"fine-tuned": 100}
    for name, tensor in network.state_dict().items():  # BatchNorm's statistics, too
        assert not torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "protocol, rates, nesterov, weight_decay",
    [
        ("raw", [1.0] * 6 + [0.1] * 2 + [0.01] * 2, True, 0.0),  # 60 and 80 of 100 epochs
        ("scaled", [1.0] * 3 + [0.1] * 3 + [0.01] * 2, False, 1e-4),  # 15 and 30 of 40
    ],
)
def test_a_probe_is_trained_as_published(protocol, rates, nesterov, weight_decay):
    """The scaled one on standardised features of unit norm."""
    args = completed(baseline="random", protocol=protocol, epochs=len(rates), lr=1, rotation=0.0)
    data = images_of_four_colors()
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    features = encoder(data.images / 255)
    mean = None
    std = None
    if protocol == "scaled":
        features = torch.stack([row / row.norm() for row in features])
        mean = features.mean(dim=0)
        std = features.std(dim=0)
        features = (features - mean) / std
    probe = eval_linear.LinearProbe(encoder, 3, 4, mean, std)
    expected = copy.deepcopy(probe.head)
    every = torch.arange(256)
    eval_linear.fit(probe, data, every, eval_linear.PROTOCOLS[protocol], args, 0, 1)

    settings = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizer = torch.optim.SGD(expected.parameters(), **settings)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(expected(features), data.labels).backward()
        optimizer.step()
    torch.testing.assert_close(probe.head.state_dict(), expected.state_dict())


# ---- what it writes


def test_baselines_take_the_network_and_go_into_files_of_their_own(capsys):
    changes = {"stem": "small-pool", "epochs": 1, "warmup_epochs": 0.5, "run_name": "a"}
    run = msf.main(replace(msf.RECIPES["digits"], **changes))
    for baseline in (None, "random", "raw"):
        evaluate(checkpoint="runs/a/last.pt", baseline=baseline, epochs=0)
    top1 = {}
    for name in ("eval", "eval-random", "eval-raw"):
        content = json.loads(Path(f"runs/a/{name}.json").read_text())
        assert content["args"]["stem"] == "small-pool" and content["step"] == 22
        assert Path(f"runs/a/{name.replace('eval', 'neighbors')}.png").exists()
        top1[name] = content["top1"]
    assert top1["eval"]["20-NN"] == pytest.approx(run["knn"]) != top1["eval-random"]["20-NN"]
    assert top1["eval-raw"]["1-NN"] == pytest.approx(95.28, abs=0.01)
    assert "1-NN  95.28%" in capsys.readouterr().out


def test_results_are_printed_where_nothing_can_be_written(capsys):
    Path("runs").write_text("no folder")
    evaluate(baseline="raw", epochs=0)
    printed = capsys.readouterr().out
    assert "1-NN  95.28%" in printed and "cannot write into runs/raw-digits-0" in printed


def test_the_picture_frames_right_neighbors_green_and_wrong_ones_red():
    train = data_of(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [-1, 0, 1, -1])
    test = data_of(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), [1])
    queries = torch.tensor([[1.0, 0.0]])
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])  # the nearest first
    voters = torch.tensor([1, 2, 3])
    shown = torch.tensor([0])
    result = eval_linear.draw_neighbors(train, test, voters, shown, features, queries)
    frames = [result[:, 3, x] for x in (3, 77, 151, 225)]  # a tile has 72 pixels and 2 to the next
    red, green, gray = (color.tolist() for color in frames[1:])
    assert red[0] > red[1] and green[1] > green[0] and gray[0] == gray[1]
    assert result[:, 36, 36].tolist() == [1, 1, 1] and result[:, 36, 110].tolist() == [0, 0, 0]


def test_images_without_labels_are_shown_as_their_own_first_neighbors():
    for i in range(12):
        picture(f"photos/{i}.png", color=(20 * i, 100, 200 - 15 * i))
    results = evaluate(baseline="random", dataset="small-folder", data_dir="photos", num_workers=0)
    assert results == {}
    shown = np.asarray(Image.open("runs/random-small-folder-0/neighbors-random.png"))
    middles = shown[38::74]  # of each line of pictures
    assert len(middles) == 12 and np.array_equal(middles[:, 38], middles[:, 38 + 74])


def test_two_processes_judge_as_one_does():
    """On more training images than both take at once, and not a multiple of that."""
    alone = evaluate(baseline="random", labels="50pct", epochs=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [eval_linear.__file__, "--baseline", "random", "--labels", "50pct"]
    subprocess.run([*command, "--epochs", "2"], check=True, capture_output=True)
    content = json.loads(Path("runs/random-digits-0/eval-random.json").read_text())
    together = content["top1"]
    assert together.pop("linear") > 50
    assert together == alone


def test_a_resnet50_of_torchvision_judges_images_of_224_pixels():
    labelled_pictures("d", each=2, side=230)
    torch.save(torchvision.models.resnet50().state_dict(), "resnet50.pth")
    given = {"checkpoint": "resnet50.pth", "dataset": "folder", "data_dir": "d", "num_workers": 0}
    results = evaluate(epochs=1, **given)
    assert set(results) == {"1-NN", "20-NN", "200-NN", "linear"} and results["1-NN"] == 100
    fine_tuned = evaluate(epochs=1, fine_tune=True, **given)  # without a projector
    assert set(fine_tuned) == {"fine-tuned"}


def test_images_in_memory_are_judged_at_the_given_size():
    data = data_of(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), [0] * 3)
    data.args = replace(data.args, image_size=8)
    found = eval_linear.outputs(eval_linear.Pixels(), data, torch.arange(3), 0, 1)
    assert found.shape == (3, 3 * 8 * 8)
