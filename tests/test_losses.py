"""The losses and the steps of the methods against their equations, in loops.

q: queries, u: targets, M: bank. What a step should push and search is kept here in plain lists.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scripts import METHODS, arguments, small_model, unit

import cmsf_semi
import cmsf_ssl
import mnn
import msf


def slow_loss(queries, neighbors):
    """Mean over images of the mean over their list of neighbours of ||q - M_j||^2."""
    losses = []
    for q, rows in zip(queries, neighbors):
        losses.append(sum(((q - m) ** 2).sum().item() for m in rows) / len(rows))
    return sum(losses) / len(losses)


def mean_shift_loss(script, queries, neighbors):
    """The loss with all neighbours valid."""
    if script is cmsf_semi:
        valid = torch.ones(neighbors.shape[:2], dtype=torch.bool, device=neighbors.device)
        return cmsf_semi.mean_shift_loss(queries, neighbors, valid)
    return script.mean_shift_loss(queries, neighbors)


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("b, k, d", [(1, 1, 2), (7, 5, 16), (5, 12, 4)])
def test_the_loss_equals_loops(script, b, k, d):
    queries = unit(b, d)
    neighbors = unit(b, k, d)
    expected = pytest.approx(slow_loss(queries, neighbors), abs=1e-12)
    assert mean_shift_loss(script, queries, neighbors).item() == expected


@pytest.mark.parametrize("script", [cmsf_ssl, cmsf_semi])
def test_the_loss_over_valid_neighbours_equals_loops(script):
    queries = unit(6, 8)
    neighbors = unit(6, 5, 8)
    valid = torch.rand(6, 5) < 0.5
    valid[:, 2] = True
    valid[0] = torch.arange(5) == 2  # one neighbour
    expected = slow_loss(queries, [rows[mask] for rows, mask in zip(neighbors, valid)])
    loss = script.mean_shift_loss(queries, neighbors, valid)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "labels, neighbor_labels, purity",
    [
        ([0, 1], [[0, 0, 1], [0, 1, 1]], 4 / 6),
        ([0, -1], [[0, 0, 1], [-1, 1, 1]], 2 / 3),  # an image without a label does not count
        ([0, 1], [[0, -1, -1], [-1, -1, 0]], 1 / 2),  # nor does a row without one
        ([-1], [[-1, -1]], math.nan),
    ],
)
def test_purity_is_the_share_of_neighbours_with_the_same_label(labels, neighbor_labels, purity):
    measured = msf.label_purity(torch.tensor(neighbor_labels), torch.tensor(labels))
    assert measured.item() == pytest.approx(purity, nan_ok=True)


# ---- whole steps. BatchNorm is in eval mode, so that no image depends on others.


def three_epochs():
    """Batches of 8 of 24 images, 9 of them: indices [8], and weak and strong views."""
    for number in range(9):
        indices = torch.arange(8) + 8 * (number % 3)
        weak, strong = torch.randn(2, 8, 3, 4, 4)
        yield number, indices, weak, strong


@torch.no_grad()
def queries_of(model, view):
    """q = norm(h(f(view)))"""
    return F.normalize(model.predictor(model.online(view)), dim=1)


@torch.no_grad()
def targets_of(model, view):
    """u = norm(g(view))"""
    return F.normalize(model.target(view), dim=1)


def nearest(u, rows, k):
    """Positions of the k of these vectors that are nearest to u, or of all, nearest first."""
    distances = [((u - row) ** 2).sum().item() for row in rows]
    return sorted(range(len(rows)), key=lambda j: distances[j])[:k]


def share_equal(pairs):
    """Share of the pairs of two equal numbers, or NaN without pairs."""
    equal = [int(a) == int(b) for a, b in pairs]
    return sum(equal) / len(equal) if equal else math.nan


def test_a_step_of_msf_is_that_of_the_paper():
    """The targets are pushed, and then the k nearest rows of all that were pushed are searched."""
    model = small_model(msf, bank_size=20, topk=3).eval()
    labels = torch.randint(0, 3, (24,))
    bank = []
    bank_labels = []
    for _, indices, weak, strong in three_epochs():
        q = queries_of(model, strong)
        u = targets_of(model, weak)
        bank = (bank + list(u))[-20:]
        bank_labels = (bank_labels + labels[indices].tolist())[-20:]
        rows = [nearest(target, bank, 3) for target in u]
        loss, metrics = model(weak, strong, labels[indices])
        expected = slow_loss(q, [[bank[j] for j in row] for row in rows])
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        pairs = [(labels[i], bank_labels[j]) for i, row in zip(indices, rows) for j in row]
        assert metrics["purity"].item() == pytest.approx(share_equal(pairs))
        assert metrics["spread"].item() == pytest.approx(u.std(dim=0).norm().item())


@pytest.mark.parametrize("constraint", ["previous-epoch", "third-view", "kmeans"])
def test_a_step_of_cmsf_is_that_of_the_paper(constraint):
    """Half of the loss is over the k nearest rows, half over the k nearest related ones."""
    model = small_model(cmsf_ssl, num_images=24, topk=3, constraint=constraint).eval()
    labels = torch.randint(0, 3, (24,))
    bank = []  # M
    other_bank = []  # M'
    bank_images = []
    last = {}  # image -> its last u
    for number, indices, weak, strong in three_epochs():
        third = torch.randn(8, 3, 4, 4)
        q = queries_of(model, strong)
        u = targets_of(model, weak)
        others = [last.get(i, target) for i, target in zip(indices.tolist(), u)]  # u'
        if constraint == "third-view":
            others = list(targets_of(model, third))
        bank = (bank + list(u))[-20:]
        other_bank = (other_bank + others)[-20:]
        bank_images = (bank_images + indices.tolist())[-20:]
        last |= dict(zip(indices.tolist(), u))

        plain = [nearest(target, bank, 3) for target in u]
        related = []
        for i, target, other in zip(indices, u, others):
            candidates = nearest(other, other_bank, 6)  # C
            if constraint == "kmeans":
                cluster = model.clusters[i]
                same = [model.clusters[image] == cluster for image in bank_images]
                candidates = [j for j in range(len(bank)) if same[j]]
            order = nearest(target, [bank[j] for j in candidates], 3)
            related.append([candidates[j] for j in order])

        loss, metrics = model(weak, strong, third, labels[indices], indices)
        expected = slow_loss(q, [[bank[j] for j in row] for row in plain]) / 2
        expected += slow_loss(q, [[bank[j] for j in row] for row in related]) / 2
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        for name, rows in (("purity", plain), ("purity_constrained", related)):
            pairs = [(labels[i], labels[bank_images[j]]) for i, r in zip(indices, rows) for j in r]
            assert metrics[name].item() == pytest.approx(share_equal(pairs))
        ranks = [nearest(target, bank, 20).index(row[-1]) for target, row in zip(u, related)]
        assert metrics["rank"].item() == pytest.approx(sum(ranks) / 8)
        if number % 3 == 2 and constraint == "kmeans":
            model.update_clusters(images_per_cluster=6)
            assert len(model.clusters.unique()) > 1


@pytest.mark.parametrize("constraint", ["previous-epoch", "kmeans"])
def test_the_first_epoch_of_cmsf_is_that_of_msf(constraint):
    """The same losses and gradients from the same seed."""
    torch.manual_seed(0)
    plain = small_model(msf)
    torch.manual_seed(0)
    model = small_model(cmsf_ssl, constraint=constraint)
    for number, indices, weak, strong in three_epochs():
        if number == 3:
            break
        expected, _ = plain(weak, strong, indices % 3)
        loss, metrics = model(weak, strong, None, indices % 3, indices)
        torch.testing.assert_close(loss, expected)
        assert metrics["rank"] == 2  # k - 1
    expected.backward()
    loss.backward()
    for ours, theirs in zip(model.online.parameters(), plain.online.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_step_of_cmsf_with_labels_is_that_of_the_paper():
    """An image has the given label, else a confident prediction, else none, and is pushed with it.
    Its neighbours are the nearest rows of its label or, if it has none, of all."""
    true = torch.arange(24) % 3
    given = torch.where(torch.arange(24) % 4 == 0, true, -1)
    model = small_model(cmsf_semi, given=given, topk=4, confidence=0.6).eval()
    bank = []
    bank_labels = []
    bank_truths = []
    for number, indices, weak, strong in three_epochs():
        q = queries_of(model, strong)
        u = targets_of(model, weak)
        with torch.no_grad():
            probability, predicted = model.classifier(u).softmax(dim=1).max(dim=1)
        labels = given[indices].tolist()
        guessed = []  # images with a predicted label
        for i in range(8):
            if labels[i] < 0 and number >= 6 and probability[i] >= 0.6:
                labels[i] = predicted[i].item()
                guessed.append(i)
        bank = (bank + list(u))[-20:]
        bank_labels = (bank_labels + labels)[-20:]
        bank_truths = (bank_truths + true[indices].tolist())[-20:]
        rows = []
        for label, target in zip(labels, u):
            allowed = [j for j in range(len(bank)) if label == -1 or bank_labels[j] == label]
            order = nearest(target, [bank[j] for j in allowed], 4)
            rows.append([allowed[j] for j in order])

        loss, metrics = model(weak, strong, indices, true[indices])
        expected = slow_loss(q, [[bank[j] for j in row] for row in rows])
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        pairs = [(true[i], bank_truths[j]) for i, row in zip(indices, rows) for j in row]
        assert metrics["purity"].item() == pytest.approx(share_equal(pairs))
        hidden = (given[indices] < 0).sum().item()
        assert metrics["coverage"].item() == pytest.approx(len(guessed) / hidden)
        accuracy = share_equal([(labels[i], true[indices[i]]) for i in guessed])
        assert metrics["pseudo_accuracy"].item() == pytest.approx(accuracy, nan_ok=True)
        if number == 5:
            for _ in range(20):
                model.train_classifier()
    assert 0 < len(guessed) < hidden  # some were sure, some were not


@pytest.mark.parametrize(
    "changes", [{}, {"symmetric": False}, {"weighting": False}, {"renormalize": True}]
)
def test_a_step_of_mnn_is_that_of_the_paper(changes):
    """Neighbours are searched before the push, in both directions; weak targets are pushed."""
    model = small_model(mnn, bank_size=20, topk=3, lam=0.4, **changes).eval()
    bank = []
    for number, indices, weak, strong in three_epochs():
        directions = [(queries_of(model, strong), targets_of(model, weak))]
        if model.symmetric:
            directions.append((queries_of(model, weak), targets_of(model, strong)))
        losses = []
        for queries, targets in directions:
            for q, u in zip(queries, targets):
                rows = [bank[j] for j in nearest(u, bank, 3)]
                if number == 0:
                    rows = [u]  # the target stands in for its neighbours
                mixed = [0.4 * m + 0.6 * u for m in rows]
                if model.renormalize:
                    mixed = [z / z.norm() for z in mixed]
                loss = sum((2 - 2 * q @ z).item() for z in mixed) / len(mixed)
                if model.weighting:
                    loss += (2 - 2 * q @ u).item()
                losses.append(loss)
        loss, metrics = model(weak, strong, indices % 3)
        assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert math.isnan(metrics["purity"].item()) == (number == 0)
        bank = (bank + list(directions[0][1]))[-20:]


@pytest.mark.parametrize("script", METHODS)
def test_the_target_is_an_average_of_weights_and_gets_no_gradient(script):
    model = small_model(script)
    before = [weight.clone() for weight in model.target.parameters()]
    weak, strong = torch.randn(2, 8, 3, 4, 4)
    loss, _ = model(*arguments(script, weak, strong, torch.arange(8) % 3, torch.arange(8)))
    loss.backward()
    model.update_target()
    for old, new, online in zip(before, model.target.parameters(), model.online.parameters()):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)
        assert new.grad is None
        assert online.grad is not None
    assert all(weight.grad is not None for weight in model.predictor.parameters())


@pytest.mark.parametrize("script", METHODS)
def test_the_targets_batchnorm_trains_and_keeps_statistics_of_its_own(script):
    model = small_model(script)
    weak = torch.randn(8, 3, 4, 4)
    model(*arguments(script, weak, 3 * weak, torch.arange(8) % 3, torch.arange(8)))
    before = model.target[0][1].running_var.clone()
    assert (before != 1).all()  # of this batch
    model.update_target()
    assert torch.equal(model.target[0][1].running_var, before)
    assert not torch.allclose(model.online[0][1].running_var, before)


# ---- mnn.py


def test_lam_is_uniform_and_drawn_for_each_direction(monkeypatch):
    drawn = []
    mix = mnn.mix_neighbors
    monkeypatch.setattr(mnn, "mix_neighbors", lambda u, m, lam: drawn.append(lam) or mix(u, m, lam))
    model = small_model(mnn, lam="random")
    for _ in range(200):
        model(*torch.randn(2, 4, 3, 4, 4), torch.zeros(4, dtype=torch.int64))
    drawn = torch.stack(drawn)
    assert len(drawn.unique()) == len(drawn) == 400
    assert drawn.min() < 0.02 and drawn.max() > 0.98
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.05)


def test_split_batchnorm_is_batchnorm_of_each_part():
    norm = mnn.SplitBatchNorm(5, splits=4)
    images = (torch.randn(12, 5, 3, 3) * 2 + 1).requires_grad_(True)
    expected = torch.empty(12, 5, 3, 3)
    means = []
    variances = []
    for i in range(4):
        plain = torch.nn.BatchNorm2d(5)
        expected[i::4] = plain(images[i::4])  # images i, i + 4, i + 8
        means.append(plain.running_mean)
        variances.append(plain.running_var)
    normalized = norm(images)
    torch.testing.assert_close(normalized, expected)
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(dim=0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(dim=0))

    weights = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected.relu() * weights).sum(), images)
    (found,) = torch.autograd.grad((normalized.relu_() * weights).sum(), images)
    torch.testing.assert_close(found, wanted)

    norm.eval()
    plain.eval()
    plain.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(images), plain(images))


def split_model():
    return small_model(mnn, norm_layer=partial(mnn.SplitBatchNorm, splits=4))


def test_the_heads_batchnorm_is_not_split():
    """Without its bias, its output has the mean 0 over the batch, not over each part."""
    model = split_model()
    seen = []
    for head in (model.online[1], model.predictor, model.target[1]):
        head[1].register_forward_hook(lambda norm, inputs, output: seen.append(output - norm.bias))
    model(*torch.randn(2, 8, 3, 4, 4), torch.zeros(8, dtype=torch.int64))
    assert len(seen) == 6
    for output in seen:
        torch.testing.assert_close(output.mean(dim=0), torch.zeros(16), atol=1e-4, rtol=0)
        assert (output[:2].mean(dim=0).abs() > 0.01).any()


def test_the_networks_see_one_view_at_a_time_and_the_online_one_the_weak_first():
    model = split_model()
    seen = []
    model.online.register_forward_hook(lambda network, inputs, output: seen.append(inputs[0]))
    model.target.register_forward_hook(lambda network, inputs, output: seen.append(inputs[0]))
    weak, strong = torch.randn(2, 8, 3, 4, 4)
    model(weak, strong, torch.zeros(8, dtype=torch.int64))
    assert len(seen) == 4
    assert torch.equal(seen[0], weak) and torch.equal(seen[1], strong)
    for view, expected in zip(seen[2:], (weak, strong)):  # of the target: in another order
        assert sorted(view[:, 0, 0, 0].tolist()) == sorted(expected[:, 0, 0, 0].tolist())


def test_targets_are_shuffled_and_put_back():
    model = split_model().eval()
    seen = []
    model.target.register_forward_hook(lambda network, inputs, output: seen.append(inputs[0]))
    view = torch.randn(64, 3, 4, 4)
    targets = model.embed_targets(view)
    assert not torch.equal(seen[0], view)
    torch.testing.assert_close(targets, targets_of(model, view))
