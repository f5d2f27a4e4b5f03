"""The search and the memory bank against slow and obvious versions."""

import math

import pytest
import torch
import torch.nn.functional as F
from scripts import FAKE_GPU, METHODS, small_model, unit
from test_losses import mean_shift_loss, nearest
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cmsf_semi
import cmsf_ssl


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("m, k", [(1, 1), (5, 5), (37, 4), (200, 10)])
def test_neighbours_equal_a_full_sort(script, m, k):
    targets = unit(9, 8)
    bank = unit(m, 8)
    found = script.nearest_neighbors(targets, bank, k)
    assert found.tolist() == [nearest(target, bank, k) for target in targets]


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


@pytest.mark.parametrize("script", METHODS)
def test_more_neighbours_than_rows_is_an_error(script):
    with pytest.raises(ValueError, match="4 neighbours of a bank with 3 rows"):
        script.nearest_neighbors(unit(2, 5), unit(3, 5), 4)
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="4 neighbours of a bank with 3 rows"):
        cmsf_semi.same_label_neighbors(unit(3, 5), labels, unit(3, 5), labels, 4)


@pytest.fixture
def autocast():
    """What torch.autocast("cuda", torch.bfloat16) sets; it does nothing itself without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)


class Products(TorchDispatchMode):
    """Keeps the types of all matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.dtypes.append(result.dtype)
        return result


@FAKE_GPU
@pytest.mark.parametrize("script", METHODS)
def test_search_and_loss_stay_in_float32_where_networks_are_in_bfloat16(script, autocast):
    """Shown without a GPU by fake tensors, which have a device and no numbers."""
    with FakeTensorMode(), Products() as products:
        queries = torch.empty(4, 8, device="cuda")
        neighbors = torch.empty(4, 2, 8, device="cuda")
        queries @ queries.T
        assert products.dtypes.pop() == torch.bfloat16
        script.nearest_neighbors(queries, queries, 2)
        assert mean_shift_loss(script, queries, neighbors).dtype == torch.float32
        if script is cmsf_semi:
            labels = torch.empty(4, dtype=torch.int64, device="cuda")
            script.same_label_neighbors(queries, labels, queries, labels, 2)
        assert set(products.dtypes) == {torch.float32}


@pytest.mark.parametrize("script", METHODS)
def test_the_bank_is_first_in_first_out(script):
    """Five rows; with an embedding goes all else that a script keeps, here 10 and so on higher."""
    bank = script.MemoryBank(5, 1)
    assert len(bank) == 0
    for pushed, expected in [
        ([1, 2, 3], [1, 2, 3]),
        ([4, 5, 6], [6, 2, 3, 4, 5]),
        ([7, 8, 9, 10, 11], [11, 7, 8, 9, 10]),
    ]:
        columns = []
        for i, buffer in enumerate(bank.buffers()):
            column = (torch.tensor(pushed) + 10 * i).to(buffer.dtype)
            columns.append(column.view(-1, *buffer.shape[1:]))
        bank.enqueue(*columns)
        assert len(bank) == len(expected)
        for i, buffer in enumerate(bank.buffers()):
            assert buffer[: len(bank)].flatten().tolist() == [row + 10 * i for row in expected]


# ---- the neighbours of cmsf_ssl.py


@pytest.mark.parametrize("k, n", [(1, 1), (3, 3), (3, 7), (5, 30)])
def test_constrained_neighbours_equal_loops(k, n):
    """Of the n rows nearest in the other bank, the k nearest in this one."""
    targets, bank = unit(9, 8), unit(30, 8)
    other_targets, other_bank = unit(9, 8), unit(30, 8)
    found = cmsf_ssl.constrained_neighbors(targets, bank, other_targets, other_bank, k, n)
    for i in range(9):
        candidates = nearest(other_targets[i], other_bank, n)
        order = nearest(targets[i], bank, 30)
        assert found[i].tolist() == [row for row in order if row in candidates][:k]


def test_neighbours_of_one_cluster_equal_loops():
    """Of clusters with 0, 1, 2, 3 and more rows in the bank."""
    bank_clusters = torch.tensor([1, 2, 2, 3, 3, 3] + [4] * 9)[torch.randperm(15)]
    clusters = torch.tensor([0, 1, 2, 3, 4, 4])
    similarities = torch.randn(6, 15)
    found, valid = cmsf_ssl.cluster_neighbors(similarities, clusters, bank_clusters, 3)
    for i, cluster in enumerate(clusters):
        order = similarities[i].argsort(descending=True)
        expected = [row for row in order.tolist() if bank_clusters[row] == cluster][:3]
        assert found[i][valid[i]].tolist() == expected
        assert valid[i].tolist() == [j < len(expected) for j in range(3)]


def test_kmeans_equals_loops():
    embeddings = F.normalize(torch.randn(50, 4), dim=1)
    torch.manual_seed(1)
    ours = cmsf_ssl.spherical_kmeans(embeddings, 7, rounds=5)
    torch.manual_seed(1)
    centers = [embeddings[i] for i in torch.randperm(50)[:7]]
    for _ in range(5):
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


# ---- the neighbours of cmsf_semi.py


@pytest.mark.parametrize("k", [1, 4, 10])
def test_same_label_neighbours_equal_loops(k):
    """Classes with 0, 1, k - 1, k and more rows, rows without label, images without label."""
    counts = {0: 0, 1: 1, 2: k - 1, 3: k, 4: k + 7, -1: 12}
    bank_labels = torch.tensor([label for label, n in counts.items() for _ in range(n)])
    bank_labels = bank_labels[torch.randperm(len(bank_labels))]
    targets, bank = unit(18, 8), unit(len(bank_labels), 8)
    labels = torch.tensor([0, 1, 2, 3, 4, -1] * 3)
    found, valid = cmsf_semi.same_label_neighbors(targets, labels, bank, bank_labels, k)
    for i, label in enumerate(labels):
        order = nearest(targets[i], bank, len(bank))
        expected = [row for row in order if label < 0 or bank_labels[row] == label][:k]
        assert found[i][valid[i]].tolist() == expected
        assert valid[i].tolist() == [j < len(expected) for j in range(k)]
