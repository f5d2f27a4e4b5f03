"""The loss, the search and the bank that the scripts share, against transcriptions in loops."""

import math

import pytest
import torch
import torchvision

import cmsf_ssl
import eval_linear

from .conftest import slow_loss, slow_neighbors, unit


@pytest.mark.parametrize("b, k, d", [(1, 1, 2), (7, 5, 16), (3, 1, 8), (5, 12, 4)])
def test_loss_equals_loops(b, k, d):
    queries, neighbors = torch.randn(b, d, dtype=torch.float64), unit(b, k, d)
    assert cmsf_ssl.mean_shift_loss(queries, neighbors).item() == pytest.approx(
        slow_loss(queries, neighbors), abs=1e-12
    )
    valid = torch.rand(b, k) < 0.5
    valid[0] = True
    valid[-1] = b == 1  # an image without a valid neighbour
    assert cmsf_ssl.mean_shift_loss(queries, neighbors, valid).item() == pytest.approx(
        slow_loss(queries, neighbors, valid), abs=1e-12
    )


def test_loss_of_known_vectors():
    query, opposite = torch.tensor([[2.0, 0.0]]), torch.tensor([[[-1.0, 0.0], [0.0, 1.0]]])
    assert cmsf_ssl.mean_shift_loss(query, opposite).item() == 3.0  # 4 and 2
    assert cmsf_ssl.mean_shift_loss(query, query[None]).item() == 0.0
    nobody = torch.zeros(1, 2, dtype=torch.bool)
    assert cmsf_ssl.mean_shift_loss(query, opposite, nobody).item() == 0.0


def test_invalid_neighbours_have_no_gradient_and_may_hold_anything():
    queries = torch.randn(2, 4, requires_grad=True)
    neighbors = unit(2, 3, 4, dtype=torch.float32)
    valid = torch.tensor([[True, False, True], [True, True, False]])
    loss = cmsf_ssl.mean_shift_loss(queries, neighbors, valid)
    (gradient,) = torch.autograd.grad(loss, queries)
    changed = torch.where(valid[..., None], neighbors, unit(2, 3, 4, dtype=torch.float32))
    (again,) = torch.autograd.grad(cmsf_ssl.mean_shift_loss(queries, changed, valid), queries)
    torch.testing.assert_close(gradient, again)


# blocks of 1, 1, 1, 8, 64 (fewer than k), 64 and 32 rows
SIZES = [(1, 1), (5, 5), (37, 4), (1000, 10), (128, 70), (192, 192), (1440, 31)]


@pytest.mark.parametrize("m, k", SIZES)
def test_neighbours_equal_a_full_sort(m, k):
    targets, bank = unit(9, 8), unit(m, 8)
    found = cmsf_ssl.nearest_neighbors(targets, bank, k)
    assert found.shape == (9, k)
    assert torch.equal(found, slow_neighbors(targets, bank, k))


def test_a_mask_may_leave_whole_blocks_empty():
    targets, bank, mask = unit(4, 8), unit(256, 8), torch.zeros(4, 256, dtype=torch.bool)
    mask[0, [3, 130]], mask[1, 64:128], mask[2] = True, True, True
    found = cmsf_ssl.nearest_neighbors(targets, bank, 70, mask)
    for i, count in enumerate((2, 64, 70, 0)):
        left = mask[i].nonzero()[:, 0]
        expected = left[slow_neighbors(targets[i : i + 1], bank[left], count)[0]].tolist()
        assert found[i].tolist() == expected + [-1] * (70 - count)


@pytest.mark.parametrize("shape", [(20,), (9, 20)])
def test_masked_neighbours_equal_a_sort_of_the_rows_left(shape):
    targets, bank = unit(9, 8), unit(20, 8)
    mask = torch.rand(shape) < 0.4
    if len(shape) == 2:
        mask[0], mask[1] = False, torch.arange(20) == 7  # no row, and one row
    found = cmsf_ssl.nearest_neighbors(targets, bank, 6, mask)
    for i, row in enumerate(found):
        left = mask.expand(9, 20)[i].nonzero()[:, 0]
        expected = left[slow_neighbors(targets[i : i + 1], bank[left], 6)[0]].tolist()
        assert row.tolist() == expected + [-1] * (6 - len(expected))


def test_more_neighbours_than_rows_is_an_error():
    with pytest.raises(ValueError, match="k = 4 .* 3 rows"):
        cmsf_ssl.nearest_neighbors(unit(2, 5), unit(3, 5), 4)


@pytest.mark.parametrize("size, pushes", [(8, [3, 3, 3, 8, 1]), (5, [5, 5]), (4, [9])])
def test_bank_equals_a_list_first_in_first_out(size, pushes):
    bank, rows, pushed = cmsf_ssl.MemoryBank(size, 3), [None] * size, 0
    for n in pushes:
        embeddings, labels = torch.randn(n, 3), torch.randint(0, 9, (n,))
        indices = torch.arange(pushed, pushed + n)
        bank.enqueue(embeddings, labels, indices)
        for row in zip(embeddings, labels, indices):
            rows[pushed % size] = row
            pushed += 1
        assert len(bank) == min(pushed, size)
        for i, row in enumerate(rows):
            if row is None:
                assert bank.labels[i] == bank.indices[i] == -1
            else:
                assert torch.equal(bank.embeddings[i], row[0])
                assert (bank.labels[i], bank.indices[i]) == row[1:]


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


@pytest.mark.parametrize("arch, stem", [("resnet18", "small"), ("resnet10", "small-stride")])
def test_backbone_loads_strictly_into_torchvision(arch, stem):
    net, width = cmsf_ssl.encoder(arch, stem)
    if arch == "resnet10":
        other = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    else:
        other = getattr(torchvision.models, arch)()
    other.fc = torch.nn.Identity()
    other.conv1 = torch.nn.Conv2d(3, 64, 3, 2 if stem == "small-stride" else 1, 1, bias=False)
    other.maxpool = torch.nn.Identity()
    other.load_state_dict(net.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert net.eval()(images).shape == (2, width)
    torch.testing.assert_close(net(images), other.eval()(images))
