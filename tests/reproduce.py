"""Do the papers' claims hold? Train every method with several seeds, with its script's own recipe
for the data set, judge each by eval_linear.py, and print one table. Run by hand, not by pytest.

    python tests/reproduce.py --jobs 2                          # digits, 5 seeds
    python tests/reproduce.py --methods msf mnn raw --seeds 3
    python tests/reproduce.py --dataset small-folder --data-dir letters --options="--flip 0"

Each run has a folder of its own, runs/reproduce-..., with what it printed in log.txt. The same
command continues where it was stopped; what is finished and judged is only read. With other
options, choose another --name.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # what is trained: its row in the table, and its command
    "msf": ("MSF", "msf.py"),
    "cmsf-previous-epoch": ("CMSF, previous epoch", "cmsf_ssl.py --constraint previous-epoch"),
    "cmsf-third-view": ("CMSF, third view", "cmsf_ssl.py --constraint third-view"),
    "cmsf-kmeans": ("CMSF, k-means", "cmsf_ssl.py --constraint kmeans"),
    "mnn": ("MNN", "mnn.py"),
    "mnn-one-side": ("MNN, one side", "mnn.py --no-symmetric"),  # as many views a step as MSF
    "cmsf-1pct": ("CMSF, 1% of labels", "cmsf_semi.py --labels 1pct"),
    "cmsf-10pct": ("CMSF, 10% of labels", "cmsf_semi.py --labels 10pct"),
    "cmsf-100pct": ("CMSF, all labels", "cmsf_semi.py --labels 100pct"),
}
BASELINES = {"raw": "raw pixels", "random": "untrained network"}
Method = Literal[
    "raw",
    "random",
    "msf",
    "cmsf-previous-epoch",
    "cmsf-third-view",
    "cmsf-kmeans",
    "mnn",
    "mnn-one-side",
    "cmsf-1pct",
    "cmsf-10pct",
    "cmsf-100pct",
]


@dataclass
class Args:
    """Train and judge methods with several seeds; print the mean and the spread of each."""

    dataset: str = "digits"  # of the scripts' recipes
    data_dir: str = "data"  # folder of the data set
    seeds: int = 5  # seeds 0, 1, ... of each method
    epochs: int | None = None  # of training; None: those of each recipe
    jobs: int = 1  # runs at a time, which share the cores of the CPU
    methods: tuple[Method, ...] = (*BASELINES, *METHODS)  # rows of the table
    options: str = ""  # more options of every training run, in one string: --options="--flip 0"
    name: str = "reproduce"  # with which the names of the runs begin


def run_folder(method, seed, args):
    """The folder of a run, the same whenever the same is asked for."""
    parts = [args.name, args.dataset, method, str(seed)]
    if args.epochs is not None:  # other epochs are another schedule of the learning rate
        parts.insert(2, f"epochs{args.epochs}")
    return Path("runs", "-".join(parts))


def run_script(words, log, args):
    """Run a script, and append what it prints to a file. RuntimeError if it fails."""
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if result.returncode != 0:
        lines = [line for line in log.read_text().splitlines() if re.search(r"\w", line)]
        raise RuntimeError(f"exit code {result.returncode}: {lines[-1]} (see {log})")


def judging_words(folder, seed, args):
    """The command that judges a run."""
    words = ["eval_linear.py", "--checkpoint", str(folder / "last.pt")]
    return [*words, "--data-dir", args.data_dir, "--seed", str(seed)]


def train_and_judge(method, seed, args):
    """Train a method, unless that is done. Returns {"20-NN": percent, "linear": percent, ...} and,
    where there is one, the accuracy of its own "classifier"."""
    folder = run_folder(method, seed, args)
    if not (folder / "eval.json").exists():
        _, command = METHODS[method]
        words = [*command.split(), "--dataset", args.dataset, "--data-dir", args.data_dir]
        words += ["--seed", str(seed), "--run-name", folder.name, *args.options.split()]
        if args.epochs is not None:
            words += ["--epochs", str(args.epochs)]
        # Of the k-NN accuracies, only those before and after training.
        run_script([*words, "--knn-every", "100000"], folder / "log.txt", args)
        run_script(judging_words(folder, seed, args), folder / "judging.txt", args)
    result = json.loads((folder / "eval.json").read_text())["top1"]
    classifier = re.findall(r"classifier accuracy ([\d.]+)%", (folder / "log.txt").read_text())
    if classifier:
        result["classifier"] = float(classifier[-1])
    return result


def judge_baseline(baseline, method, seed, args):
    """Judge raw pixels or an untrained network, with data, size and network of a method's run."""
    folder = run_folder(method, seed, args)
    output = folder / f"eval-{baseline}.json"
    if not output.exists():
        words = [*judging_words(folder, seed, args), "--baseline", baseline]
        run_script(words, folder / f"judging-{baseline}.txt", args)
    return json.loads(output.read_text())["top1"]


def spread(values):
    """Mean, and in brackets the least and the greatest."""
    if not values:
        return ""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def collect(futures, results, faults):
    """Add to results[method] what each future of a dict, future -> (method, seed), returns."""
    for future in as_completed(futures):
        method, seed = futures[future]
        try:
            results[method].append(future.result())
            print(method, seed, json.dumps(future.result()), flush=True)
        except Exception as error:  # the other runs go on
            faults.append(f"{method}, seed {seed}: {error}")
            print(faults[-1], flush=True)


def main(args):
    trained = [method for method in args.methods if method in METHODS]
    baselines = [method for method in args.methods if method in BASELINES]
    if not trained:
        raise SystemExit("--methods: baselines take data and network from a run: add a method")
    results = {method: [] for method in args.methods}
    faults = []
    pool = ThreadPoolExecutor(args.jobs)
    try:
        futures = {}
        for seed in range(args.seeds):
            for method in trained:
                futures[pool.submit(train_and_judge, method, seed, args)] = (method, seed)
        collect(futures, results, faults)
        futures = {}
        for seed in range(args.seeds):
            for baseline in baselines:
                future = pool.submit(judge_baseline, baseline, trained[0], seed, args)
                futures[future] = (baseline, seed)
        collect(futures, results, faults)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, no more runs start

    print("\n| | 20-NN | linear | own classifier |\n| --- | --- | --- | --- |")
    for method in args.methods:
        cells = [BASELINES[method] if method in BASELINES else METHODS[method][0]]
        for column in ("20-NN", "linear", "classifier"):
            cells.append(spread([top1[column] for top1 in results[method] if column in top1]))
        print(f"| {' | '.join(cells)} |")
    if faults:
        raise SystemExit("\n".join(["failed:", *faults]))


if __name__ == "__main__":
    main(tyro.cli(Args))
