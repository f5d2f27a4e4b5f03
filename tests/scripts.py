"""The scripts of the methods, for tests that run over all of them."""

import torch

import cmsf_semi
import cmsf_ssl
import mnn
import msf

METHODS = [msf, cmsf_ssl, cmsf_semi, mnn]


def small_model(script, bank_size=32, num_images=40, topk=3):
    """The model of a script around a small network."""
    backbone, width = script.build_backbone("resnet10", "small-stride")
    if script is msf:
        return msf.MSF(backbone, width, topk, bank_size, ema=0.9)
    if script is cmsf_ssl:
        return cmsf_ssl.CMSF(
            backbone, width, num_images, topk, topk, bank_size, 0.9, "previous-epoch"
        )
    if script is mnn:
        options = {"lam": "random", "weighting": True, "symmetric": True, "renormalize": False}
        return mnn.MNN(backbone, width, 32, topk, bank_size, 0.9, **options)
    given = torch.full((num_images,), -1)
    given[::4] = torch.arange(num_images)[::4] % 3
    return cmsf_semi.CMSF(backbone, width, given, topk, bank_size, 0.9, 0.85)


def step(script, model, weak, strong, labels, indices):
    """A forward pass of any script's model: its loss, and its metrics."""
    if script in (msf, mnn):
        return model(weak, strong, labels)
    if script is cmsf_ssl:
        return model(weak, strong, None, labels, indices)
    return model(weak, strong, indices, labels)
