"""Constrained mean shift, self-supervised: the constraint in loops, and what a run keeps and logs."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, as_torchrun, check_pictures, first_of_twelve, stop_at
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faults import TINY, write_folder
from test_method import slow_loss, slow_neighbors, unit
from test_runs import assert_same_state, load

import cmsf_ssl
import msf

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


def test_kmeans_finds_groups_and_splits_its_work():
    groups = torch.eye(8).repeat_interleave(50, 0)
    points = F.normalize(groups + 0.05 * torch.randn(400, 8), dim=1)
    clusters = cmsf_ssl.spherical_kmeans(points, 40)
    assert clusters.min() >= 0
    for cluster in clusters.unique():
        assert groups[clusters == cluster].unique(dim=0).shape[0] == 1
    torch.manual_seed(5)
    starts = torch.randint(400, (2**21,))
    torch.manual_seed(5)
    half = cmsf_ssl.spherical_kmeans(points.half(), 2**21, rounds=1)  # 32 rows at a time
    assert torch.equal(groups[starts[half]], groups)


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


@pytest.mark.parametrize("constraint", ["previous-epoch", "kmeans"])
def test_the_first_epoch_is_plain_msf(constraint):
    """But for rounding, as the gradient comes in two halves: after four steps, all is still the same."""
    few = dict(epochs=1, batch_size=359)
    plain = msf.main(msf.Args(run_name="plain", **few))
    ours = cmsf_ssl.main(cmsf_ssl.Args(run_name="ours", **few, constraint=constraint))
    assert plain["purity"] == ours["purity"] == ours["purity_constrained"]
    assert plain["loss"] == pytest.approx(ours["loss"], abs=1e-5) and plain["knn"] == ours["knn"]
    plain, ours = load("plain")["model"], load("ours")["model"]
    ours["bank.embeddings"], others = ours["bank.embeddings"].chunk(2, dim=1)
    for name, value in plain.items():
        torch.testing.assert_close(value, ours[name], atol=1e-4, rtol=1e-4, msg=name)
    assert not others.any()


@pytest.mark.parametrize("half", [False, True])
def test_the_second_epoch_uses_the_embeddings_of_the_first(half, monkeypatch):
    steps, forward = [], cmsf_ssl.CMSF.forward

    def record(self, views, labels, indices):
        before = self.cache[indices].float()
        result = forward(self, views, labels, indices)
        newest = torch.arange(self.bank.pushed - len(indices), self.bank.pushed) % len(self.bank.labels)
        others = self.bank.embeddings[newest].chunk(2, dim=1)[1].clone()
        assert torch.equal(before, others)
        steps.append((indices, self.latest[0].clone(), others))
        return result

    monkeypatch.setattr(cmsf_ssl.CMSF, "forward", record)
    cmsf_ssl.main(cmsf_ssl.Args(run_name="a", epochs=3 - half, half_cache=half))
    given = {}
    for number, (indices, targets, others) in enumerate(steps):
        for i, target, other in zip(indices.tolist(), targets, others):
            assert torch.equal(other, given.get(i, torch.zeros(128))), (number, i)
        given |= dict(zip(indices.tolist(), targets.half().float() if half else targets))
    assert all(others.any() == (number >= 22) for number, (_, _, others) in enumerate(steps))


@pytest.mark.parametrize(
    "given, step",
    [
        (dict(half_cache=True), 30),
        (dict(constraint="kmeans"), 22),  # an epoch's end, where the clusters change
        (dict(constraint="third-view"), 10),
    ],
)
def test_resume_continues_bit_for_bit(given, step, monkeypatch):
    given = given | dict(epochs=math.ceil((step + 1) / 22), warmup_epochs=0, bank_size=500)
    cmsf_ssl.main(cmsf_ssl.Args(run_name="whole", **given))
    stop_at(step - 1, cmsf_ssl, monkeypatch)
    with pytest.raises(SystemExit, match=f"stopped at step {step}"):
        cmsf_ssl.main(cmsf_ssl.Args(run_name="parts", **given))
    cmsf_ssl.main(cmsf_ssl.Args(resume="runs/parts/last.pt"))
    whole = load("whole")
    assert_same_state(whole, load("parts"))
    assert whole["model"]["cache"].dtype == (torch.half if "half_cache" in given else torch.float)
    if given.get("constraint") == "kmeans":
        assert whole["model"]["clusters"].unique().numel() > 40


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_what_a_run_logs(constraint):
    given = dict(epochs=2, warmup_epochs=0, constraint=constraint)
    result = cmsf_ssl.main(cmsf_ssl.Args(run_name="a", **given))
    assert result["knn"] > 70
    events = EventAccumulator("runs/a", size_guidance=dict(histograms=0)).Reload()
    assert {"loss", "purity", "purity_constrained", "median_rank", "knn"} <= set(events.Tags()["scalars"])
    histograms, medians = events.Histograms("constrained_rank"), events.Scalars("median_rank")
    assert [event.step for event in histograms] == [event.step for event in medians] == [22, 44]
    first, second = (event.histogram_value for event in histograms)
    if constraint != "third-view":  # plain MSF: ranks 0 to 4
        assert first.min == 0 and first.max == 4 and medians[0].value == 2
    assert second.max > 4 and second.num > 200

    run = load("a")
    args = cmsf_ssl.Args(**run["args"])
    data, model = cmsf_ssl.ImageData(args, True, torch.device("cpu")), cmsf_ssl.CMSF(args, 1437)
    model.load_state_dict(run["model"])
    shown, expected = first_of_twelve(list(range(1437))), []
    with torch.no_grad():
        targets = F.normalize(model.target.eval()(cmsf_ssl.augment(data.images[shown], 16)), dim=1)
    bank, other_bank = model.bank.embeddings.chunk(2, dim=1)
    images = model.bank.indices.tolist()
    for image, target in zip(shown, targets):
        nearest = slow_neighbors(target[None], bank, 5)[0].tolist()
        if constraint == "kmeans":
            known = [model.clusters[j] == model.clusters[image] for j in images]
            found, _ = slow_constrained(target, bank, target, bank, 5, 1024, known)
        else:
            other = target if constraint == "third-view" else model.cache[image]
            found, _ = slow_constrained(target, bank, other, other_bank, 5, 10, other_bank.any(1).tolist())
        if constraint != "third-view" and not model.cache[image].any():  # never seen: plain MSF
            found = nearest
        expected.append([image, *(images[j] for j in found), *[-1] * (5 - len(found))])
        expected.append([image, *(images[j] for j in nearest)])
    assert expected[::2] != expected[1::2]
    check_pictures("runs/a", [44], data.images, data.labels, expected)


def test_fewer_candidates_than_neighbours_is_an_error_but_for_kmeans():
    with pytest.raises(SystemExit, match="^error: raise --num-candidates$"):
        cmsf_ssl.main(cmsf_ssl.Args(num_candidates=4))
    assert not Path("runs").exists()
    given = dict(constraint="kmeans", num_candidates=4, num_clusters=7, epochs=1, run_name="a")
    cmsf_ssl.main(cmsf_ssl.Args(**given))
    assert load("a")["model"]["clusters"].unique().tolist() == list(range(-1, 7))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_files_give_as_many_crops_as_there_are_views(constraint):
    write_folder("d", side=100)
    given = dict(image_size=96, epochs=2, num_workers=1, constraint=constraint, **TINY)
    result = cmsf_ssl.main(cmsf_ssl.Args(run_name="a", **given))
    assert 0 <= result["loss"] <= 4


def train_in_eval_mode(rank, world, folder):
    """Nine steps over 24 images; BatchNorm in eval mode, so that images do not depend on others."""
    if world > 1:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    for constraint in CONSTRAINTS:
        torch.manual_seed(0)
        model, _ = small_model(24, constraint=constraint)
        model.eval()
        network = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
        network.broadcast_buffers = False
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
        losses, share = [], slice(rank * 8 // world, (rank + 1) * 8 // world)
        for step in range(9):
            views = torch.rand(3 if constraint == "third-view" else 2, 8, 3, 16, 16)
            labels, indices = torch.randint(0, 3, (8,)), torch.arange(8) + 8 * (step % 3)
            loss, _ = network(list(views[:, share]), labels[share], indices[share])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if step == 2:
                model.clusters.copy_(torch.arange(24) % 4)
        kept = dict(losses=torch.stack(losses), model=model.state_dict())
        torch.save(kept, f"{folder}/{constraint}-{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(one_and_two, tmp_path):
    one_and_two(train_in_eval_mode)
    for constraint in CONSTRAINTS:
        names = (f"{constraint}-{end}.pt" for end in ("1-0", "2-0", "2-1"))
        one, first, second = (torch.load(tmp_path / name) for name in names)
        for name, value in first["model"].items():
            assert torch.equal(value, second["model"][name]), name
            torch.testing.assert_close(value, one["model"][name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close((first["losses"] + second["losses"]) / 2, one["losses"])


def train_and_keep(rank, world, folder):
    """main as torchrun starts it; every process writes down its model."""
    as_torchrun(rank, world, 29533)
    models, build = [], cmsf_ssl.CMSF
    cmsf_ssl.CMSF = lambda *args: models.append(build(*args)) or models[0]
    cmsf_ssl.main(cmsf_ssl.Args(run_name="two", epochs=2, constraint="kmeans"))
    cmsf_ssl.CMSF = build
    torch.save(models[0].state_dict(), f"rank{rank}.pt")


def test_processes_stay_in_step(one_and_two):
    one_and_two(train_and_keep, alone=False)
    first, second = (torch.load(f"rank{rank}.pt") for rank in range(2))
    for name, value in first.items():  # BatchNorm's running statistics are each process's own
        assert torch.equal(value, second[name]) or "running" in name, name
    seen = first["cache"].any(1)
    assert seen.sum() >= 22 * 64 and torch.equal(first["clusters"] >= 0, seen)


def test_the_scripts_differ_in_the_parts_that_the_papers_name():
    import ast

    names = [
        {node.name for node in ast.parse((ROOT / name).read_text()).body if hasattr(node, "name")}
        for name in ("msf.py", "cmsf_ssl.py")
    ]
    new = {"CMSF", "constrained_neighbors", "spherical_kmeans", "neighbor_ranks"}
    assert names[1] - names[0] == new and names[0] - names[1] == {"MSF"}
