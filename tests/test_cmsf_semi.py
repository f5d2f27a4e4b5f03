"""Constrained mean shift with labels: the rule in loops, what may and may not be known, and runs."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import as_torchrun, check_pictures, first_of_twelve, stop_at
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faults import TINY, data, write_folder
from test_method import slow_loss, slow_neighbors, unit
from test_runs import assert_same_state, load

import cmsf_semi
import msf


def slow_same_label(target, label, bank, bank_labels, k):
    """All rows of the label (or all rows), sorted by distance: at most k."""
    rows = [j for j in range(len(bank)) if label < 0 or bank_labels[j] == label]
    return sorted(rows, key=lambda j: ((target - bank[j]) ** 2).sum().item())[:k]


@pytest.mark.parametrize("k", [1, 4, 10])
def test_same_label_neighbours_equal_loops(k):
    """Classes with 0, 1, k - 1, k and more rows, rows without label, images without label."""
    counts = {0: 0, 1: 1, 2: k - 1, 3: k, 4: k + 7, -1: 12}
    bank_labels = torch.tensor([c for c, count in counts.items() for _ in range(count)])
    bank_labels = bank_labels[torch.randperm(len(bank_labels))]
    targets, bank = unit(18, 8), unit(len(bank_labels), 8)
    labels = torch.tensor([0, 1, 2, 3, 4, -1] * 3)
    indices, valid = cmsf_semi.same_label_neighbors(targets, labels, bank, bank_labels, k)
    assert indices.shape == valid.shape == (18, k) and valid.dtype == torch.bool
    assert 0 <= indices.min() and indices.max() < len(bank)
    for i, label in enumerate(labels.tolist()):
        expected = slow_same_label(targets[i], label, bank, bank_labels, k)
        assert indices[i][valid[i]].tolist() == expected
        assert valid[i].tolist() == [j < len(expected) for j in range(k)]
        if label >= 0:
            assert (bank_labels[indices[i][valid[i]]] == label).all()


def test_same_label_neighbours_among_ties():
    bank, bank_labels = unit(4, 6).repeat(6, 1), torch.arange(24) % 3
    targets, labels = bank[:4].clone(), torch.tensor([0, 1, 2, 0])
    indices, valid = cmsf_semi.same_label_neighbors(targets, labels, bank, bank_labels, 5)
    assert valid.all() and all(len(set(row)) == 5 for row in indices.tolist())
    assert (bank_labels[indices] == labels[:, None]).all()
    assert (indices[:, :2] % 4 == torch.arange(4)[:, None]).all()  # its two equal rows of its label


def test_more_neighbours_than_rows_is_an_error():
    with pytest.raises(ValueError, match="k = 4 .* 3 rows"):
        labels = torch.zeros(3).long()
        cmsf_semi.same_label_neighbors(unit(2, 5), labels[:2], unit(3, 5), labels, 4)


@pytest.mark.parametrize("share", [1, 10, 37, 100])
def test_a_share_is_balanced_and_repeats_with_its_seed(share):
    train = data()
    truth = train.labels
    first, again, other = (cmsf_semi.given_labels(f"{share}pct", seed, train) for seed in (0, 0, 1))
    assert torch.equal(first, again) and (share == 100 or not torch.equal(first, other))
    assert (first == truth).logical_or(first == -1).all()
    for c in range(10):
        expected = max(1, round((truth == c).sum().item() * share / 100))
        assert (first == c).sum() == (other == c).sum() == expected


def test_a_class_of_one_image_keeps_it_and_unknown_labels_are_not_given():
    train = data()
    train.labels = torch.tensor([0] * 50 + [1] + [-1] * 20)
    train.classes = ["a", "b"]
    given = cmsf_semi.given_labels("10pct", 0, train)
    assert given[50] == 1 and (given == 0).sum() == 5 and (given >= 0).sum() == 6


def test_a_list_of_file_names():
    write_folder("d")
    train = data(image_size=32, **TINY)
    for i, file in enumerate(train.files):  # names of their own, as ImageNet's are
        Path(file).rename(Path(file).with_name(f"n{i}{Path(file).suffix}"))
    train = data(image_size=32, **TINY)
    names = [Path(file).name for file in train.files]
    Path("list.txt").write_text(f"{names[3]}\n\n{names[0]} \r\n{names[12]}\n")
    given = cmsf_semi.given_labels("list.txt", 0, train)
    assert {i: label for i, label in enumerate(given.tolist()) if label >= 0} == {0: 0, 3: 0, 12: 1}
    Path("list.txt").write_text("\n".join(["x.png", names[0], "../n0.png", "y.png", "z.png"]))
    with pytest.raises(SystemExit, match=r"list.txt: 4 names are not in the data.*x.png.*n0.png.*y.png"):
        cmsf_semi.given_labels("list.txt", 0, train)
    Path("list.txt").write_text("")
    with pytest.raises(SystemExit, match=r"list.txt: 1 names are not in the data: \[''\]"):
        cmsf_semi.given_labels("list.txt", 0, train)
    Path("subset10pct").write_text("0.png")
    with pytest.raises(SystemExit, match="subset10pct: 1 names are not in the data"):
        cmsf_semi.given_labels("subset10pct", 0, data())  # digits are no files


def test_a_list_names_the_class_where_file_names_repeat():
    write_folder("d")  # every class has images of the same names
    train = data(image_size=32, **TINY)
    names = ["/".join(Path(file).parts[-2:]) for file in train.files]
    Path("list.txt").write_text("\n".join([names[-1], "", names[1]]))
    given = cmsf_semi.given_labels("list.txt", 0, train)
    assert given[-1] == train.labels[-1] and given[1] == 0 and (given >= 0).sum() == 2
    Path("list.txt").write_text(Path(names[1]).name)
    with pytest.raises(SystemExit, match="list.txt: some images share a name; list them as CLASS/NAME"):
        cmsf_semi.given_labels("list.txt", 0, train)


@pytest.mark.parametrize("labels", ["0pct", "101pct", "tenpct", "-5pct", "x" * 999, "", "pct", "/"])
def test_impossible_labels_are_one_line(labels):
    with pytest.raises(SystemExit, match=r"^error: --labels[^\n]* 1pct to 100pct, or a file[^\n]*$"):
        cmsf_semi.main(cmsf_semi.Args(labels=labels))
    assert not Path("runs").exists()


def small_model(labels, truth, **changes):
    given = dict(bank_size=20, topk=4, batch_size=8) | changes
    args, _ = cmsf_semi.resolve(cmsf_semi.Args(**given))
    return cmsf_semi.SemiCMSF(args, labels, truth), args


def test_a_step_equals_the_paper():
    """Twelve batches of 24 images: the given label, else a sure prediction, else none."""
    truth = torch.arange(24) % 3
    given = truth.where(torch.arange(24) % 4 == 0, -1)
    model, args = small_model(given, truth, confidence=0.6)
    model.eval()  # BatchNorm in eval mode, so that rows do not depend on their batch
    rows, cache, kinds = [], {}, set()
    for step in range(12):
        weak, strong = torch.randn(2, 8, 3, 16, 16)
        indices = torch.arange(8) + 8 * (step % 3)
        with torch.no_grad():
            for weight in model.online.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        loss, metrics = model([weak, strong], given[indices], indices)
        with torch.no_grad():
            queries = model.predictor(model.online(strong))
            targets = F.normalize(model.target(weak), dim=1)
            probabilities = model.classifier(targets).softmax(1)
        labels = []
        for i, index in enumerate(indices.tolist()):
            best = probabilities[i].argmax().item()
            sure = step >= 6 and probabilities[i, best] >= 0.6
            labels.append(given[index].item() if given[index] >= 0 else best if sure else -1)
            kinds.add("given" if given[index] >= 0 else "sure" if sure else "none")
            if given[index] >= 0:
                cache[index] = targets[i]
        rows = (rows + list(zip(targets, labels, indices.tolist())))[-20:]
        bank, bank_labels = torch.stack([row[0] for row in rows]), [row[1] for row in rows]
        assert sorted(model.bank.labels[: len(model.bank)].tolist()) == sorted(bank_labels)
        found = [slow_same_label(t, label, bank, bank_labels, 4) for t, label in zip(targets, labels)]
        valid = torch.tensor([[j < len(row) for j in range(4)] for row in found])
        padded = torch.tensor([row + [0] * (4 - len(row)) for row in found])
        assert loss.item() == pytest.approx(slow_loss(queries, bank[padded], valid), abs=1e-5)
        pairs = [(truth[i], truth[rows[j][2]]) for i, row in zip(indices, found) for j in row]
        purity = sum(bool(a == b) for a, b in pairs) / len(pairs)
        assert metrics["purity"].item() == pytest.approx(purity)
        free = [i for i, index in enumerate(indices.tolist()) if given[index] < 0]
        sure = [i for i in free if labels[i] >= 0]
        right = [i for i in sure if labels[i] == truth[indices[i]]]
        assert metrics["coverage"].item() == pytest.approx(len(sure) / len(free))
        assert metrics["right"].item() == pytest.approx(len(right) / len(free))
        slots = model.slots.tolist()
        for index, embedding in cache.items():
            torch.testing.assert_close(model.cache[slots[index]], embedding)
        if step == 5:
            for _ in range(20):
                model.train_classifier()
    assert kinds == {"given", "sure", "none"}


def test_a_round_uses_labelled_images_only():
    truth = torch.arange(40) % 3
    given = truth.where(torch.arange(40) < 12, -1)
    model, _ = small_model(given, truth)
    for step in range(3):  # images 0 to 7 of the labelled ones, and 16 others
        images, indices = torch.randn(8, 3, 16, 16), torch.arange(8) + (0, 16, 24)[step]
        model([images, images], given[indices], indices)
    seen = model.cache.any(1)
    assert seen.tolist() == [False] + [True] * 8 + [False] * 4
    batches, forward = [], model.classifier.forward
    model.classifier.forward = lambda x: batches.append(x.clone()) or forward(x)
    before = [p.clone() for p in model.parameters()]
    model.train_classifier()
    assert len(batches) == 10
    for batch in batches:
        assert sorted(batch[:, 0].tolist()) == sorted(model.cache[1:9, 0].tolist())
    after = [p.clone() for p in model.parameters()]
    for (name, _), old, new in zip(model.named_parameters(), before, after):
        assert torch.equal(old, new) != name.startswith("classifier"), name
    frozen = [not p.requires_grad for p in model.classifier.parameters()]
    assert all(frozen) and not model.classifier.training
    model.cache.zero_()
    model.train_classifier()  # nothing cached: no round
    assert all(torch.equal(old, new) for old, new in zip(after, model.parameters()))
    assert len(batches) == 10 and not model.classifier.training


def test_a_round_equals_the_recipe():
    """Two rounds of ten passes, batches of at most 256, SGD 0.01, 0.9, 1e-4, begun afresh."""
    truth = torch.arange(300) % 3
    model, _ = small_model(truth.where(torch.arange(300) < 290, -1), truth)
    model.cache[1:] = F.normalize(torch.randn(290, 128), dim=1)
    classifier = copy.deepcopy(model.classifier).train().requires_grad_(True)
    for pushed in 100, 200:
        model.bank.pushed = pushed
        model.train_classifier()
    for number in range(20):
        if number % 10 == 0:
            velocity = [torch.zeros_like(p) for p in classifier.parameters()]
            generator = torch.Generator().manual_seed(100 if number == 0 else 200)
        order = torch.randperm(290, generator=generator) + 1
        for batch in order[:145], order[145:]:
            scores = classifier(model.cache[batch])
            loss = -scores.log_softmax(1)[torch.arange(145), truth[batch - 1]].mean()
            gradients = torch.autograd.grad(loss, list(classifier.parameters()))
            with torch.no_grad():
                for p, g, v in zip(classifier.parameters(), gradients, velocity):
                    v.mul_(0.9).add_(g + 1e-4 * p)
                    p.sub_(0.01 * v)
    for ours, slow in zip(model.classifier.parameters(), classifier.parameters()):
        torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-4)


def test_labels_that_are_not_given_change_nothing(monkeypatch):
    given = dict(epochs=2, warmup_epochs=0, confidence=0.12)
    first = cmsf_semi.main(cmsf_semi.Args(run_name="a", **given))
    choose = cmsf_semi.given_labels

    class Changed(cmsf_semi.ImageData):
        """All training images have another label, but for those that --labels picks."""

        def __init__(self, args, train, device):
            super().__init__(args, train, device)
            if train:
                picked = choose(args.labels, args.label_seed, self)
                self.labels = self.labels.where(picked >= 0, (self.labels + 1) % 10)
                monkeypatch.setattr(cmsf_semi, "given_labels", lambda *_: picked)

    monkeypatch.setattr(cmsf_semi, "ImageData", Changed)
    second = cmsf_semi.main(cmsf_semi.Args(run_name="b", **given))
    assert_same_state(load("a"), load("b"))
    assert 0 < first["pseudo_accuracy"] != second["pseudo_accuracy"] > 0  # only looked at
    assert first["knn"] == second["knn"] and first["classifier"] == second["classifier"]
    assert load("a")["model"]["classifier.1.num_batches_tracked"] == 40  # 4 rounds of 10 passes
    assert (load("a")["model"]["bank.labels"] >= 0).float().mean() > 0.3  # pseudo-labels were used


def test_before_the_first_round_unlabelled_images_are_plain_msf(monkeypatch):
    """And only rounds, at the half and at the end of an epoch, change the classifier."""
    steps, states = [], []
    search, train = cmsf_semi.same_label_neighbors, cmsf_semi.SemiCMSF.train_classifier

    def record(targets, labels, bank, bank_labels, k):
        indices, valid = search(targets, labels, bank, bank_labels, k)
        plain = msf.nearest_neighbors(targets, bank, k)
        steps.append((labels < 0, (indices == plain).all(1) & valid.all(1)))
        return indices, valid

    def train_and_record(self):
        before = copy.deepcopy(self.classifier.state_dict())
        train(self)
        states.append((len(steps), before, copy.deepcopy(self.classifier.state_dict())))

    monkeypatch.setattr(cmsf_semi, "same_label_neighbors", record)
    monkeypatch.setattr(cmsf_semi.SemiCMSF, "train_classifier", train_and_record)
    cmsf_semi.main(cmsf_semi.Args(run_name="a", epochs=1, confidence=0.0))
    assert len(steps) == 22 + 1  # and one search for the picture
    steps.pop()
    for free, plain in steps[:11]:
        assert plain[free].all() and (~free).sum() < 20
    assert all(not free.any() for free, _ in steps[11:])  # at confidence 0 every prediction counts
    assert [step for step, _, _ in states] == [11, 22]
    (_, old, first), (_, second, _) = states
    for name in old:
        assert torch.equal(first[name], second[name]) and not torch.equal(old[name], first[name])


def test_large_batches_have_a_round_at_the_end_of_an_epoch_only(monkeypatch):
    rounds, train = [], cmsf_semi.SemiCMSF.train_classifier

    class Twice(cmsf_semi.ImageData):
        def __init__(self, args, train, device):
            super().__init__(args, train, device)
            if train:
                self.images, self.labels = self.images.repeat(2, 1, 1, 1), self.labels.repeat(2)

    def train_and_count(self):
        rounds.append(self.bank.pushed)
        train(self)

    monkeypatch.setattr(cmsf_semi, "ImageData", Twice)
    monkeypatch.setattr(cmsf_semi.SemiCMSF, "train_classifier", train_and_count)
    cmsf_semi.main(cmsf_semi.Args(run_name="a", epochs=1, batch_size=1024))
    assert rounds == [2 * 1024]


def test_all_labels_build_no_classifier_and_give_purity_one():
    result = cmsf_semi.main(cmsf_semi.Args(run_name="a", epochs=2, labels="100pct", log_every=1))
    assert result["purity"] == 1 and not any("classifier" in name for name in load("a")["model"])
    events = EventAccumulator("runs/a").Reload()
    assert all(event.value == 1 for event in events.Scalars("purity"))


def small_model_of(run):
    args, train = cmsf_semi.Args(**run["args"]), data()
    labels = cmsf_semi.given_labels(args.labels, args.label_seed, train)
    model = cmsf_semi.SemiCMSF(args, labels, train.labels)
    model.load_state_dict(run["model"])
    return model


@pytest.mark.parametrize("labels", ["1pct", "10pct"])
def test_a_run_returns_and_logs_what_it_promises(labels, capsys):
    result = cmsf_semi.main(cmsf_semi.Args(run_name="a", epochs=2, warmup_epochs=0, labels=labels))
    assert 0 < result["loss"] < 1 and 10 < result["classifier"] <= 100 and 10 < result["knn"] <= 100
    model, test = small_model_of(load("a")), data(train=False)
    with torch.no_grad():
        views = cmsf_semi.augment(test.images, 16)
        scores = model.classifier(F.normalize(model.target.eval()(views), dim=1))
    right = (scores.argmax(1) == test.labels).float().mean().item()
    assert result["classifier"] == pytest.approx(100 * right, abs=0.3)
    counts = re.search(r"labelled, by class: \[(.*)\]", capsys.readouterr().out)
    sizes = [int(size) for size in counts[1].split(",")]
    assert len(sizes) == 10 and sum(sizes) == (10 if labels == "1pct" else 142)
    events = EventAccumulator("runs/a").Reload()
    assert events.Tags()["histograms"] == ["confidence"]
    tags = {"purity", "coverage", "pseudo_accuracy", "classifier", "knn", "loss"}
    assert tags <= set(events.Tags()["scalars"])
    for tag in tags - {"classifier", "knn"}:
        values = [event.value for event in events.Scalars(tag)]
        # before the first pseudo-label there is no accuracy of them
        assert all(0 <= x <= 1 or tag == "pseudo_accuracy" and math.isnan(x) for x in values), tag

    train, expected = data(), []
    given = cmsf_semi.given_labels(labels, 0, train)
    shown = first_of_twelve(torch.where(given >= 0)[0].tolist())
    with torch.no_grad():
        targets = F.normalize(model.target(cmsf_semi.augment(train.images[shown], 16)), dim=1)
    for image, cosines in zip(shown, (targets.double() @ model.bank.embeddings.double().T).tolist()):
        rows = sorted(range(1024), key=lambda j: -cosines[j])
        same = [j for j in rows if model.bank.labels[j] == given[image]][:10]
        for chosen in same, rows[:10]:
            images = [model.bank.indices[j].item() for j in chosen]
            expected.append([image, *images, *[-1] * (10 - len(images))])
    check_pictures("runs/a", [44], train.images, train.labels, expected)
    assert labels == "10pct" or any(-1 in row for row in expected)


def test_resume_continues_bit_for_bit(monkeypatch):
    given = dict(epochs=2, warmup_epochs=0, confidence=0.12)
    cmsf_semi.main(cmsf_semi.Args(run_name="whole", **given))
    stop_at(21, cmsf_semi, monkeypatch)
    with pytest.raises(SystemExit, match="stopped at step 22"):
        cmsf_semi.main(cmsf_semi.Args(run_name="parts", **given))
    for changed in dict(label_seed=1), dict(labels="1pct"):
        with pytest.raises(SystemExit, match=r"^error: runs/parts/last.pt (had|fits) [^\n]*$"):
            cmsf_semi.main(cmsf_semi.Args(resume="runs/parts/last.pt", **changed))
    cmsf_semi.main(cmsf_semi.Args(resume="runs/parts/last.pt"))
    assert_same_state(load("whole"), load("parts"))


def test_a_run_with_a_list_that_leaves_out_a_class():
    write_folder("d")
    train = data(image_size=32, **TINY)
    names = ["/".join(Path(file).parts[-2:]) for file in train.files]
    Path("list.txt").write_text("\n".join(names[:3]))  # no dog
    given = dict(image_size=32, epochs=2, topk=4, labels="list.txt", **TINY)
    result = cmsf_semi.main(cmsf_semi.Args(run_name="a", **given))
    assert result["classifier"] == result["knn"] == 50 and 0 <= result["loss"] <= 4
    assert load("a")["model"]["cache"].shape == (4, 128)


def train_in_eval_mode(rank, world, folder):
    """Nine steps over 24 images; BatchNorm in eval mode, so that images do not depend on others."""
    if world > 1:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    truth = torch.arange(24) % 3
    given = truth.where(torch.arange(24) % 2 == 0, -1)
    model, _ = small_model(given, truth, confidence=0.345)
    model.eval()
    network = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    network.broadcast_buffers = False
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    results, share = [], slice(rank * 8 // world, (rank + 1) * 8 // world)
    for step in range(9):
        views, indices = torch.rand(2, 8, 3, 16, 16), torch.arange(8) + 8 * (step % 3)
        loss, metrics = network(list(views[:, share]), given[indices[share]], indices[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results.append(torch.stack([loss.detach(), metrics["coverage"]]))
        if step in (2, 5):
            model.train_classifier()
    torch.save(dict(results=torch.stack(results), model=model.state_dict()), f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(one_and_two, tmp_path):
    one_and_two(train_in_eval_mode)
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
        torch.testing.assert_close(value, one["model"][name], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((first["results"] + second["results"]) / 2, one["results"])
    assert one["results"][3:, 1].max() > 0  # there were pseudo-labels


def train_and_keep(rank, world, folder):
    """main as torchrun starts it; every process writes down its model."""
    as_torchrun(rank, world, 29535)
    models, build = [], cmsf_semi.SemiCMSF
    cmsf_semi.SemiCMSF = lambda *args: models.append(build(*args)) or models[0]
    cmsf_semi.main(cmsf_semi.Args(run_name="two", epochs=1, confidence=0.1, warmup_epochs=0))
    cmsf_semi.SemiCMSF = build
    torch.save(models[0].state_dict(), f"rank{rank}.pt")


def test_processes_stay_in_step(one_and_two):
    one_and_two(train_and_keep, alone=False)
    first, second = (torch.load(f"rank{rank}.pt") for rank in range(2))
    for name, value in first.items():  # the networks' running statistics are each process's own
        assert torch.equal(value, second[name]) or "running" in name, name
    assert torch.equal(first["classifier.1.running_mean"], second["classifier.1.running_mean"])
    assert first["classifier.1.num_batches_tracked"] == 20
    assert (first["bank.labels"] >= 0).float().mean() > 0.3
