# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "tyro", "tensorboard", "scikit-learn"]
# ///
"""Judge a checkpoint: k-NN and a linear probe on the frozen features of its backbone.

Features are the backbone's pooled output, in eval mode, under the view for testing.

    k-NN     the k training images with the nearest features vote: k = 1, k = 20, and k = 200 with
             votes weighted by exp(cosine / 0.1)
    linear   one linear layer, trained on random resized crops by SGD. Below 96 pixels: raw
             features, lr 30, 100 epochs, x0.1 at 60 and 80, Nesterov. From 96 pixels on, and for
             digits, too few for that lr: features L2-normalised and standardised, lr 0.01, weight
             decay 1e-4, 40 epochs, x0.1 at 15 and 30

    python eval_linear.py --checkpoint runs/NAME/last.pt

The accuracy is that of the last epoch. Data set, backbone and views are those of the checkpoint.
"""

import functools, json, math, os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch, tyro
import torch.nn.functional as F
from torch import nn

@dataclass
class Args:
    """Judge a checkpoint by k-NN and a linear probe."""

    checkpoint: str  # A last.pt that a training script has written.
    data_dir: str | None = None  # Where the data set lies now; None: where it lay in training.
    epochs: int | None = None  # Epochs of the linear probe; None: those of the protocol, 0: none.
    batch_size: int = 256  # Images a step of the linear probe.
    num_workers: int = os.cpu_count() or 1  # Processes that decode image files.
    seed: int = 0  # Seed of the probe's weights, of the order of the images and of their views.

def check(condition, message):
    """Stop with one line on the terminal unless the condition holds."""
    if not condition: raise SystemExit(f"error: {message}")

# ---- data ---------------------------------------------------------------------------------------
class ImageData(torch.utils.data.Dataset):
    """A split on the device: labels int64 [N], -1 = unknown, and images uint8 [N, 3, H, W], or None
    where workers decode files as needed. Raises SystemExit where the data set is missing."""
    def __init__(self, args, train, device):
        from torchvision import datasets, transforms as T
        name, root, size = args.dataset, Path(args.data_dir), args.image_size
        self.device, self.workers, images = device, args.num_workers, None
        how = "folders: train/CLASS/*.jpg, val/CLASS/*.jpg; see image-net.org, cs231n.stanford.edu"
        try:
            if name == "digits":
                from sklearn.datasets import load_digits
                source, rows = load_digits(), slice(-360) if train else slice(-360, None)
                labels, images = source.target[rows], torch.tensor(source.images[rows] / 16)
                images = F.interpolate(images[:, None], scale_factor=2, mode="bilinear") * 255
                images = images.round().byte().expand(-1, 3, -1, -1)
            elif name in ("cifar10", "cifar100", "stl10"):
                split = train if name != "stl10" else "train+unlabeled" if train else "test"
                source = getattr(datasets, name.upper())(root, split, download=True)
                images = torch.from_numpy(source.data).movedim(1 if name == "stl10" else 3, 1)
                labels = source.labels if name == "stl10" else source.targets
            else:
                source = datasets.ImageFolder(root / ("train" if train else "val"))
                (self.files, labels), self.read = zip(*source.samples), source.loader  # as RGB
            if name == "tinyimagenet" and not train:  # one folder of images, and a list of classes
                rows = (root / "val/val_annotations.txt").read_text().splitlines()
                class_of = dict(row.split("\t")[:2] for row in rows)
                source.classes = sorted(set(class_of.values()))
                labels = [source.classes.index(class_of[Path(file).name]) for file in self.files]
        except Exception as error: check(False, f"no {name} in {root.absolute()} ({how}): {error}")
        self.classes = list(getattr(source, "classes", range(10)))
        self.labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
        self.images = None if images is None else images.to(device).contiguous()
        resize = T.Resize(size * 8 // 7 if size >= 96 else size)  # 256 for 224
        self.test_crop = T.Compose([resize, T.CenterCrop(size), T.PILToTensor()])
        self.random_crop = T.Compose([T.RandomResizedCrop(size, args.crop_scale), T.PILToTensor()])
        if images is None and size < 96:
            every = torch.arange(len(labels)).split(256)
            self.images = torch.cat([images for _, (images,), _ in self.batches(every)])
    def __getitem__(self, item):
        """(index, number of views, seed) -> (index, uint8 [views, 3, size, size])."""
        index, views, seed = item
        try: image = self.read(self.files[index])
        except Exception as error: raise OSError(f"cannot read {self.files[index]}: {error}")
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
        fork = "fork" if self.workers else None  # what is on a GPU cannot be pickled
        options = dict(num_workers=self.workers, multiprocessing_context=fork)
        options |= dict(pin_memory=self.labels.is_cuda, worker_init_fn=lambda _: os.setsid())
        try:
            for batch in torch.utils.data.DataLoader(self, batch_sampler=items, **options):
                indices, images = (x.to(self.device, non_blocking=True) for x in batch)
                yield indices, images.unbind(1), self.labels[indices]
        except OSError as error: check(False, str(error).strip().splitlines()[-1])

# ---- views: batched, random for every image, on the device of the images ------------------------
def random_boxes(n, height, width, scale, device):
    """Boxes (top, left, height, width), [n] each, as torchvision's RandomResizedCrop draws them."""
    area = torch.empty(n, 10, device=device).uniform_(*scale) * height * width
    ratio = torch.empty(n, 10, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w * h > 0) & (w <= width) & (h <= height)
    first, found = fits.int().argmax(1, keepdim=True), fits.any(1)  # of ten tries, else all of it
    w, h = (x.gather(1, first)[:, 0].where(found, side) for x, side in ((w, width), (h, height)))
    top, left = torch.rand(2, n, device=device)
    return (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor(), h, w

def warp(images, boxes, size, flip, degrees):
    """Cut boxes (top, left, height, width), [n] each, out of uint8 [n, 3, H, W], resize, mirror
    where flip [n], turn counter-clockwise by degrees [n], bilinear: float [n, 3, size, size]."""
    top, left, height, width, flip, angle = (x.view(-1, 1, 1) for x in (*boxes, flip, degrees))
    steps = (torch.arange(size, device=images.device) + 0.5) * 2 / size - 1  # -1..1 across the view
    cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
    x, y = cos * steps - sin * steps[:, None], sin * steps + cos * steps[:, None]  # [n, size, size]
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
    scale: area of a random resized crop (None: whole); flip, gray, blur: probabilities; rotation:
    degrees; jitter: as torchvision's, with probability 0.8. The defaults: the view for testing."""
    (n, _, height, width), device = images.shape, images.device
    random = functools.partial(torch.rand, n, 1, 1, 1, device=device)
    boxes = [torch.full((n,), side, device=device) for side in (0, 0, height, width)]
    boxes = random_boxes(n, height, width, scale, device) if scale else boxes
    images = warp(images, boxes, size, random() < flip, rotation * (2 * random() - 1))
    if any(jitter):
        chosen = random() < 0.8
        amounts = [(i < 3) + chosen * x * (2 * random() - 1) for i, x in enumerate(jitter)]
        for i in torch.randperm(4).tolist():  # one order for the batch, as in torchvision
            images = adjust(images, i, amounts[i]) if jitter[i] else images
    if gray: images = torch.where(random() < gray, adjust(images, 2, 0), images)
    if blur:
        sigma = (0.1 + 1.9 * random()).where(random() < blur, 1e-3)  # 1e-3 pixels: unchanged
        images = gaussian_blur(images, sigma.view(n, 1))
    mean, std = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)

# ---- features -----------------------------------------------------------------------------------
def encoder(arch, stem):
    """A torchvision ResNet that returns its pooled features [B, F], and F."""
    from torchvision.models import resnet as nets
    net = nets.ResNet(nets.BasicBlock, [1] * 4) if arch == "resnet10" else getattr(nets, arch)()
    if stem != "imagenet":
        net.conv1 = nn.Conv2d(3, 64, 3, 2 if stem == "small-stride" else 1, 1, bias=False)
        net.maxpool = net.maxpool if stem == "small-pool" else nn.Identity()
    width, net.fc = net.fc.in_features, nn.Identity()
    return net, width

@torch.no_grad()
def embed(net, data, rows, args):
    """Features [n, F] that net in eval mode gives to the test views of images rows [n] of data."""
    mode, _ = net.training, net.eval()
    batches = data.batches(rows.split(256))
    features = torch.cat([net(augment(images, args.image_size)) for _, (images,), _ in batches])
    net.train(mode)
    return features

# ---- k-NN ---------------------------------------------------------------------------------------
def nearest_neighbors(targets, bank, k, mask=None):
    """N(i): indices [B, k] of the rows of bank [M, D] nearest to targets [B, D], nearest first, all
    of unit norm. Only rows where mask [M] or [B, M] is True are chosen; -1 stands for each that is
    missing. Raises ValueError if k > M."""
    if k > len(bank): raise ValueError(f"k = {k} neighbours, but the bank has {len(bank)} rows")
    similarities = targets @ bank.T
    if mask is not None: similarities.masked_fill_(~mask, -math.inf)
    values, indices = similarities.topk(k, dim=1)
    return indices.masked_fill(values == -math.inf, -1)

def knn_predict(queries, features, labels, k, num_classes, temperature=None):
    """Classes [B], voted by the k rows of features [N, F] nearest in cosine to queries [B, F].

    A vote counts 1, or exp(cosine / temperature); ties go to the lower class. ValueError if k > N.
    """
    features, predictions = F.normalize(features, dim=1), []
    for chunk in F.normalize(queries, dim=1).split(1024):
        neighbors = nearest_neighbors(chunk, features, k)  # [b, k]
        votes = torch.einsum("bf,bkf->bk", chunk, features[neighbors])
        votes = (votes / temperature).exp() if temperature else torch.ones_like(votes)
        scores = votes.new_zeros(len(chunk), num_classes).scatter_add_(1, labels[neighbors], votes)
        predictions.append(scores.argmax(1))
    return torch.cat(predictions)

# ---- linear probe -------------------------------------------------------------------------------
def linear_probe(backbone, train, rows, features, queries, settings, args):
    """Classes [B] that a linear layer, trained on frozen features, gives to queries [B, F].

    rows [n]: indices of the labelled training images; features [n, F]: theirs under the view for
    testing; settings: the arguments of the checkpoint."""
    small = settings.dataset != "digits" and settings.image_size < 96
    std, mean = torch.std_mean(F.normalize(features, dim=1), dim=0)

    def prepare(features):
        return features if small else (F.normalize(features, dim=1) - mean) / std.clamp(min=1e-6)

    torch.manual_seed(args.seed)
    head = nn.Linear(features.shape[1], len(train.classes)).to(train.device)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(
        head.parameters(), lr=30.0 if small else 0.01, momentum=0.9, nesterov=small,
        weight_decay=0.0 if small else 1e-4,
    )
    epochs = (100 if small else 40) if args.epochs is None else args.epochs
    milestones = [round(epochs * share) for share in ((0.6, 0.8) if small else (0.375, 0.75))]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    view = dict(size=settings.image_size, flip=settings.flip, rotation=settings.rotation)
    view["scale"] = None if train.images is None else settings.crop_scale  # files come cropped
    for epoch in range(epochs):
        order = rows[torch.randperm(len(rows))].split(args.batch_size)
        for _, (images,), labels in train.batches(order, 1, args.seed, epoch * len(rows)):
            with torch.no_grad():
                features = backbone(augment(images, **view))
            loss = F.cross_entropy(head(prepare(features)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return head(prepare(queries)).argmax(1)

def main(args):
    """Returns {"1-NN", "20-NN", "200-NN", "linear"}: top-1 on the test images, in percent."""
    try:
        checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        settings, weights = SimpleNamespace(**checkpoint["args"]), checkpoint["model"]
    except Exception as error:
        raise SystemExit(f"error: {args.checkpoint} is no checkpoint: {error!r:.200}") from None
    settings.data_dir = args.data_dir or settings.data_dir
    settings.num_workers = args.num_workers
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = ImageData(settings, True, device), ImageData(settings, False, device)

    backbone, _ = encoder(settings.arch, settings.stem)
    prefix = "online.0."  # the online encoder is Sequential(backbone, projector)
    state = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    backbone.load_state_dict(state)
    backbone = backbone.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    rows = (train.labels >= 0).nonzero()[:, 0].cpu()  # STL-10 has unlabelled images too
    labels = train.labels[rows.to(device)]
    features = embed(backbone, train, rows, settings)
    queries = embed(backbone, test, torch.arange(len(test.labels)), settings)
    predictions = {}
    for k, temperature in (1, None), (20, None), (200, 0.1):
        k, classes = min(k, len(rows)), len(train.classes)
        predictions[f"{k}-NN"] = knn_predict(queries, features, labels, k, classes, temperature)
    if args.epochs != 0:
        linear = linear_probe(backbone, train, rows, features, queries, settings, args)
        predictions["linear"] = linear
    results = {k: 100 * (v == test.labels).float().mean().item() for k, v in predictions.items()}
    print(f"{settings.dataset}, {settings.arch}: {len(rows)} training, {len(queries)} test images")
    for name, value in results.items():
        print(f"{name:>8} {value:6.2f}")
    path = Path(args.checkpoint).with_name("eval.json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path}")
    return results

if __name__ == "__main__":
    main(tyro.cli(Args))
