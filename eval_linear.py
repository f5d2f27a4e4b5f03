# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "tyro", "tensorboard", "scikit-learn"]
# ///
"""Judge the backbone of a checkpoint: k-NN and a linear probe on frozen features, or fine-tuning.

    features     the backbone's pooled output, in eval mode, for whole images or center crops
    k-NN         the k nearest training images (cosine) vote, for k = 1, 20 (or as many as a class
                 has on average, if these are fewer) and 200 (weighted by similarity)
    linear       a linear layer on frozen features of random crops, raw for CIFAR, STL-10 and Tiny
                 ImageNet, else scaled (to unit norm, then standardised); rates are in PROTOCOLS
    fine-tuned   backbone, projector and a linear layer, all trained

Accuracies are those after the last epoch, not the best. The labelled images, or those that
--labels names, vote and train. neighbors.png shows test images, each with its nearest training
images.

    python eval_linear.py --checkpoint runs/NAME/last.pt
    python eval_linear.py --checkpoint runs/NAME/last.pt --labels 10pct --fine-tune
    python eval_linear.py --checkpoint runs/NAME/last.pt --baseline random    # or raw: pixels
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint resnet50.pth --dataset imagenet
"""

import argparse
import contextlib
import json
import math
import os
import pickle
import re
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, transforms
from torchvision.models import resnet
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid, save_image

# A class for each group of --help; class Args has them all.


@dataclass
class Network:
    checkpoint: str | None = None  # last.pt of a training script, or a file with a ResNet's weights
    # judge raw pixels or an untrained network, with data and network as in --checkpoint, if given
    baseline: Literal["raw", "random"] | None = None
    prefix: str | None = None  # how the backbone's tensors' names begin, without "module."
    arch: Literal["resnet10", "resnet18", "resnet34", "resnet50"] | None = None  # backbone
    # imagenet: 7x7/2, max-pool; small: 3x3; small-pool: 3x3, max-pool; small-stride: 3x3/2
    stem: Literal["imagenet", "small", "small-pool", "small-stride"] | None = None


@dataclass
class Data:
    # digits, cifar10, cifar100, stl10, tinyimagenet, imagenet;
    # for your own images: folder (224 pixels), small-folder (64 pixels)
    dataset: str | None = None
    data_dir: str | None = None  # folder of the data set; CIFAR and STL-10 are downloaded to it
    num_workers: int = min(8, os.cpu_count() or 1)  # processes that read image files, for each GPU
    labels: str | None = None  # images that vote and train: 1pct to 100pct, or a file listing them
    label_seed: int | None = None  # which images have the labels; the same as in cmsf_semi.py


@dataclass
class Views:
    image_size: int | None = None  # side of an image in pixels; below 96, files stay in memory
    # least and largest share of the area of a crop, in training
    crop_scale: tuple[float, float] | None = None
    flip: float | None = None  # probability of a horizontal flip, in training
    rotation: float | None = None  # largest rotation in training, in degrees


@dataclass
class Training:
    protocol: Literal["raw", "scaled"] | None = None  # features as they are, or standardised
    fine_tune: bool = False  # train all weights, not a linear layer on frozen features
    epochs: int | None = None  # passes over the training images; 0: no linear layer
    lr: float | None = None  # learning rate of SGD, at first
    batch_size: int = 256  # images per step, over all processes
    amp: bool = True  # on GPUs, run the backbone in bfloat16
    seed: int = 0  # of new weights, the order of the images and their views


@dataclass
class Args(Network, Data, Views, Training):
    """Judge a checkpoint or a baseline. None: as in the checkpoint, else as in the recipe."""


# fmt: off
AT_224 = Args(
    data_dir="data", label_seed=0, image_size=224, arch="resnet50", stem="imagenet",
    protocol="scaled", crop_scale=(0.08, 1.0), flip=0.5, rotation=0.0)
AT_32 = replace(AT_224, image_size=32, arch="resnet18", stem="small", protocol="raw")
AT_64 = replace(AT_32, image_size=64, stem="small-pool")
RECIPES = {
    "digits": replace(
        AT_224, image_size=16, arch="resnet10", stem="small-stride", crop_scale=(0.6, 1.0),
        flip=0.0, rotation=10.0),
    "cifar10": AT_32,
    "cifar100": AT_32,
    "stl10": replace(AT_64, image_size=96),  # its full size; the scripts train at 64
    "tinyimagenet": AT_64,
    "imagenet": AT_224,
    "folder": AT_224,
    "small-folder": replace(AT_64, protocol="scaled"),
}
# fmt: on


@dataclass
class Protocol:
    """SGD with momentum 0.9; lr is divided by 10 after the epochs in milestones."""

    lr: float
    weight_decay: float
    nesterov: bool
    epochs: int
    milestones: tuple[int, ...]


PROTOCOLS = {  # as published: scaled for ImageNet, raw for small images
    "scaled": Protocol(0.01, 1e-4, nesterov=False, epochs=40, milestones=(15, 30)),
    "raw": Protocol(30.0, 0.0, nesterov=True, epochs=100, milestones=(60, 80)),
    "fine-tuned": Protocol(0.001, 1e-4, nesterov=False, epochs=20, milestones=(15,)),
}


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


def complete_args(args, run):
    """Fill in what is None: from the arguments of the run that made the checkpoint, {} if they are
    not known, and then from the recipe. Raises SystemExit, with what to change."""
    dataset = args.dataset or run.get("dataset")
    if dataset is None and args.checkpoint is None:
        dataset = "digits"
    if dataset not in RECIPES:
        fault = f"unknown --dataset {dataset}" if dataset else f"{args.checkpoint}: give --dataset"
        raise SystemExit(f"{fault}, one of {', '.join(RECIPES)}")
    from_run = ["arch", "stem"]
    if run.get("dataset") == dataset:
        from_run += ["data_dir", "flip", "rotation", "label_seed"]  # but the recipe's crop_scale
        if dataset != "stl10":  # which is judged at a larger size than it is trained at
            from_run.append("image_size")

    values = vars(RECIPES[dataset])  # what comes later wins
    values = values | {name: run[name] for name in from_run if run.get(name) is not None}
    values |= {name: value for name, value in vars(args).items() if value is not None}
    values["dataset"] = dataset
    if args.baseline == "raw" and args.protocol is None:
        values["protocol"] = "scaled"  # the protocol "raw" has a rate of 30, too high for pixels
    protocol = PROTOCOLS["fine-tuned" if args.fine_tune else values["protocol"]]
    for name in ("epochs", "lr"):
        if values[name] is None:
            values[name] = getattr(protocol, name)
    args = Args(**values)

    if args.fine_tune and args.baseline == "raw":
        raise SystemExit("--baseline raw: pixels have no weights to --fine-tune")
    if args.epochs < (1 if args.fine_tune else 0):
        raise SystemExit("--epochs must be at least 1 to fine-tune, and 0 for k-NN alone")
    for name in ("batch_size", "image_size", "lr"):
        if not getattr(args, name) > 0:
            raise SystemExit(f"--{name.replace('_', '-')} must be above 0")
    return args


# ======== judges: k-NN, linear probe, fine-tuning ========


class Encoder(nn.Module):
    """Images [b, 3, S, S] in 0..1 -> the features [b, width] that a backbone gives."""

    def __init__(self, backbone, amp):
        super().__init__()
        self.backbone = backbone
        self.amp = amp  # on GPUs, in bfloat16

    def forward(self, images):
        enabled = self.amp and images.is_cuda
        with torch.autocast(images.device.type, torch.bfloat16, enabled=enabled):
            features = self.backbone(standardize(images))
        return features.float()


class Pixels(nn.Module):
    """The baseline "raw": images [b, 3, S, S] averaged to at most 32 x 32 pixels, [b, width]."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images, min(32, images.shape[3])).flatten(1)


def labelled(data):
    """Indices of the images with a label."""
    return (data.labels >= 0).nonzero().squeeze(1).cpu()


@torch.no_grad()
def outputs(network, data, indices, rank, world_size):
    """What a network in eval mode gives, [n, ...], for the images with these indices [n] as they
    are tested. The processes share the work, and all get all of it."""
    network.eval()
    n = len(indices)
    size = min(256, math.ceil(n / world_size))  # of a process's batch
    rounds = math.ceil(n / (size * world_size))
    wrapped = indices[torch.arange(rounds * world_size * size) % n]
    # In each round every process has one batch; gathered, they are in the order of the indices.
    own = wrapped.view(rounds, world_size, size)[:, rank]
    start = 0
    for images in data.eval_batches(own):
        if images.shape[3] != data.args.image_size:  # those in memory come in their full size
            side = [data.args.image_size] * 2
            images = F.interpolate(images, side, mode="bilinear", antialias=True)
        part = gather(network(images))[: n - start]  # without what was wrapped
        if start == 0:  # filled in place: a list and torch.cat would hold all twice
            result = part.new_empty(n, *part.shape[1:])
        result[start : start + len(part)] = part
        start += len(part)
    return result


def nearest_neighbors(targets, bank, k):
    """Indices [b, k] of the rows of bank [m, D] nearest to targets [b, D], nearest first. All have
    unit norm, so the nearest has the largest dot product. Raises ValueError for k > m."""
    if k > len(bank):
        raise ValueError(f"{k} neighbours of a bank with {len(bank)} rows")
    return (targets @ bank.T).topk(k, dim=1).indices


def knn_predict(queries, bank, labels, k, temperature=None):
    """Classes [b] for queries [b, D], which the k nearest rows of bank [N, D] vote for by their
    labels [N]. All rows have unit norm. Each vote counts 1 or exp(cosine / temperature); of equal
    counts, the lower class wins."""
    num_classes = 1 + labels.max().item()
    predictions = []
    for part in queries.split(256):
        nearest = nearest_neighbors(part, bank, k)
        votes = part.new_ones(nearest.shape)
        if temperature is not None:
            cosines = torch.einsum("bd,bkd->bk", part, bank[nearest])
            votes = (cosines / temperature).exp()
        counts = part.new_zeros(len(part), num_classes)
        counts.scatter_add_(1, labels[nearest], votes)
        predictions.append(counts.argmax(dim=1))
    return torch.cat(predictions)


class LinearProbe(nn.Module):
    """A linear layer on the features of a frozen encoder, images [b, 3, S, S] -> scores [b, C].
    With mean and std [width], features of unit norm are standardised by them first."""

    def __init__(self, encoder, width, num_classes, mean=None, std=None):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.mean = mean
        self.std = std

    def forward(self, images):
        features = self.encoder(images)
        if self.mean is not None:
            features = (F.normalize(features, dim=1) - self.mean) / self.std
        return self.head(features)


def fit(network, train, chosen, protocol, args, rank, world_size):
    """Train those weights of a network that need a gradient, on the images with these indices [n].
    Epochs and learning rate are those of args; the milestones are moved in proportion. Raises
    SystemExit for batches that are too small, and if the loss is not finite."""
    share = math.ceil(len(chosen) / world_size)  # images of each process
    steps = math.ceil(share * world_size / args.batch_size)
    least = 2 if network.training else 1  # BatchNorm needs two images
    if share // steps < least:  # the size of the smallest batch
        fault = f"a step needs {least} or more images for each process"
        raise SystemExit(f"{fault}: raise --batch-size, or label more images")
    parallel = network
    if world_size > 1:
        parallel = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(
        [p for p in network.parameters() if p.requires_grad],
        args.lr,
        momentum=0.9,
        weight_decay=protocol.weight_decay,
        nesterov=protocol.nesterov,
    )
    shortened = args.epochs / protocol.epochs
    milestones = [max(1, round(epoch * shortened)) for epoch in protocol.milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    for epoch in range(args.epochs):
        generator = torch.Generator().manual_seed(args.seed * 1_000_000 + epoch)
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        # As many for each process: if the images run out, the first come again.
        own = order[torch.arange(rank, share * world_size, world_size) % len(chosen)]
        batches = own.tensor_split(steps)  # equal parts: a last one of one image fails in BatchNorm
        torch.manual_seed(args.seed * 1_000_000 + epoch * 1_000 + rank)
        for indices, (crops,) in zip(batches, train.batches(batches, num_crops=1)):
            scores = parallel(flip_and_rotate(crops, args))
            loss = F.cross_entropy(scores, train.labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if not loss.isfinite():
            raise SystemExit(f"the loss is not finite in epoch {epoch + 1}: lower --lr {args.lr:g}")
        if rank == 0:
            print(f"epoch {epoch + 1}/{args.epochs}  loss {loss.item():.4f}", flush=True)
    if world_size > 1:
        for buffer in network.buffers():  # DDP sends them before each step: this is after the last
            dist.broadcast(buffer, 0)


def unit_features(encoder, data, indices, rank, world_size):
    """Features [n, width], of unit norm, of the images with these indices [n]."""
    features = outputs(encoder, data, indices, rank, world_size)
    return F.normalize(features, dim=1, out=features)  # in place: those of ImageNet take 10 GB


def judge_frozen(encoder, train, test, args, rank, world_size):
    """Accuracies, in percent, of k-NN and of a linear layer on frozen features, and, for the first
    process, a picture of neighbours."""
    voters = labelled(train)
    tested = labelled(test)
    labels = train.labels[voters]
    answers = test.labels[tested]
    features = unit_features(encoder, train, voters, rank, world_size)
    queries = unit_features(encoder, test, tested, rank, world_size)
    if not queries.isfinite().all():
        raise SystemExit("the features are not finite")
    picture = None
    if rank == 0:
        dozen = a_dozen(tested)
        picture = draw_neighbors(train, test, voters, tested[dozen], features, queries[dozen])

    num_classes = 1 + max(labels.max().item(), answers.max().item())
    class_size = math.ceil(len(voters) / num_classes)  # further neighbours are of other classes
    predictions = {
        "1-NN": knn_predict(queries, features, labels, 1),
        "20-NN": knn_predict(queries, features, labels, min(20, class_size)),
        "200-NN": knn_predict(queries, features, labels, min(200, len(voters)), temperature=0.1),
    }
    results = {judge: percent(found == answers) for judge, found in predictions.items()}
    tell(results, rank)  # a linear layer takes much longer
    if args.epochs > 0:
        mean = None
        std = None
        if args.protocol == "scaled":
            variance, mean = torch.var_mean(features, dim=0, correction=0)
            std = (variance + 1e-5).sqrt()
        width = features.shape[1]
        del features
        probe = LinearProbe(encoder, width, num_classes, mean, std).to(labels.device)
        probe.eval()  # its encoder is frozen
        fit(probe, train, voters, PROTOCOLS[args.protocol], args, rank, world_size)
        predicted = outputs(probe, test, tested, rank, world_size).argmax(dim=1)
        results["linear"] = percent(predicted == answers)
        tell({"linear": results["linear"]}, rank)
    return results, picture


def judge_fine_tuned(network, train, test, args, rank, world_size):
    """Accuracy, in percent, of a linear layer on encoder and projector, after training all."""
    chosen = labelled(train)
    tested = labelled(test)
    answers = test.labels[tested]
    network = network.to(answers.device)
    width = outputs(network, train, chosen[:1], rank, world_size).shape[1]
    num_classes = 1 + max(train.labels.max().item(), answers.max().item())
    network = nn.Sequential(network, nn.Linear(width, num_classes)).to(answers.device)
    if world_size > 1 and answers.is_cuda:  # SyncBatchNorm needs GPUs
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # in place
    network.train()
    fit(network, train, chosen, PROTOCOLS["fine-tuned"], args, rank, world_size)
    predicted = outputs(network, test, tested, rank, world_size).argmax(dim=1)
    results = {"fine-tuned": percent(predicted == answers)}
    tell(results, rank)
    return results


def tell(results, rank):
    """The first process prints accuracies, a line each."""
    if rank != 0:
        return
    for judge, result in results.items():
        print(f"{judge:>10} {result:6.2f}%", flush=True)


def percent(right):
    """Percent of True in a tensor."""
    return 100 * right.double().mean().item()


def show_neighbors(encoder, train, test, rank, world_size):
    """A picture of neighbours where there are no labels. Without test images, it is of training
    images, which are their own first neighbours."""
    if len(test.labels) == 0:
        test = train
    every = torch.arange(len(train.labels))
    shown = a_dozen(torch.arange(len(test.labels)))
    features = unit_features(encoder, train, every, rank, world_size)
    queries = unit_features(encoder, test, shown, rank, world_size)
    if rank != 0:
        return None
    return draw_neighbors(train, test, every, shown, features, queries)


def a_dozen(items):
    """Positions of 12 items, or of all, evenly spread."""
    return torch.linspace(0, len(items) - 1, min(12, len(items))).long()


def draw_neighbors(train, test, voters, shown, features, queries):
    """A picture [3, H, W]: in each line an image of test (indices shown [n], with queries [n, D]),
    and the 10 images of train nearest to it (of the indices voters [N], with features [N, D]),
    framed green if they have its class, red if not, and gray if one has no class."""
    nearest = nearest_neighbors(queries, features, min(10, len(voters))).cpu()
    neighbors = voters[nearest]  # [n, 10]
    white = torch.ones(3)
    green, red, gray = torch.tensor([[0.0, 0.6, 0.2], [0.9, 0.1, 0.1], [0.6, 0.6, 0.6]])
    tiles = []
    queried = test.eval_batches(shown[:, None])
    found = train.eval_batches(neighbors)
    for row, others, query, images in zip(shown, neighbors, queried, found):
        label = test.labels[row].item()
        colors = [white]
        for other in train.labels[others].tolist():
            if label < 0 or other < 0:
                colors.append(gray)
            else:
                colors.append(green if other == label else red)
        for color, image in zip(colors, torch.cat([query, images])):
            framed = color.view(3, 1, 1).repeat(1, 72, 72)
            framed[:, 4:-4, 4:-4] = F.interpolate(image[None].cpu(), 64)[0]
            tiles.append(framed)
    return make_grid(torch.stack(tiles), nrow=1 + neighbors.shape[1], padding=2, pad_value=1.0)


# ======== checkpoints ========
# Files are read without running code from them, whatever their layout.


OWN = "model.online.0."  # what the backbone's names begin with in a checkpoint of these scripts
# In other files, the best first; they are compared without "state_dict." and "model.".
USUAL = ["online.0.", "", "encoder_q.", "backbone.", "teacher.backbone."]


def read_file(path):
    """The content of a checkpoint. Raises SystemExit if it is damaged, or holds more than tensors,
    numbers, texts, and an argparse.Namespace."""
    scalar = np.float64(0).__reduce__()[0]  # what numpy's pickles call, by its name in numpy 1 or 2
    allowed = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed += [type(np.dtype(kind)) for kind in ("bool", "int64", "float32", "float64")]
    allowed += [np.dtype, argparse.Namespace]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {found[1]}, which could run code" if found else "it is damaged"
        advice = "if you trust it, save its state_dict alone"
        raise SystemExit(f"{path} is refused: {reason}; {advice}") from error
    except Exception as error:  # a damaged file can cause any
        reason = str(error).split("\n")[0] or "it is empty"
        raise SystemExit(f"{path} cannot be read: {reason}") from error


def named_tensors(content, prefix=""):
    """The tensors of nested dicts by their names, which are joined by dots."""
    if torch.is_tensor(content):
        return {prefix.removesuffix("."): content}
    tensors = {}
    if isinstance(content, dict):
        for name, value in content.items():
            tensors |= named_tensors(value, f"{prefix}{name}.")
    return tensors


def drop_wrappers(tensors, path):
    """Without what DataParallel ("module") and torch.compile ("_orig_mod") add to the names."""
    plain = {re.sub(r"\b(module|_orig_mod)\.", "", name): x for name, x in tensors.items()}
    if len(plain) < len(tensors):
        raise SystemExit(
            f"{path} holds some tensors twice, with and without module. in their names"
        )
    return plain


def below(tensors, start):
    """Those whose names begin with start, without it."""
    return {name[len(start) :]: x for name, x in tensors.items() if name.startswith(start)}


def name_numbered(tensors):
    """Give the numbered children of ResNets saved as nn.Sequential(*children), as in MNN's files,
    torchvision's names. Children without tensors, such as ReLU, have a number too, so the numbers
    that are found are matched with the names by their order."""
    children = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    renamed = dict(tensors)
    for first, tensor in tensors.items():
        sees_images = tensor.ndim == 4 and tensor.shape[1] == 3
        if not re.fullmatch(r"(.*\.)?0\.weight", first) or not sees_images:
            continue
        start = first.removesuffix("0.weight")
        inside = [name for name in below(tensors, start) if re.match(r"\d+\.", name)]
        numbers = sorted({int(name.split(".")[0]) for name in inside})
        child_of = dict(zip(numbers, children))
        for name in inside:
            number, rest = name.split(".", 1)
            if int(number) in child_of:
                new_name = f"{start}{child_of[int(number)]}.{rest}"
                renamed[new_name] = renamed.pop(start + name)
    return renamed


def find_prefix(tensors, path):
    """What the names of the one ResNet begin with, or of the best known one of several."""
    mark = "layer4.0.conv1.weight"
    found = sorted(name.removesuffix(mark) for name in tensors if name.endswith(mark))
    for usual in USUAL:
        for prefix in found:
            if re.sub(r"\b(state_dict|model)\.", "", prefix) == usual:
                return prefix
    if len(found) != 1:
        holds = f"several ResNets, {found}" if found else f"no ResNet among {len(tensors)} tensors"
        raise SystemExit(f"{path} holds {holds}: choose one by --prefix")
    return found[0]


def load_backbone(backbone, tensors, prefix, path):
    """Fill a backbone with the tensors whose names begin with prefix. Raises SystemExit, with their
    names, if some are missing, of another shape, or too many."""
    expected = backbone.state_dict()
    children = {name.split(".")[0] for name in expected}  # no classifier, no projector
    given = below(tensors, prefix)
    given = {name: x for name, x in given.items() if name.split(".")[0] in children}
    wrong = [name for name in given if name not in expected]
    for name, tensor in expected.items():
        if name in given:
            fits = given[name].shape == tensor.shape
        else:  # old files lack the counters of BatchNorm, which are of no use here
            fits = name.endswith("num_batches_tracked")
        if not fits:
            wrong.append(name)
    if wrong:
        fault = f"{path}: {len(wrong)} of {len(expected)} tensors do not fit, as {wrong[:3]}"
        raise SystemExit(f"{fault}; another --arch, --stem or --prefix?")
    backbone.load_state_dict(given, strict=False)


def load_projector(tensors, prefix, path):
    """The projector behind the backbone with this prefix: a list of Linear, BatchNorm1d and, before
    each Linear but the first, ReLU. It is online.1 for online.0, fc elsewhere, and may be empty."""
    start = prefix + "fc."
    if prefix.endswith("online.0."):
        start = prefix.removesuffix("0.") + "1."
    inside = below(tensors, start)
    layers = []
    for number in sorted({int(name.split(".")[0]) for name in inside if name[0].isdecimal()}):
        state = below(inside, f"{number}.")
        if "weight" in state and state["weight"].ndim == 2:
            if layers:
                layers.append(nn.ReLU())
            out, width = state["weight"].shape
            layer = nn.Linear(width, out, bias="bias" in state)
        elif "running_mean" in state:
            layer = nn.BatchNorm1d(len(state["running_mean"]), affine="weight" in state)
        else:
            raise SystemExit(f"{path}: {start}{number} is neither Linear nor BatchNorm1d")
        layer.load_state_dict(state)
        layers.append(layer)
    return layers


def load_encoder(args, content):
    """Backbone, projector (a list of layers) and prefix, from the content of args.checkpoint."""
    backbone, _ = build_backbone(args.arch, args.stem)
    tensors = drop_wrappers(named_tensors(content), args.checkpoint)
    prefix = args.prefix
    if is_own(content):
        prefix = prefix or OWN
    else:
        tensors = name_numbered(tensors)
    if prefix is None:
        prefix = find_prefix(tensors, args.checkpoint)
    if prefix and not prefix.endswith("."):
        prefix += "."
    load_backbone(backbone, tensors, prefix, args.checkpoint)
    projector = []
    if args.fine_tune:
        projector = load_projector(tensors, prefix, args.checkpoint)
    return backbone, projector, prefix


def is_own(content):
    """Is this a checkpoint of these scripts? No others have "pushed"."""
    return isinstance(content, dict) and {"model", "pushed", "args"} <= content.keys()


# ======== networks ========
# Networks, data and views are those of the training scripts; mnn.py passes a norm_layer.


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


def choose_labels(args, data):
    """Labels [N] of the images of data: those that --labels gives, else -1. The share is taken of
    each class, one image at least. Raises SystemExit for what is neither share nor list."""
    share = re.fullmatch(r"([1-9]\d?|100)pct", args.labels)
    if share is None:
        chosen = listed_images(args.labels, data)
    else:
        generator = torch.Generator().manual_seed(args.label_seed)
        order = torch.randperm(len(data.labels), generator=generator)
        labels = data.labels.cpu()[order]
        chosen = []
        for label in range(labels.max().item() + 1):
            images = order[labels == label]
            chosen += images[: max(1, round(len(images) * int(share[1]) / 100))].tolist()
    if len(chosen) == 0:
        raise SystemExit(f"--labels {args.labels} gives no training image a label")
    given = torch.full_like(data.labels, -1)
    given[chosen] = data.labels[chosen]
    return given


def listed_images(path, data):
    """Indices of the labelled images that a file lists: each line is the end of one path."""
    if not Path(path).expanduser().is_file():
        raise SystemExit(f"--labels {path}: neither 1pct to 100pct nor a file")
    if data.paths is None:
        raise SystemExit(f"--labels {path}: a list needs image files; here, use 1pct to 100pct")
    # By the file's name first, for speed. Then compare with a "/" before both (a place may start
    # with C:), so that a/1.jpg is not taken for ba/1.jpg.
    images_of = {}  # name of a file -> (image, path) of all that have it
    for i in (data.labels >= 0).nonzero().squeeze(1).tolist():
        place = os.path.abspath(data.paths[i]).replace(os.sep, "/")
        images_of.setdefault(os.path.basename(place), []).append((i, place))
    chosen = []
    faults = []
    for line in Path(path).expanduser().read_text("utf-8-sig", errors="replace").splitlines():
        name = line.strip().replace("\\", "/").removeprefix("./").lstrip("/")
        same_name = images_of.get(os.path.basename(name), [])
        found = [(i, place) for i, place in same_name if f"/{place}".endswith(f"/{name}")]
        if len(found) == 1:
            chosen.append(found[0][0])
        elif name:
            places = ", ".join(place for _, place in same_name[:3])
            faults.append(f"{name} ({len(found)} match; of this name: {places or 'none'})")
    if faults:
        shown = ", ".join(faults[:3])
        raise SystemExit(f"{path}: {len(faults)} line(s) do not name one labelled image: {shown}")
    return chosen


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


def standardize(images):
    """Subtract ImageNet's mean and divide by its standard deviation. By channels: a tensor of means
    would have to be copied to the device."""
    red, green, blue = images.unbind(1)
    channels = [(red - 0.485) / 0.229, (green - 0.456) / 0.224, (blue - 0.406) / 0.225]
    return torch.stack(channels, dim=1).contiguous(memory_format=torch.channels_last)


# ======== evaluation ========


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


def write(results, picture, folder, name, step, args):
    """Write results as JSON and the picture of neighbours, if there is one, into folder, and both
    for TensorBoard. If that is impossible, say so: the results are on the terminal."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = {"top1": results, "step": step, "args": asdict(args)}
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        with SummaryWriter(folder) as writer:
            for judge, result in results.items():
                writer.add_scalar(f"{name}/{judge}", result, step)
            if picture is not None:
                picture_name = name.replace("eval", "neighbors")  # eval-raw: neighbors-raw
                save_image(picture, folder / f"{picture_name}.png")
                writer.add_image(picture_name, picture, step)
                print(f"neighbours are shown in {folder / picture_name}.png")
        print(f"written to {folder / name}.json")
    except OSError as error:
        print(f"cannot write into {folder}: {error}")


@failures_explained()
def main(args):
    """Returns accuracies in percent: "1-NN", "20-NN", "200-NN" and "linear", or "fine-tuned"."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.checkpoint is None and args.baseline is None:
        raise SystemExit("give --checkpoint, or --baseline raw or random")
    content = {}
    if args.checkpoint is not None:
        content = read_file(args.checkpoint)
    run = content["args"] if is_own(content) else {}
    args = complete_args(args, run)
    trained_labels = run.get("labels")  # of cmsf_semi.py
    step = content["step"] if is_own(content) else 0
    torch.manual_seed(args.seed)
    projector = []
    if args.baseline is None:
        backbone, projector, prefix = load_encoder(args, content)
        source = f"{args.arch} of {args.checkpoint}, tensors {prefix}*"
    else:
        backbone, _ = build_backbone(args.arch, args.stem)
        source = f"baseline {args.baseline}"
    del content

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size > 1:
        backend = "nccl" if on_gpu else "gloo"
        timeout = timedelta(hours=1)  # for a download
        dist.init_process_group(backend, timeout=timeout, device_id=device if on_gpu else None)
    # The first process of each node loads the data first, as it may download them.
    if world_size > 1 and local_rank > 0:
        dist.barrier()
    train = ImageData(args, is_train=True, device=device)
    test = ImageData(args, is_train=False, device=device)
    if world_size > 1 and local_rank == 0:
        dist.barrier()

    if args.labels is not None:
        train.labels = choose_labels(args, train)

    if args.baseline == "raw":
        encoder = Pixels()
    else:
        encoder = Encoder(backbone, args.amp).to(device, memory_format=torch.channels_last)
    num_voters = len(labelled(train))
    num_tested = len(labelled(test))
    can_judge = num_voters > 0 and num_tested > 0
    if rank == 0:
        print(source)
        print(f"{args.dataset}: {num_voters} training and {num_tested} test images with labels")
        if can_judge and args.labels is None and trained_labels not in (None, "100pct"):
            print(f"all labels vote and train; only those it had: --labels {trained_labels}")
        if args.fine_tune:
            print(f"fine-tuning with a projector of {len(projector)} layers", flush=True)
    name = "eval" if args.baseline is None else f"eval-{args.baseline}"
    results = {}
    picture = None
    if args.fine_tune:
        if not can_judge:
            raise SystemExit("to fine-tune, need labelled images for training and for testing")
        name = f"{name}-fine-tuned"
        network = nn.Sequential(encoder, *projector)
        results = judge_fine_tuned(network, train, test, args, rank, world_size)
    elif can_judge:
        results, picture = judge_frozen(encoder, train, test, args, rank, world_size)
    else:
        picture = show_neighbors(encoder, train, test, rank, world_size)
    if rank == 0:
        folder = Path("runs", f"{args.baseline}-{args.dataset}-{args.seed}")
        if args.checkpoint is not None:
            folder = Path(args.checkpoint).parent
        write(results, picture, folder, name, step, args)
    if world_size > 1:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    main(parse_groups(Args()))
