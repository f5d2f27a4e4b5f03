"""What only a GPU shows: whether all scripts run there, how fast, and what they learn in minutes.
Run by hand; pytest does not collect it.

    python tests/gpu_check.py --out FOLDER                        # at most 8 minutes on one H100
    python tests/gpu_check.py --out FOLDER --only search step
    python tests/gpu_check.py --out FOLDER --small                # tries this file, also on a CPU

Every row is printed and appended to FOLDER/gpu_check.md as soon as it is measured. Each part is a
process of its own, so that no other part is lost if it fails, hangs or runs out of time.
"""

import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cmsf_semi  # noqa: E402
import cmsf_ssl  # noqa: E402
import mnn  # noqa: E402
import msf  # noqa: E402

PARTS = ("works", "search", "step", "learning")
METHODS = {  # script, and what differs from its recipe
    "MSF": (msf, {}),
    "CMSF, previous epoch": (cmsf_ssl, {"constraint": "previous-epoch"}),
    "CMSF, third view": (cmsf_ssl, {"constraint": "third-view"}),
    "CMSF, k-means": (cmsf_ssl, {"constraint": "kmeans"}),
    "CMSF, 10% of labels": (cmsf_semi, {"labels": "10pct"}),
    "CMSF, all labels": (cmsf_semi, {"labels": "100pct"}),
    "MNN": (mnn, {}),
}
# What a step needs does not depend on how many labels there are.
STEPPING = [name for name in METHODS if name != "CMSF, all labels"]
LEARNING = ["MSF", "CMSF, previous epoch", "CMSF, k-means", "MNN", "CMSF, 10% of labels"]


@dataclass
class Args:
    """Check the scripts on a GPU."""

    out: Path  # folder for gpu_check.md
    only: tuple[Literal["works", "search", "step", "learning"], ...] = PARTS  # parts to run
    small: bool = False  # a tiny form of everything, which runs on a CPU, too
    seconds: int = 470  # for all parts together
    works_seconds: int = 120  # at most, for each of the parts
    search_seconds: int = 40
    step_seconds: int = 130  # without compiling: that takes two minutes more
    learning_seconds: int = 470
    glyphs: Path = ROOT.parent / "shared" / "glyphs" / "expand.py"  # writes the images of learning
    epochs: int | None = None  # of learning; None: as many as fit into its time
    probe_epochs: int = 10  # of the linear classifier that judges learning


# ======== what is written ========


class OutOfTime(Exception):
    """The time of a part is over."""


class Report:
    """Writes to the terminal and, at once, to the end of a file."""

    def __init__(self, path, deadline=0.0):
        self.path = path
        self.deadline = deadline  # in time.time()'s seconds

    def seconds_left(self):
        return self.deadline - time.time()

    def write(self, text):
        print(text, flush=True)
        with open(self.path, "a") as file:
            file.write(text + "\n")

    def table(self, *names):
        """The head of a table."""
        self.write(f"\n| {' | '.join(names)} |\n|{' --- |' * len(names)}")

    def row(self, *cells):
        cells = [str(cell).replace("|", "/") for cell in cells]
        self.write(f"| {' | '.join(cells)} |")

    def guarded(self, label, function, *values):
        """Call a function that writes rows. If it fails, a row with this label says why. Raises
        OutOfTime if there is no time for it."""
        if self.seconds_left() <= 0:
            raise OutOfTime
        try:
            function(*values)
        except Exception as error:
            self.row(label, f"FAILED: {fault(error)}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def fault(error):
    """What went wrong, and the last line of the project where it did, in one line."""
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename).resolve()
        if file.parent in (ROOT, ROOT / "tests"):
            place = f"{file.name}, line {frame.lineno}: {frame.line}"
    return f"{type(error).__name__}: {last_lines(str(error))} ({place})"


def last_lines(text):
    """The end of an output, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-400:]


def met(goal_is_met):
    return "met" if goal_is_met else "NOT met"


# ======== measuring ========


def set_up_gpu():
    """As main does."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")


def gpu_milliseconds(function, calls=3):
    """Milliseconds that the GPU works for a call, however slow the host is: the sum over its
    kernels."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    kernels = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    return sum(event.self_device_time_total for event in kernels) / calls / 1000


def median_seconds(functions, rounds, calls):
    """Median seconds of a call of each function of a dict. They take turns: in a round, each is
    called `calls` times between two synchronizations. A first round warms up."""
    on_gpu = torch.cuda.is_available()
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            if on_gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(calls):
                function()
            if on_gpu:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - started) / calls)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def run_script(words, folder, seconds):
    """Run a script, given as in a shell, in a folder. Returns what it printed, and its seconds.
    RuntimeError, with the last lines, if it fails or takes longer than `seconds`."""
    started = time.time()
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=max(0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise RuntimeError(f"stopped, out of time; {last_lines(output)}") from None
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}; {last_lines(output)}")
    return output, time.time() - started


def run_name(method):
    """MSF -> msf, CMSF, 10% of labels -> cmsf-10-of-labels."""
    return re.sub(r"[^a-z0-9]+", "-", method.lower())


def training_words(method, name, epochs):
    """The command that trains a method for some epochs, in runs/NAME."""
    script, options = METHODS[method]
    words = [f"{script.__name__}.py", "--run-name", name, "--epochs", str(epochs)]
    for option, value in options.items():
        words += [f"--{option}", value]
    return words


def judge(name, options, folder, seconds):
    """The accuracies that eval_linear.py gives the run runs/NAME, {"20-NN": percent, ...}, and its
    seconds."""
    words = ["eval_linear.py", "--checkpoint", f"runs/{name}/last.pt", *options]
    _, seconds = run_script(words, folder, seconds)
    evaluation = json.loads((folder / "runs" / name / "eval.json").read_text())
    return evaluation["top1"], seconds


class Trainer:
    """A method's model, optimizer and random images on the device, with the step of its main."""

    def __init__(self, method, size, device):
        self.script, options = METHODS[method]
        self.args = replace(self.script.RECIPES[size.dataset], **size.changes, **options)
        self.device = device
        args = self.args
        self.labels = torch.randint(size.num_classes, (size.num_images,), device=device)
        self.indices = torch.randperm(size.num_images, device=device)[: args.batch_size]
        self.num_crops = 3 if method == "CMSF, third view" else 2
        side = args.image_size
        # Small images are held on the device, and it crops them. Workers crop larger ones.
        self.in_memory = side < msf.SMALL
        shape = (args.batch_size, self.num_crops, 3, side, side)
        if self.in_memory:
            shape = (size.num_images, 3, side, side)
        self.images = torch.randint(256, shape, dtype=torch.uint8, device=device)

        self.model = build_model(self.script, args, self.labels)
        self.model = self.model.to(device, memory_format=torch.channels_last)
        self.parallel_model = self.model
        fill_bank(self.model.bank, size)
        self.share_networks(self.model.online, self.model.predictor, self.model.target)

        self.weak_args = args
        if self.script is mnn and args.weak_flip is not None:
            self.weak_args = replace(args, flip=args.weak_flip)
        view = torch.rand(args.batch_size, 3, side, side, device=device)
        self.view = msf.weak_view(view, args)

    def share_networks(self, online, predictor, target):
        """Take these networks in place of the model's own."""
        self.model.online = online
        self.model.predictor = predictor
        self.model.target = target
        args = self.args
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.SGD(
            weights, args.lr, args.momentum, weight_decay=args.weight_decay, fused=fused
        )

    def parallelize(self, on_gpu):
        """Let the processes of the group train the model together, as main does."""
        if on_gpu:
            for network in (self.model.online, self.model.predictor, self.model.target):
                nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.parallel_model = nn.parallel.DistributedDataParallel(self.model)
        self.parallel_model.broadcast_buffers = False

    def autocast(self):
        on_gpu = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu)

    def crops(self):
        """Random crops [b, 3, S, S] in 0..1, as ImageData gives them."""
        if not self.in_memory:
            return list((self.images / 255).unbind(1))
        copies = (self.images[self.indices] / 255).repeat(self.num_crops, 1, 1, 1)
        return list(self.script.random_crop(copies, self.args).chunk(self.num_crops))

    def views(self):
        """Random crops and views of a batch: weak, strong, and a third if there is one."""
        crops = self.crops()
        views = [self.script.weak_view(crops[0], self.weak_args)]
        views.append(self.script.strong_view(crops[1], self.args))
        if self.num_crops == 3:
            views.append(self.script.weak_view(crops[2], self.args))
        return views

    def whole_step(self):
        """Crops, views, networks, search, loss, optimizer and moving average. Returns the loss."""
        weak, strong, *third = self.views()
        labels = self.labels[self.indices]
        with self.autocast():
            if self.script in (msf, mnn):
                loss, _ = self.parallel_model(weak, strong, labels)
            elif self.script is cmsf_ssl:
                third_view = third[0] if third else None
                loss, _ = self.parallel_model(weak, strong, third_view, labels, self.indices)
            else:
                loss, _ = self.parallel_model(weak, strong, self.indices, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.update()
        return loss.detach()

    def update(self):
        """The optimizer and the moving average."""
        self.optimizer.step()
        self.model.update_target()

    def networks_alone(self):
        """What the step cannot do without: its forward and backward passes of the networks."""
        symmetric = self.script is mnn and self.args.symmetric
        num_queries = 2 if symmetric else 1
        num_targets = 2 if symmetric or self.num_crops == 3 else 1
        total = 0
        with self.autocast():
            for _ in range(num_queries):
                total = total + self.model.predictor(self.model.online(self.view)).float().sum()
            with torch.no_grad():
                for _ in range(num_targets):
                    self.model.target(self.view)
        self.optimizer.zero_grad()
        total.backward()


def build_model(script, args, labels):
    """The model that the main of a script would build, for images with these labels [N]."""
    norm_layer = nn.BatchNorm2d
    if script is mnn and args.bn_splits > 1:
        norm_layer = partial(mnn.SplitBatchNorm, splits=args.bn_splits)
    backbone, width = script.build_backbone(args.arch, args.stem, norm_layer)
    if script is msf:
        return msf.MSF(backbone, width, args.topk, args.bank_size, args.ema)
    if script is cmsf_ssl:
        options = (args.topk, args.num_candidates, args.bank_size, args.ema, args.constraint)
        model = cmsf_ssl.CMSF(backbone, width, len(labels), *options)
        model.cached.fill_(True)
        if args.constraint == "kmeans":
            model.clusters.random_(0, len(labels) // args.images_per_cluster)
        return model
    if script is cmsf_semi:
        is_given = torch.rand(len(labels), device=labels.device) < 0.1
        given = torch.where(is_given, labels, -1)
        options = (args.topk, args.bank_size, args.ema, args.confidence)
        return cmsf_semi.CMSF(backbone, width, given, *options)
    return mnn.MNN(
        backbone,
        width,
        hidden=args.hidden,
        topk=args.topk,
        bank_size=args.bank_size,
        ema=args.ema,
        lam=args.lam,
        weighting=args.weighting,
        symmetric=args.symmetric,
        renormalize=args.renormalize_mix,
    )


def fill_bank(bank, size):
    """Fill a memory bank with random embeddings of random images."""
    for name, buffer in bank.named_buffers():
        if name in ("embeddings", "others"):
            buffer.copy_(F.normalize(torch.randn_like(buffer), dim=1))
        elif name == "indices":
            buffer.random_(0, size.num_images)
        else:
            buffer.random_(0, size.num_classes)
    bank.pushed = len(bank.labels)


@dataclass
class Size:
    """A size of images and networks whose step is measured."""

    name: str
    dataset: str  # whose recipe is taken, with changes
    changes: dict
    num_images: int
    num_classes: int
    goal: float  # the largest share of a step for all but the networks, in percent
    rounds: int


def sizes_to_measure(small):
    """CIFAR-10's recipe, and ImageNet's with half the batch."""
    cifar_changes = {}
    imagenet_changes = {"batch_size": 128, "bank_size": 128_000}
    if small:
        cifar_changes = {"batch_size": 16, "bank_size": 64, "arch": "resnet10"}
        imagenet_changes = {"batch_size": 4, "bank_size": 64, "arch": "resnet10", "image_size": 96}
        return [
            Size("ResNet-10, 32 pixels", "cifar10", cifar_changes, 100, 10, 15, 1),
            Size("ResNet-10, 96 pixels", "imagenet", imagenet_changes, 100, 10, 10, 1),
        ]
    return [
        Size("ResNet-18, 32 pixels", "cifar10", cifar_changes, 50_000, 10, 15, 5),
        Size("ResNet-50, 224 pixels", "imagenet", imagenet_changes, 1_281_167, 1000, 10, 3),
    ]


# ======== part: works ========


def works(args, report, folder):
    """Does every script run on the device, without waiting for it within a step?"""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        set_up_gpu()
    report.write(
        "\n## works: one step, from crops to moving average; to wait for the GPU is an error"
    )
    report.table("method", "result", "peak memory, GiB")
    size = sizes_to_measure(args.small)[0]
    for method in STEPPING:
        report.guarded(method, step_without_waiting, method, size, report)

    backend = "nccl" if on_gpu else "gloo"
    report.write(f"\n## works: a step under DDP with {backend}, one process, as main sets it up")
    report.table("method", "result", "loss, and without DDP")
    start_process_group(backend)
    for method in STEPPING:
        report.guarded(method, step_under_ddp, method, size, report)
    dist.destroy_process_group()

    epochs = 1 if args.small else 2
    runs = {method: training_words(method, run_name(method), epochs) for method in METHODS}
    if on_gpu:
        runs["MSF, --compile"] = training_words("MSF", "msf-compiled", epochs) + ["--compile"]
    if args.small:
        runs = {name: words + ["--image-size", "8"] for name, words in runs.items()}
    pictures = folder / "pictures"
    write_pictures(pictures, side=120)
    words = ["--dataset", "folder", "--data-dir", str(pictures), "--image-size", "96"]
    words += ["--arch", "resnet10", "--batch-size", "16", "--bank-size", "64"]
    from_files = training_words("MSF", "msf-files", epochs) + words
    runs["MSF, files of 120 pixels read by workers"] = from_files
    report.write(f"\n## works: whole runs, digits, --epochs {epochs}, several runs side by side")
    report.table("run", "seconds", "result")

    def train(words):
        output, seconds = run_script(words, folder, report.seconds_left())
        measured = [line for line in output.splitlines() if "accuracy" in line]
        return f"{seconds:.0f}", measured[-1]

    def train_on(words):
        output, seconds = run_script(words, folder, report.seconds_left())
        continued = [line for line in output.splitlines() if line.startswith("continuing")]
        return f"{seconds:.0f}", continued[0]

    def evaluate(name):
        top1, seconds = judge(name, ["--epochs", "2"], folder, report.seconds_left())
        return f"{seconds:.0f}", accuracies(top1)

    jobs = 9 if on_gpu else 2
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train, words): name for name, words in runs.items()}
        write_results(futures, report)
        more = runs["MSF"] + ["--epochs", str(epochs + 1)]  # the last --epochs counts
        futures = {pool.submit(train_on, more): "MSF, one more epoch"}
        futures[pool.submit(evaluate, "cmsf-10-of-labels")] = "eval_linear.py, of 10% of labels"
        write_results(futures, report)


def accuracies(top1):
    """{"20-NN": percent, ...} as a text."""
    return ", ".join(f"{name} {percent:.2f}" for name, percent in top1.items())


def write_results(futures, report):
    """A row for each future of a dict future -> name: the cells it returns, or why it failed."""
    for future in as_completed(futures):
        try:
            report.row(futures[future], *future.result())
        except Exception as error:
            report.row(futures[future], "", f"FAILED: {error}")


def step_without_waiting(method, size, report):
    on_gpu = torch.cuda.is_available()
    trainer = Trainer(method, size, torch.device("cuda" if on_gpu else "cpu"))
    for _ in range(3):
        trainer.whole_step()
    memory = ""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.whole_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        memory = peak_memory()
    report.row(method, "never waits" if on_gpu else "runs (no GPU: not checked)", memory)


def start_process_group(backend):
    """A process group of this process alone, as torchrun --nproc_per_node=1 would have it."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29876"}
    device = torch.device("cuda", 0) if backend == "nccl" else None
    dist.init_process_group(backend, rank=0, world_size=1, device_id=device)


def step_under_ddp(method, size, report):
    """Two steps with DistributedDataParallel and SyncBatchNorm, and the same two without."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    losses = []
    for parallel in (True, False):
        torch.manual_seed(0)
        trainer = Trainer(method, size, device)
        if parallel:
            trainer.parallelize(on_gpu)
        trainer.whole_step()
        losses.append(trainer.whole_step().item())
    with_ddp, without = losses
    alike = abs(with_ddp - without) < 0.05
    report.row(method, "the same" if alike else "NOT the same", f"{with_ddp:.4f}, {without:.4f}")


def peak_memory():
    return f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"


# ======== part: search ========


def by_topk(similarities, k):
    """What the scripts' largest(similarities, k) gives, by one topk."""
    return similarities.topk(k, dim=1)


def search(args, report, folder):
    """How much longer than the product of targets and bank does the search for neighbours take?"""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    if on_gpu:
        set_up_gpu()
    batch, dim = (16, 64) if args.small else (256, 512)
    bank_sizes = [8_192, 16_384] if args.small else [128_000, 1_024_000]
    # From bfloat16 to float32: the sums are kept as they are, and not rounded to 8 bits.
    precisions = ["fp32", "TF32", "bf16", "bf16 to fp32"] if on_gpu else ["fp32", "bf16"]
    report.write(
        f"\n## search: B {batch}, D {dim}; goal: at most 1.5 x the product at the larger M"
    )
    report.write("Embeddings of 10,000 clusters. Recall: share of the neighbours by fp32 and topk.")
    report.table("M", "product in", "search", "ms", "x the product", "recall, %", "goal")
    for bank_size in bank_sizes:
        centers = torch.randn(10_000, dim, device=device)
        bank = near_centers(centers, bank_size)
        targets = near_centers(centers, batch)
        torch.set_float32_matmul_precision("highest")
        similarities = targets @ bank.T
        expected = {k: by_topk(similarities, k).indices for k in (5, 10)}
        del similarities
        is_goal = bank_size == bank_sizes[-1]
        for precision in precisions:
            label = f"{bank_size:,} {precision}"
            values = (targets, bank, precision, expected, is_goal, report)
            report.guarded(label, search_rows, *values)
        del bank, expected

    size = sizes_to_measure(args.small)[1]
    if not args.small:
        size.changes = {}  # ImageNet's own: batches of 256, and a bank of 1,024,000
    report.write(f"\n{size.name}, MSF, a whole step, with a full bank")
    report.table("M", "batch", "product in", "search", "ms", "share of the first, %")
    report.guarded("whole step", search_within_a_step, size, torch.device(device), report)


def near_centers(centers, n):
    """Embeddings [n, D] of unit norm, each near one of the centers, as those of a class are."""
    chosen = torch.randint(len(centers), (n,), device=centers.device)
    noise = torch.randn(n, centers.shape[1], device=centers.device)
    return F.normalize(centers[chosen] + 0.7 * noise, dim=1)


def search_rows(targets, bank, precision, expected, is_goal, report):
    """Rows of one bank and one precision; expected: k -> neighbours [b, k]."""
    torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
    if precision.startswith("bf16"):
        targets = targets.bfloat16()
        bank = bank.bfloat16()

    def product():
        if precision == "bf16 to fp32":
            return torch.mm(targets, bank.T, out_dtype=torch.float32)
        return targets @ bank.T

    def product_and_search(find, k):
        return find(product(), k)

    searches = {}
    for k in expected:
        searches[f"topk {k}"] = partial(product_and_search, by_topk, k)
        searches[f"largest {k}, as in the scripts"] = partial(product_and_search, msf.largest, k)
    seconds = median_seconds({"product alone": product} | searches, rounds=5, calls=10)
    alone = seconds["product alone"]
    head = (f"{len(bank):,}", precision)
    report.row(*head, "product alone", f"{1000 * alone:.3f}", "1.00", "", "")
    for name, find in searches.items():
        _, found = find()
        wanted = expected[found.shape[1]]
        recall = (found[:, :, None] == wanted[:, None]).any(dim=2).float().mean().item()
        ratio = seconds[name] / alone
        goal = met(ratio <= 1.5) if is_goal else ""
        milliseconds = f"{1000 * seconds[name]:.3f}"
        report.row(*head, name, milliseconds, f"{ratio:.2f}", f"{100 * recall:.2f}", goal)


def search_within_a_step(size, device, report):
    """What a whole step gains by each kind of search."""
    trainer = Trainer("MSF", size, device)
    largest = msf.largest

    def whole_step(precision, find):
        torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
        msf.largest = find
        trainer.whole_step()
        msf.largest = largest

    steps = {}
    for precision in ("fp32", "TF32"):
        steps[precision, "topk"] = partial(whole_step, precision, by_topk)
        steps[precision, "largest"] = partial(whole_step, precision, largest)
    seconds = median_seconds(steps, rounds=3, calls=4 if device.type == "cuda" else 1)
    first = seconds["fp32", "topk"]
    head = (f"{trainer.args.bank_size:,}", trainer.args.batch_size)
    for (precision, name), value in seconds.items():
        report.row(*head, precision, name, f"{1000 * value:.2f}", f"{100 * value / first:.1f}")


# ======== part: step ========


def step(args, report, folder):
    """How fast is a step, and what share of it is not the networks'?"""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu:
        set_up_gpu()
    sizes = sizes_to_measure(args.small)
    report.write("\n## step: images/s of a whole step, and of its networks alone")
    report.write("Without reading files, k-means and the classifier's rounds, which no step has.")
    for size in sizes:
        report.write(f"Goal for {size.name}: at most {size.goal}% for all but the networks.")
    report.write("Goal for MNN on CIFAR-10 (50,000 images, 200 epochs): at most 10 minutes.")
    if on_gpu:
        report.write(f"The host needs {host_microseconds():.0f} us to start one kernel.")
    names = ("method", "compiled", "whole step", "networks alone", "the rest, %")
    gpu_names = ("GPU ms, whole", "networks", "the rest, %")
    report.table("size", *names, *gpu_names, "goal: by time; by GPU", "peak GiB", "first step, s")

    # Those that have the same networks share them: compiling takes long.
    families = [[method for method in STEPPING if method != "MNN"], ["MNN"]]
    for compiled in (False, True):
        if compiled and not on_gpu:
            continue
        for size in sizes:
            for family in families:
                first = Trainer(family[0], size, device)
                networks = (first.model.online, first.model.predictor, first.model.target)
                del first
                if compiled:
                    for network in networks:
                        network.compile()
                for method in family:
                    label = f"{size.name}, {method}, compiled: {compiled}"
                    values = (method, size, device, networks, compiled, report)
                    report.guarded(label, step_row, *values)
                del networks


def host_microseconds():
    """Time of the host for an operation that is nothing to the GPU."""
    number = torch.zeros((), device="cuda")

    def add_often():
        for _ in range(1000):
            number.add_(1)

    return median_seconds({"add": add_often}, rounds=3, calls=1)["add"] * 1000


def step_row(method, size, device, networks, compiled, report):
    on_gpu = device.type == "cuda"
    trainer = Trainer(method, size, device)
    trainer.share_networks(*networks)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.time()
    trainer.whole_step()
    if on_gpu:
        torch.cuda.synchronize()
    first_step = time.time() - started
    functions = {"whole": trainer.whole_step, "networks": trainer.networks_alone}
    seconds = median_seconds(functions, size.rounds, calls=5 if on_gpu else 1)

    batch = trainer.args.batch_size
    speeds = {name: batch / value for name, value in seconds.items()}
    rest = 100 * (1 - seconds["networks"] / seconds["whole"])
    goal = met(rest <= size.goal)
    gpu_cells = ("", "", "")
    if on_gpu:
        whole = gpu_milliseconds(trainer.whole_step)
        networks = gpu_milliseconds(trainer.networks_alone)
        gpu_rest = 100 * (1 - networks / whole)
        gpu_cells = (f"{whole:.2f}", f"{networks:.2f}", f"{gpu_rest:.1f}")
        goal += f"; {met(gpu_rest <= size.goal)}"
    if method == "MNN" and size.dataset == "cifar10":
        minutes = 200 * 50_000 / speeds["whole"] / 60
        goal += f"; {minutes:.1f} minutes for 200 epochs: {met(minutes < 10)}"
    report.row(
        size.name,
        method,
        "yes" if compiled else "no",
        f"{speeds['whole']:,.0f}",
        f"{speeds['networks']:,.0f}",
        f"{rest:.1f}",
        *gpu_cells,
        goal,
        peak_memory() if on_gpu else "",
        f"{first_step:.1f}",
    )


# ======== part: learning ========


def learning(args, report, folder):
    """What do the methods learn from letters (or from a few random pictures) in equal epochs?"""
    report.write("\n## learning: letters of fonts, 32 pixels, all methods side by side")
    data = folder / "glyphs"
    started = time.time()
    if args.small:
        write_pictures(data, side=32)
    elif args.glyphs.is_file():
        expand = [sys.executable, str(args.glyphs), str(data)]
        subprocess.run(expand, check=True, timeout=report.seconds_left())
    else:
        report.write(f"\nSkipped: there is no {args.glyphs}.")
        return
    report.write(f"The pictures were written in {time.time() - started:.0f} s.")

    options = ["--dataset", "small-folder", "--data-dir", str(data), "--image-size", "32"]
    options += ["--stem", "small", "--flip", "0", "--rotation", "10"]
    if args.small:
        options += ["--arch", "resnet10", "--batch-size", "16", "--bank-size", "64"]
        options += ["--num-workers", "0"]
    else:
        options += ["--arch", "resnet18", "--num-workers", "4"]
    epochs = args.epochs
    if epochs is None:
        epochs = 1 if args.small else epochs_that_fit(data, options, report, folder)
    options += ["--warmup-epochs", str(epochs / 10)]
    report.write(f"--epochs {epochs}; the linear classifier's: {args.probe_epochs}.")
    report.table("method", "20-NN", "linear", "k-NN untrained", "seconds to train", "to judge")

    def train_and_judge(method):
        name = run_name(method)
        words = training_words(method, name, epochs) + options
        output, seconds = run_script(words, folder, report.seconds_left())
        untrained = re.search(r"k-NN accuracy ([\d.]+)%", output)[1]
        probe = ["--data-dir", str(data), "--epochs", str(args.probe_epochs)]
        top1, judging_seconds = judge(name, probe, folder, report.seconds_left())
        percents = (f"{top1['20-NN']:.2f}", f"{top1['linear']:.2f}", untrained)
        return (*percents, f"{seconds:.0f}", f"{judging_seconds:.0f}")

    jobs = 2 if args.small else len(LEARNING)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train_and_judge, method): method for method in LEARNING}
        write_results(futures, report)


def write_pictures(folder, side):
    """A few random pictures, of two classes."""
    for split, count in (("train", 32), ("val", 8)):
        for label in ("dark", "light"):
            place = folder / split / label
            place.mkdir(parents=True)
            for i in range(count):
                image = torch.rand(3, side, side) / 2
                if label == "light":
                    image = image + 0.5
                to_pil_image(image).save(place / f"{i}.png")


def epochs_that_fit(data, options, report, folder):
    """How many epochs of all methods side by side fit into the time that is left, by one epoch of
    each. A minute is kept for judging."""
    started = time.time()

    def train(method):
        words = training_words(method, f"one-epoch-{run_name(method)}", 1) + options
        output, _ = run_script(words, folder, report.seconds_left())
        return float(re.findall(r"(\d+) images/s", output)[-1])

    speeds = []
    with ThreadPoolExecutor(len(LEARNING)) as pool:
        for future in [pool.submit(train, method) for method in LEARNING]:
            try:
                speeds.append(future.result())
            except RuntimeError as error:
                report.write(f"One epoch FAILED: {error}")
    num_images = sum(1 for _ in data.glob("train/*/*.png"))
    epoch_seconds = num_images / min(speeds)
    other_seconds = time.time() - started - epoch_seconds  # start, files, k-NN
    epochs = int((report.seconds_left() - 60 - other_seconds) / epoch_seconds)
    report.write(
        f"One epoch of all side by side takes {epoch_seconds:.1f} s, the rest of a run"
        f" {other_seconds:.0f} s; {report.seconds_left():.0f} s are left."
    )
    return max(1, epochs)


# ======== all parts ========


def run_part(name, args, report, folder):
    """One part, in a process of its own."""
    functions = {"works": works, "search": search, "step": step, "learning": learning}
    try:
        functions[name](args, report, folder)
    except OutOfTime:
        report.write(f"\nThe part {name} is out of time: what is missing was not measured.")
    except Exception as error:
        report.write(f"\nThe part {name} FAILED: {fault(error)}")


def main():
    args = tyro.cli(Args)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.small:
        raise SystemExit("there is no GPU; --small tries this file without one")
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report((args.out / "gpu_check.md").resolve())
    machine = torch.cuda.get_device_name() if on_gpu else "CPU"
    report.write(f"# python {' '.join(sys.argv)}")
    report.write(f"{datetime.now():%Y-%m-%d %H:%M}, {machine}, torch {torch.__version__}")

    patience = 1 if on_gpu else 5  # the limits are those of a GPU
    deadline = time.time() + patience * args.seconds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in args.only:
            seconds = min(patience * getattr(args, f"{name}_seconds"), deadline - time.time())
            report.deadline = time.time() + seconds - 10  # it stops itself before it is killed
            process = multiprocessing.get_context("spawn").Process(
                target=run_part, args=(name, args, report, Path(folder))
            )
            started = time.time()
            process.start()
            process.join(max(0, seconds))
            if process.is_alive():
                process.kill()
                process.join()
                report.write(f"\nThe part {name} was stopped: what is missing was not measured.")
            elif process.exitcode != 0:
                report.write(f"\nThe part {name} FAILED: exit code {process.exitcode}.")
            report.write(f"\nThe part {name} took {time.time() - started:.0f} s.")


if __name__ == "__main__":
    main()
