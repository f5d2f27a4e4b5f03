"""The losses and the steps of the methods against their definitions, in loops and in float64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scripts import METHODS, small_model, step

import cmsf_semi
import cmsf_ssl
import mnn
import msf


def unit(*shape):
    """Random rows of unit norm, in float64."""
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def slow_loss(queries, neighbors):
    """Mean over images, mean over each one's list of neighbours, of ||q - M_j||^2."""
    total = 0.0
    for query, rows in zip(queries.tolist(), neighbors):
        for row in rows.tolist():
            total += sum((q - m) ** 2 for q, m in zip(query, row)) / len(rows)
    return total / len(queries)


def mean_shift_loss(script, queries, neighbors):
    """The loss with all neighbours valid."""
    if script is cmsf_semi:
        valid = torch.ones(neighbors.shape[:2], dtype=torch.bool, device=neighbors.device)
        return cmsf_semi.mean_shift_loss(queries, neighbors, valid)
    return script.mean_shift_loss(queries, neighbors)


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("b, k, d", [(1, 1, 2), (7, 5, 16), (3, 1, 8), (5, 12, 4)])
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
    changed = torch.where(valid[..., None], neighbors, unit(6, 5, 8))
    assert script.mean_shift_loss(queries, changed, valid).item() == loss.item()


@pytest.mark.parametrize("script", METHODS)
def test_the_loss_of_known_vectors(script):
    query = torch.tensor([[1.0, 0.0]])
    opposite_and_orthogonal = torch.tensor([[[-1.0, 0.0], [0.0, 1.0]]])
    assert mean_shift_loss(script, query, opposite_and_orthogonal).item() == 3  # 4 and 2
    assert mean_shift_loss(script, query, query[None]).item() == 0


@pytest.mark.parametrize("script", METHODS)
def test_the_gradient_is_that_of_the_definition(script):
    raw = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    neighbors = unit(4, 3, 6)
    loss = mean_shift_loss(script, F.normalize(raw, dim=1), neighbors)
    (ours,) = torch.autograd.grad(loss, raw)
    distances = (F.normalize(raw, dim=1)[:, None] - neighbors).pow(2).sum(dim=2)
    (expected,) = torch.autograd.grad(distances.mean(), raw)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "labels, neighbor_labels, purity",
    [
        ([0, 1], [[0, 0, 1], [0, 1, 1]], 4 / 6),
        ([0, -1], [[0, 0, 1], [-1, 1, 1]], 2 / 3),  # an image without a label does not count
        ([0, 1], [[0, -1, -1], [-1, -1, 0]], 1 / 2),  # nor does a row without one
        ([2], [[2, 2, 2]], 1),
        ([2], [[0, 1, 3]], 0),
    ],
)
def test_purity(labels, neighbor_labels, purity):
    measured = msf.label_purity(torch.tensor(neighbor_labels), torch.tensor(labels))
    assert measured.item() == pytest.approx(purity)


def test_purity_without_labels_is_not_a_number():
    assert msf.label_purity(torch.full((2, 3), -1), torch.full((2,), -1)).isnan()


# ---- a whole step, against the paper


class Steps:
    """Batches of 8 of 24 images, 12 of them, through a model, whose weights change in between; in
    BatchNorm's eval mode, so that no image depends on others. Keeps what was pushed."""

    def __init__(self, script, model, labels):
        self.script = script
        self.model = model.eval()
        self.labels = labels
        self.pushed = []  # the indices of the images
        self.targets = []

    def __iter__(self):
        for number in range(12):
            indices = torch.arange(8) + 8 * (number % 3)
            with torch.no_grad():
                for weight in self.model.online.parameters():
                    weight.add_(0.02 * torch.randn_like(weight))
            weak, strong = torch.randn(2, 8, 3, 16, 16)
            loss, metrics = step(
                self.script, self.model, weak, strong, self.labels[indices], indices
            )
            with torch.no_grad():
                queries = F.normalize(self.model.predictor(self.model.online(strong)), dim=1)
                targets = F.normalize(self.model.target(weak), dim=1)
            self.pushed += indices.tolist()
            self.targets += list(targets)
            yield number, indices, queries, targets, loss.item(), metrics

    def bank(self):
        """The last rows pushed, [M, D], and their images."""
        size = len(self.model.bank)
        return torch.stack(self.targets[-size:]), self.pushed[-size:]


def nearest(target, bank, k, allowed=None):
    """The k rows nearest to a target, or all that there are, of those that are allowed."""
    order = ((bank - target) ** 2).sum(dim=1).argsort().tolist()
    return [row for row in order if allowed is None or allowed[row]][:k]


def test_a_step_of_msf_is_that_of_the_paper():
    """Targets are pushed first; then the nearest rows are searched, among filled rows only."""
    labels = torch.randint(0, 3, (24,))
    steps = Steps(msf, small_model(msf), labels)
    for _, indices, queries, targets, loss, metrics in steps:
        bank, images = steps.bank()
        rows = [nearest(target, bank, 3) for target in targets]
        assert [row[0] for row in rows] == list(range(len(bank) - 8, len(bank)))  # the image itself
        assert loss == pytest.approx(slow_loss(queries, [bank[row] for row in rows]), abs=1e-5)
        same = [labels[images[j]] == labels[i] for i, row in zip(indices, rows) for j in row]
        assert metrics["purity"].item() == pytest.approx(sum(same).item() / len(same))
        assert metrics["spread"].item() == pytest.approx(targets.std(dim=0).norm().item())
    assert len(steps.pushed) == 96  # the bank of 32 has wrapped around


@pytest.mark.parametrize("constraint", ["previous-epoch", "third-view", "kmeans"])
def test_a_step_of_cmsf_is_that_of_the_paper(constraint, monkeypatch):
    """u' is that of the image's last time, at first u; here a third view is the weak one again."""
    labels = torch.randint(0, 3, (24,))
    backbone, width = cmsf_ssl.build_backbone("resnet10", "small-stride")
    model = cmsf_ssl.CMSF(backbone, width, 24, 3, 6, 20, 0.9, constraint)
    steps = Steps(cmsf_ssl, model, labels)
    last = {}  # image -> its last u
    others = []  # u', row by row
    clusters = torch.zeros(24, dtype=torch.int64)
    forward = model.forward

    def with_third_view(weak, strong, third, *given):
        return forward(weak, strong, weak, *given)

    monkeypatch.setattr(model, "forward", with_third_view)
    for number, indices, queries, targets, loss, metrics in steps:
        bank, images = steps.bank()
        for index, target in zip(indices.tolist(), targets):
            is_first = index not in last or constraint == "third-view"
            others.append(target if is_first else last[index])
        other_bank = torch.stack(others[-len(bank) :])
        plain = [nearest(target, bank, 3) for target in targets]
        related = []
        for index, target, other in zip(indices.tolist(), targets, others[-8:]):
            if constraint == "kmeans":
                candidates = [
                    row for row in range(len(bank)) if clusters[images[row]] == clusters[index]
                ]
            else:
                candidates = nearest(other, other_bank, 6)
            allowed = [row in candidates for row in range(len(bank))]
            related.append(nearest(target, bank, 3, allowed))
        expected = slow_loss(queries, [bank[row] for row in plain]) / 2
        expected += slow_loss(queries, [bank[row] for row in related]) / 2
        assert loss == pytest.approx(expected, abs=1e-5)
        if number < 3 and constraint != "third-view":
            assert related == plain  # the first epoch is that of MSF

        ranks = []
        for target, row in zip(targets, related):
            ranks.append(nearest(target, bank, len(bank)).index(row[-1]))
        assert metrics["rank"].item() == pytest.approx(sum(ranks) / 8, abs=0.13)
        same = [labels[images[j]] == labels[i] for i, row in zip(indices, related) for j in row]
        purity = sum(same).item() / len(same)
        assert metrics["purity_constrained"].item() == pytest.approx(purity)
        last |= dict(zip(indices.tolist(), targets))
        if number % 3 == 2 and constraint == "kmeans":
            model.update_clusters(images_per_cluster=6)
            clusters = model.clusters
            assert len(clusters.unique()) > 1


def test_a_step_of_cmsf_with_labels_is_that_of_the_paper():
    """The given label, else a confident prediction, else none."""
    labels = torch.arange(24) % 3
    given = torch.where(torch.arange(24) % 4 == 0, labels, -1)
    backbone, width = cmsf_semi.build_backbone("resnet10", "small-stride")
    model = cmsf_semi.CMSF(backbone, width, given, 4, 20, 0.9, confidence=0.6)
    steps = Steps(cmsf_semi, model, labels)
    used = []  # the label of every row
    kinds = set()
    for number, indices, queries, targets, loss, metrics in steps:
        bank, images = steps.bank()
        with torch.no_grad():
            probabilities = model.classifier(targets).softmax(dim=1).tolist()
        for index, probability in zip(indices.tolist(), probabilities):
            if given[index] >= 0:
                kinds.add("given")
                used.append(given[index].item())
            elif number > 5 and max(probability) >= 0.6:
                kinds.add("predicted")
                used.append(probability.index(max(probability)))
            else:
                kinds.add("none")
                used.append(-1)
        bank_labels = used[-len(bank) :]
        rows = []
        for label, target in zip(used[-8:], targets):
            allowed = [label in (-1, bank_label) for bank_label in bank_labels]
            rows.append(nearest(target, bank, 4, allowed))
        assert loss == pytest.approx(slow_loss(queries, [bank[row] for row in rows]), abs=1e-5)

        same = [labels[images[j]] == labels[i] for i, row in zip(indices, rows) for j in row]
        assert metrics["purity"].item() == pytest.approx(sum(same).item() / len(same))
        hidden = [i for i in range(8) if given[indices[i]] < 0]
        predicted = [i for i in hidden if used[-8:][i] >= 0]
        assert metrics["coverage"].item() == pytest.approx(len(predicted) / len(hidden))
        right = [used[-8:][i] == labels[indices[i]] for i in predicted]
        if right:
            accuracy = sum(right).item() / len(right)
            assert metrics["pseudo_accuracy"].item() == pytest.approx(accuracy)
        else:
            assert math.isnan(metrics["pseudo_accuracy"].item())
        if number == 5:
            for _ in range(20):
                model.train_classifier()
    assert kinds == {"given", "predicted", "none"}


@pytest.mark.parametrize("script", METHODS)
def test_the_target_is_an_average_of_weights_and_gets_no_gradient(script):
    model = small_model(script)
    before = [weight.clone() for weight in model.target.parameters()]
    images = torch.randn(8, 3, 16, 16)
    loss, _ = step(script, model, images, images, torch.arange(8) % 3, torch.arange(8))
    loss.backward()
    with torch.no_grad():
        for weight in model.online.parameters():
            weight.add_(torch.randn_like(weight))
    model.update_target()
    for old, new, online in zip(before, model.target.parameters(), model.online.parameters()):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)
        assert new.grad is None
        assert online.grad is not None
    assert all(weight.grad is not None for weight in model.predictor.parameters())


@pytest.mark.parametrize("script", [msf, cmsf_ssl, cmsf_semi])
def test_the_targets_batchnorm_keeps_statistics_of_its_own(script):
    model = small_model(script)
    weak = torch.randn(8, 3, 16, 16)
    strong = 5 + torch.randn(8, 3, 16, 16)
    step(script, model, weak, strong, torch.arange(8) % 3, torch.arange(8))
    online = model.online[0].bn1
    target = model.target[0].bn1
    assert online.num_batches_tracked == target.num_batches_tracked == 1
    model.update_target()
    assert not torch.allclose(online.running_mean, target.running_mean, atol=0.1)


def test_the_first_epoch_of_cmsf_is_that_of_msf():
    """The same losses and gradients from the same seed."""
    for constraint in ("previous-epoch", "kmeans"):
        torch.manual_seed(0)
        backbone, width = msf.build_backbone("resnet10", "small-stride")
        plain = msf.MSF(backbone, width, 3, 32, 0.9)
        torch.manual_seed(0)
        backbone, width = cmsf_ssl.build_backbone("resnet10", "small-stride")
        model = cmsf_ssl.CMSF(backbone, width, 40, 3, 5, 32, 0.9, constraint)
        for number in range(5):
            weak, strong = torch.randn(2, 8, 3, 16, 16)
            labels = torch.arange(8) % 3
            indices = 8 * number + torch.arange(8)
            expected, _ = plain(weak, strong, labels)
            loss, metrics = model(weak, strong, None, labels, indices)
            torch.testing.assert_close(loss, expected)
            assert metrics["rank"] == 2
        expected.backward()
        loss.backward()
        for ours, theirs in zip(model.online.parameters(), plain.online.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)


# ---- mnn.py


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_the_mix_and_both_terms_of_mnn_equal_loops(lam):
    queries, targets = unit(4, 6), unit(4, 6)
    neighbors = unit(4, 5, 6)
    mixed = mnn.mix_neighbors(targets, neighbors, lam)
    total = 0.0
    for i in range(4):
        total += (2 - 2 * queries[i] @ targets[i]).item() / 4
        for j in range(5):
            mix = lam * neighbors[i, j] + (1 - lam) * targets[i]
            torch.testing.assert_close(mixed[i, j], mix)
            total += (2 - 2 * queries[i] @ mix).item() / 20
    assert mnn.mnn_loss(queries, targets, mixed).item() == pytest.approx(total)


def mnn_model(**changes):
    backbone, width = mnn.build_backbone("resnet10", "small-stride")
    options = {"lam": 0.4, "weighting": True, "symmetric": True, "renormalize": False}
    return mnn.MNN(backbone, width, 32, 3, 20, 0.9, **options | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lam": "random"},
        {"symmetric": False},
        {"weighting": False},
        {"renormalize": True},
        {"weighting": False, "symmetric": False, "lam": 1.0},
    ],
)
def test_a_step_of_mnn_is_that_of_the_paper(changes, monkeypatch):
    """Neighbours are searched before the push; only the weak view's targets are pushed."""
    model = mnn_model(**changes)
    steps = Steps(mnn, model, torch.arange(24) % 3)
    views = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *batch: views.append(batch[:2]) or forward(*batch))
    drawn = []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *given, **kw: drawn.append(rand(*given)) or drawn[-1])
    for number, indices, queries, targets, loss, metrics in steps:
        weak, strong = views[-1]
        with torch.no_grad():
            weak_queries = F.normalize(model.predictor(model.online(weak)), dim=1)
            strong_targets = F.normalize(model.target(strong), dim=1)
        directions = [(queries, targets), (weak_queries, strong_targets)]
        if not model.symmetric:
            directions = directions[:1]
        before = torch.stack(steps.targets[:-8][-20:]) if number else None
        images = steps.pushed[:-8][-20:]
        losses = []
        for direction, (q, u) in enumerate(directions):
            lam = model.lam
            if lam == "random":
                lam = drawn[len(directions) * number + direction]
            for i in range(8):
                rows = nearest(u[i], before, 3) if number else []
                mixes = [lam * before[row] + (1 - lam) * u[i] for row in rows] or [u[i]]
                if model.renormalize:
                    mixes = [mix / mix.norm() for mix in mixes]
                terms = [(2 - 2 * q[i] @ mix).item() for mix in mixes]
                losses.append(sum(terms) / len(terms))
                if model.weighting:
                    losses[-1] += (2 - 2 * q[i] @ u[i]).item()
                if direction == 0 and number in (1, 2):  # no image comes twice in an epoch
                    assert indices[i] not in [images[row] for row in rows]
        assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert math.isnan(metrics["purity"].item()) == (number == 0)
    assert len(steps.pushed) == 96 and len(model.bank) == 20


def test_lam_is_uniform_and_drawn_for_each_direction(monkeypatch):
    drawn = []
    mix = mnn.mix_neighbors
    monkeypatch.setattr(mnn, "mix_neighbors", lambda u, m, lam: drawn.append(lam) or mix(u, m, lam))
    model = mnn_model(lam="random")
    embeddings = F.normalize(torch.randn(8, 128), dim=1)
    for _ in range(1000):
        model.one_direction(embeddings, embeddings, torch.zeros(8))
    drawn = torch.stack(drawn)
    assert drawn.min() < 0.01 and drawn.max() > 0.99
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.05)


def test_split_batchnorm_is_batchnorm_of_each_part():
    norm = mnn.SplitBatchNorm(5, splits=4)
    plain = torch.nn.BatchNorm2d(5)
    images = torch.randn(12, 5, 3, 3) * 2 + 1
    with torch.no_grad():
        norm.weight.uniform_()
        plain.weight.copy_(norm.weight)
    expected = []
    means = []
    variances = []
    for part in images.split(3):
        plain.reset_running_stats()
        expected.append(plain(part))
        means.append(plain.running_mean.clone())
        variances.append(plain.running_var.clone())
    torch.testing.assert_close(norm(images), torch.cat(expected))
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(dim=0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(dim=0))
    norm.eval()
    plain.eval()
    plain.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(images), plain(images))


def split_model():
    norm_layer = partial(mnn.SplitBatchNorm, splits=4)
    backbone, width = mnn.build_backbone("resnet10", "small-stride", norm_layer)
    options = {"lam": 0.4, "weighting": True, "symmetric": True, "renormalize": False}
    return mnn.MNN(backbone, width, 32, 3, 20, 0.9, **options)


def test_only_the_backbones_batchnorm_is_split():
    """The statistics of a head are those of the whole batch, of the backbone those of its parts."""
    model = split_model()
    for network in (model.online, model.target):
        kinds = {type(m) for m in network[0].modules() if isinstance(m, torch.nn.BatchNorm2d)}
        assert kinds == {mnn.SplitBatchNorm}
        assert type(network[1][1]) is torch.nn.BatchNorm1d
    assert type(model.predictor[1]) is torch.nn.BatchNorm1d

    seen = []
    model.online[1][1].register_forward_hook(lambda norm, inputs, output: seen.append(output))
    model.embed_queries(torch.randn(8, 3, 16, 16))
    (output,) = seen
    torch.testing.assert_close(output.mean(dim=0), torch.zeros(32), atol=1e-4, rtol=0)
    assert (output[:2].mean(dim=0).abs() > 0.01).any()  # not of each part


def test_the_networks_see_one_view_at_a_time_and_the_online_one_the_weak_first():
    model = split_model()
    calls = []
    hook = lambda name: lambda network, inputs, output: calls.append((name, inputs[0]))  # noqa: E731
    model.online.register_forward_hook(hook("online"))
    model.target.register_forward_hook(hook("target"))
    weak, strong = torch.randn(2, 8, 3, 16, 16)
    model(weak, strong, torch.zeros(8, dtype=torch.int64))
    assert [name for name, _ in calls] == ["online", "online", "target", "target"]
    for (_, view), expected in zip(calls, (weak, strong, weak, strong)):
        assert view.shape == expected.shape
        assert sorted(view[:, 0, 0, 0].tolist()) == sorted(expected[:, 0, 0, 0].tolist())
    assert torch.equal(calls[0][1], weak) and torch.equal(calls[1][1], strong)


def test_targets_are_shuffled_and_put_back():
    model = split_model()
    seen = []
    model.target.register_forward_hook(lambda network, inputs, output: seen.append(inputs[0]))
    view = torch.randn(64, 3, 16, 16)
    model.eval()
    targets = model.embed_targets(view)
    assert not torch.equal(seen[0], view)
    torch.testing.assert_close(
        targets, F.normalize(model.target(view), dim=1), atol=1e-5, rtol=1e-4
    )
