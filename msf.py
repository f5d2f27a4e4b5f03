# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "tyro", "tensorboard", "scikit-learn"]
# ///
"""MSF: Mean Shift for Self-Supervised Learning (Koohpayegani, Tejankar, Pirsiavash, ICCV 2021).

The target encoder g embeds a weak view of image i, and the embedding is pushed into a memory bank M
of past embeddings. The online encoder f, with a predictor h on top, embeds a strong view, and moves
towards the rows of M nearest to the target's embedding: a step of mean shift. g is an average of f.

    q = norm(h(f(strong view)))        u = norm(g(weak view)), pushed into M before the search
    N(i) = the k rows of M nearest to u_i (u_i itself is the first; k = 1 is BYOL)
    loss = mean over i, mean over j in N(i), of ||q_i - M_j||^2
    $ python msf.py                                       digits, on the CPU or on one GPU
    $ torchrun --nproc_per_node=8 msf.py --dataset cifar10                           8 GPUs
    $ torchrun --nproc_per_node=8 msf.py --dataset imagenet --data-dir /data/imagenet
"""

import math
import os
import signal
import time
from copy import deepcopy
from dataclasses import dataclass, field, fields, make_dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn

@dataclass
class Data:
    dataset: str = "digits"  # digits, cifar10, cifar100, stl10, tinyimagenet, imagenet or folder.
    data_dir: str = "data"  # Where the data set lies, or is downloaded to (CIFAR and STL-10).
    num_workers: int | None = None  # Image readers of each process; None shares out the cores.
    image_size: int | None = None  # Side of the input in pixels; below 96, files are shrunk to it.
    crop_scale: tuple[float, float] | None = None  # Least and most of the area that a crop keeps.
    flip: float | None = None  # Probability of a horizontal flip.
    rotation: float | None = None  # Largest rotation either way, in degrees.
    jitter: tuple[float, float, float, float] | None = None  # Strong view's colour jitter (p 0.8).
    gray: float | None = None  # Probability that the strong view is gray.
    blur: float | None = None  # Probability that the strong view is blurred (sigma 0.1 to 2 px).

@dataclass
class Training:
    arch: Literal["resnet10", "resnet18", "resnet34", "resnet50"] | None = None  # Backbone.
    stem: Literal["imagenet", "small", "small-pool", "small-stride"] | None = None  # First layers.
    epochs: int | None = None  # Passes over the training images.
    batch_size: int | None = None  # Images a step, over all processes.
    lr: float | None = None  # Highest learning rate of SGD, for this batch size; never rescaled.
    warmup_epochs: float | None = None  # Epochs of linear warm-up, before the cosine decay to 0.
    momentum: float | None = None  # Momentum of SGD.
    weight_decay: float | None = None  # Weight decay of SGD, on every weight.
    seed: int = 0  # Seed of the weights, of the order of the images and of their views.
    amp: bool = True  # On GPUs, networks run in bfloat16; similarities and loss stay in float32.
    sync_bn: bool = True  # On several GPUs, BatchNorm sees the whole batch, as on one GPU.
    compile: bool = False  # Compile the networks with torch.compile.
    run_name: str | None = None  # Outputs go to runs/RUN_NAME; None: script, data set, seed, time.
    resume: str | None = None  # A last.pt to continue, with its arguments but for those given.
    stop_epoch: int | None = None  # Stop after this epoch of the schedule, to be resumed later.
    log_every: int = 10  # Steps between two log points; signals are heeded there too.
    knn_every: int = 10  # Epochs between two 20-NN accuracies on the test images.
    checkpoint_minutes: float = 10.0  # Minutes between two checkpoints; one more at every stop.

@dataclass
class MeanShift:
    topk: int | None = None  # Neighbours k of each image.
    bank_size: int | None = None  # Rows of the memory bank.
    ema: float | None = None  # Momentum m of the target: g <- m g + (1 - m) f.

@dataclass
class Args(Data, Training, MeanShift):
    """Train with mean shift (MSF). None stands for the value in the data set's recipe."""

IMAGENET = dict(  # section 4 of the paper
    arch="resnet50", stem="imagenet", image_size=224, crop_scale=(0.2, 1), flip=0.5, rotation=0,
    jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5, epochs=200, batch_size=256, lr=0.05,
    momentum=0.9, warmup_epochs=0, weight_decay=1e-4, topk=5, bank_size=1_024_000, ema=0.99,
)
CIFAR = IMAGENET | dict(  # lr, decay, warm-up and bank of MNN's recipe, arXiv 2311.00562
    arch="resnet18", stem="small", image_size=32, lr=0.06, warmup_epochs=5, weight_decay=5e-4,
    bank_size=4096,
)
TINY = CIFAR | dict(stem="small-pool", image_size=64, bank_size=16_384, ema=0.996)
DIGITS = CIFAR | dict(  # ours; a flip would change what a digit means
    arch="resnet10", stem="small-stride", image_size=16, crop_scale=(0.6, 1), flip=0, lr=0.1,
    rotation=10, jitter=(0.4, 0.4, 0, 0), gray=0, blur=0, epochs=80, batch_size=64, bank_size=1024,
)
RECIPES = {
    "digits": DIGITS, "cifar10": CIFAR, "cifar100": CIFAR, "stl10": TINY, "tinyimagenet": TINY,
    "imagenet": IMAGENET, "folder": IMAGENET | dict(bank_size=128_000),
}

def check(condition, message):
    """Stop with one line on the terminal unless the condition holds."""
    if not condition:
        raise SystemExit(f"error: {message}")

def resolve(args):
    """Fill the arguments not given, from the recipe or from the checkpoint to resume: (args,
    checkpoint or None). Raises SystemExit for values that cannot work."""
    check(args.dataset in RECIPES, f"unknown --dataset {args.dataset}: one of {', '.join(RECIPES)}")
    checkpoint, base = None, RECIPES[args.dataset]
    if args.resume:
        try:
            checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
            base = vars(Args(**checkpoint["args"] | dict(resume=None, stop_epoch=None)))
        except Exception as error:
            raise SystemExit(f"error: cannot resume from {args.resume}: {error!r:.200}") from None
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    name = f"{Path(__file__).stem}-{args.dataset}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    given = {f.name: v for f in fields(args) if (v := getattr(args, f.name)) != f.default}
    fixed = given.keys() & {"dataset", "arch", "stem", "bank_size"} if checkpoint else ()
    check(not fixed, f"--resume keeps {', '.join(fixed)} as stored: leave that out")
    args = Args(**dict(run_name=name, num_workers=max(1, cores)) | base | given)
    name, batch, world = args.run_name, args.batch_size, int(os.environ.get("WORLD_SIZE", 1))
    check(batch % world == 0, f"--batch-size {batch} does not divide by {world} processes")
    check(batch > world, f"--batch-size {batch}: BatchNorm needs 2 images or more a process")
    check(1 <= args.topk <= batch <= args.bank_size, "need --topk <= --batch-size <= --bank-size")
    check(name and name == os.path.basename(name).strip("."), "--run-name: must be a plain name")
    last = Path("runs", name, "last.pt")
    own = not last.exists() or args.resume and last.samefile(args.resume)
    check(own, f"{last} exists: --resume it, or choose another --run-name")
    return args, checkpoint

# ---- data ---------------------------------------------------------------------------------------
class ImageData(torch.utils.data.Dataset):
    """A split on the device: labels int64 [N], -1 = unknown, and images uint8 [N, 3, H, W], or None
    where workers decode files as needed. Raises SystemExit where the data set is missing."""
    def __init__(self, args, train, device):
        from torchvision import datasets, transforms as T
        name, root, size = args.dataset, Path(args.data_dir), args.image_size
        self.device, self.workers, images = device, args.num_workers, None
        try:
            if name == "digits":
                from sklearn.datasets import load_digits
                source, rows = load_digits(), slice(-360) if train else slice(-360, None)
                images = torch.from_numpy(source.images[rows] / 16)[:, None].expand(-1, 3, -1, -1)
                images = F.interpolate(images, scale_factor=2, mode="bilinear")
                images, labels = (images * 255).round().byte(), source.target[rows]
            elif name in ("cifar10", "cifar100", "stl10"):
                split = train if name != "stl10" else "train+unlabeled" if train else "test"
                source = getattr(datasets, name.upper())(root, split, download=True)
                images = torch.from_numpy(source.data)
                images = images if name == "stl10" else images.permute(0, 3, 1, 2)
                labels = source.labels if name == "stl10" else source.targets
            else:
                source = datasets.ImageFolder(root / ("train" if train else "val"))
                (self.files, labels), self.read = zip(*source.samples), source.loader  # as RGB
            if name == "tinyimagenet" and not train:  # one folder of images, and a list of classes
                rows = (root / "val/val_annotations.txt").read_text().splitlines()
                class_of = dict(row.split("\t")[:2] for row in rows)
                source.classes = sorted(set(class_of.values()))
                labels = [source.classes.index(class_of[Path(file).name]) for file in self.files]
        except Exception as error:
            how = "CIFAR and STL-10 are downloaded; others: train/CLASS/*.jpg and val/CLASS/*.jpg"
            how += ", from image-net.org and http://cs231n.stanford.edu/tiny-imagenet-200.zip"
            raise SystemExit(f"error: no {name} in {root.absolute()} ({how}): {error}") from None
        self.classes = list(getattr(source, "classes", range(10)))
        self.labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
        self.images = None if images is None else images.to(device).contiguous()
        resize = T.Resize(size * 8 // 7 if size >= 96 else size)  # 256 for 224
        self.test_crop = T.Compose([resize, T.CenterCrop(size), T.PILToTensor()])
        self.random_crop = T.Compose([T.RandomResizedCrop(size, args.crop_scale), T.PILToTensor()])
        if images is None and size < 96:
            batches = self.batches(torch.arange(len(labels)).split(256))
            self.images = torch.cat([images for _, (images,), _ in batches])

    def __getitem__(self, item):
        """(index, number of views, seed) -> (index, uint8 [views, 3, size, size])."""
        index, views, seed = item
        try:
            image = self.read(self.files[index])
        except Exception as error:
            raise OSError(f"cannot read image {self.files[index]}: {error}") from None
        torch.manual_seed(seed)
        crops = [self.random_crop(image) for _ in range(views)] or [self.test_crop(image)]
        return index, torch.stack(crops)

    def batches(self, index_batches, views=0, seed=0, step=0):
        """Yield indices [b], views (each uint8 [b, 3, H, W]) and labels [b], batch by batch.
        Files give crops drawn by seed and step, or with views = 0 the one crop for testing."""
        if self.images is not None:
            for indices in index_batches:
                indices = indices.to(self.device, non_blocking=True)
                yield indices, [self.images[indices]] * max(1, views), self.labels[indices]
            return
        numbered = enumerate(index_batches, step)
        items = ([(i, views, hash((seed, n, i))) for i in batch.tolist()] for n, batch in numbered)
        fork = "fork" if self.workers else None  # the worker's set-up cannot be pickled
        options = dict(num_workers=self.workers, multiprocessing_context=fork)
        options |= dict(pin_memory=self.labels.is_cuda, worker_init_fn=lambda _: os.setpgid(0, 0))
        try:
            for batch in torch.utils.data.DataLoader(self, batch_sampler=items, **options):
                indices, images = (x.to(self.device, non_blocking=True) for x in batch)
                yield indices, images.unbind(1), self.labels[indices]
        except OSError as error:
            raise SystemExit(f"error: {str(error).strip().splitlines()[-1]}") from None

# ---- views: batched, random for every image, on the device of the images ------------------------
def random_boxes(n, height, width, scale, device):
    """Boxes (top, left, height, width), [n] each, as torchvision's RandomResizedCrop draws them."""
    area = torch.empty(n, 10, device=device).uniform_(*scale) * height * width
    ratio = torch.empty(n, 10, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first, found = fits.int().argmax(1, keepdim=True), fits.any(1)  # of ten tries, else all of it
    w, h = (x.gather(1, first)[:, 0].where(found, side) for x, side in ((w, width), (h, height)))
    top, left = torch.rand(2, n, device=device)
    return (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor(), h, w

def warp(images, boxes, size, flip, degrees):
    """Cut boxes (top, left, height, width), [n] each, out of uint8 [n, 3, H, W], resize, mirror
    where flip [n], turn counter-clockwise by degrees [n], bilinear: float [n, 3, size, size]."""
    angle, flip = degrees.deg2rad().view(-1, 1, 1), flip.view(-1, 1, 1)
    top, left, height, width = (side.view(-1, 1, 1) for side in boxes)
    steps = (torch.arange(size, device=images.device) + 0.5) * 2 / size - 1  # -1..1 across the view
    x = angle.cos() * steps - angle.sin() * steps[:, None]  # [n, size, size]
    y = angle.sin() * steps + angle.cos() * steps[:, None]
    x, y = torch.where(flip, 1 - x, 1 + x) / 2 * width, (1 + y) / 2 * height  # in pixels of the box
    x = (left + x.clamp(min=0.5).minimum(width - 0.5)) * 2 / images.shape[3] - 1  # -1..1 again
    y = (top + y.clamp(min=0.5).minimum(height - 0.5)) * 2 / images.shape[2] - 1
    return F.grid_sample(images.float() / 255, torch.stack([x, y], dim=3), align_corners=False)

def adjust(images, operation, amount):
    """Scale brightness, contrast or saturation (operation 0, 1, 2) of [n, 3, H, W], 0..1, by amount
    [n, 1, 1, 1], or turn the hue (3) by that share of a circle."""
    r, g, b = images.split(1, dim=1)
    if operation < 3:
        gray = 0.2989 * r + 0.587 * g + 0.114 * b
        other = (0, gray.mean((1, 2, 3), keepdim=True), gray)[operation]
        return (amount * images + (1 - amount) * other).clamp(0, 1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    safe = chroma.where(chroma > 0, 1)
    hue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, hue) + 6 * amount  # in sixths of a circle
    turn = torch.cat([hue + 5, hue + 3, hue + 1], dim=1) % 6
    return value - chroma * torch.minimum(turn, 4 - turn).clamp(0, 1)

def gaussian_blur(images, sigma):
    """Blur [n, 3, S, S] by sigma [n, 1] pixels, edges mirrored; the kernel spans a tenth of S."""
    size, radius = images.shape[-1], max(1, images.shape[-1] // 20)
    taps = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.softmax(-((taps / sigma) ** 2) / 2, dim=1)  # [n, taps]
    eye = F.pad(torch.eye(size, device=images.device)[None], (radius, radius), mode="reflect")[0]
    weights = torch.einsum("nt,jit->nij", kernel, eye.unfold(1, len(taps), 1))[:, None]
    return weights @ images @ weights.mT

def augment(images, size, scale=None, flip=0, rotation=0, jitter=(0, 0, 0, 0), gray=0, blur=0):
    """A random view of every image: uint8 [B, 3, H, W] -> normalised float [B, 3, size, size].
    scale: least and most area of a random resized crop, None: all; flip, gray, blur: probabilities;
    rotation: degrees; jitter: brightness, contrast, saturation and hue as in torchvision,
    with probability 0.8. The defaults give the view for testing."""
    (n, _, height, width), device = images.shape, images.device
    random = partial(torch.rand, n, 1, 1, 1, device=device)
    boxes = [torch.full((n,), side, device=device) for side in (0, 0, height, width)]
    boxes = random_boxes(n, height, width, scale, device) if scale else boxes
    images = warp(images, boxes, size, random() < flip, rotation * (2 * random() - 1))
    if any(jitter):
        chosen = random() < 0.8
        amounts = [(i < 3) + chosen * x * (2 * random() - 1) for i, x in enumerate(jitter)]
        for i in torch.randperm(4).tolist():  # one order for the batch, as in torchvision
            images = adjust(images, i, amounts[i]) if jitter[i] else images
    if gray:
        images = torch.where(random() < gray, adjust(images, 2, 0), images)
    if blur:
        sigma = (0.1 + 1.9 * random()).where(random() < blur, 1e-3)  # 1e-3 pixels: unchanged
        images = gaussian_blur(images, sigma.view(n, 1))
    scales = zip(images.unbind(1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = torch.stack([(channel - mean) / std for channel, mean, std in scales], dim=1)
    return images.contiguous(memory_format=torch.channels_last)

# ---- model --------------------------------------------------------------------------------------
def encoder(arch, stem):
    """A torchvision ResNet that returns its pooled features [B, F], and F."""
    from torchvision.models import resnet as nets
    net = nets.ResNet(nets.BasicBlock, [1] * 4) if arch == "resnet10" else getattr(nets, arch)()
    if stem != "imagenet":
        net.conv1 = nn.Conv2d(3, 64, 3, 2 if stem == "small-stride" else 1, 1, bias=False)
        net.maxpool = net.maxpool if stem == "small-pool" else nn.Identity()
    width, net.fc = net.fc.in_features, nn.Identity()
    return net, width

def mlp(width, hidden, out):
    """Projector or predictor. A bias before BatchNorm would do nothing."""
    first = nn.Linear(width, hidden, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))

class MemoryBank(nn.Module):
    """The last size embeddings pushed, with labels and indices; len(bank) rows are filled."""
    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("indices", torch.full((size,), -1))
        self.pushed = 0  # rows ever pushed, kept on the host so that no step waits for the device

    def __len__(self):
        return min(self.pushed, len(self.labels))

    def enqueue(self, embeddings, labels, indices):
        """Push [n, D], [n] and [n] over the oldest rows; where n > size, the last size of them."""
        size, n = len(self.labels), len(labels)
        rows = torch.arange(self.pushed, self.pushed + n, device=labels.device)[-size:] % size
        self.embeddings[rows] = embeddings[-size:].detach()
        self.labels[rows], self.indices[rows] = labels[-size:], indices[-size:]
        self.pushed += n

def gather(tensor):
    """[b, ...] of every process -> [B, ...] on all of them, in the order of their ranks."""
    if not dist.is_initialized():
        return tensor
    rows = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(rows, tensor.contiguous())
    return rows

# ---- the method ---------------------------------------------------------------------------------
def nearest_neighbors(targets, bank, k):
    """N(i): indices [B, k] of the rows of bank [M, D] nearest to targets [B, D], nearest first.
    All have unit norm: the nearest have the largest inner product. Raises ValueError if k > M."""
    if k > len(bank):
        raise ValueError(f"k = {k} neighbours, but the bank has {len(bank)} rows")
    return (targets @ bank.T).topk(k, dim=1).indices

def mean_shift_loss(queries, neighbors, valid=None):
    """Mean over images of the mean over their neighbours of ||q - M_j||^2 = 2 - 2 cos(q, M_j).
    queries [B, D], neighbors [B, k, D], valid bool [B, k] (None: all) -> scalar. An image without
    valid neighbours does not count."""
    distances = 2 - 2 * F.cosine_similarity(queries[:, None], neighbors, dim=2)  # [B, k]
    valid = torch.ones_like(distances) if valid is None else valid
    count = valid.sum(1)
    return ((distances * valid).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)

def label_purity(neighbor_labels, labels):
    """Share of neighbours [B, k] with the label [B] of their image, where both are known."""
    known = (neighbor_labels >= 0) & (labels >= 0)[:, None]
    return ((neighbor_labels == labels[:, None]) & known).sum() / known.sum().clamp(min=1)

class MSF(nn.Module):
    """Online and target encoder, predictor and memory bank; forward is one step of the paper."""
    def __init__(self, args):
        super().__init__()
        backbone, width = encoder(args.arch, args.stem)
        self.online = nn.Sequential(backbone, mlp(width, 2 * width, width // 4))  # f
        self.predictor = mlp(width // 4, 2 * width, width // 4)  # h
        self.target = deepcopy(self.online).requires_grad_(False)  # g
        self.bank = MemoryBank(args.bank_size, width // 4)
        self.topk, self.ema, self.amp = args.topk, args.ema, args.amp

    def forward(self, weak, strong, labels, indices):
        """Views [b, 3, S, S], labels and indices [b] of one process -> (loss, purity)."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.amp and weak.is_cuda):
            queries = self.predictor(self.online(strong)).float()  # q, [b, D]; the loss normalises
            with torch.no_grad():
                weights = list(self.target.parameters()), list(self.online.parameters())
                torch._foreach_lerp_(*weights, 1 - self.ema)  # g <- m g + (1 - m) f, weights only
                targets = F.normalize(self.target(weak).float(), dim=1)  # u, [b, D]
        self.bank.enqueue(gather(targets), gather(labels), gather(indices))
        rows = self.bank.embeddings[: len(self.bank)]
        neighbors = nearest_neighbors(targets, rows, self.topk)  # [b, k]
        purity = label_purity(self.bank.labels[neighbors], labels)
        return mean_shift_loss(queries, rows[neighbors]), purity

# ---- monitoring and training --------------------------------------------------------------------
@torch.no_grad()
def knn_accuracy(backbone, train, test, args):
    """20-NN accuracy in percent: at most 100,000 training images vote on the test images."""
    known = (train.labels >= 0).nonzero()[:, 0].cpu()
    known, features = known[:: math.ceil(len(known) / 100_000)], []
    backbone.eval()
    for data, rows in (train, known), (test, torch.arange(len(test.labels))):
        for _, (images,), _ in data.batches(rows.split(256)):
            with torch.autocast("cuda", torch.bfloat16, enabled=args.amp and images.is_cuda):
                features.append(backbone(augment(images, args.image_size)).float())
    backbone.train()
    bank, queries = F.normalize(torch.cat(features), dim=1).tensor_split([len(known)])
    y, c, k = train.labels[known], len(train.classes), min(20, len(bank))
    votes = [F.one_hot(y[nearest_neighbors(q, bank, k)], c).sum(1) for q in queries.split(1024)]
    return 100 * (torch.cat(votes).argmax(1) == test.labels).float().mean().item()

def step_indices(n, args, start, rank, world):
    """The indices [b] of this process at every step from start on; each epoch has its own order."""
    steps = n // args.batch_size
    for step in range(start, args.epochs * steps):
        if step == start or step % steps == 0:
            generator = torch.Generator().manual_seed(hash((args.seed, step // steps)))
            order = torch.randperm(n, generator=generator)[: steps * args.batch_size]
        yield order.view(steps, world, -1)[step % steps, rank]

def main(args):
    """Train; returns the last mean "loss", the 20-NN accuracy "knn" (percent) and "checkpoint"."""
    args, checkpoint = resolve(args)
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world, cuda = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        check(local < torch.cuda.device_count(), "more processes than GPUs: lower --nproc_per_node")
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    if local > 0:
        dist.barrier()  # until the first process of the node has downloaded
    train, test = ImageData(args, True, device), ImageData(args, False, device)
    if world > 1 and local == 0:
        dist.barrier()
    n, differ = len(train.labels), sorted(set(train.classes) ^ set(test.classes))
    check(args.batch_size <= n, f"--batch-size {args.batch_size}: there are {n} training images")
    check(not differ, f"classes in only one of train and val: {', '.join(differ[:5])}")
    torch.manual_seed(args.seed)
    network = model = MSF(args).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), fused=cuda)  # lr and the rest: at every step
    start, steps = 0, n // args.batch_size  # steps of an epoch
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, model.bank.pushed, checkpoint = checkpoint["step"], checkpoint["pushed"], None
    total, warmup = args.epochs * steps, args.warmup_epochs * steps
    end = min(total, (args.stop_epoch or args.epochs) * steps)
    check(start < end, f"{args.resume}: all {start} steps are done; raise --stop-epoch or --epochs")
    if world > 1 and cuda and args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for part in (model.online, model.target, model.predictor) if args.compile else ():
        part.compile()
    if world > 1:  # no buffer is broadcast: every process computes the same bank
        DDP, name = nn.parallel.DistributedDataParallel, "forward_sync_buffers"
        name = name if name in DDP.__init__.__annotations__ else "broadcast_buffers"  # torch < 2.15
        network = DDP(model, **{name: False})
    weak_view = dict(size=args.image_size, flip=args.flip, rotation=args.rotation)
    weak_view["scale"] = None if train.images is None else args.crop_scale  # files come cropped
    strong_view = weak_view | dict(jitter=args.jitter, gray=args.gray, blur=args.blur)
    last = Path("runs", args.run_name, "last.pt")
    if rank == 0:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(last.parent, purge_step=start + 1)
        writer.add_text("config", repr(args))
        print(f"{args}\n{world} x {device.type}, {n} images, steps {start} to {end}", flush=True)
    signals, history, knn, since, saved = [], [], math.nan, time.time(), time.time()
    signal.signal(signal.SIGTERM, lambda n, _: signals.append(n))
    signal.signal(signal.SIGINT, lambda n, _: signals.append(signal.signal(n, signal.SIG_DFL)))
    batches = train.batches(step_indices(n, args, start, rank, world), 2, args.seed, start)
    for step, (indices, (weak, strong), labels) in zip(range(start + 1, end + 1), batches):
        torch.manual_seed(hash((args.seed, step, rank)))
        decay = (1 + math.cos(math.pi * max(0, step - 1 - warmup) / max(1, total - warmup))) / 2
        lr = args.lr * min(decay, step / max(1, warmup))
        for group in optimizer.param_groups:
            group.update(lr=lr, momentum=args.momentum, weight_decay=args.weight_decay)
        weak, strong = augment(weak, **weak_view), augment(strong, **strong_view)
        loss, purity = network(weak, strong, labels, indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(torch.stack([loss.detach(), purity]))
        if step % args.log_every and step % steps:
            continue
        table = torch.stack([*history, torch.full_like(history[0], len(signals))])
        if world > 1:
            dist.all_reduce(table)
        *rows, (stopped, _) = (table / world).tolist()  # the only place where the host waits
        for number, (loss, _) in enumerate(rows, step - len(rows) + 1):
            check(math.isfinite(loss), f"loss {loss} at step {number}, lr {lr:g}; kept: {last}")
        loss, purity = (sum(column) / len(rows) for column in zip(*rows))
        speed = len(rows) * args.batch_size / (time.time() - since)
        done = stopped or step == end
        if rank == 0:
            if step == end or step % (steps * args.knn_every) == 0 and not stopped:
                knn = knn_accuracy(model.online[0], train, test, args)
                writer.add_scalar("knn", knn, step)
            for name, value in dict(loss=loss, purity=purity, lr=lr, img_per_s=speed).items():
                writer.add_scalar(name, value, step)
            left = timedelta(seconds=round((end - step) * args.batch_size / speed))
            line = f"epoch {step / steps:.1f}/{args.epochs} step {step} loss {loss:.4f} purity"
            line += f" {purity:.3f} knn {knn:.2f} lr {lr:.3g} {speed:.0f} img/s {left} left"
            if step == end:
                line += f"\n20-NN {knn:.2f}%, judge it: python eval_linear.py --checkpoint {last}"
            print(line, end="\x1b[K\r" if os.isatty(1) and not done else "\n", flush=True)
            if done or time.time() - saved > 60 * args.checkpoint_minutes:
                state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
                state |= dict(step=step, pushed=model.bank.pushed, args=vars(args))
                torch.save(state, last.with_suffix(".tmp"))
                os.replace(last.with_suffix(".tmp"), last)  # whole or not at all
                torch.save(model.online[0].state_dict(), last.with_name("backbone.pt"))
                saved = time.time()
        if world > 1 and done:
            dist.barrier()  # until the checkpoint is complete
        check(not stopped, f"stopped at step {step}; continue with --resume {last}")
        history, since = [], time.time()
    return {"loss": loss, "knn": knn, "checkpoint": str(last)}

if __name__ == "__main__":  # --help shows one group for each base class of Args
    groups = [(base.__name__, base, field(default_factory=base)) for base in Args.__bases__]
    options = dict(description=Args.__doc__, config=(tyro.conf.OmitArgPrefixes,))
    groups = vars(tyro.cli(make_dataclass("Groups", groups), **options)).values()
    main(Args(**{name: value for group in groups for name, value in vars(group).items()}))
