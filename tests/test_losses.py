"""The losses and the steps of the methods against their equations, in loops.

q: queries, u: targets, M: bank. What a step should push and search is kept here in plain queues.
"""

import copy
import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from scripts import METHODS, arguments, small_model, unit

import cmsf_semi
import cmsf_ssl
import mnn
import msf


def nearest(u, rows, k, allowed=None):
    """Positions of the k rows nearest to u, nearest first: of all rows, or of those allowed."""
    if allowed is None:
        allowed = range(len(rows))
    return sorted(allowed, key=lambda j: ((u - rows[j]) ** 2).sum().item())[:k]


def slow_loss(queries, bank, found):
    """Mean over images of the mean over their neighbours j, listed in found, of ||q - M_j||^2."""
    losses = []
    for q, neighbors in zip(queries, found):
        distances = [((q - bank[j]) ** 2).sum().item() for j in neighbors]
        losses.append(sum(distances) / len(distances))
    return sum(losses) / len(losses)


def share(answers):
    """Share of the answers that are true, NaN without any; to be compared with a tensor's item."""
    return pytest.approx(sum(answers) / len(answers) if answers else math.nan, nan_ok=True)


def slow_purity(labels, bank_labels, found):
    return share([label == bank_labels[j] for label, rows in zip(labels, found) for j in rows])


@pytest.mark.parametrize("script", METHODS)
def test_the_loss_equals_loops(script):
    queries = unit(7, 16)
    bank = unit(30, 16)
    rows = torch.randint(0, 30, (7, 5))
    valid = torch.ones(7, 5, dtype=torch.bool)
    if script in (msf, mnn):
        loss = script.mean_shift_loss(queries, bank[rows])
    else:
        valid = torch.rand(7, 5) < 0.5
        valid[:, 2] = True  # one at least
        loss = script.mean_shift_loss(queries, bank[rows], valid)
    found = [row[mask].tolist() for row, mask in zip(rows, valid)]
    assert loss.item() == pytest.approx(slow_loss(queries, bank, found), abs=1e-12)


@pytest.mark.parametrize("script", METHODS)
def test_purity_leaves_out_images_and_neighbours_without_a_label(script):
    neighbor_labels = torch.tensor([[0, 0, 1], [-1, 1, -1], [-1, 1, 0]])
    purity = script.label_purity(neighbor_labels, torch.tensor([0, -1, 1]))
    assert purity.item() == pytest.approx(3 / 5)


# ---- whole steps


def three_epochs():
    """Nine batches of 8 of 24 images: number, indices [8], labels [8], weak and strong views."""
    for number in range(9):
        indices = torch.arange(8) + 8 * (number % 3)
        weak, strong = torch.randn(2, 8, 3, 4, 4)
        yield number, indices, indices % 3, weak, strong


@torch.no_grad()
def queries_of(model, view):
    """q = norm(h(f(view)))"""
    return F.normalize(model.predictor(model.online(view)), dim=1)


@torch.no_grad()
def targets_of(model, view):
    """u = norm(g(view))"""
    return F.normalize(model.target(view), dim=1)


def test_a_step_of_msf_is_that_of_the_paper():
    """The targets are pushed, and then the k nearest rows of all that were pushed are searched."""
    model = small_model(msf, bank_size=20, topk=3)
    bank = deque(maxlen=20)
    bank_labels = deque(maxlen=20)
    for _, _, labels, weak, strong in three_epochs():
        q = queries_of(model, strong)
        u = targets_of(model, weak)
        bank.extend(u)
        bank_labels.extend(labels.tolist())
        found = [nearest(target, bank, 3) for target in u]

        loss, metrics = model(weak, strong, labels)
        assert loss.item() == pytest.approx(slow_loss(q, bank, found), abs=1e-5)
        assert metrics["purity"].item() == slow_purity(labels, bank_labels, found)
        assert metrics["spread"].item() == pytest.approx(u.std(dim=0).norm().item())


@pytest.mark.parametrize("constraint", ["previous-epoch", "third-view", "kmeans"])
def test_a_step_of_cmsf_is_that_of_the_paper(constraint):
    """Half of the loss is over the k nearest rows, half over the k nearest related ones."""
    model = small_model(cmsf_ssl, bank_size=20, topk=3, constraint=constraint)
    bank = deque(maxlen=20)  # M
    other_bank = deque(maxlen=20)  # M'
    bank_images = deque(maxlen=20)
    last = {}  # image -> its last u
    for number, indices, labels, weak, strong in three_epochs():
        third = torch.randn(8, 3, 4, 4)
        q = queries_of(model, strong)
        u = targets_of(model, weak)
        others = [last.get(image, target) for image, target in zip(indices.tolist(), u)]  # u'
        if constraint == "third-view":
            others = targets_of(model, third)
        bank.extend(u)
        other_bank.extend(others)
        bank_images.extend(indices.tolist())
        last |= dict(zip(indices.tolist(), u))

        plain = [nearest(target, bank, 3) for target in u]
        related = []
        for image, target, other in zip(indices, u, others):
            candidates = nearest(other, other_bank, 6)  # C
            if constraint == "kmeans":
                clusters = model.clusters[list(bank_images)]
                candidates = [j for j in range(len(bank)) if clusters[j] == model.clusters[image]]
            related.append(nearest(target, bank, 3, candidates))

        loss, metrics = model(weak, strong, third, labels, indices)
        expected = (slow_loss(q, bank, plain) + slow_loss(q, bank, related)) / 2
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        bank_labels = [image % 3 for image in bank_images]
        assert metrics["purity"].item() == slow_purity(labels, bank_labels, plain)
        assert metrics["purity_constrained"].item() == slow_purity(labels, bank_labels, related)
        # How many rows are nearer than the farthest related one.
        ranks = [nearest(target, bank, 20).index(row[-1]) for target, row in zip(u, related)]
        assert metrics["rank"].item() == pytest.approx(sum(ranks) / 8)
        if number % 3 == 2 and constraint == "kmeans":
            model.update_clusters(images_per_cluster=6)
            assert len(model.clusters.unique()) > 1


@pytest.mark.parametrize("constraint", ["previous-epoch", "kmeans"])
def test_the_first_epoch_of_cmsf_is_that_of_msf(constraint):
    """The same losses and, at its end, gradients from the same seed."""
    torch.manual_seed(0)
    plain = small_model(msf)
    torch.manual_seed(0)
    model = small_model(cmsf_ssl, constraint=constraint)
    for number, indices, labels, weak, strong in three_epochs():
        if number == 3:
            break
        expected, _ = plain(weak, strong, labels)
        loss, metrics = model(weak, strong, None, labels, indices)
        torch.testing.assert_close(loss, expected)
        assert metrics["rank"] == 2  # k - 1
    expected.backward()
    loss.backward()
    for ours, theirs in zip(model.online.parameters(), plain.online.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_step_of_cmsf_with_labels_is_that_of_the_paper():
    """An image has the given label, else a confident prediction, else none, and is pushed with it.
    Its neighbours are the nearest rows of its label or, if it has none, of all."""
    images = torch.arange(24)
    given = torch.where(images % 4 == 0, images % 3, -1)
    model = small_model(cmsf_semi, bank_size=20, topk=4, given=given, confidence=0.6)
    bank = deque(maxlen=20)
    bank_labels = deque(maxlen=20)
    bank_truths = deque(maxlen=20)
    for number, indices, truths, weak, strong in three_epochs():
        q = queries_of(model, strong)
        u = targets_of(model, weak)
        with torch.no_grad():
            classifier = copy.deepcopy(model.classifier).eval()
            probability, predicted = classifier(u).softmax(dim=1).max(dim=1)
        labels = given[indices].tolist()
        guessed = []  # images with a predicted label
        for i in range(8):  # a prediction counts once the classifier is trained, after batch 5
            if labels[i] < 0 and number >= 6 and probability[i] >= 0.6:
                labels[i] = predicted[i].item()
                guessed.append(i)
        bank.extend(u)
        bank_labels.extend(labels)
        bank_truths.extend(truths.tolist())
        found = []
        for label, target in zip(labels, u):
            same = [j for j in range(len(bank)) if label == -1 or bank_labels[j] == label]
            found.append(nearest(target, bank, 4, same))

        loss, metrics = model(weak, strong, indices, truths)
        assert loss.item() == pytest.approx(slow_loss(q, bank, found), abs=1e-5)
        assert metrics["purity"].item() == slow_purity(truths, bank_truths, found)
        assert metrics["coverage"].item() == pytest.approx(len(guessed) / 6)  # 2 of 8 are given
        assert metrics["pseudo_accuracy"].item() == share([labels[i] == truths[i] for i in guessed])
        if number == 5:
            for _ in range(20):
                model.train_classifier()
    assert 0 < len(guessed) < 6  # some were sure, some were not


def slow_mnn_loss(model, queries, targets, bank):
    losses = []
    for q, u in zip(queries, targets):
        neighbors = [bank[j] for j in nearest(u, bank, 3)]
        if not bank:
            neighbors = [u]  # the target stands in for its neighbours
        mixes = [0.4 * m + 0.6 * u for m in neighbors]
        if model.renormalize:
            mixes = [z / z.norm() for z in mixes]
        loss = sum((2 - 2 * q @ z).item() for z in mixes) / len(mixes)
        if model.weighting:
            loss += (2 - 2 * q @ u).item()
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "changes", [{}, {"symmetric": False}, {"weighting": False}, {"renormalize": True}]
)
def test_a_step_of_mnn_is_that_of_the_paper(changes):
    """Neighbours are searched before the push, in both directions; weak targets are pushed."""
    model = small_model(mnn, bank_size=20, topk=3, lam=0.4, **changes)
    bank = deque(maxlen=20)
    bank_labels = deque(maxlen=20)
    for _, _, labels, weak, strong in three_epochs():
        u = targets_of(model, weak)
        expected = slow_mnn_loss(model, queries_of(model, strong), u, bank)
        if model.symmetric:
            other = slow_mnn_loss(model, queries_of(model, weak), targets_of(model, strong), bank)
            expected = (expected + other) / 2
        found = [nearest(target, bank, 3) for target in u]

        loss, metrics = model(weak, strong, labels)
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        assert metrics["purity"].item() == slow_purity(labels, bank_labels, found)
        bank.extend(u)
        bank_labels.extend(labels.tolist())


@pytest.mark.parametrize("script", METHODS)
def test_the_target_is_an_average_of_the_weights_alone(script):
    """Its BatchNorm trains, with statistics of its own, and it gets no gradient."""
    model = small_model(script)
    before = copy.deepcopy(model.target)
    weak = torch.randn(8, 3, 4, 4)
    loss, _ = model(*arguments(script, weak, 3 * weak, torch.arange(8) % 3, torch.arange(8)))
    loss.backward()
    variance = model.target[0][1].running_var.clone()
    assert (variance != 1).all()  # of this batch
    assert not torch.allclose(variance, model.online[0][1].running_var)
    model.update_target()
    assert torch.equal(model.target[0][1].running_var, variance)
    weights = zip(before.parameters(), model.target.parameters(), model.online.parameters())
    for old, new, online in weights:
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)
        assert new.grad is None and online.grad is not None
    assert all(weight.grad is not None for weight in model.predictor.parameters())


# ---- mnn.py


def test_lam_is_uniform_and_drawn_for_each_direction(monkeypatch):
    drawn = []
    monkeypatch.setattr(mnn, "mix_neighbors", lambda u, m, lam: drawn.append(lam) or m)
    model = small_model(mnn, lam="random")
    for _ in range(200):
        model(*torch.randn(2, 4, 3, 4, 4), torch.zeros(4, dtype=torch.int64))
    drawn = torch.stack(drawn)
    assert len(drawn.unique()) == len(drawn) == 400
    assert drawn.min() < 0.02 and drawn.max() > 0.98
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.05)


def test_split_batchnorm_is_batchnorm_of_each_part():
    norm = mnn.SplitBatchNorm(5, splits=4)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    plain = [torch.nn.BatchNorm2d(5) for _ in range(4)]
    images = (torch.randn(12, 5, 3, 3) * 2 + 1).requires_grad_(True)
    expected = torch.empty(12, 5, 3, 3)
    for i in range(4):
        plain[i].load_state_dict(norm.state_dict())
        expected[i::4] = plain[i](images[i::4])  # images i, i + 4, i + 8
    normalized = norm(images)
    torch.testing.assert_close(normalized, expected)
    for name in ("running_mean", "running_var"):
        parts = torch.stack([getattr(part, name) for part in plain])
        torch.testing.assert_close(getattr(norm, name), parts.mean(dim=0))

    (wanted,) = torch.autograd.grad(expected.relu().square().sum(), images)
    normalized.relu_().square().sum().backward()  # in place, as in a ResNet
    torch.testing.assert_close(images.grad, wanted)
    assert norm.weight.grad.abs().min() > 0 and norm.bias.grad.abs().min() > 0

    plain[0].load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm.eval()(images), plain[0].eval()(images))


def test_the_networks_see_one_view_at_a_time():
    """The online one the weak view first; the target one in another order of the images."""
    model = small_model(mnn)
    seen = []
    model.online.register_forward_hook(lambda network, inputs, output: seen.append(inputs[0]))
    model.target.register_forward_hook(lambda network, inputs, output: seen.append(inputs[0]))
    weak, strong = torch.randn(2, 8, 3, 4, 4)
    model(weak, strong, torch.zeros(8, dtype=torch.int64))
    assert len(seen) == 4
    assert torch.equal(seen[0], weak) and torch.equal(seen[1], strong)
    for view, expected in zip(seen[2:], (weak, strong)):
        assert not torch.equal(view, expected)
        assert sorted(view.tolist()) == sorted(expected.tolist())
