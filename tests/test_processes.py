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
import time
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
    data_of,
    labelled_pictures,
    small_backbone,
    small_model,
    tiny,
)
from torch.nn.parallel import DistributedDataParallel

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
    parallel_model = model
    if world_size > 1:
        parallel_model = DistributedDataParallel(model)
        parallel_model.broadcast_buffers = False
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, 0.05, 0.9)
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    for number in range(5):
        torch.manual_seed(number)
        weak, strong = torch.randn(2, 8, 3, 4, 4)
        labels = torch.randint(0, 3, (8,))
        indices = 8 * number + torch.arange(8)
        batch = [part[share] for part in (weak, strong, labels, indices)]
        loss, _ = parallel_model(*arguments(script, *batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target()
    if script is cmsf_semi:
        model.train_classifier()
    if script is cmsf_ssl:
        model.update_clusters(images_per_cluster=5)
    return model.state_dict()


def embed_in_shares(rank, world_size):
    """Embeddings of 5 of 9 images. Each process has its own BatchNorm statistics."""
    torch.manual_seed(0)
    backbone, _ = small_backbone()
    backbone[1].running_mean.fill_(rank)
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    chosen = torch.tensor([8, 1, 4, 0, 6])
    return msf.embed(backbone, data_of(images, [0] * 9), chosen, rank, world_size)


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


def test_two_processes_embed_as_the_first_does_alone(pair):
    expected = embed_in_shares(0, 1)
    for rank in range(2):
        torch.testing.assert_close(torch.load(pair / f"embedded-{rank}.pt"), expected)


def test_only_the_first_of_two_processes_speaks(pair):
    """For each of the four scripts, of two epochs."""
    output = (pair / "output").read_text()
    assert output.count("reading 16 image files") == 4
    assert output.count("writing to runs/") == 4
    assert output.count("  loss ") == 4 * 2
    assert output.count("k-NN accuracy") == 4 * 3
    assert output.count("To evaluate this run:") == 4


@pytest.mark.parametrize("script", METHODS)
def test_one_process_measures_what_two_do_and_goes_on(script, pair, small_networks):
    shutil.copytree(pair, ".", dirs_exist_ok=True)
    args = run_arguments(script)
    result = script.main(args)  # no epoch is left: it is only evaluated
    for rank in range(2):
        measured = torch.load(f"{script.__name__}-result-{rank}.pt")
        assert result == measured | {"loss": pytest.approx(math.nan, nan_ok=True)}
    script.main(replace(args, epochs=3))
    assert checkpoint(script.__name__)["pushed"] == 3 * 16


# ---- runs of a user's command


WORDS = "--dataset digits --batch-size 256 --topk 5 --epochs 20 --run-name"  # 100 steps


def start(script, launcher, name):
    """A run of 20 epochs, in processes of its own."""
    command = [*launcher, ROOT / f"{script.__name__}.py", *WORDS.split(), name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, **pipes)


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
    for kill in range(6):
        process = start(script, launcher, "a")
        for line in process.stdout:
            epoch = re.match(r"epoch (\d+)/20 .* loss", line)
            if epoch and int(epoch[1]) >= 3 * kill + 2:
                break
        time.sleep(torch.rand(()).item())
        kill_all(process)
        process.communicate()
        assert 1 <= checkpoint()["epoch"] < 20
    for name in ("a", "whole"):
        output, _ = start(script, launcher, name).communicate()
        assert "To evaluate this run:" in output, output
    assert_same_state(checkpoint("whole"), checkpoint())


@pytest.mark.long
@pytest.mark.parametrize("script", METHODS)
def test_two_nodes_train(script):
    """README's command for two nodes, on the loopback device: four processes."""
    rendezvous = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29517"]
    nodes = [start(script, [*TORCHRUN, *rendezvous], "a") for _ in range(2)]
    outputs = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "training on 4 x cpu, writing to runs/a" in outputs[0] + outputs[1]
    assert checkpoint()["pushed"] == 100 * 256


def work():
    """In each of two processes: a run of every script, and the steps. The first run joins the
    processes, and they stay joined."""
    rank = int(os.environ["RANK"])
    dist.destroy_process_group = lambda *given, **options: None
    for script in METHODS:
        script.build_backbone = small_backbone
        result = script.main(run_arguments(script))
        torch.save(result, f"{script.__name__}-result-{rank}.pt")
        torch.save(train_in_eval_mode(script, rank, 2), f"{script.__name__}-{rank}.pt")
        dist.init_process_group = lambda *given, **options: None
    torch.save(embed_in_shares(rank, 2), f"embedded-{rank}.pt")


if __name__ == "__main__":
    work()
