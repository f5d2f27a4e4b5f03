# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "tyro", "tensorboard", "scikit-learn"]
# ///
"""MSF: Mean Shift for Self-Supervised Learning (Koohpayegani, Tejankar and Pirsiavash, ICCV 2021).

An online encoder f with a predictor h learns from a target encoder g, the moving average of f, and
from a memory bank M of past target embeddings. norm(x) = x / ||x||.

    target   u = norm(g(weak view)), which is pushed into M
    query    q = norm(h(f(strong view)))
    loss     mean of ||q - M_j||^2 over the k rows M_j nearest to u

u is its own nearest row, so that k = 1 is BYOL's loss, not symmetrised.

    python msf.py                                                  # digits, on a CPU or a GPU
    python msf.py --dataset small-folder --data-dir photos         # pictures without labels
    torchrun --nproc_per_node=8 msf.py --dataset imagenet --data-dir /data/imagenet
"""

import argparse
import contextlib
import copy
import io
import math
import os
import re
import time
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, transforms
from torchvision.models import resnet
from torchvision.transforms.functional import pil_to_tensor, rgb_to_grayscale

# A class for each group of --help; class Args has them all. The defaults are those for digits.


@dataclass
class Run:
    # digits, cifar10, cifar100, stl10, tinyimagenet, imagenet;
    # for your own images: folder (224 pixels), small-folder (64 pixels)
    dataset: str = "digits"
    data_dir: str = "data"  # folder of the data set; CIFAR and STL-10 are downloaded to it
    num_workers: int = min(8, os.cpu_count() or 1)  # processes that read image files, for each GPU
    run_name: str | None = None  # outputs go to runs/RUN_NAME; the same name continues it
    seed: int = 0  # of the weights, the order of the images and their views
    log_every: int = 50  # steps between two lines within an epoch
    knn_every: int = 10  # epochs between two k-NN accuracies
    amp: bool = True  # on GPUs, run the networks in bfloat16
    compile: bool = False  # compile the networks with torch.compile


@dataclass
class Views:
    # side S of a view in pixels; below 96, image files are first reduced to their S x S center
    image_size: int = 16
    crop_scale: tuple[float, float] = (0.6, 1.0)  # a crop's share of the area, at least and at most
    flip: float = 0.0  # probability of a horizontal flip
    rotation: float = 10.0  # largest rotation, in degrees
    # strong view: brightness, contrast, saturation and hue change by up to this, probability 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.0, 0.0)
    gray: float = 0.0  # probability that the strong view is gray
    blur: float = 0.0  # probability that the strong view is blurred


@dataclass
class Training:
    arch: Literal["resnet10", "resnet18", "resnet34", "resnet50"] = "resnet10"  # backbone
    # imagenet: 7x7/2, max-pool; small: 3x3; small-pool: 3x3, max-pool; small-stride: 3x3/2
    stem: Literal["imagenet", "small", "small-pool", "small-stride"] = "small-stride"
    epochs: int = 80  # passes over the training images
    batch_size: int = 64  # images per step, over all processes
    lr: float = 0.1  # highest learning rate of SGD
    warmup_epochs: float = 5.0  # linear warm-up before the cosine decay
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of SGD


@dataclass
class MeanShift:
    topk: int = 5  # neighbours k, the image itself being the first
    bank_size: int = 1024  # rows of the memory bank M
    ema: float = 0.99  # share of the target encoder g that a step keeps


@dataclass
class Args(Run, Views, Training, MeanShift):
    """Train with mean shift. The defaults depend on --dataset."""


# fmt: off
IMAGENET = Args(  # section 4 of the paper, like topk, ema and momentum in the classes above
    dataset="imagenet", image_size=224, crop_scale=(0.2, 1.0), flip=0.5, rotation=0.0,
    jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5, arch="resnet50", stem="imagenet", epochs=200,
    batch_size=256, lr=0.05, warmup_epochs=0.0, weight_decay=1e-4, bank_size=1_024_000)
CIFAR10 = replace(  # views as above; optimiser and bank as arXiv 2311.00562 has them for MSF
    IMAGENET, dataset="cifar10", image_size=32, arch="resnet18", stem="small", lr=0.06,
    warmup_epochs=5.0, weight_decay=5e-4, bank_size=4096)
STL10 = replace(  # from arXiv 2311.00562, too
    CIFAR10, dataset="stl10", image_size=64, stem="small-pool", bank_size=16_384, ema=0.996)
RECIPES = {
    "digits": Args(),  # ours: a flip would change what a digit means
    "cifar10": CIFAR10,
    "cifar100": replace(CIFAR10, dataset="cifar100"),
    "stl10": STL10,
    "tinyimagenet": replace(STL10, dataset="tinyimagenet"),
    "imagenet": IMAGENET,
    "folder": replace(IMAGENET, dataset="folder", bank_size=128_000),  # ours: for fewer images
    "small-folder": replace(  # ours
        CIFAR10, dataset="small-folder", image_size=64, stem="small-pool"),
}
# fmt: on


def parse_args():
    """The command line: --dataset chooses a recipe, and the other options change it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset", choices=RECIPES, default="digits")
    known, _ = parser.parse_known_args()  # at first only --dataset
    return parse_groups(RECIPES[known.dataset])


def parse_groups(defaults):
    """Args from the command line: tyro.cli(Args, default=defaults), but with a group in --help for
    each base class of Args. tyro makes groups of the values of a dict."""
    groups = {}  # such as "Views": Views(...)
    for base in Args.__bases__:
        values = {field.name: getattr(defaults, field.name) for field in fields(base)}
        groups[base.__name__] = base(**values)
    no_prefixes = [tyro.conf.OmitArgPrefixes]  # --seed, not --Run.seed
    parsed = tyro.cli(dict, default=groups, config=no_prefixes, description=Args.__doc__)
    given = {}
    for group in parsed.values():
        given |= vars(group)
    return Args(**given)


def check_args(args, world_size):
    """Raise SystemExit, with what to change, for arguments that do not fit."""
    for name in ("epochs", "batch_size", "topk", "image_size", "log_every", "knn_every"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1")
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and value < 0:
            raise SystemExit(f"--{name.replace('_', '-')} must not be negative")
    for name in ("flip", "gray", "blur", "ema"):
        if getattr(args, name) > 1:
            raise SystemExit(f"--{name} must be from 0 to 1")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        raise SystemExit("--crop-scale: need 0 < least share <= largest share <= 1")
    if min(args.jitter) < 0 or max(args.jitter) > 1:
        raise SystemExit("--jitter: need four numbers from 0 to 1")
    if args.batch_size % world_size != 0 or args.batch_size < 2 * world_size:
        fault = "--batch-size must be at least 2 for each process, and a multiple of their number"
        raise SystemExit(f"{fault}, {world_size}")
    if args.run_name is not None:
        is_path = Path(args.run_name).name != args.run_name
        if is_path or args.run_name in ("", ".."):
            raise SystemExit("--run-name is the name of a folder in runs/, without a path")
    if not args.topk <= args.batch_size <= args.bank_size:
        values = f"{args.topk}, {args.batch_size}, {args.bank_size}"
        need = "need --topk <= --batch-size (rows of the first step) <= --bank-size"
        raise SystemExit(f"{need}; they are {values}")


# ======== method: mean shift ========


class MemoryBank(nn.Module):
    """The last `size` embeddings, of unit norm, with the labels of their images (-1: unknown)."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("labels", torch.full((size,), -1))
        # Rows ever pushed: a plain int, so that no step waits for the device. state_dict lacks it:
        # main saves it, and resume restores it.
        self.pushed = 0

    def __len__(self):
        return min(self.pushed, len(self.labels))

    def enqueue(self, embeddings, labels):
        """Push embeddings [n, D] and labels [n], n <= size, over the oldest rows."""
        rows = torch.arange(self.pushed, self.pushed + len(labels), device=labels.device)
        rows = rows % len(self.labels)
        self.embeddings[rows] = embeddings
        self.labels[rows] = labels
        self.pushed += len(labels)


BLOCK = 512  # columns


def largest(similarities, k):
    """As similarities.topk(k, dim=1), but faster where m is large: values and indices [b, k] of the
    k largest in each row of similarities [b, m], the largest first."""
    columns = similarities.shape[1]
    # Plain topk where a row has no whole number of blocks, or where blocks would save little: where
    # k of them are more than 1/16 of the row.
    if columns % BLOCK != 0 or 16 * k * BLOCK > columns:
        return similarities.topk(k, dim=1)
    blocks = similarities.unflatten(1, (-1, BLOCK))  # [b, m / BLOCK, BLOCK]
    # Only the k blocks with the largest maxima are searched: a number in another block is no larger
    # than these k maxima, so the k largest can do without it.
    chosen = blocks.amax(dim=2).topk(k, dim=1).indices  # [b, k]
    candidates = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK))  # [b, k, BLOCK]
    values, found = candidates.flatten(1).topk(k, dim=1)  # found: among k * BLOCK candidates
    block = chosen.gather(1, found // BLOCK)  # found // BLOCK: which of the k chosen ones
    return values, block * BLOCK + found % BLOCK


@torch.autocast("cuda", enabled=False)  # the networks are in bfloat16, this is not
def nearest_neighbors(targets, bank, k):
    """Indices [b, k] of the rows of bank [m, D] nearest to targets [b, D], nearest first. All have
    unit norm, so the nearest has the largest dot product. Raises ValueError for k > m."""
    if k > len(bank):
        raise ValueError(f"{k} neighbours of a bank with {len(bank)} rows")
    _, indices = largest(targets @ bank.T, k)
    return indices


def mean_shift_loss(queries, neighbors):
    """Mean of ||q - M_j||^2 = 2 - 2 q . M_j: queries [b, D], neighbors [b, k, D], of unit norm."""
    similarities = (queries[:, None] * neighbors).sum(dim=2)  # [b, k]
    return (2 - 2 * similarities).mean()


class MSF(nn.Module):
    """The method, around a backbone that gives features [b, width]. Call update_target after each
    step of the optimiser."""

    def __init__(self, backbone, width, topk, bank_size, ema):
        super().__init__()
        dim = width // 4  # the paper's 512 for ResNet-50
        hidden = 2 * width  # and its 4096
        self.topk = topk
        self.online = nn.Sequential(backbone, mlp(width, hidden, dim))  # f, with its projector
        self.predictor = mlp(dim, hidden, dim)  # h
        self.target = copy.deepcopy(self.online).requires_grad_(False)  # g
        self.bank = MemoryBank(bank_size, dim)  # M
        self.ema = ema

    def update_target(self):
        """g <- ema g + (1 - ema) f, for weights; BatchNorm's statistics are g's own."""
        averages = list(self.target.parameters())
        weights = list(self.online.parameters())
        # In place and without gradients. The last argument, a count, is not used.
        get_ema_multi_avg_fn(self.ema)(averages, weights, None)

    def forward(self, weak, strong, labels):
        """Views [b, 3, S, S] -> loss, and metrics to log. Labels [b] only measure the purity."""
        queries = self.predictor(self.online(strong))
        queries = F.normalize(queries.float(), dim=1)  # q, [b, D]
        with torch.no_grad():
            targets = F.normalize(self.target(weak).float(), dim=1)  # u, [b, D]

        # Push first: u is then in M, and is (up to rounding) its own nearest row.
        self.bank.enqueue(gather(targets), gather(labels))
        bank = self.bank.embeddings[: len(self.bank)]
        nearest = nearest_neighbors(targets, bank, self.topk)
        loss = mean_shift_loss(queries, bank[nearest])

        purity = label_purity(self.bank.labels[nearest], labels)
        # About sqrt(1 - ||mean u||^2): near 1 if the targets u point everywhere, 0 if all equal
        spread = targets.std(dim=0).norm()
        return loss, {"purity": purity, "spread": spread}


def label_purity(neighbor_labels, labels):
    """Of the pairs of an image [b] and a neighbour [b, k] with both labels known (>= 0), the share
    with equal labels; NaN if there are none. Each image is its own neighbour, so that this is at
    least 1 / k; where few images have labels, few other pairs are known, and it is near 1."""
    known = (neighbor_labels >= 0) & (labels >= 0)[:, None]
    same = (neighbor_labels == labels[:, None]) & known
    return same.sum() / known.sum()


# ======== networks ========
# From here to main, msf.py, cmsf_ssl.py, cmsf_semi.py and mnn.py have the same functions; only
# mnn.py passes a norm_layer.


def build_backbone(arch, stem, norm_layer=nn.BatchNorm2d):
    """A torchvision ResNet that gives features [b, width], without classifier, and the width."""
    if arch == "resnet10":
        net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
    else:
        net = getattr(resnet, arch)(norm_layer=norm_layer)
    if stem != "imagenet":
        stride = 2 if stem == "small-stride" else 1
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=stride, padding=1, bias=False)
    if stem in ("small", "small-stride"):
        net.maxpool = nn.Identity()
    width = net.fc.in_features
    net.fc = nn.Identity()
    return net, width


def mlp(width, hidden, out):
    """A projector or predictor."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
    )


def gather(tensor):
    """[b, ...] of every process -> [B, ...], in the order of their ranks, on each of them."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


# ======== data ========


SMALL = 96  # below this size, image files are shrunk once and kept in memory
UNLABELLED = ("unlabelled", "unlabeled")  # folders in train/ that are no classes
FOLDERS = "need images in any folders, or train/CLASS/*.jpg and, to test, val/CLASS/*.jpg"
HINTS = {
    "digits": "they come with scikit-learn",
    "cifar10": f"if offline, put {datasets.CIFAR10.url} there",
    "cifar100": f"if offline, put {datasets.CIFAR100.url} there",
    "stl10": f"if offline, put {datasets.STL10.url} there",
    "tinyimagenet": "need the unpacked http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "imagenet": "need train/CLASS/*.JPEG and val/CLASS/*.JPEG",
    "folder": FOLDERS,
    "small-folder": FOLDERS,
}


def load_split(args, is_train):
    """A split: (images uint8 [N, 3, H, H], None, labels [N]) or, where the images are files, (None,
    N paths, labels [N]). A label of -1 is unknown. OSError or RuntimeError for missing data."""
    root = Path(args.data_dir).expanduser()
    if args.dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        # The last 360 are mostly by other writers.
        split = slice(None, -360) if is_train else slice(-360, None)
        images = torch.tensor(digits.images[split]).unsqueeze(1) * (255 / 16)  # were 0 to 16
        images = F.interpolate(images, scale_factor=2, mode="bilinear").round().byte()
        return images.expand(-1, 3, -1, -1), None, digits.target[split]
    if args.dataset in ("cifar10", "cifar100"):
        cifar = datasets.CIFAR10 if args.dataset == "cifar10" else datasets.CIFAR100
        source = cifar(root, is_train, download=True)
        return torch.from_numpy(source.data).permute(0, 3, 1, 2), None, source.targets
    if args.dataset == "stl10":
        source = datasets.STL10(root, "train+unlabeled" if is_train else "test", download=True)
        return torch.from_numpy(source.data), None, source.labels
    need_folders = args.dataset in ("imagenet", "tinyimagenet")
    paths, labels = list_files(root, is_train, need_folders)
    return None, paths, labels


def list_files(root, is_train, need_folders):
    """Paths of a split's image files, and their labels. A file's class is the first folder below
    train/ or val/; files directly there, or in unlabelled/, have the label -1. If there is neither
    train/ nor val/, and need_folders is False, all files in root are for training, unlabelled."""
    folder = root / ("train" if is_train else "val")
    has_splits = (root / "train").is_dir() or (root / "val").is_dir()
    if is_train and not has_splits and not need_folders:
        folder = root  # all of it is for training
    names = find_images(folder) if folder.is_dir() else []
    if is_train and not names:
        raise FileNotFoundError(f"no images in {folder.absolute()}")

    file_classes = [os.path.dirname(name).split(os.sep)[0] for name in names]
    if (folder / "val_annotations.txt").exists():  # Tiny ImageNet has a list in place of folders
        lines = (folder / "val_annotations.txt").read_text().splitlines()
        listed = dict(line.split("\t")[:2] for line in lines if line)
        file_classes = [listed.get(os.path.basename(name), "") for name in names]
    label_of = {}
    if (root / "train").is_dir():  # its folders number the classes of val/, too
        folders = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
        classes = [name for name in folders if name[0] not in ".@" and name not in UNLABELLED]
        label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of.get(name, -1) for name in file_classes]
    return [os.path.join(folder, name) for name in names], labels


def find_images(folder):
    """Paths, relative to folder, of the image files in it at any depth. Names that begin with . or
    @ (of a NAS) are no data."""
    names = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name[0] in ".@":
            continue
        if entry.is_dir():
            names += [os.path.join(entry.name, name) for name in find_images(entry.path)]
        elif entry.name.lower().endswith(datasets.folder.IMG_EXTENSIONS):
            names.append(entry.name)
    return names


def read_image(path):
    """An image file as RGB. Raises OSError, with the path, if it cannot be read."""
    try:
        with Image.open(path) as image:
            # 16-bit gray has the mode "I;16" or, for PPM and older Pillow's PNG, "I" (32 bits).
            is_16_bit_in_32 = image.mode == "I" and image.format in ("PNG", "PPM")
            if image.mode.startswith("I;16") or is_16_bit_in_32:
                high_bytes = np.asarray(image) // 256
                return Image.fromarray(high_bytes.astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError("its range is unknown; convert it to 8 or unsigned 16 bits")
            if image.mode == "P":  # straight to RGB, Pillow may warn of transparent colours
                image = image.convert("RGBA")
            return image.convert("RGB")
    except Exception as error:
        raise OSError(f"cannot read {path}: {error}") from error


class ImageFiles(Dataset):
    """Item i: crops of the i-th file, random ones or the center, uint8 [num_crops, 3, S, S]."""

    def __init__(self, paths, args, num_crops, center=False):
        self.paths = paths
        self.num_crops = num_crops
        size = args.image_size
        if center:
            resized = size if size < SMALL else size * 8 // 7  # 256 for 224
            self.cut = transforms.Compose([transforms.Resize(resized), transforms.CenterCrop(size)])
        else:
            self.cut = transforms.RandomResizedCrop(size, args.crop_scale)

    def __getitem__(self, i):
        image = read_image(self.paths[i])
        crops = [self.cut(image) for _ in range(self.num_crops)]
        return torch.stack([pil_to_tensor(crop) for crop in crops])


class ImageData:
    """A split of a data set, on the device: labels [N], -1 where unknown, and images, uint8
    [N, 3, H, H]; or images is None, and files are read when a batch needs them."""

    def __init__(self, args, is_train, device):
        self.args = args
        self.device = device
        try:
            images, self.paths, labels = load_split(args, is_train)
        except (OSError, RuntimeError) as error:
            fault = f"cannot load {args.dataset} from --data-dir {args.data_dir}"
            raise SystemExit(f"{fault}: {HINTS[args.dataset]} ({error})") from error
        if self.paths and args.image_size < SMALL:
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"reading {len(labels)} image files into memory", flush=True)
            order = torch.arange(len(labels)).split(256)
            batches = self.read_files(order, num_crops=1, center=True)
            # Each is cloned, so that its shared memory with a worker is free again.
            images = torch.cat([batch.squeeze(1).clone() for batch in batches])
        self.images = None if images is None else images.contiguous().to(device)
        self.labels = torch.as_tensor(labels, dtype=torch.int64, device=device)

    def batches(self, order, num_crops):
        """For each batch of indices [b] in `order`, a list of num_crops tensors of random crops,
        [b, 3, S, S] in 0..1."""
        if self.images is None:
            for crops in self.read_files(order, num_crops):
                crops = crops.to(self.device, non_blocking=True) / 255
                yield list(crops.unbind(1))
        else:
            for indices in order:
                copies = (self.images[indices] / 255).repeat(num_crops, 1, 1, 1)
                yield list(random_crop(copies, self.args).chunk(num_crops))  # one call for all

    def eval_batches(self, order):
        """For each batch of indices [b] in `order`, the images as they are tested, in 0..1: center
        crops of files, [b, 3, S, S]; else full images, [b, 3, H, H] (STL-10: 96 pixels)."""
        if self.images is None:
            for images in self.read_files(order, num_crops=1, center=True):
                yield images.squeeze(1).to(self.device, non_blocking=True) / 255
        else:
            for indices in order:
                yield self.images[indices] / 255

    def read_files(self, order, num_crops, center=False):
        """For each batch of indices in `order`, crops of files, uint8 [b, num_crops, 3, S, S]."""
        return DataLoader(
            ImageFiles(self.paths, self.args, num_crops, center),
            batch_sampler=[indices.tolist() for indices in order],
            num_workers=self.args.num_workers,
            pin_memory=self.device.type == "cuda",
        )


def epoch_order(n, epoch, args, rank, world_size):
    """Indices [steps, b] of this process's images, in an order that the seed and the epoch give; an
    incomplete last batch is left out."""
    steps = n // args.batch_size
    generator = torch.Generator().manual_seed(args.seed * 1_000_000 + epoch)
    order = torch.randperm(n, generator=generator)[: steps * args.batch_size]
    return order.view(steps, world_size, -1)[:, rank]


# ======== views: random for every image, computed for a whole batch on its device ========
# The same in every script; skip them at first reading.


def uniform(images, low, high):
    """A random number in low..high for every image, [n, 1, 1, 1]."""
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)


def random_boxes(n, side, scale, device):
    """Boxes in square images, drawn as by torchvision's RandomResizedCrop. Returns their start
    [2, n], top and left, and their length [2, n], height and width."""
    area = torch.empty(n, 10, device=device).uniform_(*scale) * side**2  # ten tries
    # Width / height.
    ratio = torch.empty(n, 10, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    lengths = torch.stack([area / ratio, area * ratio]).sqrt().round()  # [2, n, 10]
    fits = ((lengths >= 1) & (lengths <= side)).all(dim=0)
    first = fits.int().argmax(dim=1)  # the first try that fits
    length = lengths[:, torch.arange(n, device=device), first]  # [2, n]
    length = torch.where(fits.any(dim=1), length, side)  # or the whole image
    start = (torch.rand(2, n, device=device) * (side - length + 1)).floor()
    return start, length


def resize_weights(start, length, side, size):
    """Matrices [..., size, side] that cut start..start + length out of `side` pixels and resize it
    to `size` pixels, bilinear and antialiased as in torchvision."""
    start = start[..., None, None]
    end = start + length[..., None, None]
    step = (end - start) / size  # from one pixel of the result to the next
    pixels = torch.arange(side, device=start.device) + 0.5  # their middles, [side]
    result_pixels = torch.arange(size, device=start.device)[:, None] + 0.5  # [size, 1]
    centers = start + step * result_pixels  # [..., size, 1]
    distances = (pixels - centers).abs()  # [..., size, side]
    # Triangles, from 1 at the center to 0 at a distance of one pixel or, where the image shrinks,
    # of one step (antialiasing).
    weights = (1 - distances / step.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixels > start) & (pixels < end))  # pixels outside do not count
    return weights / weights.sum(dim=-1, keepdim=True)


def random_crop(images, args):
    """Images [n, 3, H, H] -> random resized crops, [n, 3, S, S]."""
    n, _, side, _ = images.shape
    start, length = random_boxes(n, side, args.crop_scale, images.device)
    rows, columns = resize_weights(start, length, side, args.image_size)  # [n, S, H] each
    return torch.einsum("nih,nchw,njw->ncij", rows, images, columns)


def flip_and_rotate(images, args):
    """Mirror each image with probability args.flip, and turn it by up to args.rotation degrees;
    the corners that this leaves open are black, as in torchvision."""
    images = torch.where(uniform(images, 0, 1) < args.flip, images.flip(3), images)
    if args.rotation == 0:
        return images
    angle = uniform(images, -args.rotation, args.rotation).deg2rad().flatten()
    zero = torch.zeros_like(angle)
    matrix = [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero]
    matrices = torch.stack(matrix, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def shift_hue(images, shift):
    """Turn the hue by a share [n, 1, 1, 1] of the colour circle: from RGB to hue, chroma and value
    and back, by the formula f(n) of https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    """
    red, green, blue = images.split(1, dim=1)
    value = images.amax(1, keepdim=True)
    chroma = (value - images.amin(1, keepdim=True)).clamp(min=1e-12)
    # The hue, modulo 6: red is 0, green 2, blue 4.
    hue = torch.where(value == green, 2 + (blue - red) / chroma, 4 + (red - green) / chroma)
    hue = torch.where(value == red, (green - blue) / chroma, hue)
    hue = hue + 6 * shift
    # Red, green and blue are f(5), f(3) and f(1), where
    # f(n) = value - chroma * max(0, min(k, 4 - k, 1)) and k = (n + hue) % 6.
    k = torch.cat([hue + 5, hue + 3, hue + 1], dim=1) % 6
    return value - torch.minimum(k, 4 - k).clamp_(0, 1) * chroma


def color_jitter(images, brightness, contrast, saturation, hue):
    """torchvision's ColorJitter with probability 0.8. Every image has its own amounts; the order of
    the four operations is drawn once for the batch."""
    jittered = uniform(images, 0, 1) < 0.8
    for operation in torch.randperm(4).tolist():
        amount = torch.where(jittered, uniform(images, -1, 1), 0)
        if operation == 0:
            images = (images * (1 + brightness * amount)).clamp_(0, 1)
        elif operation == 1:
            mean = rgb_to_grayscale(images).mean((2, 3), keepdim=True)
            images = torch.lerp(mean, images, 1 + contrast * amount).clamp_(0, 1)
        elif operation == 2:
            gray = rgb_to_grayscale(images)
            images = torch.lerp(gray, images, 1 + saturation * amount).clamp_(0, 1)
        else:
            images = shift_hue(images, hue * amount)
    return images


def gaussian_blur(images):
    """Blur by a sigma of 0.1 to 2 pixels, drawn for every image: columns, then rows."""
    sigma = uniform(images, 0.1, 2)
    pixels = torch.arange(images.shape[3], device=images.device)
    distance = pixels[:, None] - pixels
    # At least -30, a weight of 1e-13: much smaller weights, and their products, are denormal
    # numbers, with which CPUs multiply slowly.
    exponent = (-(distance**2) / (2 * sigma**2)).clamp(min=-30)
    weights = torch.softmax(exponent, dim=3)  # [n, 1, S, S]; rows sum to 1
    return weights @ images @ weights.mT


def standardize(images):
    """Subtract ImageNet's mean and divide by its standard deviation. By channels: a tensor of means
    would have to be copied to the device."""
    red, green, blue = images.unbind(1)
    channels = [(red - 0.485) / 0.229, (green - 0.456) / 0.224, (blue - 0.406) / 0.225]
    return torch.stack(channels, dim=1).contiguous(memory_format=torch.channels_last)


def weak_view(crops, args):
    """Crops [b, 3, S, S] in 0..1 -> weak views."""
    return standardize(flip_and_rotate(crops, args))


def strong_view(crops, args):
    """Crops [b, 3, S, S] in 0..1 -> strong views: with other colours, too."""
    images = color_jitter(flip_and_rotate(crops, args), *args.jitter)
    if args.gray > 0:
        images = torch.where(uniform(images, 0, 1) < args.gray, rgb_to_grayscale(images), images)
    if args.blur > 0:
        images = torch.where(uniform(images, 0, 1) < args.blur, gaussian_blur(images), images)
    return standardize(images)


# ======== training ========


def check_data(args, train, test, world_size):
    """Lines to print about data and run. Raises SystemExit for fewer images than a batch."""
    n = len(train.labels)
    if n < 2 * world_size:
        raise SystemExit(f"{n} training images are too few")
    if args.batch_size > n:
        batch = world_size * max(2, n // 4 // world_size)  # some four steps an epoch
        smaller = f"--batch-size {batch} --bank-size {n}"  # a row for each image
        if args.topk > batch:
            smaller += f" --topk {batch}"
        raise SystemExit(f"--batch-size is above the {n} training images; try {smaller}")
    labelled = (train.labels >= 0).sum().item()
    tested = (test.labels >= 0).sum().item()
    tests = f"{len(test.labels)} test images ({tested} labelled)"
    lines = [f"{n} training images ({labelled} labelled), {tests}"]
    if args.bank_size > n:
        lines.append(f"--bank-size is above {n}: the bank holds several embeddings of an image")
    if args.warmup_epochs >= args.epochs:
        warmup = f"--warmup-epochs {args.warmup_epochs:g} of {args.epochs} epochs"
        lines.append(f"{warmup}: the learning rate only rises (fine for a trial)")
    if labelled == 0:
        lines.append("purity and k-NN accuracy are not measured: they need labels, train/CLASS/")
    elif tested == 0:
        lines.append("the k-NN accuracy is not measured: it needs val/ with the classes of train/")
    return lines


@torch.no_grad()
def embed(network, data, indices, rank, world_size):
    """A network's outputs [n, D], of unit norm, for the images with these indices [n], on all
    processes."""
    share = math.ceil(len(indices) / world_size)  # the same for all, as gather needs it
    positions = torch.arange(rank * share, (rank + 1) * share)
    own = indices[positions % len(indices)]  # past the end, again from the start
    amp = data.args.amp and data.device.type == "cuda"
    outputs = []
    network.eval()
    if dist.is_initialized():
        # Without SyncBatchNorm (on CPUs), BatchNorm's statistics differ by process: use rank 0's.
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    for images in data.eval_batches(own.split(256)):
        with torch.autocast(data.device.type, torch.bfloat16, enabled=amp):
            output = network(standardize(images))
        outputs.append(F.normalize(output.float(), dim=1))
    network.train()
    return gather(torch.cat(outputs))[: len(indices)]  # without those again


def knn_accuracy(backbone, train, test, rank, world_size):
    """k-NN accuracy, in percent, on the labelled test images; at most 100,000 labelled training
    images vote. k is 20 or, if smaller, the mean number of voters in a class. None without labels.
    """
    voters = (train.labels >= 0).nonzero().squeeze(1).cpu()
    tested = (test.labels >= 0).nonzero().squeeze(1).cpu()
    if len(voters) == 0 or len(tested) == 0:
        return None
    voters = voters[:: math.ceil(len(voters) / 100_000)]
    labels = train.labels[voters]
    k = min(20, math.ceil(len(labels) / len(labels.unique())))
    bank = embed(backbone, train, voters, rank, world_size)
    queries = embed(backbone, test, tested, rank, world_size)
    nearest = torch.cat([nearest_neighbors(part, bank, k) for part in queries.split(1024)])
    votes = labels[nearest].mode(dim=1).values
    return 100 * (votes == test.labels[tested]).float().mean().item()


def learning_rate(step, steps_per_epoch, args):
    """For steps 1, 2, ...: linear warm-up to lr, then a cosine from lr towards 0."""
    warmup = round(args.warmup_epochs * steps_per_epoch)
    if step <= warmup:
        return args.lr * step / warmup
    progress = (step - 1 - warmup) / (args.epochs * steps_per_epoch - warmup)
    return args.lr * (1 + math.cos(math.pi * progress)) / 2


def save(content, path):
    """Write a file whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    temporary = path.with_suffix(".tmp")
    # On a full disk, write_bytes raises OSError, which failures_explained knows; torch.save would
    # raise RuntimeError.
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)


def resume(path, args, n, model, optimizer):
    """Load a checkpoint of a run on n images. Returns its epochs, and lines to print. Raises
    SystemExit if the number of images or the model is another, or if it has too many epochs."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("method") != type(model).__name__:
        raise SystemExit(f"{path} is of another script or version: choose a new --run-name")
    if state["images"] != n:
        fault = f"{path} was trained on {state['images']} images, and now there are {n}"
        raise SystemExit(f"{fault}: restore them, or choose a new --run-name")
    changes = []
    for name, value in vars(args).items():
        old = state["args"].get(name)
        if value != old:
            changes.append(f"--{name.replace('_', '-')} is now {value}, was {old}")
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        if state["args"].keys() != vars(args).keys():
            why = "it is of another script or version"
        else:
            why = ", ".join(changes) or "it has other networks"
        raise SystemExit(f"{path} does not fit: {why}. Choose a new --run-name") from error
    if state["epoch"] > args.epochs:
        raise SystemExit(f"{path} has {state['epoch']} epochs, more than --epochs {args.epochs}")
    model.bank.pushed = state["pushed"]
    # load_state_dict also loads the options momentum and weight_decay; put this run's back.
    settings = {name: x for name, x in optimizer.param_groups[0].items() if name != "params"}
    optimizer.load_state_dict(state["optimizer"])
    optimizer.param_groups[0].update(settings)
    return state["epoch"], [f"continuing after epoch {state['epoch']} of {args.epochs}", *changes]


@contextlib.contextmanager
def failures_explained():
    """Around main: one line for Ctrl-C and for a file that cannot be read or written, and a hint
    where processes that read images fail."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    except OSError as error:
        # An error from a worker holds the worker's traceback; its last line is the message.
        message = str(error).strip().split("\n")[-1].removeprefix("OSError: ")
        if "No space left" in message:
            message += " (the disk or, in Docker, /dev/shm: docker run --shm-size=8g)"
        raise SystemExit(message) from error
    except RuntimeError as error:
        if not re.search(r"worker .*(killed|exited)|unable to .*shared memory", str(error)):
            raise
        hint = "Lower --num-workers or, in Docker, use docker run --shm-size=8g."
        raise SystemExit(f"Reading images failed; too little memory? {hint}\n{error}") from error


@failures_explained()
def main(args):
    """Train. Returns a dict: loss (the last one, of this process's images; NaN if no epoch was
    left), knn (k-NN accuracy in percent, None without labels) and checkpoint (its path, valid in
    the first process)."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check_args(args, world_size)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        # TF32 for products in float32. The search finds nearly the same neighbours, much sooner.
        torch.set_float32_matmul_precision("high")
    if world_size > 1:
        backend = "nccl" if on_gpu else "gloo"
        timeout = timedelta(hours=1)  # for a download
        dist.init_process_group(backend, timeout=timeout, device_id=device if on_gpu else None)
    if rank == 0:
        recipe = vars(RECIPES[args.dataset])
        changes = {name: value for name, value in vars(args).items() if value != recipe[name]}
        print(f"the recipe for {args.dataset}, with {changes or 'no changes'}", flush=True)

    # The first process of each node loads the data first, as it may download them.
    if world_size > 1 and local_rank > 0:
        dist.barrier()
    train = ImageData(args, is_train=True, device=device)
    test = ImageData(args, is_train=False, device=device)
    if world_size > 1 and local_rank == 0:
        dist.barrier()
    lines = check_data(args, train, test, world_size)
    n = len(train.labels)
    steps_per_epoch = n // args.batch_size
    total_steps = args.epochs * steps_per_epoch

    torch.manual_seed(args.seed)
    backbone, width = build_backbone(args.arch, args.stem)  # it will be model.online[0]
    model = MSF(backbone, width, args.topk, args.bank_size, args.ema)
    model = model.to(device, memory_format=torch.channels_last)
    networks = (model.online, model.predictor, model.target)
    if world_size > 1 and on_gpu:
        for network in networks:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)  # in place
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, args.lr, args.momentum, weight_decay=args.weight_decay, fused=on_gpu
    )

    new_name = f"msf-{args.dataset}-{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = Path("runs", args.run_name or new_name)  # only rank 0 writes; new_name differs by rank
    first_epoch = 0
    if (folder / "last.pt").exists():
        first_epoch, news = resume(folder / "last.pt", args, n, model, optimizer)
        lines += news
    epochs_found = gather(torch.tensor([first_epoch], device=device))
    if len(epochs_found.unique()) > 1:
        raise SystemExit("the processes found different checkpoints: they must share runs/")
    if args.compile:
        for network in networks:
            network.compile()
    parallel_model = model
    if world_size > 1:
        parallel_model = nn.parallel.DistributedDataParallel(model)
        # DDP need not send rank 0's buffers (the bank: up to 2 GB) before every step: banks stay
        # equal, as each process pushes the gathered rows, and BatchNorm's statistics are used only
        # in embed, which sends them. Set after construction, as torch 2.14 warns if the
        # constructor gets broadcast_buffers=False; DDP reads the attribute in each forward.
        parallel_model.broadcast_buffers = False
    if rank == 0:
        # Makes the folder, and hides what a stopped run logged after its last checkpoint.
        writer = SummaryWriter(folder, purge_step=first_epoch * steps_per_epoch + 1)
        writer.add_text("args", str(args))
        lines.append(f"training on {world_size} x {device.type}, writing to {folder}")
        print(*lines, sep="\n", flush=True)

    def measure_knn(epoch):
        knn = knn_accuracy(backbone, train, test, rank, world_size)
        if rank == 0 and knn is not None:
            writer.add_scalar("knn", knn, epoch * steps_per_epoch)
            print(f"epoch {epoch}/{args.epochs}  k-NN accuracy {knn:.2f}%", flush=True)
        return knn

    loss = torch.tensor(math.nan)  # if no epoch is left
    for epoch in range(first_epoch, args.epochs):
        if epoch % args.knn_every == 0:
            measure_knn(epoch)  # at first, that of the untrained network
        order = epoch_order(n, epoch, args, rank, world_size).to(device)
        # Seeds crops and views: other ones in each process, and the same again if a stopped run
        # goes on with this epoch.
        torch.manual_seed(args.seed * 1_000_000 + epoch * 1_000 + rank)
        started = time.time()
        history = []
        for i, crops in enumerate(train.batches(order, num_crops=2)):
            step = epoch * steps_per_epoch + i + 1
            lr = learning_rate(step, steps_per_epoch, args)
            optimizer.param_groups[0]["lr"] = lr

            weak = weak_view(crops[0], args)
            strong = strong_view(crops[1], args)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp and on_gpu):
                loss, metrics = parallel_model(weak, strong, train.labels[order[i]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_target()

            history.append(torch.stack([loss.detach(), *metrics.values()]))
            is_last = i + 1 == steps_per_epoch
            if not is_last and (i + 1) % args.log_every != 0:
                continue
            # From here on the host waits for the device. A NaN in one process gets into the weights
            # of all, through the averaged gradients: all processes stop here.
            norm_of_weights = nn.utils.get_total_norm(parameters)
            if not norm_of_weights.isfinite():
                raise SystemExit(f"weights not finite by step {step}, lr {lr:g}; lower --lr")
            if rank == 0:  # the means are of its own images
                means = torch.stack(history).nanmean(dim=0).tolist()  # purity may be NaN
                names = ["loss", *metrics]
                entry = {name: x for name, x in zip(names, means) if not math.isnan(x)}
                seconds_per_step = (time.time() - started) / (i + 1)
                speed = args.batch_size / seconds_per_step
                left = timedelta(seconds=int(seconds_per_step * (total_steps - step)))
                text = "  ".join(f"{name} {value:.3f}" for name, value in entry.items())
                head = f"epoch {epoch + 1}/{args.epochs}  step {i + 1}/{steps_per_epoch}"
                print(f"{head}  {text}  lr {lr:.3g}  {speed:.0f} images/s  {left} left", flush=True)
                for name, value in (entry | {"lr": lr, "images_per_s": speed}).items():
                    writer.add_scalar(name, value, step)
            history.clear()

        if rank == 0:  # before the evaluation, which may fail
            state = {
                "method": type(model).__name__,
                "args": vars(args),
                "images": n,
                "epoch": epoch + 1,
                "step": step,  # for eval_linear.py
                "model": model.state_dict(),
                "pushed": model.bank.pushed,
                "optimizer": optimizer.state_dict(),
            }
            save(backbone.state_dict(), folder / "backbone.pt")
            save(state, folder / "last.pt")

    knn = measure_knn(args.epochs)
    if rank == 0:
        writer.close()
        print(f"To evaluate this run: python eval_linear.py --checkpoint {folder / 'last.pt'}")
    if world_size > 1:
        dist.destroy_process_group()
    return {"loss": loss.item(), "knn": knn, "checkpoint": str(folder / "last.pt")}


if __name__ == "__main__":
    main(parse_args())
