"""The search for neighbours and the clusters against slow and obvious versions."""

import math

import pytest
import torch
import torch.nn.functional as F
from scripts import FAKE_GPU, METHODS, small_model, unit
from test_losses import nearest
from torch._subclasses.fake_tensor import FakeTensorMode

import cmsf_semi
import cmsf_ssl


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("m, k", [(1, 1), (5, 5), (37, 4)])
def test_neighbours_equal_a_full_sort(script, m, k):
    targets = unit(9, 8)
    bank = unit(m, 8)
    found = script.nearest_neighbors(targets, bank, k)
    assert found.tolist() == [nearest(target, bank, k) for target in targets]
    with pytest.raises(ValueError, match=f"{m + 1} neighbours of a bank with {m} rows"):
        script.nearest_neighbors(targets, bank, m + 1)


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("k", [1, 3])
def test_the_largest_of_a_long_row_equal_a_full_sort(script, k):
    m = 16 * k * script.BLOCK
    similarities = torch.randn(6, m + 1)
    similarities[1, 700 : 700 + k] = 9  # all of them in one block, and equal
    similarities[2] = similarities[2].round()  # ties
    similarities[3, 1:] = -math.inf  # fewer than k rows
    for columns in (m, m + 1, script.BLOCK):
        rows = similarities[:, :columns]
        values, indices = script.largest(rows, k)
        assert values.equal(rows.sort(dim=1, descending=True).values[:, :k])
        assert rows.gather(1, indices).equal(values)
        assert all(len(found.unique()) == k for found in indices)


@pytest.fixture
def autocast():
    """What torch.autocast("cuda", torch.bfloat16) sets; it does nothing itself without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)


@FAKE_GPU
@pytest.mark.parametrize("script", METHODS)
def test_the_search_is_in_float32_where_networks_are_in_bfloat16(script, autocast, monkeypatch):
    """Shown without a GPU by fake tensors, which have a device and no numbers."""

    def largest_of_float32(similarities, k):
        assert similarities.dtype == torch.float32
        return similarities.topk(k)

    monkeypatch.setattr(script, "largest", largest_of_float32)
    with FakeTensorMode():
        targets = torch.empty(4, 8, device="cuda")
        assert (targets @ targets.T).dtype == torch.bfloat16
        script.nearest_neighbors(targets, targets, 2)
        if script is cmsf_semi:
            labels = torch.empty(4, dtype=torch.int64, device="cuda")
            script.same_label_neighbors(targets, labels, targets, labels, 2)


# ---- constrained neighbours


@pytest.mark.parametrize("k, n", [(1, 1), (3, 3), (3, 7), (5, 30)])
def test_constrained_neighbours_equal_loops(k, n):
    """Of the n rows nearest in the other bank, the k nearest in this one."""
    targets, bank = unit(9, 8), unit(30, 8)
    other_targets, other_bank = unit(9, 8), unit(30, 8)
    found = cmsf_ssl.constrained_neighbors(targets, bank, other_targets, other_bank, k, n)
    for i in range(9):
        candidates = nearest(other_targets[i], other_bank, n)
        assert found[i].tolist() == nearest(targets[i], bank, k, candidates)


@pytest.mark.parametrize("kind", ["label", "cluster"])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_neighbours_of_one_label_or_cluster_equal_loops(kind, k):
    """With 0, 1, k - 1, k and more rows in the bank. Images without a label (-1) search all."""
    counts = {0: 0, 1: 1, 2: k - 1, 3: k, 4: k + 7, -1: 12}
    bank_labels = torch.tensor([label for label, n in counts.items() for _ in range(n)])
    bank_labels = bank_labels[torch.randperm(len(bank_labels))]
    targets, bank = unit(18, 8), unit(len(bank_labels), 8)
    labels = torch.tensor([0, 1, 2, 3, 4, -1] * 3)
    if kind == "label":
        found, valid = cmsf_semi.same_label_neighbors(targets, labels, bank, bank_labels, k)
    else:
        found, valid = cmsf_ssl.cluster_neighbors(targets @ bank.T, labels, bank_labels, k)
    for i, label in enumerate(labels):
        allowed = [j for j in range(len(bank)) if bank_labels[j] == label]
        if kind == "label" and label < 0:
            allowed = range(len(bank))
        expected = nearest(targets[i], bank, k, allowed)
        assert found[i][valid[i]].tolist() == expected
        assert valid[i].tolist() == [j < len(expected) for j in range(k)]


# ---- clusters


def test_kmeans_equals_loops():
    embeddings = F.normalize(torch.randn(50, 4), dim=1)
    torch.manual_seed(1)
    ours = cmsf_ssl.spherical_kmeans(embeddings, 7, rounds=2)
    torch.manual_seed(1)
    centers = [embeddings[i] for i in torch.randperm(50)[:7]]
    for _ in range(2):
        clusters = [nearest(row, centers, 1)[0] for row in embeddings]
        for cluster in range(7):
            members = [row for row, own in zip(embeddings, clusters) if own == cluster]
            if members:
                centers[cluster] = sum(members) / sum(members).norm()
    assert ours.tolist() == clusters


def test_an_image_without_embedding_is_a_cluster_of_its_own():
    model = small_model(cmsf_ssl, num_images=20, constraint="kmeans")
    model.cached[:15] = True
    model.cache[:15] = unit(15, 8)
    model.update_clusters(images_per_cluster=5)
    assert model.clusters[:15].max() < 3
    assert len(model.clusters[15:].unique()) == 5 and model.clusters[15:].min() >= 3
