"""Do the papers' claims hold? Train every method with several seeds, judge each, print one table.

All methods get one recipe: that of msf.py for digits or for CIFAR, with the same epochs, batch, learning rate and
views. What a method's paper gives for itself (k, the bank's rows, the candidates) stays. Nothing is tuned.

    $ python tests/reproduce.py                                             digits, 5 seeds
    $ python tests/reproduce.py --dataset folder --data-dir DIR --seeds 3   32-pixel images, ResNet-18, 200 epochs

Each run has a folder in runs/. The same command goes on where it was stopped; a run that was stopped while it was being
judged has to be removed first, and the seconds of one that went on are those since then. Run by hand, not by pytest.
"""

import concurrent.futures
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
DIGITS = "--batch-size 64 --lr 0.1 --weight-decay 5e-4 --warmup-epochs 5"
SMALL = (  # for pictures that must not be mirrored, such as letters
    "--arch resnet18 --stem small --image-size 32 --flip 0 --rotation 10 --batch-size 256 --lr 0.06 "
    "--weight-decay 5e-4 --warmup-epochs 5 --bank-size 4096"
)
METHODS = {  # name -> script and arguments; digits' own recipes differ in what stands in DIGITS, and in mnn.py's k
    "MSF": "msf",
    "CMSF, previous epoch": "cmsf_ssl --constraint previous-epoch",
    "CMSF, third view": "cmsf_ssl --constraint third-view",
    "CMSF, k-means": "cmsf_ssl --constraint kmeans",
    "MNN": "mnn --topk 5 --bn-splits 1",
    "MNN, one side": "mnn --topk 5 --bn-splits 1 --no-symmetric",  # as many views a step as MSF
    "CMSF, 1% of labels": "cmsf_semi --labels 1pct",
    "CMSF, 10% of labels": "cmsf_semi --labels 10pct",
    "CMSF, all labels": "cmsf_semi --labels 100pct",
    "raw pixels": "eval_linear --baseline raw",
    "untrained network": "eval_linear --baseline random",
}
JUDGES = ("1-NN", "20-NN", "200-NN", "linear")


@dataclasses.dataclass
class Args:
    """Train and judge all methods with several seeds; print the mean and the spread of each."""

    dataset: str = "digits"  # digits, or folder: small images in train/CLASS/*.png, val/CLASS/*.png.
    data_dir: str = "data"  # Where the folder lies.
    seeds: int = 5  # Seeds 0, 1, ... of each method.
    epochs: int | None = None  # Epochs of training of every method; None: digits 40, folder 200.
    jobs: int = 1  # Runs at a time, which share the cores of the CPU.


def call(words, args):
    """Run a script; (what it printed, seconds). Its words are seen if it fails."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // args.jobs))
    start = time.time()
    result = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], capture_output=True, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS=threads))
    if result.returncode:
        raise SystemExit(f"{' '.join(words)}: {result.stdout[-1000:]}{result.stderr[-1000:]}")
    return result.stdout, time.time() - start


def train_and_judge(method, seed, args):
    """{judge: percent} and, if it was trained, "seconds" and perhaps "classifier"."""
    script, *words = METHODS[method].split()
    data = ["--dataset", args.dataset, "--data-dir", args.data_dir, "--seed", str(seed)]
    small = SMALL.split() if args.dataset == "folder" else []
    if script == "eval_linear":
        call([f"{script}.py", *words, *data, *small[:6]], args)
        return json.loads(Path(f"runs/{words[1]}-{args.dataset}-{seed}/eval.json").read_text())["top1"]
    name = f"reproduce-{args.dataset}-{re.sub('[^a-z0-9]+', '-', method.lower())}-{seed}"
    known = Path("runs", name, "reproduce.json")
    if known.exists():
        return json.loads(known.read_text())
    heads = ["--hidden", "1024"] if script == "mnn" else []  # as wide as the other methods' on these networks
    epochs = args.epochs or (200 if small else 40)
    command = [f"{script}.py", *words, *heads, *data, *(small or DIGITS.split()), "--epochs", str(epochs)]
    output, seconds = call([*command, "--run-name", name, "--knn-every", "1000"], args)
    call(["eval_linear.py", "--checkpoint", f"runs/{name}/last.pt", "--data-dir", args.data_dir], args)
    result = json.loads(Path("runs", name, "eval.json").read_text())["top1"] | dict(seconds=seconds)
    found = re.findall(r"classifier accuracy ([\d.]+)", output)
    result |= dict(classifier=float(found[-1])) if found else {}
    known.write_text(json.dumps(result))
    return result


def spread(values):
    """Mean, and in brackets the least and the greatest."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def main(args):
    if args.dataset not in ("digits", "folder"):
        raise SystemExit(f"error: --dataset {args.dataset}: digits or folder")
    results = {method: [] for method in METHODS}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(train_and_judge, method, seed, args): (method, seed)
                for seed in range(args.seeds) for method in METHODS}
        for run in concurrent.futures.as_completed(runs):
            results[runs[run][0]].append(run.result())
            print(*runs[run], json.dumps(run.result()), flush=True)
    print(f"\n| | {' | '.join(JUDGES)} | own classifier | seconds |\n|{' --- |' * 7}")
    for method, rows in results.items():
        cells = [spread([row[judge] for row in rows if judge in row]) for judge in (*JUDGES, "classifier")]
        seconds = [row["seconds"] for row in rows if "seconds" in row]
        print(f"| {method} | {' | '.join(cells)} | {f'{statistics.mean(seconds):.0f}' if seconds else ''} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
