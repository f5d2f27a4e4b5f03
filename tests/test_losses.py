"""The loss of mean shift against its definition, in loops and in float64."""

import pytest
import torch
import torch.nn.functional as F
from scripts import METHODS

import msf


def unit(*shape):
    """Random rows of unit norm, in float64."""
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def slow_loss(queries, neighbors):
    """Mean over images, mean over neighbours, of ||q - M_j||^2."""
    total = 0.0
    for query, rows in zip(queries.tolist(), neighbors.tolist()):
        for row in rows:
            total += sum((q - m) ** 2 for q, m in zip(query, row)) / len(rows)
    return total / len(queries)


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("b, k, d", [(1, 1, 2), (7, 5, 16), (3, 1, 8), (5, 12, 4)])
def test_the_loss_equals_loops(script, b, k, d):
    queries = unit(b, d)
    neighbors = unit(b, k, d)
    expected = pytest.approx(slow_loss(queries, neighbors), abs=1e-12)
    assert script.mean_shift_loss(queries, neighbors).item() == expected


@pytest.mark.parametrize("script", METHODS)
def test_the_loss_of_known_vectors(script):
    query = torch.tensor([[1.0, 0.0]])
    opposite_and_orthogonal = torch.tensor([[[-1.0, 0.0], [0.0, 1.0]]])
    assert script.mean_shift_loss(query, opposite_and_orthogonal).item() == 3  # 4 and 2
    assert script.mean_shift_loss(query, query[None]).item() == 0


@pytest.mark.parametrize("script", METHODS)
def test_the_gradient_is_that_of_the_definition(script):
    raw = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    neighbors = unit(4, 3, 6)
    queries = F.normalize(raw, dim=1)
    (ours,) = torch.autograd.grad(script.mean_shift_loss(queries, neighbors), raw)
    queries = F.normalize(raw, dim=1)
    distances = (queries[:, None] - neighbors).pow(2).sum(dim=2)
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


def step_in_eval_mode(model, weak, strong, labels):
    """One training step; BatchNorm in eval mode, so that an image does not depend on others."""
    model.eval()
    loss, metrics = model(weak, strong, labels)
    loss.backward()
    return loss, metrics


def small_msf(bank_size=32):
    backbone, width = msf.build_backbone("resnet10", "small-stride")
    return msf.MSF(backbone, width, topk=3, bank_size=bank_size, ema=0.9)


def test_a_step_of_msf_is_that_of_the_paper():
    """Targets are pushed first; then the nearest rows are searched, among filled rows only."""
    model = small_msf()
    with torch.no_grad():
        for weight in model.online.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    pushed = []
    pushed_labels = []
    for _ in range(5):  # 40 rows into a bank of 32: it wraps around
        weak, strong = torch.randn(2, 8, 3, 16, 16)
        labels = torch.randint(0, 3, (8,))
        loss, metrics = step_in_eval_mode(model, weak, strong, labels)

        with torch.no_grad():
            queries = F.normalize(model.predictor(model.online(strong)), dim=1)
            targets = F.normalize(model.target(weak), dim=1)
        pushed += targets.tolist()
        pushed_labels += labels.tolist()
        bank = torch.tensor(pushed[-32:])
        bank_labels = torch.tensor(pushed_labels[-32:])
        distances = torch.cdist(targets.double(), bank.double())
        nearest = distances.argsort(dim=1)[:, :3]
        assert nearest[:, 0].tolist() == list(range(len(bank) - 8, len(bank)))  # the image itself
        assert loss.item() == pytest.approx(slow_loss(queries, bank[nearest]), abs=1e-5)
        same = bank_labels[nearest] == labels[:, None]
        assert metrics["purity"].item() == pytest.approx(same.float().mean().item())
        assert metrics["spread"].item() == pytest.approx(targets.std(dim=0).norm().item())


def test_the_target_is_an_average_of_weights_and_gets_no_gradient():
    model = small_msf()
    before = [weight.clone() for weight in model.target.parameters()]
    images = torch.randn(8, 3, 16, 16)
    loss, _ = model(images, images, torch.zeros(8, dtype=torch.int64))
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


def test_the_targets_batchnorm_keeps_statistics_of_its_own():
    model = small_msf()
    weak = torch.randn(8, 3, 16, 16)
    strong = 5 + torch.randn(8, 3, 16, 16)
    model(weak, strong, torch.zeros(8, dtype=torch.int64))
    online = model.online[0].bn1
    target = model.target[0].bn1
    assert online.num_batches_tracked == target.num_batches_tracked == 1
    model.update_target()
    assert not torch.allclose(online.running_mean, target.running_mean, atol=0.1)
