"""eval_linear.py: every kind of file, its judges against loops, checkpoints of all, refusals."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import eval_linear
import msf

from .conftest import data, write_folder


def torchvision_net(arch="resnet18", classes=7):
    """With statistics that differ from those of a new network."""
    net = getattr(torchvision.models, arch)(num_classes=classes)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
            norm.num_batches_tracked.fill_(3)
    return net.eval()


def numbered(net, start="net.net.", pooling=True):
    """The names that MNN's authors give: children by number, with or without the max-pool."""
    children = [name for name, _ in net.named_children() if name != "fc" and (pooling or name != "maxpool")]
    state = {}
    for name, tensor in net.state_dict().items():
        child, _, rest = name.partition(".")
        if child in children:
            state[f"{start}{children.index(child)}.{rest}"] = tensor
    return state


def with_prefix(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def load(path, prefix=None, arch="resnet18"):
    net, _ = eval_linear.encoder(arch, "imagenet")
    weights, *_ = eval_linear.read_weights(path)
    count, _ = eval_linear.load_backbone(net, weights, prefix, path)
    assert count == len([name for name in net.state_dict() if "num_batches" not in name])
    return net.eval()


FORMATS = {
    "plain": lambda net, other: net.state_dict(),
    "under state_dict": lambda net, other: {"state_dict": net.state_dict(), "epoch": 3},
    "under model": lambda net, other: {"model": net.state_dict(), "opt": {"lr": 0.1}},
    "of DDP": lambda net, other: {"state_dict": with_prefix(net.state_dict(), "module.")},
    "compiled": lambda net, other: with_prefix(net.state_dict(), "_orig_mod."),
    "without counters": lambda net, other: {
        k: v for k, v in net.state_dict().items() if "num_batches" not in k
    },
    "MoCo": lambda net, other: {
        "state_dict": with_prefix(net.state_dict(), "module.encoder_q.")
        | with_prefix(other.state_dict(), "module.encoder_k.")
        | {"module.queue": torch.randn(8, 4)}
    },
    "MoCo under model": lambda net, other: {
        "model": with_prefix(other.state_dict(), "module.encoder_k.")
        | with_prefix(net.state_dict(), "module.encoder_q.")
    },
    "MNN": lambda net, other: {"state_dict": numbered(net) | numbered(other, "target.net.")},
    "MNN without pool": lambda net, other: {"model": numbered(net, "module.net.net.", pooling=False)},
    "another name": lambda net, other: with_prefix(net.state_dict(), "trunk.deep."),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_features(kind):
    net, images = torchvision_net(), torch.randn(3, 3, 40, 40)
    torch.save(FORMATS[kind](net, torchvision_net()), "file.pt")
    loaded, net.fc = load("file.pt"), nn.Identity()
    assert torch.equal(loaded(images), net(images))


def test_a_prefix_chooses_among_networks():
    a, b, images = torchvision_net(), torchvision_net(), torch.randn(2, 3, 40, 40)
    torch.save(with_prefix(a.state_dict(), "a.") | with_prefix(b.state_dict(), "b."), "two.pt")
    with pytest.raises(SystemExit, match=r"the networks \['a.', 'b.'\]: choose --prefix"):
        load("two.pt")
    b.fc = nn.Identity()
    assert torch.equal(load("two.pt", "b.")(images), b(images))
    with pytest.raises(SystemExit, match="--prefix"):
        load("two.pt", "c.")


def own_checkpoint(**given):
    args = dataclasses.replace(msf.RECIPES["digits"], **given)
    backbone, width = msf.build_backbone(args.arch, args.stem)
    model = msf.MSF(backbone, width, args.topk, args.bank_size, args.ema)
    Path("runs/a").mkdir(parents=True)
    state = dict(step=7, pushed=0, args=vars(args), model=model.state_dict())
    torch.save(state, "runs/a/last.pt")
    return model


def judge(**given):
    return eval_linear.main(eval_linear.Args(**given))


def test_our_checkpoint_brings_data_and_network_which_can_be_given():
    model = own_checkpoint(arch="resnet10", stem="small", data_dir="elsewhere", rotation=3)
    args, weights, step = eval_linear.complete(eval_linear.Args("runs/a/last.pt"))
    assert (args.dataset, args.arch, args.stem, args.rotation) == ("digits", "resnet10", "small", 3)
    assert args.data_dir == "elsewhere" and step == 7 and args.epochs == 40 and args.lr is None
    net, _ = eval_linear.encoder("resnet10", "small")
    assert eval_linear.load_backbone(net, weights, None, "")[1] == "online.1."
    for name, tensor in model.online[0].state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor)
    args, *_ = eval_linear.complete(eval_linear.Args("runs/a/last.pt", dataset="cifar10", data_dir="d"))
    assert (args.arch, args.stem, args.image_size, args.flip) == ("resnet10", "small", 32, 0.5)
    assert (args.data_dir, args.protocol, args.epochs, args.rotation) == ("d", "raw", 100, 0)


def test_a_file_from_elsewhere_must_be_told_its_data():
    torch.save(torchvision_net().state_dict(), "net.pth")
    with pytest.raises(SystemExit, match="give --dataset, of digits, cifar10"):
        judge(checkpoint="net.pth")


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def broken_files():
    net = torchvision_net()
    torch.save({"state_dict": net.state_dict(), "x": Evil()}, "evil.pt")
    torch.save({"state_dict": net.state_dict(), "args": eval_linear.Args()}, "object.pt")
    torch.save(net.state_dict(), "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:100_000])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("no weights here\n")
    Path("folder.pt").mkdir()
    torch.save({}, "nothing.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"state_dict": 5}, "five.pt")
    torch.save({"fc.weight": torch.ones(2, 2)}, "layer.pt")
    torch.save({k: v for k, v in net.state_dict().items() if k != "layer3.1.bn2.weight"}, "hole.pt")
    torch.save({k: v.to(torch.int8) for k, v in net.state_dict().items()}, "integers.pt")
    twice = net.state_dict() | with_prefix(net.state_dict(), "module.")
    torch.save(twice, "twice.pt")
    torch.save({"pushed": 0, "state_dict": {"fc.weight": torch.ones(2, 2)}}, "half.pt")
    torch.save({k: v * math.nan for k, v in net.state_dict().items() if v.ndim}, "nan.pt")
    torch.save(torchvision_net("resnet34").state_dict(), "deep.pt")


REFUSED = {
    "evil.pt": "refused.*nsupported (?i:global).*system",
    "object.pt": "refused.*nsupported (?i:global).*Args",
    "cut.pt": "cut.pt",
    "empty.pt": "empty.pt",
    "text.pt": "text.pt is refused: it is damaged",
    "folder.pt": "folder.pt is no checkpoint",
    "missing.pt": "missing.pt is no checkpoint",
    "nothing.pt": "nothing.pt holds no weights",
    "list.pt": "list.pt holds no weights",
    "five.pt": "five.pt holds no weights",
    "integers.pt": r"has 0 of this network's 100 tensors, not \['conv1.weight'",
    "twice.pt": "some names twice",
    "half.pt": "no ResNet among its 1 tensors",
    "nan.pt": "features are not finite",
    "layer.pt": "no ResNet among its 1 tensors",
    "hole.pt": r"has 99 of this network's 100 tensors, not \['layer3.1.bn2.weight'\]; 0 others",
    "deep.pt": r"has 100 of this network's 100 tensors, not \[\]; \d+ others \['layer1.2.conv1.weight'",
}


def test_what_cannot_be_judged_is_refused_in_one_line():
    broken_files()
    before = sorted(os.listdir())
    for name, message in REFUSED.items():
        with pytest.raises(SystemExit, match=message) as error:
            judge(checkpoint=name, dataset="digits", arch="resnet18", stem="imagenet")
        assert str(error.value).startswith("error: ") and len(str(error.value).splitlines()) == 1
    for wrong in dict(stem="small"), dict(arch="resnet50"), dict(arch="resnet10"):
        given = dict(dataset="digits", arch="resnet18", stem="imagenet") | wrong
        with pytest.raises(SystemExit, match="another --arch or --stem"):
            judge(checkpoint="whole.pt", **given)
    assert sorted(os.listdir()) == before  # "ran" is not there: no code was run


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(), "give --checkpoint or --baseline"),
        (dict(checkpoint="a.pt", baseline="raw"), "give --checkpoint or --baseline"),
        (dict(baseline="raw", dataset="digit"), "unknown --dataset digit: one of digits, "),
        (dict(baseline="raw", epochs=-1), "--epochs -1: need 0 to"),
        (dict(baseline="random", fine_tune=True, epochs=0), "1 to fine-tune"),
        (dict(baseline="raw", fine_tune=True), "no weights to --fine-tune"),
        (dict(baseline="raw", batch_size=0), "--batch-size"),
        (dict(baseline="raw", image_size=-3), "--image-size"),
        (dict(baseline="raw", lr=float("nan")), "--lr nan"),
        (dict(baseline="raw", labels="0pct"), "--labels: 1pct to 100pct"),
        (dict(baseline="random", dataset="folder", data_dir="x"), "no folder in "),
    ],
)
def test_arguments_that_cannot_work_are_refused_in_one_line(given, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        judge(**given)


@pytest.mark.parametrize("protocol", ["scaled", "raw"])
def test_linear_probe_equals_its_definition(protocol):
    """SGD with momentum, weight decay, Nesterov and steps of lr written out, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        features, labels = torch.rand(60, 5) * torch.arange(5), torch.randint(0, 4, (60,))
        queries, epochs = torch.rand(300, 5) * torch.arange(5) + 0.01, 8  # the first is dead in training
        orders = [torch.randperm(60).split(25) for _ in range(epochs)]
        lr = 0.5 if protocol == "raw" else 0.3
        args, *_ = eval_linear.complete(
            eval_linear.Args(baseline="raw", protocol=protocol, epochs=epochs, lr=lr, seed=5)
        )
        def batches(epoch):
            return ((features[i], labels[i]) for i in orders[epoch])
        found = eval_linear.linear_probe(batches, features, queries, 4, args)

        def scale(rows):
            if protocol == "raw":
                return rows
            unit = torch.stack([row / row.norm() for row in features])
            mean = sum(unit) / 60
            variance = sum((row - mean) ** 2 for row in unit) / 60
            return torch.stack([(row / row.norm() - mean) / (variance + 1e-5).sqrt() for row in rows])

        torch.manual_seed(5)
        head = nn.Linear(5, 4)
        nn.init.normal_(head.weight, std=0.01)
        w, b = head.weight.data.clone(), torch.zeros(4)
        speed = [torch.zeros_like(w), torch.zeros_like(b)]
        for epoch in range(epochs):
            drops = (5, 6) if protocol == "raw" else (3, 6)  # 0.6, 0.8 and 0.375, 0.75 of 8
            rate = lr * 0.1 ** sum(epoch >= drop for drop in drops)
            for batch in orders[epoch]:
                x, y = scale(features[batch]), labels[batch]
                residual = ((x @ w.T + b).softmax(1) - F.one_hot(y, 4)) / len(y)
                gradients = [residual.T @ x, residual.sum(0)]
                for weight, gradient, v in zip((w, b), gradients, speed):
                    if protocol == "scaled":
                        gradient = gradient + 1e-4 * weight
                    v.mul_(0.9).add_(gradient)
                    weight -= rate * (gradient + 0.9 * v if protocol == "raw" else v)
        expected = scale(queries) @ w.T + b
        assert torch.equal(found, expected.argmax(1)) and len(found.unique()) > 1
        if protocol == "scaled":  # which matters
            assert not torch.equal(found, (queries @ w.T + b).argmax(1))
    finally:
        torch.set_default_dtype(torch.float32)


PROTOCOLS = [
    (dict(baseline="random"), dict(lr=0.01, weight_decay=1e-4), 40, (0.375, 0.75)),
    (dict(baseline="random", protocol="raw"), dict(lr=30, nesterov=True), 100, (0.6, 0.8)),
    (dict(baseline="random", fine_tune=True), dict(lr=0.001, weight_decay=1e-4), 20, (0.75,)),
    (dict(baseline="random", lr=0.5), dict(lr=0.5, weight_decay=1e-4), 40, (0.375, 0.75)),
]


@pytest.mark.parametrize("given, options, epochs, milestones", PROTOCOLS)
def test_the_published_protocols(given, options, epochs, milestones, monkeypatch):
    """What reaches train_epochs, and that images come cropped and turned."""
    seen, views, augment = [], [], eval_linear.augment

    def record(batches, network, parameters, marks, args, **how):
        next(iter(batches(0)))
        seen.append((how, args.epochs, marks, sum(p.numel() for p in parameters)))

    monkeypatch.setattr(eval_linear, "train_epochs", record)
    monkeypatch.setattr(eval_linear, "augment", lambda *x, **view: views.append(view) or augment(*x, **view))
    judge(labels="2pct", **given)
    assert seen == [(options, epochs, milestones, seen[0][3])]
    width = sum(p.numel() for p in eval_linear.encoder("resnet10", "small-stride")[0].parameters())
    assert seen[0][3] == 512 * 10 + 10 + ("fine_tune" in given) * width
    assert dict(scale=(0.6, 1), flip=0, rotation=10) in views


def test_learning_rate_falls_at_the_milestones():
    args, *_ = eval_linear.complete(eval_linear.Args(baseline="raw", epochs=8))
    weight, rates = torch.zeros(3, 2, requires_grad=True), []
    def batches(epoch):
        yield torch.eye(2), torch.tensor([0, 1])
    def network(x):
        rates.append(weight.detach().clone())
        return x @ weight.T
    eval_linear.train_epochs(batches, network, [weight], (0.375, 0.75), args, lr=0.1)
    speed, expected = torch.zeros(3, 2), torch.zeros(3, 2)
    for epoch, found in enumerate(rates):
        torch.testing.assert_close(found, expected)
        gradient = (expected.T.softmax(1) - torch.eye(2, 3)).T / 2
        speed = 0.9 * speed + gradient
        expected = expected - 0.1 * 0.1 ** sum(epoch >= mark for mark in (3, 6)) * speed


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(SystemExit, match="^error: loss .* in epoch .*--lr"):
        judge(baseline="random", lr=1e38, labels="2pct", epochs=4)


def test_knn_of_raw_pixels():
    """On digits, methods.md's figure for 1-NN; with a share of the labels, against loops."""
    assert judge(baseline="raw", epochs=0)["1-NN"] == pytest.approx(95.28, abs=0.01)
    few = judge(baseline="raw", epochs=0, labels="3pct")
    cpu = torch.device("cpu")
    train, test = (msf.ImageData(msf.RECIPES["digits"], split, cpu) for split in (True, False))
    train.classes = list(range(10))
    given = eval_linear.given_labels("3pct", 0, train)
    rows = (given >= 0).nonzero()[:, 0].tolist()
    pixels, queries = ((x.images.flatten(1) / 255.0).double() for x in (train, test))
    right = 0
    for query, label in zip(queries, test.labels.tolist()):
        cosines = F.cosine_similarity(query[None], pixels[rows]).tolist()
        right += train.labels[rows[cosines.index(max(cosines))]].item() == label
    assert few["1-NN"] == pytest.approx(100 * right / len(queries), abs=1e-3)
    record = json.loads(Path("runs/raw-digits-0/eval-3pct.json").read_text())
    assert record["top1"] == few and record["labelled"] == len(rows) and record["test"] == 360
    assert Path("runs/raw-digits-0/eval.json").exists()
    few = judge(baseline="raw", epochs=0, labels="1pct")  # an image a class: more votes would tie
    assert few["20-NN"] == few["1-NN"] > 60


def test_fine_tuning_keeps_the_projector_and_trains_everything(capsys, monkeypatch, few_digits):
    model, features = own_checkpoint(), torch.randn(9, 512)
    weights, *_ = eval_linear.read_weights("runs/a/last.pt")
    projector = nn.Sequential(*eval_linear.read_projector(weights, "online.1.")).eval()
    assert torch.equal(projector(features), model.online[1].eval()(features))

    seen, train_epochs = [], eval_linear.train_epochs

    def record(batches, network, *rest, **options):
        seen.append(network)
        return train_epochs(batches, network, *rest, **options)

    monkeypatch.setattr(eval_linear, "train_epochs", record)
    given = dict(checkpoint="runs/a/last.pt", fine_tune=True, labels="50pct", epochs=2)
    result = judge(lr=0.05, batch_size=16, **given)
    (net,) = seen
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.Linear]
    assert [type(part) for part in net[1:]] == kinds
    for before, after in ((model.online[0], net[0]), (model.online[1], net[1:5])):
        for a, b in zip(before.parameters(), after.parameters()):
            assert not torch.equal(a, b)  # all are trained
    assert set(result) == {"fine-tuned"} and 0 <= result["fine-tuned"] <= 100
    assert "no projector" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="BatchNorm needs 2 images"):
        judge(batch_size=1, **given)
    record = json.loads(Path("runs/a/eval-50pct-fine-tuned.json").read_text())
    assert record["top1"] == result and 50 < record["labelled"] < 80


def test_features_are_cached_and_made_anew_for_other_weights(monkeypatch, few_digits):
    own_checkpoint()
    given = dict(checkpoint="runs/a/last.pt", cache_features=True, epochs=2)
    first = judge(**given)
    original = eval_linear.passes
    monkeypatch.setattr(eval_linear, "passes", lambda *_: pytest.fail("the cache is not used"))
    assert judge(**given) == first
    monkeypatch.setattr(eval_linear, "passes", original)
    wider = judge(**given, stem="small")  # the same tensors, other strides
    assert wider == judge(checkpoint="runs/a/last.pt", stem="small", epochs=0) | wider


def test_a_checkpoint_of_msf_is_judged(few_digits, capsys):
    """On digits, and on files, which have a recipe of their own; and fine-tuned with its projector."""
    assert msf.RECIPES.keys() == eval_linear.RECIPES.keys()
    args = dataclasses.replace(msf.RECIPES["digits"], run_name="a", epochs=1, batch_size=32)
    trained = msf.main(args)
    result = judge(checkpoint=trained["checkpoint"], epochs=1)
    assert list(result) == ["1-NN", "20-NN", "200-NN", "linear"]
    assert result["20-NN"] == pytest.approx(trained["knn"], abs=0.3)

    write_folder("d")
    given = dict(run_name="b", data_dir="d", arch="resnet10", stem="small-stride", epochs=1)
    given |= dict(image_size=32, batch_size=8, bank_size=16, num_workers=0)
    trained = msf.main(dataclasses.replace(msf.RECIPES["small-folder"], **given))
    args, *_ = eval_linear.complete(eval_linear.Args(trained["checkpoint"]))
    assert (args.dataset, args.image_size, args.stem) == ("small-folder", 32, "small-stride")
    judge(checkpoint=trained["checkpoint"], epochs=1, num_workers=0)
    result = judge(checkpoint=trained["checkpoint"], epochs=1, num_workers=0, fine_tune=True)
    assert 0 <= result["fine-tuned"] <= 100 and "no projector" not in capsys.readouterr().out


@pytest.mark.parametrize("k, temperature", [(1, None), (4, None), (30, None), (7, 0.1)])
def test_knn_predict_equals_loops(k, temperature):
    queries, features = torch.randn(20, 5).double(), torch.randn(30, 5).double()
    features[10:20] = features[:10]  # ties between rows, of other classes
    labels = torch.randint(0, 4, (30,))
    labels[10:20] = labels[:10]
    predicted = eval_linear.knn_predict(queries, features, labels, k, 6, temperature)
    for query, answer in zip(queries, predicted):
        cosines = torch.cosine_similarity(query[None], features).tolist()
        votes = [0.0] * 6
        for cosine, label in sorted(zip(cosines, labels.tolist()), reverse=True)[:k]:
            votes[label] += math.exp(cosine / temperature) if temperature else 1
        assert answer == votes.index(max(votes))  # the lower class wins a tie
