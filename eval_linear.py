"""Judge a checkpoint: k-NN and a linear probe on its backbone's frozen features, or fine-tuning.
Features are the backbone's pooled output, in eval mode, under the view for testing.
    k-NN        the k training images with the nearest features vote: k = 1; k = 20, or images a
                class if these are fewer; k = 200 with votes weighted by exp(cosine / 0.1)
    linear      one linear layer, trained on random resized crops by SGD with momentum 0.9
                --protocol scaled, for digits and from 96 pixels on: features L2-normalised, then
                each standardised; lr 0.01, weight decay 1e-4, 40 epochs, x0.1 at 15 and 30
                --protocol raw, below 96 pixels: lr 30, Nesterov, 100 epochs, x0.1 at 60 and 80
    fine-tuned  all weights of backbone, projector and a linear layer on it, trained by SGD: lr
                0.001, momentum 0.9, weight decay 1e-4, 20 epochs, x0.1 at 15
An accuracy is that of the last epoch. The images that --labels names vote and train: all, or few.
    $ python eval_linear.py --checkpoint runs/NAME/last.pt
    $ python eval_linear.py --checkpoint runs/NAME/last.pt --labels 10pct --fine-tune
    $ torchrun --nproc_per_node=8 eval_linear.py --checkpoint resnet50.pth --dataset imagenet
"""
import dataclasses, functools, hashlib, json, math, os, pickle, re, types, typing
from pathlib import Path
import torch, torch.distributed as dist, torch.nn.functional as F, tyro
from torch import nn

@dataclasses.dataclass
class Args:
    """Judge a checkpoint or a baseline. None stands for the value in the checkpoint or recipe."""
    checkpoint: str | None = None  # A last.pt of these scripts, or a file with a ResNet's weights.
    baseline: typing.Literal["raw", "random"] | None = None  # Pixels, or an untrained network.
    prefix: str | None = None  # What the backbone's names begin with, if a file has several.
    # One of digits, cifar10, cifar100, stl10, tinyimagenet, imagenet, folder or small-folder.
    dataset: str | None = None
    data_dir: str | None = None  # Where the data set lies, or is downloaded to (CIFAR and STL-10).
    num_workers: int = os.cpu_count() // int(os.getenv("LOCAL_WORLD_SIZE", 1))  # Readers of images.
    image_size: int | None = None  # Side of the input in pixels; below 96, files are shrunk to it.
    arch: typing.Literal["resnet10", "resnet18", "resnet34", "resnet50"] | None = None  # Backbone.
    stem: typing.Literal["imagenet", "small", "small-pool", "small-stride"] | None = None  # Input.
    labels: str | None = None  # Images that vote and train: 1pct to 100pct, or a list of files.
    label_seed: int = 0  # Another seed, another share; the same one as in cmsf_semi.py.
    fine_tune: bool = False  # Train all weights, instead of judging frozen features.
    protocol: typing.Literal["scaled", "raw"] | None = None  # Probe's; see the script's head.
    epochs: int | None = None  # Passes over the images; None: the protocol's; 0: no probe.
    lr: float | None = None  # First learning rate; None: the protocol's.
    batch_size: int = 256  # Images a step of training, over all processes.
    cache_features: bool = False  # Keep features in features.pt; the probe then sees no crops.
    projector: bool = False  # Write test features and thumbnails for TensorBoard's projector.
    seed: int = 0  # Seed of new weights, of the order of the images and of their views.

AT_224 = dict(arch="resnet50", stem="imagenet", image_size=224, crop_scale=(0.2, 1), flip=0.5,
              rotation=0, data_dir="data")  # as in training
AT_32 = AT_224 | dict(arch="resnet18", stem="small", image_size=32)
AT_64 = AT_32 | dict(stem="small-pool", image_size=64)
AT_16 = AT_32 | dict(arch="resnet10", stem="small-stride", image_size=16, crop_scale=(0.6, 1),
                     flip=0, rotation=10)
RECIPES = dict(digits=AT_16, cifar10=AT_32, cifar100=AT_32, stl10=AT_64, tinyimagenet=AT_64,
               imagenet=AT_224, folder=AT_224) | {"small-folder": AT_64}

def check(condition, message):
    """Stop with one line on the terminal unless the condition holds."""
    if not condition: raise SystemExit(f"error: {message}")

def complete(args):
    """(args completed from checkpoint or recipe, weights, steps trained); SystemExit if wrong."""
    check((args.checkpoint is None) != (args.baseline is None), "give --checkpoint or --baseline")
    weights, run, step = read_weights(args.checkpoint) if args.checkpoint else ({}, {}, 0)
    name, known = args.dataset or run.get("dataset", args.baseline and "digits"), ", ".join(RECIPES)
    check(name is not None, f"{args.checkpoint} does not name its data: give --dataset, of {known}")
    check(str(name) in RECIPES, f"unknown --dataset {name}: one of {known}")
    stored = RECIPES[name] if run.get("dataset") == name else ("arch", "stem")  # else its net
    stored = {key: run[key] for key in stored if key in run}
    for key, value in stored.items():
        usual = RECIPES[name][key]  # of the same type, and, if there are choices, one of them
        fits = isinstance(value, (int, float) if isinstance(usual, int | float) else type(usual))
        fits &= key not in ("arch", "stem") or repr(value) in str(Args.__annotations__[key])
        check(fits, f"{args.checkpoint} holds {key} = {value!r:.50}: is it damaged?")
    given = {key: value for key, value in vars(args).items() if value is not None}
    args = types.SimpleNamespace(**vars(args) | RECIPES[name] | stored | given | dict(dataset=name))
    raw = name != "digits" and args.image_size < 96  # digits are too few for lr 30
    args.protocol = args.protocol or ("raw" if raw else "scaled")
    args.rank, args.world = (int(os.environ.get(x, y)) for x, y in (("RANK", 0), ("WORLD_SIZE", 1)))
    usual = 20 if args.fine_tune else 100 if args.protocol == "raw" else 40
    args.epochs = usual if args.epochs is None else args.epochs
    for name, x in vars(args).items():
        most = dict(image_size=1024, num_workers=512, lr=1e38).get(name, 2**31)
        fits = not isinstance(x, (int, float)) or 0 <= x <= most  # false for NaN
        check(fits, f"--{name.replace('_', '-')} {x}: need 0 to {most}")
    check(args.epochs >= args.fine_tune, "--epochs: need 0 or more, 1 to fine-tune")
    check(args.batch_size and args.image_size, "need --batch-size and --image-size of 1 or more")
    check(args.lr is None or args.lr > 0, f"--lr {args.lr}: must be above 0")
    check(not args.fine_tune or args.baseline != "raw", "pixels have no weights to --fine-tune")
    return args, weights, step
# ---- the checkpoint -----------------------------------------------------------------------------
def read_weights(path):
    """Tensors by name of a checkpoint, a state_dict, or a file with one under "state_dict" or
    "model"; arguments and step of the run (none and 0 if it is not ours). Raises SystemExit."""
    try: file = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search("(?i)unsupported .{,50}|$", str(error))[0] or "not a pickle"
        check(False, f"{path} is refused: it is damaged, or needs more than tensors and numbers, "
              f"which could run code ({reason}). If you trust it, save its state_dict alone")
    except Exception as error: check(False, f"{path} is no checkpoint: {error!r:.200}")
    file = file if isinstance(file, dict) else {}
    weights = next((file[key] for key in ("state_dict", "model") if key in file), file)
    weights = {str(n): w for n, w in getattr(weights, "items", dict)() if torch.is_tensor(w)}
    plain = {re.sub(r"\b(module|_orig_mod)\.", "", n): w for n, w in weights.items()}  # DDP's, say
    check(weights and len(plain) == len(weights), f"{path} holds no weights, or some names twice")
    ours = isinstance(file.get("args"), dict) and isinstance(file.get("step"), int)
    return plain, *((file["args"], file["step"]) if ours else ({}, 0))

def load_backbone(net, weights, prefix, path):
    """Fill the ResNet net with the weights whose names begin with prefix (None: the only ones, or
    the online encoder's). Returns how many, and what the projector's names begin with. Raises
    SystemExit, naming tensors, if any is missing, has another shape, or is too many."""
    first = [n for n, w in weights.items() if n.endswith("0.weight") and w.shape[1:2] == (3,)]
    for start in [name[:-8] for name in first]:
        numbers = {name[len(start) :].split(".")[0] for name in weights if name.startswith(start)}
        numbers = sorted(filter(str.isdecimal, numbers), key=int)  # of children that have weights
        for number, child in zip(numbers, ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")):
            for name in [name for name in weights if name.startswith(f"{start}{number}.")]:
                new = start + child + name.removeprefix(start + number)
                weights = weights | {new: weights[name]}  # as MNN's authors number them
    last = "layer4.0.conv1.weight"
    found = sorted(name.removesuffix(last) for name in weights if name.endswith(last))
    usual = [x for x in ("", "online.0.", "encoder_q.", "net.net.") if x in found] or found
    check(found, f"{path}: no ResNet among its {len(weights)} tensors")
    check(prefix in found or prefix is None and len(usual) == 1,
          f"{path} holds the networks {found}: choose --prefix among these")
    prefix = usual[0] if prefix is None else prefix
    inside = re.compile(re.escape(prefix) + r"((conv1|bn1|layer\d+)\.(?!.*num_batches).*)")
    state = {match[1]: weights[match[0]] for match in map(inside.fullmatch, weights) if match}
    own = {name: w for name, w in net.state_dict().items() if "num_batches" not in name}
    kinds = {name: (w.shape, w.is_floating_point()) for name, w in state.items()}
    wrong = [name for name, w in own.items() if kinds.get(name) != (w.shape, w.is_floating_point())]
    extra = [name for name in state if name not in own]
    check(not wrong + extra, f"{path} has {len(own) - len(wrong)} of this network's {len(own)} "
          f"tensors, not {wrong[:3]}; {len(extra)} others {extra[:3]}: another --arch or --stem?")
    net.load_state_dict(state, strict=False)  # but for the counters of BatchNorm, of no use here
    return len(own), prefix + "fc." if prefix[-2:] != "0." else prefix[:-2] + "1."

def read_projector(weights, prefix):
    """List of Linear, BatchNorm and ReLU, as weights number them after prefix; may be empty."""
    layers, pattern = [], re.compile(re.escape(prefix) + r"(\d+)\.weight")
    for number in sorted(int(match[1]) for match in map(pattern.fullmatch, weights) if match):
        start = f"{prefix}{number}."
        state = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
        shape = state["weight"].shape
        layer = nn.Linear(*shape[::-1], "bias" in state) if shape[1:] else nn.BatchNorm1d(*shape)
        layer.load_state_dict(state)
        layers += [nn.ReLU(), layer] if layers and len(shape) == 2 else [layer]
    return layers
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

def given_labels(spec, seed, train):
    """Labels int64 [N] of the training images that --labels picks, -1 for all others."""
    share, truth, files = spec.removesuffix("pct"), train.labels.cpu(), getattr(train, "files", ())
    if spec not in {f"{number}pct" for number in range(1, 101)}:
        try: names = [x for x in map(str.strip, Path(spec).open(errors="replace")) if x] or [""]
        except Exception as error: check(False, f"--labels: 1pct to 100pct, or a file: {error}")
        depth = 1 + min(name.count("/") for name in names)  # NAME, or CLASS/NAME
        rows = {"/".join(file.split(os.sep)[-depth:]): i for i, file in enumerate(files)}
        check(len(rows) == len(files), f"{spec}: some images share a name; list them as CLASS/NAME")
        lost = [name for name in names if name not in rows]
        check(not lost, f"{spec}: {len(lost)} names are not in the data: {lost[:3]!s:.200}")
        chosen = torch.tensor([rows[name] for name in names])
    else:
        order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
        _, *rows = order[truth[order].argsort(stable=True)].split((truth + 1).bincount().tolist())
        chosen = torch.cat([x[: max(1, round(len(x) * int(share) / 100))] for x in rows])
    return torch.full_like(truth, -1).scatter(0, chosen, truth[chosen]).to(train.device)
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

class Pixels(nn.Module):
    """The baseline "raw": pixels in 0..1, averaged to at most 32 x 32, [B, 3, S, S] -> [B, F]."""
    def forward(self, images):
        mu, std = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        return F.adaptive_avg_pool2d(images * std + mu, min(32, images.shape[-1])).flatten(1)

def gather(tensor):
    """[b, ...] of every process -> [B, ...] on all of them, in the order of their ranks."""
    if not dist.is_initialized(): return tensor
    parts = [tensor.new_empty(tensor.shape) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)

def passes(net, data, rows, args, views=0, seed=0, view={}):
    """Yield features [b, F] of images rows [n] under the view (arguments of augment) and labels [b]
    by batches. Each process runs net on its share of them, and all get all: numbers do not depend
    on how many processes there are. views: 1 where files shall come cropped, else 0."""
    size, world = min(args.batch_size, len(rows)), args.world
    rounds = math.ceil(len(rows) / (size * world))
    filled = rows[torch.arange(rounds * world * size) % len(rows)]  # padding, cut off again below
    own = filled.view(rounds, world, size)[:, args.rank]
    for number, (_, (images,), _) in enumerate(data.batches(own, views, seed, args.rank, world)):
        torch.manual_seed(hash((seed, number * world + args.rank)))
        with torch.no_grad(): features = gather(net(augment(images, args.image_size, **view)))
        labels = data.labels[rows[number * world * size :][: world * size].to(data.device)]
        yield from zip(features[: len(labels)].split(size), labels.split(size))

def all_features(net, sets, path, args):
    """Features [n, F] under the view for testing of every (data, rows [n]) in sets. If there is a
    path they are taken from there, if they are of these weights and data, else written there."""
    def compute(): return [torch.cat([x for x, _ in passes(net, *pair, args)]) for pair in sets]
    if not path: return compute()
    key = hashlib.sha256(repr((args.dataset, args.data_dir, args.image_size, args.stem)).encode())
    for data, _ in sets: key.update(repr(getattr(data, "files", len(data.labels))).encode())
    for weight in net.state_dict().values(): key.update(weight.cpu().contiguous().numpy())
    device, features = sets[0][0].device, None
    try: features = torch.load(path, map_location=device, weights_only=True)[key.hexdigest()]
    except Exception: pass  # none yet, of others, or damaged
    if gather(torch.tensor([features is not None], device=device)).all(): return features
    features = compute()
    if args.rank == 0: torch.save({key.hexdigest(): features}, path)
    return features
# ---- k-NN ---------------------------------------------------------------------------------------
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

def knn_predict(queries, features, labels, k, num_classes, temperature=None):
    """Classes [B] voted by the k rows of features [N, F] nearest in cosine to queries [B, F]: votes
    of 1, or of exp(cosine / temperature); ties go to the lower class. ValueError if k > N."""
    features, predictions = F.normalize(features, dim=1), []
    for chunk in F.normalize(queries, dim=1).split(256):
        neighbors = nearest_neighbors(chunk, features, k)  # [b, k]
        votes = torch.einsum("bf,bkf->bk", chunk, features[neighbors])
        votes = (votes / temperature).exp() if temperature else torch.ones_like(votes)
        scores = votes.new_zeros(len(chunk), num_classes).scatter_add_(1, labels[neighbors], votes)
        predictions.append(scores.argmax(1))
    return torch.cat(predictions)
# ---- training: linear probe, fine-tuning --------------------------------------------------------
def train_epochs(batches, network, parameters, milestones, args, **options):
    """Train by SGD with momentum 0.9, lr x0.1 at milestones (shares of all epochs); batches(epoch)
    yields inputs of the network and labels."""
    optimizer = torch.optim.SGD(parameters, momentum=0.9, **options)
    milestones = [max(1, round(args.epochs * share)) for share in milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    for epoch in range(args.epochs):
        for inputs, labels in batches(epoch):
            loss = F.cross_entropy(network(inputs), labels)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        schedule.step()
        check(loss.isfinite(), f"loss {loss:g} in epoch {epoch + 1}: a smaller --lr?")
        if args.rank == 0: print(f"epoch {epoch + 1}/{args.epochs} loss {loss:.4g}", flush=True)

def linear_probe(batches, features, queries, num_classes, args):
    """Classes [B] that a linear layer, trained on frozen features, gives to queries [B, F].
    batches(epoch) yields features [b, F] and labels [b] of the training images; features [n, F]:
    theirs under the view for testing, whose mean and standard deviation scale all."""
    raw = args.protocol == "raw"
    if not raw: var, mean = torch.var_mean(F.normalize(features, dim=1), dim=0, correction=0)
    def network(x): return head(x if raw else (F.normalize(x, dim=1) - mean) / (var + 1e-5).sqrt())
    torch.manual_seed(args.seed)
    head = nn.Linear(features.shape[1], num_classes).to(features.device)
    head.weight.data.normal_(std=0.01); head.bias.data.zero_()
    options = dict(lr=30, nesterov=True) if raw else dict(lr=0.01, weight_decay=1e-4)
    options["lr"], milestones = args.lr or options["lr"], (0.6, 0.8) if raw else (0.375, 0.75)
    train_epochs(batches, network, head.parameters(), milestones, args, **options)
    return network(queries).argmax(1)

def fine_tune(net, train, rows, view, args):
    """Train all weights of net, images [b, 3, S, S] -> scores [b, C], on images rows [n]. Views (on
    a CPU, BatchNorm too) are each process's own, so that the result depends on their number."""
    parts = math.ceil(len(rows) / args.batch_size)
    check(len(rows) >= 2 * parts * args.world, "BatchNorm needs 2 images a process and step")
    if args.world > 1 and train.labels.is_cuda: net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    network = nn.parallel.DistributedDataParallel(net) if args.world > 1 else net
    def batches(epoch):
        seed = hash((args.seed, epoch))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        order = rows[order].tensor_split(parts * args.world)  # all about as long, for BatchNorm
        own = train.batches(order[args.rank :: args.world], 1, seed, args.rank, args.world)
        for number, (_, (images,), labels) in enumerate(own):
            torch.manual_seed(hash((seed, number, args.rank)))
            yield augment(images, args.image_size, **view), labels
    options = dict(lr=args.lr or 0.001, weight_decay=1e-4)
    train_epochs(batches, network.train(), net.parameters(), (0.75,), args, **options)
    for buffer in net.buffers() if args.world > 1 else (): dist.broadcast(buffer, 0)  # BatchNorm's
    return net.eval()
# ---- the table ----------------------------------------------------------------------------------
def main(args):
    """Returns {"1-NN", "20-NN", "200-NN", "linear"} or {"fine-tuned"}: top-1 percent of test."""
    asked, (args, weights, step), path = args.dataset, complete(args), None
    torch.manual_seed(args.seed)
    (net, width), projector, source = encoder(args.arch, args.stem), [], f"{args.baseline} baseline"
    folder = Path(args.checkpoint or f"runs/{args.baseline}-{args.dataset}-{args.seed}/-").parent
    if args.baseline == "raw": net = Pixels()
    if args.checkpoint:
        count, head = load_backbone(net, weights, args.prefix, args.checkpoint)
        try:
            projector = read_projector(weights, head) if args.fine_tune else []
            width = nn.Sequential(*projector).eval()(torch.zeros(1, width)).shape[1]
        except Exception as error: check(False, f"cannot use projector {head}: {error!r:.200}")
        source = f"{args.checkpoint}: all {count} tensors of {args.arch} matched"
    check(os.access(folder if folder.exists() else ".", os.W_OK), f"cannot write into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    local, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    check(not cuda or local < torch.cuda.device_count(), "fewer GPUs than --nproc_per_node")
    if cuda: torch.cuda.set_device(device)
    if args.world > 1: dist.init_process_group("nccl" if cuda else "gloo")
    if local > 0: dist.barrier()  # until the first process of the node has downloaded
    train, test = (ImageData(args, split, device) for split in (True, False))
    if args.world > 1 and local == 0: dist.barrier()
    check(train.classes == test.classes, "train and val do not have the same classes")
    known = (train.labels >= 0).nonzero()[:, 0].cpu()  # STL-10 has unlabelled images too
    if args.labels: train.labels = given_labels(args.labels, args.label_seed, train)
    rows, every = (train.labels >= 0).nonzero()[:, 0].cpu(), torch.arange(len(test.labels))
    labels, classes, answers = train.labels[rows.to(device)], len(train.classes), {}
    source += f"\n{args.dataset}: {len(rows)} labelled images, {len(every)} test images"
    if args.rank == 0: print(source, flush=True)
    net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(args.fine_tune)
    view = dict(flip=args.flip, rotation=args.rotation)
    if train.images is not None: view["scale"] = args.crop_scale  # files come cropped
    if args.fine_tune:
        if not projector and args.rank == 0: print("no projector: fine-tuning without")
        net = nn.Sequential(net, *projector, nn.Linear(width, classes)).to(device)
        net = fine_tune(net, train, rows, view, args)
        (queries,) = all_features(net, [(test, every)], None, args)
        answers["fine-tuned"] = queries.argmax(1)
    else:
        path, voters = (folder / "features.pt", known) if args.cache_features else (path, rows)
        features, queries = all_features(net, [(train, voters), (test, every)], path, args)
        if path: features = features[torch.isin(voters, rows).to(device)]
        check(features.isfinite().all() & queries.isfinite().all(), "features are not finite")
        for k, temperature in (1, None), (20, None), (200, 0.1):
            few = min(k, len(rows) if temperature else math.ceil(len(rows) / classes))  # else ties
            answers[f"{k}-NN"] = knn_predict(queries, features, labels, few, classes, temperature)
        def batches(epoch):
            seed = hash((args.seed, epoch))
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            if not path: return passes(net, train, rows[order], args, 1, seed, view)
            return ((features[i], labels[i]) for i in order.to(device).split(args.batch_size))
        if args.epochs: answers["linear"] = linear_probe(batches, features, queries, classes, args)
    results = {k: 100 * (v == test.labels).double().mean().item() for k, v in answers.items()}
    if args.rank > 0: return results
    of = (Path(args.checkpoint).stem.replace("last", ""), asked) if args.checkpoint else ()
    how = Path(args.labels or "").stem, f"seed{args.label_seed}" * (args.label_seed > 0)
    how += (args.prefix or "").strip("."), "cached" * bool(path), "fine-tuned" * args.fine_tune
    name = "-".join(filter(None, ("eval", *of, *how)))
    record = vars(args) | dict(labelled=len(rows), test=len(every), step=step, top1=results)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(folder) as writer:
        for judge, value in results.items():
            print(f"{judge:>10} {value:6.2f}")
            writer.add_scalar(f"{name}/{judge}", value, step)
        if args.projector:  # of 5,000 images at most: the page grows slow
            first = test.batches(every[:5000].split(256))
            small = [F.interpolate(x / 255, min(32, x.shape[-1])) for _, (x,), _ in first]
            names = [str(test.classes[label]) for label in test.labels[:5000].tolist()]
            writer.add_embedding(queries[:5000], names, torch.cat(small), step, name)
    print(f"written to {folder / name}.json")
    return results

if __name__ == "__main__":
    main(tyro.cli(Args))
