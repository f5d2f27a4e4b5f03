"""What the tests share: the scripts, small models, pictures on disk, and runs of a second."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves

import cmsf_semi
import cmsf_ssl
import mnn
import msf

METHODS = [msf, cmsf_ssl, cmsf_semi, mnn]
FAKE_GPU = pytest.mark.skipif(
    torch.__version__.startswith("2.6") and not torch.cuda.is_available(),
    reason="torch 2.6 asks a GPU's driver even for fake tensors",
)
CPU = torch.device("cpu")


# ---- models


def unit(*shape):
    """Random rows of unit norm, in float64."""
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def small_backbone(arch=None, stem=None, norm_layer=nn.BatchNorm2d):
    """One convolution in place of a ResNet, and the number of its features."""
    convolution = nn.Conv2d(3, 32, kernel_size=4, stride=4, bias=False)
    layers = [convolution, norm_layer(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers), 32


def small_model(script, num_images=24, norm_layer=nn.BatchNorm2d, **changes):
    """A script's model around a small backbone, for views [b, 3, 4, 4]."""
    backbone, width = small_backbone(norm_layer=norm_layer)
    options = {"topk": 3, "bank_size": 20, "ema": 0.9} | changes
    if script is msf:
        model = msf.MSF(backbone, width, **options)
    if script is cmsf_ssl:
        options = {"num_candidates": 6, "constraint": "previous-epoch"} | options
        model = cmsf_ssl.CMSF(backbone, width, num_images, **options)
    if script is cmsf_semi:
        images = torch.arange(num_images)
        given = options.pop("given", torch.where(images % 4 == 0, images % 3, -1))
        model = cmsf_semi.CMSF(backbone, width, given, **{"confidence": 0.85} | options)
    if script is mnn:
        choices = {"weighting": True, "symmetric": True, "renormalize": False}
        model = mnn.MNN(backbone, width, **{"hidden": 16, "lam": 0.4} | choices | options)
    with torch.no_grad():  # so that online and target network differ
        for weight in model.online.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.bank.embeddings.normal_()  # rows that are not in use, and must not be found
    return model


def arguments(script, weak, strong, labels, indices):
    """A batch as the arguments of a script's model."""
    if script in (msf, mnn):
        return weak, strong, labels
    if script is cmsf_ssl:
        return weak, strong, None, labels, indices
    return weak, strong, indices, labels


# ---- data


def picture(path, side=40, color=None):
    """Write a picture of random pixels, or of one colour."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if color:
        Image.new("RGB", (side, side), color).save(path)
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (side, side + 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def labelled_pictures(root="photos", each=8, side=40):
    """train/cat, train/dog, val/cat and val/dog; cats are red, dogs are blue."""
    for split in ("train", "val"):
        for i in range(each):
            picture(f"{root}/{split}/cat/{i}.jpg", side, "red")
            picture(f"{root}/{split}/dog/{i}.jpg", side, "blue")


def data_of(images, labels):
    """A data set of images uint8 [N, 3, H, H] in memory (or None), with labels [N]."""
    data = msf.ImageData(msf.RECIPES["digits"], False, CPU)
    data.images = images
    data.labels = torch.as_tensor(labels)
    return data


# ---- runs


def tiny(script, **changes):
    """Arguments of a run on photos/: 16 pixels, two steps an epoch with labelled_pictures. Below 96
    pixels, pictures are read once, into memory; else in every epoch."""
    given = {"dataset": "folder", "data_dir": "photos", "batch_size": 8, "bank_size": 16}
    given |= {"epochs": 2, "warmup_epochs": 0.5, "num_workers": 0, "topk": 5, "run_name": "a"}
    return replace(script.RECIPES["digits"], **given | changes)


def checkpoint(name="a"):
    return torch.load(f"runs/{name}/last.pt", weights_only=True)


def assert_same_state(one, other):
    """Two checkpoints hold the same bits, but for their arguments."""
    for part in ("model", "optimizer", "epoch", "pushed"):
        for ours, theirs in zip(tree_leaves(one[part]), tree_leaves(other[part]), strict=True):
            same = torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs
            assert same, part
