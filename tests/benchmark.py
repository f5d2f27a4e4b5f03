"""How fast the parts are, as one table. Run by hand: pytest does not collect it.

    $ python tests/benchmark.py                                  all of it, on the GPU if there is one
    $ python tests/benchmark.py --device cpu --only search views

Every ratio is taken inside one run: the functions compared take turns, and the medians are divided.
On a GPU the sizes are those of training on ImageNet and CIFAR; on a CPU smaller, where they must be.
"""

import copy
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import tyro  # noqa: E402
from torch import nn  # noqa: E402

import cmsf_semi  # noqa: E402
import cmsf_ssl  # noqa: E402
import mnn  # noqa: E402
import msf  # noqa: E402

PARTS = ("search", "views", "step", "compile", "start", "files", "processes")


@dataclasses.dataclass
class Args:
    """Time the parts of the four scripts."""

    device: typing.Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    only: tuple[typing.Literal[PARTS], ...] = PARTS  # Parts of the table.
    rounds: int = 9  # Turns that each function takes; the median counts.


def seconds(function, device):
    """Time of one call, to the end of what it started on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def take_turns(functions, args, rounds=None):
    """Median seconds of each function of a dict; the first turn warms up and does not count."""
    times = {name: [] for name in functions}
    for turn in range((rounds or args.rounds) + 1):
        for name, function in functions.items():
            took = seconds(function, args.device)
            times[name] += [took] * (turn > 0)
    return {name: statistics.median(took) for name, took in times.items()}


def row(name, value, unit="ms", ratio=None, of="", want=""):
    """One line of the table: a time (in seconds, printed as ms) or another number."""
    value = f"{1e3 * value:.2f}" if unit == "ms" else f"{value:,.4g}" if unit else value
    ratio = "" if ratio is None else f"{ratio:.3f} x {of}"
    print(f"| {name} | {value} {unit} | {ratio} | {want} |", flush=True)


def heading(title):
    print(f"\n| {title} | median | ratio | asked |\n| --- | --- | --- | --- |", flush=True)


def unit_rows(*shape, device, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, device=device), dim=-1).to(dtype)


# ---- search and loss ----------------------------------------------------------------------------
def transcription(queries, targets, bank, labels, bank_labels, k):
    """The equation as it stands: two full matrices of distances, a clone of the bank, a table of all
    labels, and the mean distance to the k rows of the same label."""
    bank = bank.clone()
    from_targets, from_queries = 2 - 2 * targets @ bank.T, 2 - 2 * F.normalize(queries) @ bank.T
    table = bank_labels.repeat(len(targets), 1)  # [B, M]
    from_targets = torch.where(table == labels[:, None], from_targets, 5.0)
    chosen = from_targets.topk(k, dim=1, largest=False).indices
    return from_queries.gather(1, chosen).mean()


def search(args):
    cuda, k, b, d = args.device == "cuda", 10, 256, 512
    dtype, m = (torch.float16, 1_024_000) if cuda else (torch.float32, 131_072)
    targets, others = (unit_rows(b, d, device=args.device, dtype=dtype) for _ in range(2))
    queries = torch.randn(b, d, device=args.device, requires_grad=True)
    labels = torch.randint(1000, (b,), device=args.device)
    heading(f"search: B {b}, D {d}, k {k}, {str(dtype)[6:]}, {args.device}")

    def learn(bank, neighbors, valid=None):
        loss = msf.mean_shift_loss(queries, bank[neighbors].float(), valid)
        torch.autograd.grad(loss, queries)

    def same_label(bank, bank_labels):
        learn(bank, *cmsf_semi.same_label_neighbors(targets, labels, bank, bank_labels, k))

    for rows in (m, 4096, 16_384, 65_536, 262_144):
        if rows > m:
            continue
        pair = unit_rows(rows, 2, d, device=args.device, dtype=dtype)
        bank, other = pair[:, 0].contiguous(), pair[:, 1].contiguous()
        bank_labels = torch.randint(1000, (rows,), device=args.device)
        few = rows != m
        functions = dict(product=lambda: targets @ bank.T)
        functions["search and loss"] = lambda: learn(bank, msf.nearest_neighbors(targets, bank, k))
        if not few:
            functions["same label and loss"] = lambda: same_label(bank, bank_labels)
            functions["constrained and loss"] = lambda: learn(
                bank, cmsf_ssl.constrained_neighbors(targets, bank, others, other, k, k))
            functions["transcription"] = lambda: torch.autograd.grad(transcription(
                queries.to(dtype), targets, bank, labels, bank_labels, k), queries)
            functions["topk of all"] = lambda: (targets @ bank.T).topk(k)
        times = take_turns(functions, args)
        product = times["product"]
        row(f"product, M {rows:,}", product, ratio=1e9 * product / rows, of="ns a row")
        asked = {"search and loss": "1.3" if not cuda else "1.5", "same label and loss": "1.5",
                 "constrained and loss": "2.4", "transcription": "4 x the same label's"}
        for name in list(times)[1:]:
            row(f"{name}, M {rows:,}", times[name], ratio=times[name] / product, of="product",
                want="" if few else asked.get(name, ""))
        if few:
            continue
        ratio = times["transcription"] / times["search and loss"]
        row("transcription / search and loss", "", "", ratio, "", "4")
        ratio = times["transcription"] / times["same label and loss"]
        row("transcription / same label and loss", "", "", ratio, "", "4")
        found = msf.nearest_neighbors(targets, bank, k)
        exact = (targets[:64].float() @ bank.float().T).sort(dim=1, descending=True).indices[:, :k]
        hits = (found[:64, :, None] == exact[:, None]).any(2).float().mean().item()
        row("recall against a full sort in float32, 64 targets", 100 * hits, "%")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            msf.nearest_neighbors(targets, bank, k)
            extra = torch.cuda.max_memory_allocated() - before
            matrix = b * rows * targets.element_size()
            row("peak memory of the search", extra / 2**20, "MiB", extra / matrix, "matrix", "1.1")


# ---- views --------------------------------------------------------------------------------------
def views(args):
    from torchvision.transforms import v2

    recipe = msf.RECIPES["cifar10"]
    size, jitter = recipe["image_size"], recipe["jitter"]
    names = ("flip", "jitter", "gray", "blur")
    how = dict(size=size, scale=recipe["crop_scale"]) | {name: recipe[name] for name in names}
    pipeline = v2.Compose([
        v2.RandomResizedCrop(size, recipe["crop_scale"], antialias=False),
        v2.RandomHorizontalFlip(recipe["flip"]), v2.RandomApply([v2.ColorJitter(*jitter)], 0.8),
        v2.RandomGrayscale(recipe["gray"]), v2.RandomApply([v2.GaussianBlur(3, (0.1, 2))], recipe["blur"]),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])
    images = torch.randint(0, 256, (256, 3, size, size), dtype=torch.uint8)
    pictures = [v2.functional.to_pil_image(image) for image in images]
    from_pil = v2.Compose([*pipeline.transforms[:-2], v2.PILToTensor(), *pipeline.transforms[-2:]])
    on_device = images.to(args.device)
    times = take_turns({
        "augment": lambda: msf.augment(on_device, **how),
        "torchvision v2, tensors, one by one": lambda: torch.stack([pipeline(x) for x in images]),
        "torchvision v2, PIL, one by one": lambda: torch.stack([from_pil(x) for x in pictures]),
    }, args)
    heading(f"strong view of 256 images at {size} pixels, {args.device}")
    row("augment", times["augment"])
    for name in list(times)[1:]:
        row(name, times[name], ratio=times[name] / times["augment"], of="augment", want="5")


# ---- the step -----------------------------------------------------------------------------------
def build(script, args, **given):
    """(model, args) of a script, with its bank full of random rows, as main would make it."""
    options, _ = script.resolve(script.Args(**given))
    torch.manual_seed(0)
    n, classes = 2 * options.bank_size, 1000
    truth = torch.arange(n, device=args.device) % classes
    given = truth.where(torch.rand(n, device=args.device) < 0.1, -1)
    builders = {msf: lambda: msf.MSF(options), cmsf_ssl: lambda: cmsf_ssl.CMSF(options, n),
                cmsf_semi: lambda: cmsf_semi.SemiCMSF(options, given, truth), mnn: lambda: mnn.MNN(options)}
    model = builders[script]()
    model = model.to(args.device, memory_format=torch.channels_last)
    bank, width = model.bank, model.predictor[-1].out_features
    bank.pushed = options.bank_size
    for part in bank.embeddings.split(width, dim=1):  # M, and M' beside it
        part.copy_(unit_rows(*part.shape, device=args.device))
    bank.labels.random_(classes)
    bank.indices.copy_(torch.arange(len(bank.indices)))
    if script is cmsf_ssl:
        model.cache.copy_(unit_rows(*model.cache.shape, device=args.device))
    return model, options


def step(args):
    cuda = args.device == "cuda"
    cases = [("ResNet-50, 224 pixels", "imagenet", 256 if cuda else 10, "10%"),
             ("ResNet-18, 32 pixels", "cifar10", 256 if cuda else 32, "15%")]
    for title, dataset, batch, want in cases:
        heading(f"a step: {title}, batch {batch}, {args.device}")
        for script in (msf, cmsf_ssl, cmsf_semi, mnn):
            given = dict(dataset=dataset, batch_size=batch)
            if script is mnn and dataset == "cifar10":
                given["bn_splits"] = 1  # as one GPU of eight
            model, options = build(script, args, **given)
            one_step(script, model, options, args, want, parts=script is msf)


def one_step(script, model, options, args, want, parts):
    """Time a step, a bare loop of its networks, and (parts) each part alone."""
    cuda, b, size = args.device == "cuda", options.batch_size, options.image_size
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4, fused=cuda)
    bare = copy.deepcopy(nn.ModuleList([model.online, model.predictor, model.target]))
    images = torch.randint(0, 256, (b, 3, size, size), dtype=torch.uint8, device=args.device)
    labels = torch.arange(b, device=args.device) % 1000
    indices = torch.arange(b, device=args.device)
    weak = dict(size=size, flip=options.flip, scale=options.crop_scale if size < 96 else None)
    strong = weak | dict(jitter=options.jitter, gray=options.gray, blur=options.blur)
    precision = torch.autocast("cuda", torch.bfloat16, enabled=options.amp and cuda)
    sides = 1 + getattr(options, "symmetric", False)

    def make_views():
        return [msf.augment(images, **weak), msf.augment(images, **strong)]

    views = make_views()

    def whole():
        loss, _ = model(make_views(), labels, indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def students():
        with precision:
            outputs = [bare[1](bare[0](view)) for view in views[:sides]]
        sum(x.float().sum() for x in outputs).backward()
        bare.zero_grad()

    def teacher():
        with precision, torch.no_grad():
            for view in views[:sides]:
                bare[2](view)

    rounds = None if cuda else 3
    times = take_turns(dict(step=whole, bare=lambda: (students(), teacher())), args, rounds)
    name, share = script.__name__, 100 * (1 - times["bare"] / times["step"])
    row(f"{name}.py: networks alone", times["bare"])
    row(f"{name}.py: a step", times["step"], ratio=times["step"] / times["bare"], of="networks")
    row(f"{name}.py: all but the networks", share, "%", want=want)
    if cuda:
        torch.cuda.set_sync_debug_mode("error")  # raises where the host would wait for the device
        whole()
        torch.cuda.set_sync_debug_mode("default")
        row(f"{name}.py: host waits inside a step", "none", "")
    if not parts:
        return
    weights = list(model.target.parameters()), list(model.online.parameters())
    targets = unit_rows(b, model.bank.embeddings.shape[1], device=args.device)
    queries = targets.clone().requires_grad_(True)
    rows = model.bank.embeddings
    neighbors = msf.nearest_neighbors(targets, rows, options.topk)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    with torch.no_grad():
        functions = {
            "two views": make_views,
            "online forward and backward": torch.enable_grad()(students),
            "target forward": teacher,
            "EMA": lambda: torch._foreach_lerp_(*weights, 0.01),
            "gather and push": lambda: model.bank.enqueue(targets, labels, indices),
            "search": lambda: msf.nearest_neighbors(targets, rows, options.topk),
            "loss, forward and backward": torch.enable_grad()(
                lambda: torch.autograd.grad(msf.mean_shift_loss(queries, rows[neighbors]), queries)),
            "optimizer": optimizer.step,
        }
        for part, took in take_turns(functions, args, rounds).items():
            row(f"{name}.py: {part}", took, ratio=took / times["step"], of="step")


def compiled(args):
    """What --compile gains, and that nothing is compiled again after the first step."""
    from torch._dynamo.utils import counters

    cuda = args.device == "cuda"
    heading(f"--compile, forward and backward, {args.device}")
    for script in (msf, cmsf_ssl, cmsf_semi, mnn):
        given = dict(dataset="cifar10", batch_size=256) if cuda else dict(batch_size=64)
        models = []
        for _ in range(2):
            model, options = build(script, args, **given)
            models.append(model)
        for net in (model.online, model.target, model.predictor):
            net.compile()
        size, b = options.image_size, options.batch_size
        views = list(torch.randn(2, b, 3, size, size, device=args.device))
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        labels = torch.arange(b, device=args.device)

        def run(model):
            model(views, labels, labels)[0].backward()
            model.zero_grad()

        run(model)
        graphs = counters["stats"]["unique_graphs"]
        functions = dict(eager=lambda: run(models[0]), compiled=lambda: run(models[1]))
        times = take_turns(functions, args)
        with torch.no_grad():  # k-NN and classifier embed the test images between two steps
            for net in (model.online[0], nn.Sequential(*model.target)):
                net.eval()(views[0][: b // 2])
                net.train()
        run(model)
        name, again = script.__name__, counters["stats"]["unique_graphs"] - graphs
        row(f"{name}.py, eager", times["eager"])
        gain = times["eager"] / times["compiled"]
        row(f"{name}.py, compiled", times["compiled"], ratio=gain, of="faster")
        row(f"{name}.py, graphs compiled after the first step", again, "graphs", want="0")


# ---- start, files -------------------------------------------------------------------------------
def start(args):
    heading("start-up")
    for name in ("msf", "cmsf_ssl", "cmsf_semi", "mnn", "eval_linear"):
        command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
        times = [seconds(lambda: subprocess.run(command, capture_output=True, check=True), "cpu")
                 for _ in range(4)]
        row(f"{name}.py --help", statistics.median(times[1:]), want="3000 ms")


def files(args):
    """Two views of JPEGs of ImageNet's usual size, by one core."""
    import torchvision.transforms as T
    from PIL import Image

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            path = Path(folder, split, "class")
            path.mkdir(parents=True)
            for i in range(24):
                small = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8).numpy()
                image = Image.fromarray(small).resize((500, 375), Image.BICUBIC)
                image.save(path / f"{i}.jpg", quality=90)
        options, _ = msf.resolve(msf.Args(dataset="folder", data_dir=folder, num_workers=0))
        data = msf.ImageData(options, True, torch.device("cpu"))
        normalize = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        crop, flip = T.RandomResizedCrop(224, (0.2, 1)), T.RandomHorizontalFlip()
        weak = T.Compose([crop, flip, T.ToTensor(), normalize])
        strong = T.Compose([
            crop, flip, T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(23, (0.1, 2))], 0.5), T.ToTensor(), normalize])

        def reference():
            for name in data.files:
                image = data.read(name)
                weak(image), strong(image)

        def decode():
            for name in data.files:
                data.read(name)

        cpu = dataclasses.replace(args, device="cpu")
        times = take_turns({
            "a worker of ours": lambda: [data[i, 2, i] for i in range(len(data.files))],
            "torchvision, PIL, two views": reference, "decoding alone": decode}, cpu)
        heading("image files, 500 x 375 JPEG to two views of 224 pixels, one core")
        ours = times["a worker of ours"]
        for name, took in times.items():
            row(name, len(data.files) / took, "images/s", took / ours, "the time of ours",
                "1.5" if "PIL" in name else "")
    torch.set_num_threads(threads)


# ---- processes ----------------------------------------------------------------------------------
def one_of(rank, world, folder, device, result):
    """Train for some steps on a share of the batch; BatchNorm in eval mode, so that all agree."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    bench = Args(device="cpu")
    model, options = build(msf, bench, bank_size=65_536, batch_size=64)
    model.eval()
    network = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    network.broadcast_buffers = False
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    share, sent, losses, times = slice(rank * 64 // world, (rank + 1) * 64 // world), [0], [], {}
    collective = dist.all_gather

    def counted(parts, own):
        sent[0] += sum(part.nbytes for part in parts) - own.nbytes  # received from the others
        began = time.perf_counter()
        collective(parts, own)
        times.setdefault("gather", []).append(time.perf_counter() - began)

    dist.all_gather = counted
    parts = dict(search=(msf, "nearest_neighbors"), push=(msf.MemoryBank, "enqueue"))
    for name, (owner, attribute) in parts.items():
        original = getattr(owner, attribute)

        def timed(*given, name=name, original=original):
            began = time.perf_counter()
            answer = original(*given)
            times.setdefault(name, []).append(time.perf_counter() - began)
            return answer

        setattr(owner, attribute, timed)
    for number in range(8):
        torch.manual_seed(number)
        views = torch.randn(2, 64, 3, 16, 16)
        indices = torch.arange(64)
        began, received = time.perf_counter(), sent[0]
        loss, _ = network(list(views[:, share]), indices[share] % 10, indices[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.setdefault("step", []).append(time.perf_counter() - began)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world)
    middle = {name: statistics.median(took) for name, took in times.items()}
    middle["gather"] *= len(times["gather"]) / len(times["step"])
    result.put((rank, sent[0] - received, losses, middle))
    dist.destroy_process_group()


def processes(args):
    heading("processes (gloo, one thread each), digits network, batch 64, D 128, M 65,536")
    first, context = None, mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2, 4):
            result = context.Queue()
            crew = [context.Process(target=one_of, args=(rank, world, folder, "cpu", result))
                    for rank in range(world)]
            for process in crew:
                process.start()
            _, received, losses, times = min(result.get(timeout=300) for _ in crew)
            for process in crew:
                process.join()
            first = first or losses
            row(f"{world}: bytes received by a process, a step", received, "bytes")
            gap = max(abs(a - b) for a, b in zip(losses, first))
            row(f"{world}: largest difference of a loss from that of one process", gap, "")
            for name in ("search", "push", "gather", "step"):
                if name in times:
                    row(f"{world}: {name}, rank 0", times[name])


def main(args):
    """Print the table."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"torch {torch.__version__}, {name}, {time.strftime('%Y-%m-%d')}")
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    known = dict(search=search, views=views, step=step, compile=compiled, start=start, files=files,
                 processes=processes)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for part in args.only:
            known[part](args)


if __name__ == "__main__":
    main(tyro.cli(Args))
