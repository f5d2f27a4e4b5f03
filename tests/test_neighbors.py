"""The search and the memory bank against slow and obvious versions."""

import pytest
import torch
from scripts import METHODS
from test_losses import unit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


def slow_neighbors(targets, bank, k):
    """All distances, sorted: the k smallest of each target."""
    found = []
    for target in targets.tolist():
        distances = [sum((t - m) ** 2 for t, m in zip(target, row)) for row in bank.tolist()]
        found.append(sorted(range(len(bank)), key=lambda j: distances[j])[:k])
    return torch.tensor(found)


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("m, k", [(1, 1), (5, 5), (37, 4), (200, 10)])
def test_neighbours_equal_a_full_sort(script, m, k):
    targets = unit(9, 8)
    bank = unit(m, 8)
    found = script.nearest_neighbors(targets, bank, k)
    assert found.shape == (9, k)
    assert torch.equal(found, slow_neighbors(targets, bank, k))


@pytest.mark.parametrize("script", METHODS)
def test_neighbours_among_ties_are_distinct_rows(script):
    bank = unit(4, 6).repeat(5, 1)  # every row five times
    found = script.nearest_neighbors(bank[:4], bank, 5)
    assert [sorted(row) for row in found.tolist()] == [
        [i + 4 * n for n in range(5)] for i in range(4)
    ]


@pytest.mark.parametrize("script", METHODS)
def test_more_neighbours_than_rows_is_an_error(script):
    with pytest.raises(ValueError, match="4 neighbours of a bank with 3 rows"):
        script.nearest_neighbors(unit(2, 5), unit(3, 5), 4)


@pytest.mark.parametrize("script", METHODS)
def test_a_row_that_is_not_a_number_is_not_passed_over(script):
    bank = unit(128, 8)
    bank[77] = torch.nan
    assert (script.nearest_neighbors(unit(2, 8), bank, 3) == 77).any(dim=1).all()


@pytest.fixture
def autocast():
    """What torch.autocast("cuda", torch.bfloat16) sets; it does nothing itself without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("script", METHODS)
def test_search_and_loss_stay_in_float32_where_networks_are_in_bfloat16(script, autocast):
    with FakeTensorMode(), Products() as products:
        rows = torch.empty(4, 2, 8, device="cuda")
        rows[:, 0] @ rows[:, 1].T
        assert products.dtypes == [torch.bfloat16]
        script.nearest_neighbors(rows[:, 0], rows[:, 1], 2)
        script.mean_shift_loss(rows[:, 0], rows)
        assert products.dtypes == [torch.bfloat16, torch.float32, torch.float32]


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


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("size, pushes", [(8, [3, 3, 3, 8, 1]), (5, [5, 5]), (6, [4, 4, 4])])
def test_the_bank_is_first_in_first_out(script, size, pushes):
    bank = script.MemoryBank(size, 3)
    rows = [None] * size
    pushed = 0
    for n in pushes:
        embeddings = torch.randn(n, 3)
        labels = torch.randint(0, 9, (n,))
        bank.enqueue(embeddings, labels)
        for embedding, label in zip(embeddings, labels):
            rows[pushed % size] = (embedding, label)
            pushed += 1
        assert len(bank) == min(pushed, size)
        for i, row in enumerate(rows):
            if row is None:
                assert bank.labels[i] == -1
            else:
                assert torch.equal(bank.embeddings[i], row[0]) and bank.labels[i] == row[1]
