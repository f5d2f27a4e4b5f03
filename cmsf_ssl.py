"""CMSF: Constrained Mean Shift (Navaneet, Abbasi Koohpayegani, Tejankar et al., ECCV 2022).
MSF pulls q_i to the k rows of its bank M nearest to u_i. CMSF also pulls it to the k nearest among
candidates C(i), which may be far. Where i has no u' or cluster yet (first epoch): plain MSF.
    q = norm(h(f(strong view)))    u = norm(g(weak view))    u' = last epoch's u, or a third view's
    C(i) = the n rows of M whose u', kept in M', is nearest to u'_i; kmeans: those of i's cluster
    loss = 1/2 MSF's + 1/2 MSF's with the k rows of C(i) nearest to u_i; u and u' are pushed before
    $ python cmsf_ssl.py                                  digits, on the CPU or on one GPU
    $ torchrun --nproc_per_node=8 cmsf_ssl.py --dataset cifar10                      8 GPUs
    $ torchrun --nproc_per_node=8 cmsf_ssl.py --dataset imagenet --data-dir /data/imagenet
"""
import copy, dataclasses, functools, math, os, re, signal, time, typing
from pathlib import Path
import torch, torch.distributed as dist, torch.nn.functional as F, tyro
from torch import nn

@dataclasses.dataclass
class Args:
    """Train with constrained mean shift. None stands for the value in the data set's recipe."""
    dataset: str = "digits"  # digits, cifar10, cifar100, stl10, tinyimagenet, imagenet or folder.
    data_dir: str = "data"  # Where the data set lies, or is downloaded to (CIFAR and STL-10).
    num_workers: int = os.cpu_count() // int(os.getenv("LOCAL_WORLD_SIZE", 1))  # Readers of images.
    image_size: int | None = None  # Side of the input in pixels; below 96, files are shrunk to it.
    crop_scale: tuple[float, float] | None = None  # Least and most of the area that a crop keeps.
    flip: float | None = None  # Probability of a horizontal flip.
    rotation: float | None = None  # Largest rotation either way, in degrees.
    jitter: tuple[float, float, float, float] | None = None  # Strong view's colour jitter (p 0.8).
    gray: float | None = None  # Probability that the strong view is gray.
    blur: float | None = None  # Probability that the strong view is blurred (sigma 0.1 to 2 px).
    arch: typing.Literal["resnet10", "resnet18", "resnet34", "resnet50"] | None = None  # Backbone.
    stem: typing.Literal["imagenet", "small", "small-pool", "small-stride"] | None = None  # Input.
    epochs: int | None = None  # Passes over the training images.
    batch_size: int | None = None  # Images a step, over all processes.
    lr: float | None = None  # Highest learning rate of SGD, for this batch size; never rescaled.
    warmup_epochs: float | None = None  # Epochs of linear warm-up, before the cosine decay to 0.
    momentum: float | None = None  # Momentum of SGD.
    weight_decay: float | None = None  # Weight decay of SGD, on every weight.
    seed: int = 0  # Seed of the weights, of the order of the images and of their views.
    amp: bool = True  # On GPUs, networks run in bfloat16; similarities and loss stay in float32.
    compile: bool = False  # Compile the networks with torch.compile.
    run_name: str | None = None  # Outputs go to runs/RUN_NAME; None: script, data set, seed, time.
    resume: str | None = None  # A last.pt to continue; auto: the run's own, if there is one.
    log_every: int = 10  # Steps between two log points (0: an epoch); signals are heeded there too.
    knn_every: int = 10  # Epochs between two 20-NN accuracies on the test images; 0: at the end.
    checkpoint_every_minutes: float = 10.0  # Time between two checkpoints; one more at a stop.
    topk: int | None = None  # Neighbours k of each image.
    bank_size: int | None = None  # Rows of the memory bank.
    ema: float | None = None  # Momentum m of the target: g <- m g + (1 - m) f.
    # What says which rows are related: last epoch's embeddings, a third view's, or their clusters.
    constraint: typing.Literal["previous-epoch", "third-view", "kmeans"] = "previous-epoch"
    num_candidates: int = 10  # Candidates n, among which the k neighbours are; not for kmeans.
    num_clusters: int | None = None  # Clusters of kmeans; None: one for every 25 images.
    half_cache: bool = False  # Keep last epoch's embeddings of all images in float16.
# ---- recipes: IMAGENET is MSF's (section 4); what CIFAR and TINY change, MNN's (arXiv 2311.00562)
IMAGENET = dict(arch="resnet50", stem="imagenet", image_size=224, crop_scale=(0.2, 1), rotation=0,
    flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5, epochs=200, batch_size=256, lr=0.05,
    momentum=0.9, warmup_epochs=0, weight_decay=1e-4, topk=5, bank_size=1_024_000, ema=0.99)
CIFAR = IMAGENET | dict(arch="resnet18", stem="small", image_size=32, lr=0.06, warmup_epochs=5,
    weight_decay=5e-4, bank_size=4096)
TINY = CIFAR | dict(stem="small-pool", image_size=64, bank_size=16_384, ema=0.996)
DIGITS = CIFAR | dict(  # ours; a flip would change what a digit means
    arch="resnet10", stem="small-stride", image_size=16, crop_scale=(0.6, 1), flip=0, lr=0.1,
    rotation=10, jitter=(0.4, 0.4, 0, 0), gray=0, blur=0, epochs=80, batch_size=64, bank_size=1024)
RECIPES = dict(digits=DIGITS, cifar10=CIFAR, cifar100=CIFAR, stl10=TINY, tinyimagenet=TINY,
               **dict.fromkeys(("imagenet", "folder"), IMAGENET | dict(bank_size=128_000)))
LIMITS = dict(rotation=(0, 180), image_size=(8, 1024), num_workers=(0, 512), epochs=(1, 10**6),
    topk=(1, 2**16), bank_size=(1, 2**24), hidden=(1, 2**16), num_clusters=(1, 2**24), lr=(0, 1e38),
    warmup_epochs=(0, 2**31), checkpoint_every_minutes=(0, 2**31))  # else: float 0..1, int 0..2^31

def check(condition, message):
    """Stop with one line on the terminal unless the condition holds."""
    if not condition: raise SystemExit(f"error: {message}")

def resolve(args):
    """(args completed from recipe or checkpoint, checkpoint or None); SystemExit if wrong."""
    check(args.dataset in RECIPES, f"unknown --dataset {args.dataset}: one of {', '.join(RECIPES)}")
    auto, name = args.resume == "auto", f"{Path(__file__).stem}-{args.dataset}-{args.seed}"
    name = args.run_name or name + time.strftime("-%Y%m%d-%H%M%S") * (not auto)  # auto: to be found
    state, base, own = None, dict(run_name=name) | RECIPES[args.dataset], f"runs/{name}/last.pt"
    if auto: args = dataclasses.replace(args, resume=own if os.path.exists(own) else None)
    if args.resume:
        try:
            state = torch.load(args.resume, map_location="cpu", weights_only=True)
            assert state["args"].keys() == vars(args).keys(), "of another script, or version"
            base = state["args"] | dict(num_workers=args.num_workers)
        except Exception as error: check(False, f"cannot resume from {args.resume}: {error!r:.200}")
    given = {name: v for name, v in vars(args).items() if v != getattr(Args, name)}  # not default
    args, world = Args(**base | given), int(os.environ.get("WORLD_SIZE", 1))
    for name, value in vars(args).items():
        for x in value if isinstance(value, tuple) else (value,):
            least, most = LIMITS.get(name, (0, 1 if isinstance(x, float) else 2**31))
            fits = not isinstance(x, (int, float)) or least <= x <= most  # false for NaN
            check(fits, f"--{name.replace('_', '-')} {x}: need {least} to {most}")
    name, size, last = args.run_name, args.batch_size, Path("runs", str(args.run_name), "last.pt")
    check(size % world == 0 < size - world, f"--batch-size {size}: need {world} x 2 or more")
    check(args.topk <= size <= args.bank_size, "need --topk <= --batch-size <= --bank-size")
    check(args.crop_scale[0] <= args.crop_scale[1], "need the smaller --crop-scale first")
    check(re.fullmatch(r"\w[\w.,=+-]{,99}", name), "--run-name: letters, digits, _ . , = + - only")
    free = not last.exists() or args.resume and last.samefile(args.resume)
    check(free, f"{last} exists: --resume it, or choose another --run-name")
    return args, state
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
                class_of = dict(x.split("\t")[:2] for x in open(root / "val/val_annotations.txt"))
                source.classes = sorted(set(class_of.values()))
                labels = [source.classes.index(class_of[Path(file).name]) for file in self.files]
        except Exception as error: check(False, f"no {name} in {root.absolute()} ({how}): {error}")
        self.classes = list(getattr(source, "classes", range(10)))
        self.labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
        self.images = None if images is None else images.to(device).contiguous()
        resize = T.Resize(size * 8 // 7 if size >= 96 else size)  # 256 for 224
        self.center = T.Compose([resize, T.CenterCrop(size), T.PILToTensor()])
        self.crop = T.Compose([T.RandomResizedCrop(size, args.crop_scale), T.PILToTensor()])
        if images is None and size < 96:
            every = torch.arange(len(labels)).split(256)
            self.images = torch.cat([images for _, (images,), _ in self.batches(every)])
    def __getitem__(self, item):
        """(index, number of views, seed) -> (index, uint8 [views, 3, size, size])."""
        index, views, seed = item
        try: image = self.read(self.files[index])
        except Exception as error: raise OSError(f"cannot read {self.files[index]}: {error}")
        torch.manual_seed(seed)
        return index, torch.stack([self.crop(image) for _ in range(views)] or [self.center(image)])
    def batches(self, index_batches, views=0, seed=0, step=0, stride=1):
        """Yield indices [b], views (each uint8 [b, 3, H, W]) and labels [b]. Files give crops drawn
        by seed and number (step, step + stride, ...), or with views = 0 the one for testing."""
        if self.images is not None:
            for indices in (x.to(self.device, non_blocking=True) for x in index_batches):
                yield indices, [self.images[indices]] * max(1, views), self.labels[indices]
            return
        items = ([(i, views, hash((seed, step + n * stride, i))) for i in batch.tolist()]
                 for n, batch in enumerate(index_batches))
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
    chroma = (value - images.amin(1, keepdim=True)).clamp(min=1e-12)  # gray: 0 / 1e-12
    hue = torch.where(value == g, 2 + (b - r) / chroma, 4 + (r - g) / chroma)
    hue = torch.where(value == r, (g - b) / chroma, hue) + 6 * amount  # in sixths of a circle
    turn = torch.cat([hue + 5, hue + 3, hue + 1], dim=1) % 6
    return value - chroma * torch.minimum(turn, 4 - turn).clamp(0, 1)

def augment(images, size, scale=None, flip=0, rotation=0, jitter=(0, 0, 0, 0), gray=0, blur=0):
    """A random view of every image: uint8 [B, 3, H, W] -> normalised float [B, 3, size, size]. What
    the others mean, Args tells; scale is its crop_scale. The defaults give the view for testing."""
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
        pixels = torch.arange(size, device=device)
        weights = torch.softmax(-(((pixels[:, None] - pixels) / sigma) ** 2) / 2, dim=3)  # Gaussian
        images = weights @ images @ weights.mT  # at an edge, of the pixels inside
    rgb = zip(images.unbind(1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's
    return torch.stack([(x - mean) / std for x, mean, std in rgb], dim=3).movedim(3, 1)
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
        for name in ("labels", "indices"): self.register_buffer(name, torch.full((size,), -1))
        self.pushed = 0  # rows ever pushed, kept on the host so that no step waits for the device
    def __len__(self): return min(self.pushed, len(self.labels))
    def enqueue(self, embeddings, labels, indices):
        """Push [n, D], [n] and [n] over the oldest rows; where n > size, the last size of them."""
        size, start, self.pushed = len(self.labels), self.pushed, self.pushed + len(labels)
        rows = torch.arange(start, self.pushed, device=labels.device)[-size:] % size
        self.embeddings[rows] = embeddings[-size:].detach()
        self.labels[rows], self.indices[rows] = labels[-size:], indices[-size:]

def gather(tensor):
    """[b, ...] of every process -> [B, ...] on all of them, in the order of their ranks."""
    if not dist.is_initialized(): return tensor
    parts = [tensor.new_empty(tensor.shape) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
# ---- the method ---------------------------------------------------------------------------------
def nearest_neighbors(targets, bank, k, mask=None):
    """N(i): indices [B, k] of the rows of bank [M, D] nearest to targets [B, D], all of unit norm,
    nearest first, where mask [M] or [B, M] is True; -1: no more. Raises ValueError if k > M."""
    if k > len(bank): raise ValueError(f"k = {k} neighbours, but the bank has {len(bank)} rows")
    similarities = targets @ bank.T  # [B, M]
    if mask is not None: similarities.masked_fill_(~mask, -math.inf)
    size = math.gcd(len(bank), 64)  # of a block; the k best rows lie in the k best blocks
    best = similarities.unflatten(1, (-1, size)).amax(2).topk(min(k, len(bank) // size)).indices
    rows = (best[:, :, None] * size + torch.arange(size, device=best.device)).flatten(1)
    values, order = similarities.gather(1, rows).topk(k)
    return rows.gather(1, order).masked_fill(values == -math.inf, -1)

def mean_shift_loss(queries, neighbors, valid=None):
    """Mean, over images with valid neighbours, of the mean over these of ||q - M_j||^2 = 2 - 2 cos.
    queries [B, D], neighbors [B, k, D], valid bool [B, k] (None: all of them) -> scalar."""
    queries, neighbors = F.normalize(queries, dim=1), F.normalize(neighbors, dim=2)
    distances = 2 - 2 * torch.einsum("bd,bkd->bk", queries, neighbors)
    valid = torch.ones_like(distances) if valid is None else valid
    count = valid.sum(1)
    return ((distances * valid).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)

def label_purity(neighbor_labels, labels):
    """Share of neighbours [B, k] with the label [B] of their image, where both are known."""
    known = (neighbor_labels >= 0) & (labels >= 0)[:, None]
    return ((neighbor_labels == labels[:, None]) & known).sum() / known.sum().clamp(min=1)

def constrained_neighbors(targets, bank, other_targets, other_bank, k, num_candidates, mask=None):
    """Indices [B, k] of the rows of bank [M, D] nearest to targets [B, D], nearest first, among the
    num_candidates rows of other_bank [M, D] nearest to other_targets [B, D], of those where mask
    [M] is True; -1 stands for each that is missing. ValueError if k > num_candidates or k > M."""
    if k > num_candidates: raise ValueError(f"k = {k} neighbours of {num_candidates} candidates")
    n = max(k, min(num_candidates, len(bank)))  # k > M is an error of nearest_neighbors
    candidates = nearest_neighbors(other_targets, other_bank, n, mask)  # [B, n]
    similarities = torch.einsum("bd,bnd->bn", targets, bank[candidates])
    order = similarities.masked_fill(candidates < 0, -math.inf).topk(k, dim=1).indices
    return candidates.gather(1, order)

def spherical_kmeans(points, num_clusters, rounds=10):
    """Cluster [N] of every row of points [N, D], by cosine; -1 for rows of zeros. The center of an
    empty cluster stays where it is. At most 2^26 similarities are held at a time."""
    known, chunk = torch.where(points.any(1))[0], max(1, 2**26 // num_clusters)
    first = known[torch.randint(len(known), (num_clusters,))]
    clusters, centers = known.new_full((len(points),), -1), points[first].float()
    for _ in range(rounds):
        sums = torch.zeros_like(centers)
        for rows in known.split(chunk):
            clusters[rows] = (points[rows].float() @ centers.T).argmax(1)
            sums.index_add_(0, clusters[rows], points[rows].float())
        centers = F.normalize(sums, dim=1).where(sums.any(1, keepdim=True), centers)
    return clusters

def neighbor_ranks(targets, bank, neighbors):
    """Ranks [R], from 0, in bank [M, D] by similarity to targets [B, D], of all neighbors >= 0."""
    similarities = targets @ bank.T
    own = similarities.gather(1, neighbors.clamp(min=0)).split(1, dim=1)
    return torch.cat([(similarities > x).sum(1, keepdim=True) for x in own], dim=1)[neighbors >= 0]

class CMSF(nn.Module):
    """MSF with u' beside u in the bank, the last u of all n images, and their clusters."""
    def __init__(self, args, n):
        super().__init__()
        backbone, width = encoder(args.arch, args.stem)
        self.online = nn.Sequential(backbone, mlp(width, 2 * width, width // 4))  # f
        self.predictor = mlp(width // 4, 2 * width, width // 4)  # h
        self.target = copy.deepcopy(self.online).requires_grad_(False)  # g
        self.args, self.bank = args, MemoryBank(args.bank_size, 2 * (width // 4))  # M beside M'
        cache = torch.zeros(0 if args.constraint == "third-view" else n, width // 4)
        self.register_buffer("cache", cache.half() if args.half_cache else cache)  # last u of each
        self.register_buffer("clusters", torch.full((n,), -1))  # of each image; -1: none yet
    def search(self, targets, others, indices):
        """Rows of the bank, [b, k] each, for u and u' [b, D] of images indices [b]: the constrained
        (-1: no more; all the nearest if there is no u' or cluster), and the nearest."""
        rows, other_rows = self.bank.embeddings[: len(self.bank)].chunk(2, dim=1)
        k, nearest = self.args.topk, nearest_neighbors(targets, rows, self.args.topk)
        if self.args.constraint == "kmeans":
            own, clusters = self.clusters[indices], self.clusters[self.bank.indices[: len(rows)]]
            known, mask = own >= 0, own[:, None] == clusters
            constrained = nearest_neighbors(targets, rows, k, mask)
        else:
            n, known, mask = self.args.num_candidates, others.any(1), other_rows.any(1)
            constrained = constrained_neighbors(targets, rows, others, other_rows, k, n, mask)
        return constrained.where(known[:, None], nearest), nearest
    def forward(self, views, labels, indices):
        """views: weak, strong (, third) [b, 3, S, S]; labels, indices [b] -> loss, metrics"""
        (weak, strong, *third), args = views, self.args
        with torch.autocast("cuda", torch.bfloat16, enabled=args.amp and weak.is_cuda):
            queries = self.predictor(self.online(strong)).float()  # q, [b, D]; the loss normalises
            with torch.no_grad():
                weights = list(self.target.parameters()), list(self.online.parameters())
                torch._foreach_lerp_(*weights, 1 - args.ema)  # g <- m g + (1 - m) f, weights only
                targets = F.normalize(self.target(weak).float(), dim=1)  # u, [b, D]
                others = [F.normalize(self.target(view).float(), dim=1) for view in third]
        others = others[0] if third else self.cache[indices].float()  # u', [b, D]; 0: none
        pushed, images = gather(torch.cat([targets, others], dim=1)), gather(indices)
        self.bank.enqueue(pushed, gather(labels), images)
        if not third: self.cache[images] = pushed.chunk(2, dim=1)[0].to(self.cache.dtype)
        rows, both = self.bank.embeddings.chunk(2, dim=1)[0], self.search(targets, others, indices)
        self.latest = targets, rows[: len(self.bank)], both[0]
        loss = sum(mean_shift_loss(queries, rows[x], x >= 0) for x in both) / 2
        purity = [label_purity(self.bank.labels[x].where(x >= 0, -1), labels) for x in both]
        metrics = dict(purity=purity[1], purity_constrained=purity[0], spread=targets.std(0).norm())
        metrics |= dict(similarity_neighbors=1 - loss / 2)
        return loss, metrics | dict(similarity_target=F.cosine_similarity(queries, targets).mean())
# ---- monitoring and training --------------------------------------------------------------------
@torch.no_grad()
def embed(net, data, rows, args):
    """Unit rows [n, F]: what net, in eval mode, gives to test views of images rows [n] of data."""
    batches, _ = data.batches(rows.split(256)), net.eval()
    features = torch.cat([net(augment(images, args.image_size)) for _, (images,), _ in batches])
    net.train()
    return F.normalize(features, dim=1)

def knn_accuracy(backbone, train, test, args):
    """20-NN accuracy in percent: at most 100,000 training images vote on the test images."""
    known = (train.labels >= 0).nonzero()[:, 0].cpu()
    known, every = known[:: math.ceil(len(known) / 100_000)], torch.arange(len(test.labels))
    bank, queries = (embed(backbone, *x, args) for x in ((train, known), (test, every)))
    k, labels = min(20, math.ceil(len(bank) / len(train.classes))), train.labels[known]
    votes = [labels[nearest_neighbors(q, bank, k)].mode(1).values for q in queries.split(1024)]
    return 100 * (torch.cat(votes) == test.labels).float().mean().item()

def draw(data, labels, shown, model, *found):
    """Picture uint8 [3, H, W]: images shown [n] of data, and beside each those of the bank's rows
    found [n, k] (-1: none); framed green where labels [N] agree, red where not, or if unknown."""
    indices = [model.bank.indices[rows].where(rows >= 0, -1) for rows in found]  # of images, [n, k]
    images = torch.stack([torch.cat([shown[:, None], x], 1) for x in indices], 1).flatten(0, 1)
    ((_, (tiles,), _),) = data.batches([images.flatten()])
    right = (labels[images] == labels[images[:, :1]]) & (labels[images] >= 0)  # [R, 1 + k]
    picture = 255 * F.one_hot(right.long(), 3)[:, :, :, None, None].repeat(1, 1, 1, 64, 64)
    picture[..., 4:-4, 4:-4] = F.interpolate(tiles, 56).unflatten(0, images.shape)
    picture[images < 0] = 0
    return picture.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2).byte()

def step_indices(n, args, start, rank, world):
    """The indices [b] of this process at every step from start on; each epoch has its own order."""
    steps, rest = divmod(n, args.batch_size)
    for epoch in range(start // steps, args.epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(hash((args.seed, epoch))))
        yield from order[: n - rest].view(steps, world, -1)[max(0, start - epoch * steps) :, rank]

def main(args):
    """Train; returns the last mean "loss", the 20-NN accuracy "knn" (percent) and "checkpoint"."""
    args, checkpoint = resolve(args)
    check(args.constraint == "kmeans" or args.topk <= args.num_candidates, "raise --num-candidates")
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world, cuda = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    check(not cuda or local < torch.cuda.device_count(), "fewer GPUs than --nproc_per_node")
    if cuda: torch.cuda.set_device(device)
    if world > 1:  # torchrun keeps its store when it restarts (pytorch #135712): take new keys
        keys, again = next(dist.rendezvous("env://"))[0], os.getenv("TORCHELASTIC_RESTART_COUNT")
        if os.getenv("GROUP_WORLD_SIZE") == "1": keys = dist.PrefixStore(again, keys)  # one node
        dist.init_process_group("nccl" if cuda else "gloo", store=keys, rank=rank, world_size=world)
    if local > 0: dist.barrier()  # until the first process of the node has downloaded
    train, test = (ImageData(args, split, device) for split in (True, False))
    if world > 1 and local == 0: dist.barrier()
    n, differ = len(train.labels), sorted(set(train.classes) ^ set(test.classes))[:5]
    check(args.batch_size <= n, f"--batch-size {args.batch_size}: there are {n} training images")
    check(not differ, f"classes in only one of train and val: {', '.join(differ)}")
    torch.manual_seed(args.seed)
    model = CMSF(args, n).to(device, memory_format=torch.channels_last)
    network, optimizer = model, torch.optim.SGD(model.parameters(), fused=cuda)
    start, steps, last = 0, n // args.batch_size, Path("runs", args.run_name, "last.pt")
    if checkpoint:
        try: model.load_state_dict(checkpoint["model"])
        except RuntimeError: check(False, f"{args.resume} fits other data, --arch, --stem, ...")
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, model.bank.pushed, checkpoint = checkpoint["step"], checkpoint["pushed"], None
    optimizer.param_groups[0].update(momentum=args.momentum, weight_decay=args.weight_decay)
    end, warmup = args.epochs * steps, args.warmup_epochs * steps
    check(start < end, f"{args.resume}: all {start} steps are done; raise --epochs")
    for net in model.online, model.target, model.predictor:
        if world > 1 and cuda: nn.SyncBatchNorm.convert_sync_batchnorm(net)
        if args.compile: net.compile()
    if world > 1: network = nn.parallel.DistributedDataParallel(model)
    network.broadcast_buffers = False  # every process computes the same bank
    scale = None if train.images is None else args.crop_scale  # files come cropped
    weak_view = dict(size=args.image_size, scale=scale, flip=args.flip, rotation=args.rotation)
    strong_view = weak_view | dict(jitter=args.jitter, gray=args.gray, blur=args.blur)
    kinds = [weak_view, strong_view] + [weak_view] * (args.constraint == "third-view")
    if rank == 0:
        from torch.utils.tensorboard import SummaryWriter, summary
        writer = SummaryWriter(last.parent, purge_step=start + 1)
        plain = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items()}
        for part in summary.hparams(plain, dict(knn=0)): writer.file_writer.add_summary(part)
        print(f"{args}\n{world} x {device.type}, {n} images, steps {start} to {end}", flush=True)
    signals, history, since, saved, spread = [], [], time.time(), time.time(), 1
    for x in (signal.SIGTERM, signal.SIGINT): signal.signal(x, lambda *_: signals.append(1))
    batches = train.batches(step_indices(n, args, start, rank, world), len(kinds), args.seed, start)
    for step, (indices, views, labels) in enumerate(batches, start + 1):
        torch.manual_seed(hash((args.seed, step, rank)))
        decay = (1 + math.cos(math.pi * max(0, step - 1 - warmup) / max(1, end - warmup))) / 2
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(decay, step / max(1, warmup))
        views = [augment(view, **how) for view, how in zip(views, kinds)]
        loss, metrics = network(views, labels, indices)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        history.append(torch.stack([loss, *metrics.values()]).detach())
        if step % (args.log_every or steps) and step % steps: continue
        means = F.pad(torch.stack(history).mean(0), (0, 1), value=len(signals))
        if world > 1: dist.all_reduce(means)
        *means, stopped = (means / world).tolist()  # the only place where the host waits
        values, done = dict(zip(("loss", *metrics), means)), stopped or step == end
        check(math.isfinite(means[0]), f"loss {means[0]} at step {step}, lr {lr:g}; kept: {last}")
        values |= dict(lr=lr, img_per_s=len(history) * args.batch_size / (time.time() - since))
        if step % steps == 0 and args.constraint == "kmeans":
            model.clusters.copy_(spherical_kmeans(model.cache, args.num_clusters or n // 25 + 1))
            if world > 1: dist.broadcast(model.clusters, 0)  # each process drew other rows to start
        if rank == 0:
            if step % steps == 0:
                ranks = neighbor_ranks(*model.latest).float()
                writer.add_histogram("constrained_rank", ranks, step)
                values["median_rank"] = ranks.median().item()
            if step == end or step % (steps * args.knn_every or end) == 0 and not done:
                values["knn"] = knn_accuracy(model.online[0], train, test, args)
                shown = torch.stack([x[0] for x in torch.where(train.labels >= 0)[0].chunk(12)])
                u = embed(nn.Sequential(*model.target), train, shown, args)  # without --compile
                rows = model.search(u, model.cache[shown].float() if len(model.cache) else u, shown)
                writer.add_image("neighbors", draw(train, train.labels, shown, model, *rows), step)
            for name, value in values.items(): writer.add_scalar(name, value, step)
            if values["spread"] < 0.01 <= spread: print("warning: the embeddings collapsed: --lr?")
            line = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            line = f"epoch {step / steps:.1f}/{args.epochs} step {step} {line}"
            print(line, end="\x1b[K\r" if os.isatty(1) and not done else "\n", flush=True)
            if done or time.time() - saved > 60 * args.checkpoint_every_minutes:
                state = dict(step=step, pushed=model.bank.pushed, args=vars(args))
                state |= dict(model=model.state_dict(), optimizer=optimizer.state_dict())
                backbone, saved = model.online[0].state_dict(), time.time()
                for path, content in (last, state), (last.with_name("backbone.pt"), backbone):
                    with open(path.with_suffix(".tmp"), "wb") as file: torch.save(content, file)
                    os.replace(file.name, path)  # whole or not at all
        if world > 1 and done: dist.barrier()  # until the checkpoint is complete
        check(step == end or not stopped, f"stopped at step {step}; continue with --resume {last}")
        history, since, spread = [], time.time(), values["spread"]
    if rank == 0: print(f"20-NN {values['knn']:.2f}%: python eval_linear.py --checkpoint {last}")
    return dict(knn=math.nan, checkpoint=str(last)) | values

if __name__ == "__main__":
    try: main(tyro.cli(Args))
    except OSError as error: check(False, f"{error}; the last checkpoint, if any, is whole")
