"""Mixed nearest neighbours: mix and losses in loops, split BatchNorm, a step and a run."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cmsf_ssl
import mnn

from .conftest import slow_loss, slow_neighbors, train_stop_and_resume, unit


def slow_mix(target, neighbor, lam):
    """lam M_j + (1 - lam) u_i, number by number."""
    size = [math.sqrt(sum(x * x for x in row.tolist())) for row in (target, neighbor)]
    pairs = zip(target.tolist(), neighbor.tolist())
    return [lam * m / size[1] + (1 - lam) * u / size[0] for u, m in pairs]


def slow_distance(query, vector):
    """2 - 2 q.v: the query of unit norm, the vector as it is."""
    size = math.sqrt(sum(x * x for x in query.tolist()))
    return 2 - 2 * sum(a * b for a, b in zip(query.tolist(), vector)) / size


def slow_mnn(queries, targets, mixed, weighting=True):
    total = 0.0
    for query, target, row in zip(queries, targets, mixed):
        total += sum(slow_distance(query, m.tolist()) for m in row) / len(row)
        size = target.norm().item()
        total += weighting * slow_distance(query, [x / size for x in target.tolist()])
    return total / len(queries)


@pytest.mark.parametrize("b, k, d", [(1, 1, 2), (7, 5, 16), (3, 12, 4)])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mix_and_loss_equal_loops(b, k, d, lam):
    queries, targets, neighbors = (torch.randn(*s, d).double() for s in ((b,), (b,), (b, k)))
    mixed = mnn.mix_neighbors(targets, neighbors, lam)
    assert mixed.shape == (b, k, d)
    for i in range(b):
        for j in range(k):
            expected = slow_mix(targets[i], neighbors[i, j], lam)
            assert mixed[i, j].tolist() == pytest.approx(expected, abs=1e-12)
    for weighting in (True, False):
        loss = mnn.mnn_loss(queries, targets, mixed, weighting)
        expected = slow_mnn(queries, targets, mixed, weighting)
        assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_the_loss_weights_target_and_neighbours_as_the_paper_says(lam):
    """(2 - lam) d(q, u) + lam mean d(q, M_j), if the mix keeps its length."""
    queries, targets, neighbors = unit(6, 8), unit(6, 8), unit(30, 8).view(6, 5, 8)
    loss = mnn.mnn_loss(queries, targets, mnn.mix_neighbors(targets, neighbors, lam))
    own = slow_loss(queries, targets[:, None], torch.ones(6, 1, dtype=torch.bool))
    others = slow_loss(queries, neighbors, torch.ones(6, 5, dtype=torch.bool))
    assert loss.item() == pytest.approx((2 - lam) * own + lam * others, abs=1e-6)


@pytest.mark.parametrize("b, k", [(1, 1), (6, 5)])
def test_info_nce_equals_loops(b, k):
    """NNCLR's: each positive against the other images' targets, b of 2 b of them on this process."""
    queries, everyone = torch.randn(b, 8).double(), unit(2 * b, 8).double()
    positives, own = torch.randn(b, k, 8).double(), torch.eye(2 * b, dtype=torch.bool)[:b]
    total = 0.0
    for i in range(b):
        query = queries[i] / queries[i].norm()
        others = [math.exp((query @ everyone[n]).item() / 0.2) for n in range(2 * b) if n != i]
        for j in range(k):
            positive = math.exp((query @ positives[i, j]).item() / 0.2)
            total -= math.log(positive / (positive + sum(others))) / (b * k)
    loss = mnn.info_nce(queries, everyone, positives, own)
    assert loss.item() == pytest.approx(total, abs=1e-9)
    alone = mnn.info_nce(queries[:1], everyone[:1], positives[:1], own[:1, :1])
    assert alone == 0  # no other image to tell it from


def split(net, size):
    """What main does: parts of so many images."""
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.__class__, norm.size = mnn.SplitBatchNorm, size
    return net


def test_split_batchnorm_equals_each_split_alone():
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    plain.extend([nn.Linear(24, 5), nn.BatchNorm1d(5)])
    parts, whole = [copy.deepcopy(plain) for _ in range(4)], split(copy.deepcopy(plain), 3)
    assert whole.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(12, 3, 4, 4)
    expected = torch.cat([net(x) for net, x in zip(parts, images.chunk(4))])
    torch.testing.assert_close(whole(images), expected)
    assert not torch.allclose(plain(images), expected, atol=1e-3)
    weight = torch.randn_like(expected)
    (whole(images) * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, value in whole.named_parameters():
        grads = [net.get_parameter(name).grad for net in parts]
        torch.testing.assert_close(value.grad, sum(grads), atol=1e-5, rtol=1e-4)


def test_running_statistics_are_the_mean_of_the_splits_and_serve_in_eval_mode():
    whole = split(nn.BatchNorm1d(5), 4)
    for _ in range(4):
        x, alone = torch.randn(12, 5) * 3 + 1, []
        for part in x.chunk(3):
            alone.append(nn.BatchNorm1d(5))
            alone[-1].load_state_dict(whole.state_dict())
            alone[-1](part)
        whole(x)
        for name in ("running_mean", "running_var"):
            expected = sum(getattr(norm, name) for norm in alone) / 3
            torch.testing.assert_close(getattr(whole, name), expected)
    plain, before = nn.BatchNorm1d(5), copy.deepcopy(whole.state_dict())
    plain.load_state_dict(before)
    torch.testing.assert_close(whole.eval()(x), plain.eval()(x))
    assert all(torch.equal(before[name], value) for name, value in whole.state_dict().items())


def small_model(**changes):
    given = dict(bank_size=20, topk=4, batch_size=8) | changes
    args, _ = mnn.resolve(mnn.Args(**given))
    return mnn.MNN(args), args


def test_the_shuffle_is_undone():
    model = split(small_model(bn_splits=2)[0], 4)
    views, seen = list(torch.randn(2, 8, 3, 16, 16)), []
    forward = model.target.forward
    model.target.forward = lambda x: seen.append(x) or forward(x)
    with torch.no_grad():
        found = model.eval().shuffled_targets(views)
        for outputs, view in zip(found, views):
            torch.testing.assert_close(outputs, forward(view))
        model.bank.pushed = 8  # the next step has another order
        torch.testing.assert_close(model.shuffled_targets(views), found)
    for view, part in zip(views, seen[0].chunk(2)):
        order = [next(i for i in range(8) if torch.equal(view[i], x)) for x in part]
        assert sorted(order) == list(range(8)) and order != list(range(8))
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_on_parts_normalises_each_part_of_each_view_alone(parts):
    """One pass for both views gives what a pass for each part of each view gives."""
    model, args = small_model(bn_splits=parts, lam=0.4)
    frozen = copy.deepcopy(model)
    split(model, 8 // parts)
    weak, strong = torch.randn(2, 8, 3, 16, 16)
    loss, _ = model([weak, strong], torch.zeros(8).long(), torch.arange(8))
    queries = [[], []]
    for side, view in enumerate((strong, weak)):
        for part in view.chunk(parts):
            queries[side].append(frozen.predictor(frozen.online(part)))
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(8, generator=generator)
    total = 0.0
    with torch.no_grad():
        for side, view in enumerate((weak, strong)):
            outputs = [frozen.target(part) for part in view[order].chunk(parts)]
            targets = F.normalize(torch.cat(outputs), dim=1)[order.argsort()]
            mixed = mnn.mix_neighbors(targets, targets[:, None], 0.4)  # the first step
            total += slow_mnn(torch.cat(queries[side]), targets, mixed) / 2
    assert loss.item() == pytest.approx(total, abs=1e-4)


VARIANTS = [
    dict(lam=0.3), dict(lam=0.7, symmetric=False), dict(lam=0.5, renormalize_mix=True),
    dict(lam=1.0, weighting=False, symmetric=False), dict(lam=0.4, objective="info-nce"),
    dict(lam=0.4, objective="info-nce", weighting=False, symmetric=False), dict(lam="random"),
    dict(lam="random", symmetric=False),
]


@pytest.mark.parametrize("given", VARIANTS)
def test_a_step_equals_the_paper(given):
    """Eight batches of 24 images; the neighbours are found before the batch is pushed."""
    model, args = small_model(**given)
    model.eval()  # BatchNorm in eval mode, so that rows do not depend on their batch
    truth, rows, lams = torch.arange(24) % 3, [], []
    for step in range(8):
        weak, strong = torch.randn(2, 8, 3, 16, 16)
        indices = torch.arange(8) + 8 * (step % 3)
        with torch.no_grad():
            for weight in model.online.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        loss, metrics = model([weak, strong], truth[indices], indices)
        total, purities = 0.0, []
        lam = metrics["lam"].item() if args.lam == "random" else args.lam
        lams.append(lam)
        with torch.no_grad():
            for online, target in ((strong, weak), (weak, strong))[: 1 + args.symmetric]:
                queries = model.predictor(model.online(online))
                targets = F.normalize(model.target(target), dim=1)
                if target is weak:
                    new = [(u, t, i) for u, t, i in zip(targets, truth[indices], indices)]
                bank = torch.stack([row[0] for row in rows]) if rows else None
                found = slow_neighbors(targets, bank, 4) if rows else None
                near = bank[found] if rows else targets[:, None]
                mixed = torch.stack([
                    torch.tensor([slow_mix(u, m, lam) for m in row]) for u, row in zip(targets, near)
                ])
                mixed = mixed / mixed.norm(dim=2, keepdim=True) if args.renormalize_mix else mixed
                if args.objective == "mnn":
                    total += slow_mnn(queries, targets, mixed, args.weighting)
                else:
                    own = torch.eye(8, dtype=torch.bool)
                    for x in (mixed, targets[:, None])[: 1 + args.weighting]:
                        total += mnn.info_nce(queries, targets, x, own).item()
                if rows:
                    right = [truth[i] == rows[j][1] for i, r in zip(indices, found) for j in r]
                    purities.append(sum(map(int, right)) / len(right))
        if args.lam != "random" or not args.symmetric:
            assert loss.item() == pytest.approx(total / (1 + args.symmetric), abs=1e-4)
        if rows:
            assert metrics["purity"].item() == pytest.approx(sum(purities) / len(purities))
        rows = (rows + new)[-20:]
        order = model.bank.indices[: len(model.bank)].argsort()  # no image is there twice
        kept = sorted(rows, key=lambda row: row[2].item())
        assert model.bank.indices[order].tolist() == [row[2].item() for row in kept]
        assert model.bank.labels[order].tolist() == [row[1].item() for row in kept]
        embeddings = torch.stack([row[0] for row in kept])
        torch.testing.assert_close(model.bank.embeddings[order], embeddings, atol=1e-5, rtol=1e-4)
    assert args.lam != "random" or len(set(lams)) == 8 and 0 < min(lams) < max(lams) < 1


def test_splits_and_weights_that_cannot_work_are_one_line(monkeypatch):
    for given in (dict(lam=1.5), dict(lam=-0.1), dict(lam=math.nan), dict(bn_splits=0),
                  dict(bn_splits=3), dict(bn_splits=64), dict(bn_splits=-2)):
        with pytest.raises(SystemExit, match=r"^error: --(lam|bn-splits) [^\n]*$"):
            mnn.main(mnn.Args(**given))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit, match=r"^error: --bn-splits 2: .* 4 processes"):
        mnn.main(mnn.Args(bn_splits=2))
    assert not Path("runs").exists()


def test_without_mixing_and_weighting_it_is_the_loss_of_mean_shift():
    queries, targets, neighbors = unit(6, 8), unit(6, 8), unit(30, 8).view(6, 5, 8)
    loss = mnn.mnn_loss(queries, targets, mnn.mix_neighbors(targets, neighbors, 1.0), False)
    torch.testing.assert_close(loss, cmsf_ssl.mean_shift_loss(queries, neighbors))


def test_a_run_resumes_bit_for_bit(few_digits, monkeypatch):
    result, run = train_stop_and_resume(mnn, monkeypatch, bn_splits=2)
    assert 0 < result["lam"] < 1 and result["knn"] > 40
    assert run["model"]["bank.embeddings"].shape == (50, 128)
