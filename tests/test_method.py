"""The loss, the search and the bank against slow transcriptions of their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

import eval_linear
import msf


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def slow_loss(queries, neighbors, valid=None):
    """Mean over images of the mean over valid neighbours of ||q - m||^2, in loops."""
    per_image = []
    for i, query in enumerate(queries.double()):
        terms = []
        for j, row in enumerate(neighbors[i].double()):
            if valid is None or valid[i, j]:
                q, m = query / query.norm(), row / row.norm()
                terms.append(sum((a - b) ** 2 for a, b in zip(q.tolist(), m.tolist())))
        if terms:
            per_image.append(sum(terms) / len(terms))
    return sum(per_image) / len(per_image) if per_image else 0.0


def slow_neighbors(targets, bank, k):
    """All distances in float64, sorted: the k smallest of each target."""
    rows = []
    for target in targets.double():
        distances = [((target - row) ** 2).sum().item() for row in bank.double()]
        rows.append(sorted(range(len(bank)), key=lambda j: distances[j])[:k])
    return torch.tensor(rows, dtype=torch.int64)


@pytest.mark.parametrize("b, k, d", [(1, 1, 2), (7, 5, 16), (3, 1, 8), (5, 12, 4)])
def test_loss_equals_loops(b, k, d):
    queries, neighbors = torch.randn(b, d, dtype=torch.float64), unit(b, k, d)
    assert msf.mean_shift_loss(queries, neighbors).item() == pytest.approx(
        slow_loss(queries, neighbors), abs=1e-12
    )
    valid = torch.rand(b, k) < 0.5
    valid[0] = True
    valid[-1] = b == 1  # an image without a valid neighbour
    assert msf.mean_shift_loss(queries, neighbors, valid).item() == pytest.approx(
        slow_loss(queries, neighbors, valid), abs=1e-12
    )


def test_loss_of_known_vectors():
    query, opposite = torch.tensor([[2.0, 0.0]]), torch.tensor([[[-1.0, 0.0], [0.0, 1.0]]])
    assert msf.mean_shift_loss(query, opposite).item() == 3.0  # 4 and 2
    assert msf.mean_shift_loss(query, query[None]).item() == 0.0
    nobody = torch.zeros(1, 2, dtype=torch.bool)
    assert msf.mean_shift_loss(query, opposite, nobody).item() == 0.0


def test_loss_gradient_equals_autograd_of_the_definition():
    queries = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    neighbors = unit(4, 3, 6)
    (fast,) = torch.autograd.grad(msf.mean_shift_loss(queries, neighbors), queries)
    distance = (F.normalize(queries, dim=1)[:, None] - neighbors).pow(2).sum(2).mean()
    (slow,) = torch.autograd.grad(distance, queries)
    torch.testing.assert_close(fast, slow)


def test_invalid_neighbours_have_no_gradient_and_may_hold_anything():
    queries = torch.randn(2, 4, requires_grad=True)
    neighbors = unit(2, 3, 4, dtype=torch.float32)
    valid = torch.tensor([[True, False, True], [True, True, False]])
    loss = msf.mean_shift_loss(queries, neighbors, valid)
    (gradient,) = torch.autograd.grad(loss, queries)
    changed = torch.where(valid[..., None], neighbors, unit(2, 3, 4, dtype=torch.float32))
    (again,) = torch.autograd.grad(msf.mean_shift_loss(queries, changed, valid), queries)
    torch.testing.assert_close(gradient, again)


# blocks of 1, 1, 1, 8, 64 (fewer than k), 64, 64 and 32 rows
SIZES = [(1, 1), (5, 5), (37, 4), (1000, 10), (128, 70), (192, 192), (4096, 20), (1440, 31)]


@pytest.mark.parametrize("m, k", SIZES)
def test_neighbours_equal_a_full_sort(m, k):
    targets, bank = unit(9, 8), unit(m, 8)
    found = msf.nearest_neighbors(targets, bank, k)
    assert found.shape == (9, k)
    assert torch.equal(found, slow_neighbors(targets, bank, k))


def test_neighbours_among_ties_are_distinct_rows_at_the_smallest_distances():
    bank = unit(4, 6).repeat(5, 1)  # every row five times
    targets = torch.cat([bank[:3], unit(3, 6)])
    found = msf.nearest_neighbors(targets, bank, 7)
    assert all(len(set(row)) == 7 for row in found.tolist())
    distances = torch.cdist(targets, bank)
    expected = distances.sort(dim=1).values[:, :7]
    torch.testing.assert_close(distances.gather(1, found), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("spread", ["one block", "all blocks", "all rows"])
def test_the_best_rows_are_found_wherever_they_lie(spread):
    """512 rows are searched in blocks of 64: the 40 best in one, five in each, or all the same."""
    targets, bank = unit(3, 8), unit(512, 8)
    near = torch.arange(40) + 64 if spread == "one block" else torch.randperm(512)[:40]
    if spread == "all blocks":
        near = (torch.arange(8)[:, None] * 64 + torch.tensor([0, 1, 31, 62, 63])).flatten()
    targets[:] = targets[0]
    bank[near] = F.normalize(targets[0] + 0.01 * torch.randn(40, 8), dim=1)
    if spread == "all rows":
        bank[:] = bank[0]
    found = msf.nearest_neighbors(targets, bank, 40)
    assert all(len(set(row)) == 40 for row in found.tolist())
    if spread != "all rows":
        assert torch.equal(found, slow_neighbors(targets, bank, 40))
        assert sorted(found[0].tolist()) == sorted(near.tolist())


def test_a_mask_may_leave_whole_blocks_empty():
    targets, bank, mask = unit(4, 8), unit(256, 8), torch.zeros(4, 256, dtype=torch.bool)
    mask[0, [3, 130]], mask[1, 64:128], mask[2] = True, True, True
    found = msf.nearest_neighbors(targets, bank, 70, mask)
    for i, count in enumerate((2, 64, 70, 0)):
        left = mask[i].nonzero()[:, 0]
        expected = left[slow_neighbors(targets[i : i + 1], bank[left], count)[0]].tolist()
        assert found[i].tolist() == expected + [-1] * (70 - count)


def test_a_row_that_is_not_a_number_is_never_passed_over_in_silence():
    targets, bank = unit(2, 8), unit(128, 8)
    bank[77] = math.nan
    assert (msf.nearest_neighbors(targets, bank, 3) == 77).any(1).all()


@pytest.mark.parametrize("shape", [(20,), (9, 20)])
def test_masked_neighbours_equal_a_sort_of_the_rows_left(shape):
    targets, bank = unit(9, 8), unit(20, 8)
    mask = torch.rand(shape) < 0.4
    if len(shape) == 2:
        mask[0], mask[1] = False, torch.arange(20) == 7  # no row, and one row
    found = msf.nearest_neighbors(targets, bank, 6, mask)
    for i, row in enumerate(found):
        left = mask.expand(9, 20)[i].nonzero()[:, 0]
        expected = left[slow_neighbors(targets[i : i + 1], bank[left], 6)[0]].tolist()
        assert row.tolist() == expected + [-1] * (6 - len(expected))


def test_more_neighbours_than_rows_is_an_error():
    with pytest.raises(ValueError, match="k = 4 .* 3 rows"):
        msf.nearest_neighbors(unit(2, 5), unit(3, 5), 4)


@pytest.mark.parametrize("size, pushes", [(8, [3, 3, 3, 8, 1]), (5, [5, 5]), (6, [4, 4, 4]), (4, [9])])
def test_bank_equals_a_list_first_in_first_out(size, pushes):
    bank, rows, pushed = msf.MemoryBank(size, 3), [None] * size, 0
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
    assert set(dict(bank.named_buffers())) == {"embeddings", "labels", "indices"}


def small_model(**changes):
    given = dict(bank_size=32, topk=3) | changes
    args, _ = msf.resolve(msf.Args(**given))
    return msf.MSF(args), args


def test_a_step_equals_the_paper():
    """forward: EMA first, then targets, push, search over filled rows only, loss, purity."""
    model, args = small_model(batch_size=8)
    model.eval()  # BatchNorm in eval mode, so that rows do not depend on their batch
    with torch.no_grad():
        for weight in model.online.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    rows, labels_seen = [], []
    for step in range(5):  # 40 rows into 32: the bank wraps around
        before = [w.clone() for w in model.target.parameters()]
        weak, strong = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16)
        labels, indices = torch.randint(-1, 3, (8,)), torch.arange(8 * step, 8 * step + 8)
        loss, metrics = model([weak, strong], labels, indices)
        for old, new, online in zip(before, model.target.parameters(), model.online.parameters()):
            torch.testing.assert_close(new, args.ema * old + (1 - args.ema) * online)
        with torch.no_grad():
            queries, targets = model.predictor(model.online(strong)), model.target(weak)
        rows += list(F.normalize(targets, dim=1))
        labels_seen += labels.tolist()
        recent, recent_labels = rows[-32:], labels_seen[-32:]
        nearest = slow_neighbors(F.normalize(targets, dim=1), torch.stack(recent), 3)
        assert loss.item() == pytest.approx(slow_loss(queries, torch.stack(recent)[nearest]), abs=1e-5)
        own = torch.arange(len(recent) - 8, len(recent))
        assert torch.equal(nearest[:, 0], own)  # each image is its own first neighbour
        pairs = [(labels[i].item(), recent_labels[j]) for i in range(8) for j in nearest[i].tolist()]
        known = [a == b for a, b in pairs if a >= 0 and b >= 0]
        assert metrics["purity"].item() == pytest.approx(sum(known) / max(1, len(known)))
        with torch.no_grad():
            for weight in model.online.parameters():
                weight.add_(0.01 * torch.randn_like(weight))


def test_no_gradient_reaches_target_or_bank():
    model, _ = small_model(batch_size=4)
    images = torch.randn(4, 3, 16, 16)
    model([images, images], torch.zeros(4).long(), torch.arange(4))[0].backward()
    assert all(w.grad is None for w in model.target.parameters())
    assert all(w.grad is not None for w in [*model.online.parameters(), *model.predictor.parameters()])
    assert not model.bank.embeddings.requires_grad


def test_target_keeps_batch_statistics_of_its_own():
    model, _ = small_model(batch_size=8)
    weak, strong = torch.randn(8, 3, 16, 16), 5 + torch.randn(8, 3, 16, 16)
    model([weak, strong], torch.zeros(8).long(), torch.arange(8))
    online, target = model.online[0].bn1, model.target[0].bn1
    assert target.num_batches_tracked == online.num_batches_tracked == 1
    assert not torch.allclose(online.running_mean, target.running_mean)


@pytest.mark.parametrize("k, temperature", [(1, None), (4, None), (30, None), (7, 0.1)])
def test_knn_predict_equals_loops(k, temperature):
    queries, features = torch.randn(20, 5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    features[10:20] = features[:10]  # ties between rows, of other classes
    labels = torch.randint(0, 4, (30,))
    labels[10:20] = labels[:10]
    predicted = eval_linear.knn_predict(queries, features, labels, k, 6, temperature)
    for query, answer in zip(queries, predicted):
        cosines = [(F.cosine_similarity(query, row, dim=0).item(), label.item())
                   for row, label in zip(features, labels)]
        votes = [0.0] * 6
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            votes[label] += math.exp(cosine / temperature) if temperature else 1
        assert answer == votes.index(max(votes))  # the lower class wins a tie


def test_knn_with_too_few_rows_is_an_error():
    with pytest.raises(ValueError, match="k = 3"):
        eval_linear.knn_predict(torch.randn(1, 4), torch.randn(2, 4), torch.tensor([0, 1]), 3, 2)


@pytest.mark.parametrize(
    "arch, stem", [("resnet18", "small"), ("resnet50", "imagenet"), ("resnet10", "small-stride")]
)
def test_backbone_loads_strictly_into_torchvision(arch, stem):
    import torchvision

    net, width = msf.encoder(arch, stem)
    if arch == "resnet10":
        other = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    else:
        other = getattr(torchvision.models, arch)()
    other.fc = torch.nn.Identity()
    if stem != "imagenet":
        other.conv1 = torch.nn.Conv2d(3, 64, 3, 2 if stem == "small-stride" else 1, 1, bias=False)
        other.maxpool = torch.nn.Identity()
    other.load_state_dict(net.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    assert net.eval()(images).shape == (2, width)
    torch.testing.assert_close(net(images), other.eval()(images))
