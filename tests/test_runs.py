"""Whole runs: what they return and write, exact resume, signals, several processes."""

import dataclasses
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from conftest import ROOT, as_torchrun, check_pictures, first_of_twelve, stop_at

import cmsf_semi
import cmsf_ssl
import eval_linear
import mnn
import msf

SHORT = dict(epochs=2, warmup_epochs=0.5, knn_every=1)


def load(name):
    return torch.load(Path("runs", name, "last.pt"), weights_only=True)


def flat(value, name=""):
    """Every leaf of nested dicts and lists, by its path."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{name}/{key}").items()}
    return {name: value}


def assert_same_state(a, b):
    a, b = (flat({key: run[key] for key in ("model", "optimizer", "step", "pushed")}) for run in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        equal = torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]
        assert equal, name


def start(*words, processes=1):
    command = [sys.executable, str(ROOT / "msf.py"), *words]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        command[1:1] = [*launcher, f"--nproc_per_node={processes}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_leaves_what_it_promises():
    result = msf.main(msf.Args(run_name="a", **SHORT))
    assert result["knn"] > 70 and 0 < result["loss"] < 1
    assert result["checkpoint"] == "runs/a/last.pt"
    run = load("a")
    assert run["step"] == 2 * (1437 // 64)
    assert run["args"]["lr"] == 0.1 and run["args"]["epochs"] == 2  # the recipe, and what was given
    assert run["model"]["bank.embeddings"].shape == (1024, 128)
    norms = run["model"]["bank.embeddings"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(1024))

    backbone, _ = msf.encoder("resnet10", "small-stride")
    backbone.load_state_dict(torch.load("runs/a/backbone.pt", weights_only=True), strict=True)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    events = EventAccumulator("runs/a").Reload()
    tags = {"loss", "purity", "similarity_target", "similarity_neighbors", "spread", "lr", "img_per_s", "knn"}
    assert tags <= set(events.Tags()["scalars"])
    assert events.Scalars("knn")[-1].value == pytest.approx(result["knn"])
    written = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    written = plugin_data_pb2.HParamsPluginData.FromString(written).session_start_info.hparams
    assert written["lr"].number_value == 0.1 and written["arch"].string_value == "resnet10"
    assert written.keys() == run["args"].keys()

    args, _ = msf.resolve(msf.Args(run_name="b"))
    data, model = msf.ImageData(args, True, torch.device("cpu")), msf.MSF(args)
    model.load_state_dict(run["model"])
    shown = first_of_twelve(list(range(1437)))
    with torch.no_grad():
        targets = F.normalize(model.target.eval()(msf.augment(data.images[shown], 16)), dim=1)
    order = (targets.double() @ model.bank.embeddings.double().T).argsort(1, descending=True)[:, :5]
    rows = [[i, *model.bank.indices[best].tolist()] for i, best in zip(shown, order)]
    check_pictures("runs/a", [22, 44], data.images, data.labels, rows)

    judged = eval_linear.main(eval_linear.Args(checkpoint="runs/a/last.pt", epochs=3))
    assert judged["20-NN"] == pytest.approx(result["knn"], abs=0.3)
    assert judged["linear"] > 60 and Path("runs/a/eval.json").exists()


def test_resume_continues_bit_for_bit(monkeypatch):
    given = dict(epochs=2, warmup_epochs=0.5, bank_size=100)
    msf.main(msf.Args(run_name="whole", **given))
    stop_at(27, msf, monkeypatch)
    with pytest.raises(SystemExit, match="stopped at step 30; continue with --resume runs/parts/last.pt"):
        msf.main(msf.Args(run_name="parts", **given))
    assert load("parts")["step"] == 30
    result = msf.main(msf.Args(resume="runs/parts/last.pt"))
    assert result["checkpoint"] == "runs/parts/last.pt"
    assert_same_state(load("whole"), load("parts"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes_within_the_epoch(number):
    process = start("--run-name", "a", "--epochs", "1", "--log-every", "1")
    while " step 5 " not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(number)
    if number == signal.SIGTERM:  # by the scheduler and by torchrun, say: the second is no harm
        time.sleep(0.01)
        process.send_signal(number)
    began = time.time()
    _, errors = process.communicate(timeout=60)
    assert time.time() - began < 10
    assert process.returncode == 1 and "Traceback" not in errors
    stopped = re.search(r"stopped at step (\d+); continue with --resume (\S+)", errors)
    assert int(stopped[1]) == load("a")["step"] < 22
    msf.main(msf.Args(resume=stopped[2]))
    msf.main(msf.Args(run_name="b", epochs=1, log_every=1))
    assert_same_state(load("a"), load("b"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint():
    msf.main(msf.Args(run_name="a", epochs=1, warmup_epochs=0))
    before = Path("runs/a/last.pt").read_bytes()
    with pytest.raises(SystemExit, match=r"loss nan at step \d+, lr .*runs/a/last.pt"):
        msf.main(msf.Args(resume="runs/a/last.pt", lr=1e30, epochs=2))
    assert Path("runs/a/last.pt").read_bytes() == before


def test_what_is_given_on_resume_wins_over_the_checkpoint():
    msf.main(msf.Args(run_name="a", epochs=1, knn_every=7, num_workers=3))
    msf.main(msf.Args(resume="runs/a/last.pt", weight_decay=0.25, epochs=2))
    run = load("a")
    assert run["optimizer"]["param_groups"][0]["weight_decay"] == run["args"]["weight_decay"] == 0.25
    assert run["args"]["knn_every"] == 7 and run["step"] == 2 * 22
    assert run["args"]["num_workers"] == msf.Args().num_workers  # of the machine that resumes


def test_a_checkpoint_of_other_sizes_is_refused():
    msf.main(msf.Args(run_name="a", epochs=1))
    before = Path("runs/a/last.pt").read_bytes()
    for given in dict(bank_size=2048), dict(arch="resnet18"):
        with pytest.raises(SystemExit, match="^error: runs/a/last.pt fits other data, --arch[^\n]*$"):
            msf.main(msf.Args(resume="runs/a/last.pt", epochs=2, **given))
    with pytest.raises(SystemExit, match="^error: cannot resume from runs/a/last.pt: [^\n]*another script"):
        cmsf_ssl.main(cmsf_ssl.Args(resume="runs/a/last.pt", epochs=2))
    assert Path("runs/a/last.pt").read_bytes() == before


def test_torchrun_stopped_by_a_signal_keeps_the_checkpoint():
    """Two processes with workers that decode files; the launcher passes SIGTERM on to all of them."""
    from test_faults import write_folder

    write_folder("d", side=100)
    words = "--dataset folder --data-dir d --image-size 96 --arch resnet10 --stem small-stride"
    words += " --batch-size 8 --bank-size 16 --num-workers 1 --epochs 5000 --log-every 1 --run-name a"
    process = start(*words.split(), processes=2)
    while " step 3 " not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0 and "Warning" not in errors.replace("OMP_NUM_THREADS", "")
    step = int(re.search(r"stopped at step (\d+)", errors)[1])
    assert load("a")["step"] == step >= 3


def test_a_signal_at_the_end_does_not_undo_a_finished_run(monkeypatch):
    stop_at(22, msf, monkeypatch)
    result = msf.main(msf.Args(run_name="a", epochs=1, log_every=0, knn_every=0))
    assert load("a")["step"] == 22 and result["knn"] > 70


def test_the_order_of_images():
    args = msf.Args(batch_size=4, epochs=3, seed=5)
    for world in (1, 2):
        ranks = [list(msf.step_indices(11, args, 0, rank, world)) for rank in range(world)]
        steps = [torch.cat(parts) for parts in zip(*ranks)]
        assert [len(step) for step in steps] == [4] * 6
        epochs = [torch.cat(steps[i : i + 2]).tolist() for i in (0, 2, 4)]
        assert all(len(set(epoch)) == 8 and set(epoch) <= set(range(11)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
        whole = steps if world == 1 else whole
        assert all(torch.equal(a, b) for a, b in zip(whole, steps))  # the same batches for any world
        rest = list(msf.step_indices(11, args, 3, 0, world))
        assert all(torch.equal(a, b) for a, b in zip(rest, ranks[0][3:]))


def train_in_eval_mode(rank, world, folder):
    """Five steps on fixed images; BatchNorm in eval mode, so that images do not depend on others."""
    if world > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    args, _ = msf.resolve(msf.Args(batch_size=8, bank_size=20, topk=3))
    model = msf.MSF(args).eval()
    network = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    losses, share = [], slice(rank * 8 // world, (rank + 1) * 8 // world)
    for step in range(5):
        weak, strong = torch.rand(2, 8, 3, 16, 16)
        labels, indices = torch.randint(0, 3, (8,)), torch.arange(8) + 8 * step
        batch = (x[share] for x in (weak, strong, labels, indices))
        weak, strong, labels, indices = batch
        loss, _ = network([weak, strong], labels, indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    state = dict(losses=torch.stack(losses), model=model.state_dict())
    torch.save(state, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_compute_what_one_does(one_and_two, tmp_path):
    one_and_two(train_in_eval_mode)
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, one["losses"])
    assert torch.equal(first["model"]["bank.indices"], one["model"]["bank.indices"])
    assert torch.equal(first["model"]["bank.labels"], one["model"]["bank.labels"])
    for name, value in first["model"].items():
        torch.testing.assert_close(value, one["model"][name], atol=1e-5, rtol=1e-4)


def train_and_keep(rank, world, folder):
    """main as torchrun starts it; every process writes down its model."""
    as_torchrun(rank, world, 29531)
    models, build = [], msf.MSF
    msf.MSF = lambda args: models.append(build(args)) or models[0]
    msf.main(msf.Args(run_name="two", epochs=1))
    msf.MSF = build
    torch.save(models[0].state_dict(), f"rank{rank}.pt")


def test_processes_stay_in_step(one_and_two):
    one_and_two(train_and_keep, alone=False)
    first, second = (torch.load(f"rank{rank}.pt") for rank in range(2))
    assert first["bank.indices"].unique().numel() == 1024
    for name, value in first.items():  # BatchNorm's running statistics are each process's own
        assert torch.equal(value, second[name]) or "running" in name, name


@pytest.mark.parametrize("script", [msf, cmsf_ssl, cmsf_semi, mnn, eval_linear])
def test_help_has_a_sentence_for_every_argument(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        tyro.cli(script.Args, args=["--help"])
    words = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().out)
    for field in dataclasses.fields(script.Args):
        option = re.search(rf"--{field.name.replace('_', '-')}[ ,](.*?)\((default:|required)", words)
        assert option and re.search(r"[A-Z][a-z0-9].{8,}\.$|[a-z, ]{20,}\.$", option[1].strip()), field.name
