"""Several processes, as torchrun starts them, and processes that are killed.

One pair of processes runs `work`, at the end of this file, for all the tests that look at it.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from scripts import (
    METHODS,
    arguments,
    assert_same_state,
    checkpoint,
    labelled_pictures,
    small_backbone,
    small_model,
    tiny,
)

import cmsf_semi
import cmsf_ssl
import msf

ROOT = Path(msf.__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": ROOT}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]


def train_in_eval_mode(script, rank, world_size):
    """Five steps with BatchNorm in eval mode, so that no image depends on another. The state."""
    torch.manual_seed(0)
    model = small_model(script, bank_size=20, num_images=40).eval()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, 0.05, 0.9)
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    for number in range(5):
        torch.manual_seed(number)
        weak, strong = torch.randn(2, 8, 3, 4, 4)
        labels = torch.randint(0, 3, (8,))
        indices = 8 * number + torch.arange(8)
        batch = [part[share] for part in (weak, strong, labels, indices)]
        loss, _ = model(*arguments(script, *batch))
        optimizer.zero_grad()
        loss.backward()
        for weight in weights:  # as DistributedDataParallel does
            if world_size > 1:
                dist.all_reduce(weight.grad)
            weight.grad /= world_size
        optimizer.step()
        model.update_target()
    if script is cmsf_semi:
        model.train_classifier()
    if script is cmsf_ssl:
        model.update_clusters(images_per_cluster=5)
    return model.state_dict()


def run_arguments(script):
    """Two epochs on 16 images; the 15 test images do not divide by two."""
    return tiny(script, run_name=script.__name__, knn_every=1, bank_size=32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes have run `work`. Its file `output` has what they said."""
    folder = tmp_path_factory.mktemp("pair")
    labelled_pictures(folder / "photos")
    (folder / "photos/val/cat/0.jpg").unlink()
    with open(folder / "output", "w") as output:
        options = {"env": ENVIRONMENT, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([*TORCHRUN, "--standalone", __file__], cwd=folder, **options)
        try:
            process.wait(timeout=180)
        finally:
            process.terminate()  # if it hangs
    return folder


@pytest.mark.parametrize("script", METHODS)
def test_two_processes_compute_what_one_does(script, pair):
    expected = train_in_eval_mode(script, 0, 1)
    first = torch.load(pair / f"{script.__name__}-0.pt")
    second = torch.load(pair / f"{script.__name__}-1.pt")
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("script", METHODS)
def test_two_processes_train_and_only_the_first_speaks(script, pair):
    output = (pair / "output").read_text()
    said = output.partition(f"writing to runs/{script.__name__}\n")[2]
    said = said.partition("the recipe for")[0].splitlines()
    assert [line.split("  ")[0] for line in said if " loss " in line] == ["epoch 1/2", "epoch 2/2"]
    assert sum("k-NN accuracy" in line for line in said) == 3
    assert sum("To evaluate this run:" in line for line in said) == 1


@pytest.mark.parametrize("script", METHODS)
def test_one_process_measures_the_same_and_goes_on(script, pair, small_networks):
    """With the bank of the two, and the caches."""
    shutil.copytree(pair, ".", dirs_exist_ok=True)
    args = run_arguments(script)
    result = script.main(args)  # no epoch is left: it is only evaluated
    for rank in range(2):
        measured = torch.load(f"{script.__name__}-result-{rank}.pt")
        assert result == measured | {"loss": pytest.approx(math.nan, nan_ok=True)}

    two = checkpoint(script.__name__)
    script.main(replace(args, epochs=3))
    one = checkpoint(script.__name__)
    assert (two["pushed"], one["pushed"]) == (32, 48)
    old_rows = two["model"]["bank.embeddings"]
    rows = one["model"]["bank.embeddings"]
    assert torch.equal(rows[16:], old_rows[16:])  # the second epoch's
    assert not torch.equal(rows[:16], old_rows[:16])
    if script is cmsf_ssl:  # u' of the third epoch is u of the second
        indices = one["model"]["bank.indices"][:16]
        assert torch.equal(one["model"]["bank.others"][:16], two["model"]["cache"][indices])


# ---- runs of a user's command


def start(script, args, launcher):
    """The script with these arguments, in processes of its own."""
    words = [*launcher, str(ROOT / f"{script.__name__}.py"), "--dataset", args.dataset]
    recipe = script.RECIPES[args.dataset]
    for name, value in vars(args).items():
        if value != getattr(recipe, name):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=ENVIRONMENT, **pipes)


def kill_all(process):
    """Kill a process and, before it, what it has started: torchrun's processes outlive it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in map(int, children):
        os.kill(pid, signal.SIGKILL)
    process.kill()


@pytest.mark.long
@pytest.mark.parametrize("launcher", [[sys.executable], [*TORCHRUN, "--standalone"]])
@pytest.mark.parametrize("script", METHODS)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(script, launcher):
    labelled_pictures(each=64)
    args = tiny(script, epochs=20)
    for kill in range(6):
        process = start(script, args, launcher)
        for line in process.stdout:
            epoch = re.match(r"epoch (\d+)/20 .* loss", line)
            if epoch and int(epoch[1]) >= 3 * kill + 2:
                break
        delay = torch.rand(()).item()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            kill_all(process)
        process.communicate()
        assert 1 <= checkpoint()["epoch"] < 20
    for given in (args, replace(args, run_name="whole")):
        output, _ = start(script, given, launcher).communicate()
        assert "To evaluate this run:" in output, output
    assert_same_state(checkpoint("whole"), checkpoint())


@pytest.mark.long
@pytest.mark.parametrize("script", METHODS)
def test_two_nodes_train(script):
    """README's command for two nodes, on the loopback device: four processes."""
    labelled_pictures()
    rendezvous = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29517"]
    args = tiny(script)
    nodes = [start(script, args, [*TORCHRUN, *rendezvous]) for _ in range(2)]
    outputs = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    (said,) = [output for output in outputs if "training on" in output]
    assert "training on 4 x cpu, writing to runs/a" in said
    assert checkpoint()["epoch"] == 2 and checkpoint()["pushed"] == 32


def nothing(*given, **options):
    pass


def work():
    """In each of two processes: a run of every script, and the steps. The first run joins the
    processes, and they stay joined."""
    rank = int(os.environ["RANK"])
    dist.destroy_process_group = nothing
    for script in METHODS:
        script.build_backbone = small_backbone
        result = script.main(run_arguments(script))
        torch.save(result, f"{script.__name__}-result-{rank}.pt")
        torch.save(train_in_eval_mode(script, rank, 2), f"{script.__name__}-{rank}.pt")
        dist.init_process_group = nothing


if __name__ == "__main__":
    work()
