"""A step on a GPU, as far as it shows without one: fake tensors know their device, and no numbers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cmsf_semi
import cmsf_ssl
import mnn
import msf

STRONG = dict(scale=(0.2, 1), flip=0.5, rotation=10, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5)


class NoCopies(TorchDispatchMode):
    """Fail on a copy between devices: a host that copies to a GPU from unpinned memory waits for it.
    What waits for a number (item, nonzero, a boolean index) is refused by fake tensors themselves."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "copy" in str(function):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
            assert len({x.device for x in tensors}) == 1, f"{function} between devices"
        return result


def semi(args):
    labels = torch.arange(1000) % 10
    return cmsf_semi.SemiCMSF(args, labels.where(torch.arange(1000) < 300, -1), labels)


METHODS = [
    (msf, {}, lambda args: msf.MSF(args), 2),
    (cmsf_ssl, dict(constraint="previous-epoch"), lambda args: cmsf_ssl.CMSF(args, 1000), 2),
    (cmsf_ssl, dict(constraint="third-view"), lambda args: cmsf_ssl.CMSF(args, 1000), 3),
    (cmsf_ssl, dict(constraint="kmeans"), lambda args: cmsf_ssl.CMSF(args, 1000), 2),
    (cmsf_semi, {}, semi, 2),
    (mnn, {}, lambda args: mnn.MNN(args), 2),
    (mnn, dict(objective="info-nce"), lambda args: mnn.MNN(args), 2),
]


@pytest.mark.parametrize("script, given, build, views", METHODS)
@pytest.mark.filterwarnings("ignore:.*autocast")
def test_views_and_forward_pass_never_wait_for_the_device(script, given, build, views, monkeypatch):
    args, _ = script.resolve(script.Args(batch_size=64, bank_size=640, **given))
    model = build(args)
    model.bank.pushed = 700  # the bank is full
    permute = torch.randperm

    def randperm(*shape, **options):  # the order of the colour operations is drawn on the host
        with unset_fake_temporarily():
            return permute(*shape, **options)

    monkeypatch.setattr(torch, "randperm", randperm)
    with FakeTensorMode():
        def fake(x):
            return torch.empty(x.shape, dtype=x.dtype, device="cuda").requires_grad_(x.requires_grad)

        state = {name: fake(x) for name, x in [*model.named_parameters(), *model.named_buffers()]}
        for name in ("truth", "given"):
            if hasattr(model, name):
                setattr(model, name, fake(getattr(model, name)))
        images = torch.empty(64, 3, 16, 16, dtype=torch.uint8, device="cuda")
        labels = torch.empty(64, dtype=torch.int64, device="cuda")
        with NoCopies():
            batch = [script.augment(images, 16, **STRONG) for _ in range(views)]
            loss, metrics = functional_call(model, state, (batch, labels, labels))
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in batch)
        assert loss.device.type == "cuda" and {x.device for x in metrics.values()} == {loss.device}


def test_a_copy_would_be_seen():
    with FakeTensorMode(), NoCopies(), pytest.raises(AssertionError, match="between devices"):
        torch.empty(3, device="cuda").new_tensor([1.0, 2.0])
