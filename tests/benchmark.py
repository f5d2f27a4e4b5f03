"""How fast the parts of the scripts are. Run by hand; pytest does not collect it.

    python tests/benchmark.py                          # all of it, on the GPU if there is one
    python tests/benchmark.py --only search views

Functions that are compared take turns in one run; what is printed are medians and their ratio.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torchvision import transforms
from torchvision.datasets.folder import pil_loader

sys.path.insert(0, str(Path(__file__).parent.parent))
import msf  # noqa: E402

PARTS = ("search", "views", "files", "step")


@dataclass
class Args:
    """Time the parts of the scripts."""

    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    only: tuple[Literal["search", "views", "files", "step"], ...] = PARTS  # parts to time
    rounds: int = 9  # turns of each function


def compare(functions, args):
    """Print the median seconds of each function of a dict, and its ratio to the first one's."""
    times = {name: [] for name in functions}
    for _ in range(args.rounds + 1):
        for name, function in functions.items():
            if args.device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            function()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # warm
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"| {name} | {1000 * median:.1f} ms | {median / first:.2f} |", flush=True)


def search(args):
    """Search and loss on a large bank, against the matrix product that they cannot do without."""
    size = 1_024_000 if args.device == "cuda" else 131_072
    bank = F.normalize(torch.randn(size, 512, device=args.device), dim=1)
    targets = F.normalize(torch.randn(256, 512, device=args.device), dim=1)
    queries = targets.clone().requires_grad_()

    def search_and_loss():
        nearest = msf.nearest_neighbors(targets, bank, 5)
        msf.mean_shift_loss(queries, bank[nearest]).backward()

    print(f"\n| search: B 256, D 512, k 5, M {size:,} | median | ratio |\n| --- | --- | --- |")
    functions = {"the product alone": lambda: targets @ bank.T}
    compare(functions | {"search, loss and gradient": search_and_loss}, args)


def views(args):
    """Strong views of 256 images, against torchvision image by image."""
    recipe = msf.RECIPES["cifar10"]
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(32, recipe.crop_scale),
            transforms.RandomHorizontalFlip(recipe.flip),
            transforms.RandomApply([transforms.ColorJitter(*recipe.jitter)], 0.8),
            transforms.RandomGrayscale(recipe.gray),
            transforms.RandomApply([transforms.GaussianBlur(3, (0.1, 2.0))], recipe.blur),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    pictures = [transforms.functional.to_pil_image(image) for image in images]
    images = images.to(args.device)

    def ours():
        msf.strong_view(msf.random_crop(images / 255, recipe), recipe)

    def torchvision():
        torch.stack([pipeline(picture) for picture in pictures])

    print("\n| strong views of 256 images of 32 pixels | median | ratio |\n| --- | --- | --- |")
    compare({"the batch": ours, "torchvision, PIL, image by image": torchvision}, args)


def files(args):
    """Two crops of JPEG files at 224 pixels, on one core, against torchvision's whole views."""
    recipe = replace(msf.RECIPES["imagenet"], num_workers=0)
    weak = [
        transforms.RandomResizedCrop(224, recipe.crop_scale),
        transforms.RandomHorizontalFlip(recipe.flip),
    ]
    strong = [
        transforms.RandomApply([transforms.ColorJitter(*recipe.jitter)], 0.8),
        transforms.RandomGrayscale(recipe.gray),
        transforms.RandomApply([transforms.GaussianBlur(23, (0.1, 2.0))], recipe.blur),
    ]
    end = [
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    weak_view = transforms.Compose([*weak, *end])
    strong_view = transforms.Compose([*weak, *strong, *end])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.jpg" for i in range(32)]
        for path in paths:
            noise = torch.rand(3, 12, 16)
            image = F.interpolate(noise[None], (375, 500), mode="bicubic")[0].clamp(0, 1)
            transforms.functional.to_pil_image(image).save(path, quality=90)
        crops = msf.ImageFiles(paths, recipe, num_crops=2)

        def ours():
            torch.stack([crops[i] for i in range(32)])

        def torchvision():
            for path in paths:
                image = pil_loader(path)
                weak_view(image)
                strong_view(image)

        print("\n| two crops of 32 JPEGs, 500 x 375 to 224 | median | ratio |\n| --- | --- | --- |")
        compare({"a worker": ours, "torchvision, PIL": torchvision}, args)


def step(args):
    """A whole step of training on CIFAR's recipe, against its networks alone."""
    on_gpu = args.device == "cuda"
    recipe = replace(msf.RECIPES["cifar10"], batch_size=256 if on_gpu else 32)
    backbone, width = msf.build_backbone(recipe.arch, recipe.stem)
    model = msf.MSF(backbone, width, recipe.topk, recipe.bank_size, recipe.ema)
    model = model.to(args.device, memory_format=torch.channels_last)
    images = torch.rand(recipe.batch_size, 3, 32, 32, device=args.device)
    labels = torch.zeros(recipe.batch_size, dtype=torch.int64, device=args.device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, 0.05, 0.9, weight_decay=1e-4, fused=on_gpu)
    view = msf.weak_view(images, recipe)
    model.bank.pushed = recipe.bank_size

    def networks():
        with torch.autocast(args.device, torch.bfloat16, enabled=on_gpu):
            queries = model.predictor(model.online(view))
            with torch.no_grad():
                model.target(view)
        queries.float().sum().backward()

    def whole_step():
        weak = msf.weak_view(msf.random_crop(images, recipe), recipe)
        strong = msf.strong_view(msf.random_crop(images, recipe), recipe)
        with torch.autocast(args.device, torch.bfloat16, enabled=on_gpu):
            loss, _ = model(weak, strong, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target()

    print("\n| msf.py, a step of CIFAR's recipe | median | ratio |\n| --- | --- | --- |")
    compare({"networks alone": networks, "the whole step": whole_step}, args)


def main():
    args = tyro.cli(Args)
    for part in args.only:
        {"search": search, "views": views, "files": files, "step": step}[part](args)


if __name__ == "__main__":
    main()
