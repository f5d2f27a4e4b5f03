"""What the authors' own code computes, in float64, for given outputs of the networks.

tests/reference.npz holds inputs and results: numbers only. The networks are the identity here, so
that queries and targets can be given.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cmsf_semi
import cmsf_ssl
import mnn
import msf

VALUES = np.load(Path(__file__).parent / "reference.npz")


def reference(prefix):
    """Name -> tensor of all values whose name begins so."""
    names = [name for name in VALUES if name.startswith(prefix)]
    values = {name.removeprefix(prefix): torch.from_numpy(VALUES[name]) for name in names}
    values["queries"].requires_grad_()
    return values


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def assert_same_loss_and_gradient(loss, values):
    loss.backward()
    assert_close(loss, values["loss"])
    assert_close(values["queries"].grad, values["grad"])


def test_msf():
    values = reference("msf/")
    queries = F.normalize(values["queries"], dim=1)
    targets = F.normalize(values["targets"], dim=1)
    bank = msf.MemoryBank(96, 8).double()
    bank.enqueue(values["bank"], values["bank_labels"])
    bank.enqueue(targets, values["labels"])
    assert_close(bank.embeddings, values["bank_after"])
    assert torch.equal(bank.labels, values["bank_labels_after"])

    nearest = msf.nearest_neighbors(targets, bank.embeddings, 5)
    loss = msf.mean_shift_loss(queries, bank.embeddings[nearest])
    assert_same_loss_and_gradient(loss, values)


@pytest.mark.parametrize("n", [5, 10, 20])
def test_cmsf_ssl(n):
    values = reference(f"cmsf_ssl/n{n}_")
    queries = F.normalize(values["queries"], dim=1)
    targets = values["targets"]
    bank = values["bank_after"]
    nearest = cmsf_ssl.nearest_neighbors(targets, bank, 5)
    related = cmsf_ssl.constrained_neighbors(
        targets, bank, values["previous_targets"], values["previous_bank_after"], 5, n
    )
    loss = cmsf_ssl.mean_shift_loss(queries, bank[nearest]) / 2
    loss = loss + cmsf_ssl.mean_shift_loss(queries, bank[related]) / 2
    assert_same_loss_and_gradient(loss, values)


def test_cmsf_semi():
    values = reference("cmsf_semi/")
    queries = F.normalize(values["queries"], dim=1)
    targets = F.normalize(values["targets"], dim=1)
    labels = values["labels_used"]
    bank = values["bank_after"]
    nearest, valid = cmsf_semi.same_label_neighbors(
        targets, labels, bank, values["bank_labels_after"], 5
    )
    loss = cmsf_semi.mean_shift_loss(queries, bank[nearest], valid)
    assert_same_loss_and_gradient(loss, values)


@pytest.mark.parametrize("lam", [0.0, 0.37, 1.0])
def test_mnn(lam):
    values = reference(f"mnn/lam{lam}_")
    queries = F.normalize(values["queries"], dim=1)
    targets = F.normalize(values["targets"], dim=1)
    bank = F.normalize(values["bank"], dim=1)
    nearest = mnn.nearest_neighbors(targets, bank, 5)
    mixed = mnn.mix_neighbors(targets, bank[nearest], lam)
    assert_same_loss_and_gradient(mnn.mnn_loss(queries, targets, mixed), values)
