"""Constrained mean shift, self-supervised: the constraint in loops, and a run."""

import pytest
import torch
import torch.nn.functional as F

import cmsf_ssl

from .conftest import slow_loss, slow_neighbors, train_stop_and_resume, unit

CONSTRAINTS = ("previous-epoch", "third-view", "kmeans")


def slow_constrained(target, bank, other_target, other_bank, k, n, known):
    """C(i) by a full sort of the rows that are known, then the k of C(i) nearest to the target."""
    rows = [j for j in range(len(bank)) if known[j]]
    rows.sort(key=lambda j: ((other_target - other_bank[j]) ** 2).sum().item())
    candidates = rows[:n]
    nearest = sorted(candidates, key=lambda j: ((target - bank[j]) ** 2).sum().item())
    return nearest[:k], candidates


@pytest.mark.parametrize("m, k, n", [(40, 5, 10), (40, 5, 5), (40, 1, 40), (7, 5, 50), (3, 3, 3)])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.0])
def test_constrained_neighbours_equal_loops(m, k, n, share):
    targets, bank, other_targets, other_bank = unit(6, 8), unit(m, 8), unit(6, 8), unit(m, 8)
    known = torch.rand(m) < share
    mask = None if share == 1 else known
    found = cmsf_ssl.constrained_neighbors(targets, bank, other_targets, other_bank, k, n, mask)
    assert found.shape == (6, k) and found.dtype == torch.int64
    for i in range(6):
        expected, candidates = slow_constrained(
            targets[i], bank, other_targets[i], other_bank, k, n, known
        )
        assert found[i].tolist() == expected + [-1] * (k - len(expected))
        assert set(found[i].tolist()) - {-1} <= set(candidates)


def test_constrained_neighbours_among_ties():
    bank, other_bank = unit(5, 6).repeat(4, 1), unit(5, 6).repeat(4, 1)  # each pair four times
    targets, other_targets = bank[:5].clone(), other_bank[:5].clone()
    found = cmsf_ssl.constrained_neighbors(targets, bank, other_targets, other_bank, 3, 4)
    for i, row in enumerate(found.tolist()):
        assert len(set(row)) == 3 and all(j % 5 == i for j in row)


def test_impossible_numbers_of_neighbours_are_errors():
    rows = unit(6, 4)
    with pytest.raises(ValueError, match="k = 5 .* 4 candidates"):
        cmsf_ssl.constrained_neighbors(rows, rows, rows, rows, 5, 4)
    with pytest.raises(ValueError, match="k = 7 .* 6 rows"):
        cmsf_ssl.constrained_neighbors(rows, rows, rows, rows, 7, 10)


def slow_kmeans(points, num_clusters, rounds, draws):
    """Spherical k-means in loops; draws: the rows at which the clusters start."""
    centers = [points[j].tolist() for j in draws]
    for _ in range(rounds):
        clusters, sums = [], [[0.0] * points.shape[1] for _ in centers]
        for point in points.tolist():
            cosines = [sum(a * b for a, b in zip(point, center)) for center in centers]
            clusters.append(cosines.index(max(cosines)))
            sums[clusters[-1]] = [a + b for a, b in zip(sums[clusters[-1]], point)]
        for c, total in enumerate(sums):
            total = total if c in clusters and any(total) else centers[c]
            norm = sum(a * a for a in total) ** 0.5
            centers[c] = [a / max(norm, 1e-12) for a in total]
    return clusters


@pytest.mark.parametrize("n, num_clusters", [(60, 4), (60, 25), (5, 12), (1, 1)])
def test_kmeans_equals_loops(n, num_clusters):
    points = unit(n, 6)
    if n > 30:
        points[30:] = points[:30]  # every point twice: clusters start at the same place, and are empty
        points[7] = points[37] = 0  # images that have no embedding yet
    known = points.any(1)
    torch.manual_seed(5)
    draws = torch.randint(known.sum(), (num_clusters,)).tolist()
    expected = slow_kmeans(points[known].float().double(), num_clusters, 3, draws)
    torch.manual_seed(5)
    found = cmsf_ssl.spherical_kmeans(points.float(), num_clusters, rounds=3)
    assert found.dtype == torch.int64
    assert (found[~known] == -1).all()
    assert found[known].tolist() == expected


def test_ranks_equal_loops():
    targets, bank = unit(5, 6), unit(30, 6)
    neighbors = torch.stack([torch.randperm(30)[:4] for _ in range(5)])
    neighbors[2, 1:] = -1
    ranks = cmsf_ssl.neighbor_ranks(targets, bank, neighbors).tolist()
    expected = []
    for i, row in enumerate(neighbors.tolist()):
        cosines = [(targets[i] @ other).item() for other in bank]
        expected += [sum(c > cosines[j] for c in cosines) for j in row if j >= 0]
    assert ranks == expected


def small_model(n, **changes):
    given = dict(bank_size=20, topk=3, num_candidates=6, batch_size=8) | changes
    args, _ = cmsf_ssl.resolve(cmsf_ssl.Args(**given))
    return cmsf_ssl.CMSF(args, n), args


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_step_equals_the_paper(constraint):
    """Twelve batches of 24 images: three epochs of a fixed order, a bank of 20 rows that wraps."""
    model, args = small_model(24, constraint=constraint)
    model.eval()  # BatchNorm in eval mode, so that rows do not depend on their batch
    rows, previous, clusters = [], {}, {}
    far = 0
    for step in range(12):
        views = list(torch.randn(3 if constraint == "third-view" else 2, 8, 3, 16, 16))
        indices = torch.arange(8) + 8 * (step % 3)
        indices[-1] = 23 if step < 3 else indices[-1]  # images 7 and 15 have no first embedding
        labels = indices % 4
        labels[0] = -1
        loss, metrics = model(views, labels, indices)
        with torch.no_grad():
            queries = model.predictor(model.online(views[1]))
            targets = F.normalize(model.target(views[0]), dim=1)
            others = [previous.get(i) for i in indices.tolist()]
            if constraint == "third-view":
                others = list(F.normalize(model.target(views[2]), dim=1))
        rows += zip(targets, others, labels.tolist(), indices.tolist())
        rows = rows[-20:]
        bank = torch.stack([row[0] for row in rows])
        nearest = slow_neighbors(targets, bank, 3).tolist()
        constrained = []
        for i, index in enumerate(indices.tolist()):
            if constraint == "kmeans":
                same = [clusters.get(row[3], -1) == clusters.get(index, -1) for row in rows]
                nobody = clusters.get(index, -1) < 0
                found, _ = slow_constrained(targets[i], bank, bank[0], bank, 3, len(rows), same)
            else:
                nobody, known = others[i] is None, [row[1] is not None for row in rows]
                other = bank[0] if nobody else others[i]
                blank = torch.zeros_like(bank[0])
                other_bank = torch.stack([blank if row[1] is None else row[1] for row in rows])
                found, _ = slow_constrained(targets[i], bank, other, other_bank, 3, 6, known)
            constrained.append(nearest[i] if nobody else found)
        terms = []
        for found in nearest, constrained:
            padded = [row + [0] * (3 - len(row)) for row in found]
            valid = torch.tensor([[j < len(row) for j in range(3)] for row in found])
            terms.append(slow_loss(queries, bank[torch.tensor(padded)], valid))
        assert loss.item() == pytest.approx(sum(terms) / 2, abs=1e-5)
        far += nearest != constrained
        for name, found in ("purity", nearest), ("purity_constrained", constrained):
            pairs = [(labels[i].item(), rows[j][2]) for i in range(8) for j in found[i]]
            known = [a == b for a, b in pairs if a >= 0 and b >= 0]
            assert metrics[name].item() == pytest.approx(sum(known) / max(1, len(known)))
        previous |= dict(zip(indices.tolist(), targets))
        if constraint == "kmeans" and step % 3 == 2:
            model.clusters.copy_(cmsf_ssl.spherical_kmeans(model.cache, 3))
            clusters = dict(enumerate(model.clusters.tolist()))
            assert {i for i, cluster in clusters.items() if cluster >= 0} == previous.keys()
        with torch.no_grad():
            for weight in model.online.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    assert far >= 3  # the constraint matters


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_run_resumes_bit_for_bit(constraint, few_digits, monkeypatch):
    step = 4 if constraint == "kmeans" else 6  # 4: an epoch's end, where the clusters change
    half = constraint == "previous-epoch"
    given = dict(constraint=constraint, half_cache=half)
    result, run = train_stop_and_resume(cmsf_ssl, monkeypatch, step, **given)
    assert {"purity", "purity_constrained", "median_rank"} <= result.keys() and result["knn"] > 40
    model = run["model"]
    assert model["cache"].dtype == (torch.half if half else torch.float)
    assert len(model["cache"]) == (0 if constraint == "third-view" else 128)
    others = model["bank.embeddings"].chunk(2, dim=1)[1]
    assert others.any() and (model["clusters"] >= 0).all() == (constraint == "kmeans")
