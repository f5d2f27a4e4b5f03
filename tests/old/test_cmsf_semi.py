"""Constrained mean shift with labels: the rule in loops, what may be known, and a run."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cmsf_semi

from .conftest import (
    TINY,
    assert_same_state,
    data,
    load,
    slow_loss,
    train_stop_and_resume,
    unit,
    write_folder,
)


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


@pytest.mark.parametrize("share", [1, 10, 37, 100])
def test_a_share_is_balanced_and_repeats_with_its_seed(share):
    train = data(cmsf_semi)
    truth = train.labels
    first, again, other = (cmsf_semi.given_labels(f"{share}pct", seed, train) for seed in (0, 0, 1))
    assert torch.equal(first, again) and (share == 100 or not torch.equal(first, other))
    assert (first == truth).logical_or(first == -1).all()
    for c in range(10):
        expected = max(1, round((truth == c).sum().item() * share / 100))
        assert (first == c).sum() == (other == c).sum() == expected


def test_a_class_of_one_image_keeps_it_and_unknown_labels_are_not_given():
    train = data(cmsf_semi)
    train.labels = torch.tensor([0] * 50 + [1] + [-1] * 20)
    train.classes = ["a", "b"]
    given = cmsf_semi.given_labels("10pct", 0, train)
    assert given[50] == 1 and (given == 0).sum() == 5 and (given >= 0).sum() == 6


def test_a_list_of_file_names():
    write_folder("d")
    train = data(cmsf_semi, image_size=32, topk=4, **TINY)
    for i, file in enumerate(train.files):  # names of their own, as ImageNet's are
        Path(file).rename(Path(file).with_name(f"n{i}{Path(file).suffix}"))
    train = data(cmsf_semi, image_size=32, topk=4, **TINY)
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
        cmsf_semi.given_labels("subset10pct", 0, data(cmsf_semi))  # digits are no files


def test_a_list_names_the_class_where_file_names_repeat():
    write_folder("d")  # every class has images of the same names
    train = data(cmsf_semi, image_size=32, topk=4, **TINY)
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


def test_a_run_resumes_bit_for_bit_and_reads_no_label_that_is_not_given(few_digits, monkeypatch):
    result, run = train_stop_and_resume(cmsf_semi, monkeypatch, labels="20pct", confidence=0.12)
    assert 0 <= result["classifier"] <= 100 and result["knn"] > 40
    model = run["model"]
    assert model["classifier.1.num_batches_tracked"] == 40  # 4 rounds of 10 passes
    assert 20 < len(model["cache"]) < 32 and (model["bank.labels"] >= 0).float().mean() > 0.3
    for changed in dict(label_seed=1), dict(labels="30pct"):
        with pytest.raises(SystemExit, match=r"^error: runs/parts/last.pt (had|fits) [^\n]*$"):
            cmsf_semi.main(cmsf_semi.Args(resume="runs/parts/last.pt", epochs=3, **changed))
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
    cmsf_semi.main(cmsf_semi.Args(**run["args"] | dict(run_name="changed")))
    assert_same_state(run, load("changed"))


def test_all_labels_build_no_classifier_and_give_purity_one(few_digits):
    given = dict(epochs=1, batch_size=32, labels="100pct", knn_every=0)
    result = cmsf_semi.main(cmsf_semi.Args(run_name="a", **given))
    assert result["purity"] == 1
    assert not any("classifier" in name for name in load("a")["model"])
