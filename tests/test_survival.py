"""Runs that are killed, stopped, starved of disk or fed with nonsense: nothing is lost or corrupted.

The long versions: python -m pytest -m long
"""

import dataclasses
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, as_torchrun
from hypothesis import HealthCheck, given, settings, strategies
from PIL import Image
from test_faults import TINY, write_folder
from test_runs import assert_same_state, load

import cmsf_semi
import cmsf_ssl
import eval_linear
import mnn
import msf

SCRIPTS = (msf, cmsf_ssl, cmsf_semi, mnn)
OFTEN = ["--log-every", "1", "--checkpoint-every-minutes", "0"]  # a checkpoint every step
SHORT = ["--epochs", "1", "--knn-every", "0", "--batch-size", "64"]  # 22 steps

# A server that has imported everything forks one process a run, as each import takes seconds.
SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.utils.tensorboard", "torchvision", "sklearn.datasets", "tyro"])


def as_main(script, words, folder, log):
    """What `python script words` does, with one thread and its output in a file."""
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")


class Run:
    """A script in a process of its own; with processes=2, torchrun and two more, restarted so many times."""

    def __init__(self, script, *words, processes=0, restarts=0):
        self.log = Path(f"log-{time.time_ns()}").absolute()
        self.log.touch()
        if processes:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
            command = [sys.executable, *launcher, f"--nproc_per_node={processes}", str(ROOT / script), *words]
            environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
            with self.log.open("w") as file:
                self.process = subprocess.Popen(
                    command, stdout=file, stderr=file, env=environment, start_new_session=True)
        else:
            self.process = SERVER.Process(target=as_main, args=(script, words, os.getcwd(), str(self.log)))
            self.process.start()

    def wait_for(self, text, limit=60):
        end = time.time() + limit
        while text not in self.log.read_text():
            assert time.time() < end and self.code() is None, self.log.read_text()
            time.sleep(0.005)

    def code(self):
        """Exit status; None while it runs."""
        return self.process.poll() if hasattr(self.process, "poll") else self.process.exitcode

    def end(self, limit=120):
        """Wait for the end; (exit status, what it printed)."""
        end = time.time() + limit
        while self.code() is None:
            assert time.time() < end, "it hangs: " + self.log.read_text()
            time.sleep(0.02)
        return self.code(), self.log.read_text()

    def workers(self):
        """Process ids of what torchrun has started."""
        pid = self.process.pid
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# ---- killed -------------------------------------------------------------------------------------
def survive(script, kills, words):
    """Kill a run so many times at random moments, let it end, and compare it with one that nobody
    disturbed. Returns how many kills came while a checkpoint was being written."""
    chance, during = random.Random(0), 0
    command = ["--run-name", "killed", "--resume", "auto", *OFTEN, *words]
    for _ in range(kills):
        run = Run(script, *command)
        run.wait_for(" step ")  # the first log point
        time.sleep(chance.uniform(0, 0.4))
        run.process.kill()
        run.end()
        during += Path("runs/killed/last.tmp").exists() or Path("runs/killed/backbone.tmp").exists()
        load("killed")  # whatever happened, it loads
    for name, given in ("killed", command), ("whole", ["--run-name", "whole", *OFTEN, *words]):
        code, output = Run(script, *given).end(600)
        assert code == 0 and "eval_linear.py --checkpoint" in output, output
    torch.load("runs/killed/backbone.pt", weights_only=True)
    assert_same_state(load("whole"), load("killed"))
    return during


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened():
    survive("msf.py", 5, ["--epochs", "2", *SHORT[2:]])


@pytest.mark.long
@pytest.mark.parametrize("script", ["msf.py", "cmsf_ssl.py", "cmsf_semi.py", "mnn.py"])
def test_fifty_kills(script):
    during = survive(script, 50, ["--epochs", "20", *SHORT[2:]])
    print(f"{script}: {during} of 50 kills came while a checkpoint was being written")
    assert during > 0


def test_auto_starts_anew_where_there_is_no_checkpoint_and_goes_on_where_there_is_one():
    result = msf.main(msf.Args(resume="auto", epochs=1))
    last, half = Path(result["checkpoint"]), Path("runs/msf-digits-0/last.tmp")
    half.write_bytes(last.read_bytes()[:1000])  # as if killed while it was written
    msf.main(msf.Args(resume="auto", epochs=2))
    assert load("msf-digits-0")["step"] == 44 and not half.exists()
    with pytest.raises(SystemExit, match="all 44 steps are done"):
        msf.main(msf.Args(resume="auto", epochs=2))


def train_whole(rank, world, folder):
    """What nobody disturbs, on two processes."""
    as_torchrun(rank, world, 29542)
    msf.main(msf.Args(run_name="whole", epochs=1, knn_every=0))


def test_torchrun_restarts_a_run_whose_process_was_killed(one_and_two):
    """The other process does not wait for the dead one for ever, and the end is that of a whole run."""
    one_and_two(train_whole, alone=False)
    words = ["--run-name", "a", "--resume", "auto", "--epochs", "1", "--knn-every", "0", *OFTEN]
    run = Run("msf.py", *words, processes=2, restarts=2)
    run.wait_for(" step 5 ")
    killed = run.workers()[0]  # the one that writes the checkpoints
    os.kill(killed, signal.SIGKILL)
    code, output = run.end()
    assert code == 0 and re.search(rf"exitcode.*-9.*pid: {killed}", output), output
    starts = re.findall(r"2 x cpu, 1437 images, steps (\d+) to 22", output)
    assert starts[0] == "0" and int(starts[1]) >= 4
    assert re.search(r"20-NN \d\d\.\d\d%: python eval_linear.py --checkpoint runs/a/last.pt", output)
    assert output.count("20-NN") == 1
    assert_same_state(load("whole"), load("a"))


# ---- stopped ------------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.parametrize("script, number", [("cmsf_semi.py", signal.SIGINT), ("mnn.py", signal.SIGTERM)])
def test_a_signal_to_all_processes_saves_and_says_so(script, number):
    """As a terminal or a scheduler sends it: to torchrun and its workers at once."""
    run = Run(script, "--epochs", "500", "--run-name", "a", processes=2)
    run.wait_for(" step 10 ")
    os.killpg(run.process.pid, number)
    code, output = run.end(10)
    stopped = re.search(r"stopped at step (\d+); continue with --resume runs/a/last.pt", output)
    assert code != 0 and load("a")["step"] == int(stopped[1]) >= 10


def continue_for_an_epoch(rank, world, folder):
    """One more epoch of cmsf_ssl.py on so many processes; its bank and cache before and after."""
    if world > 1:
        as_torchrun(rank, world, 29541)
    before = cmsf_ssl.Args(run_name="a", resume="auto")
    epochs = 1 if not Path("runs/a/last.pt").exists() else load("a")["step"] // 22 + 1
    cmsf_ssl.main(dataclasses.replace(before, epochs=epochs, bank_size=3000, knn_every=100))
    if rank == 0:
        shutil.copy("runs/a/last.pt", f"runs/{epochs}-{world}.pt")


def test_another_number_of_processes_goes_on_with_the_same_bank_and_cache(one_and_two):
    one_and_two(continue_for_an_epoch)  # two processes, then one
    one_and_two(continue_for_an_epoch, alone=False)
    names = ("runs/1-2.pt", "runs/2-1.pt", "runs/3-2.pt")
    states = [torch.load(name, weights_only=True) for name in names]
    for number, state in enumerate(states, 1):
        assert state["step"] == 22 * number and state["pushed"] == 1408 * number
        assert state["optimizer"]["state"]
    first, second, third = (state["model"] for state in states)
    kept, again = slice(0, 1408), slice(1224, 2816)  # rows of the epoch before that still stand
    for name in ("bank.embeddings", "bank.labels", "bank.indices"):
        assert torch.equal(first[name][kept], second[name][kept])
        assert torch.equal(second[name][again], third[name][again])
    width = first["cache"].shape[1]
    own = second["bank.embeddings"][1408:2816]  # of the second epoch: u, and u' of the first
    images = second["bank.indices"][1408:2816]
    seen = first["cache"][images].any(1)
    assert seen.float().mean() > 0.9
    assert torch.equal(own[seen, width:], first["cache"][images][seen])


# ---- the disk -----------------------------------------------------------------------------------
def disk_full():
    os.symlink("/dev/full", "runs/a/last.tmp")


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint():
    run = Run("msf.py", "--epochs", "500", "--run-name", "a", "--checkpoint-every-minutes", "0.0001")
    run.wait_for(" step 10 ")
    time.sleep(0.3)  # the checkpoint of this step is written
    disk_full()
    code, output = run.end()
    assert code == 1 and "Traceback" not in output
    assert re.search(r"^error: .*No space left.*; the last checkpoint, if any, is whole$", output, re.M)
    assert load("a")["step"] >= 10


def test_a_run_folder_that_is_removed_ends_the_run_with_one_line():
    """TensorBoard's own thread may print what it thinks of it before that."""
    run = Run("msf.py", "--epochs", "500", "--run-name", "a", *OFTEN)
    run.wait_for(" step 3 ")
    while Path("runs/a").exists():  # it may write a file while others are being removed
        shutil.rmtree("runs/a", ignore_errors=True)
    code, output = run.end(60)
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert re.fullmatch("error: .*runs/a.*; the last checkpoint, if any, is whole", last), output


def test_a_folder_that_cannot_be_written_is_one_line():
    Path("runs").write_text("a file, so that no folder can be made here")
    code, output = Run("cmsf_semi.py", "--epochs", "1").end()
    assert code == 1 and re.search(r"^error: .*runs", output, re.M) and "Traceback" not in output


# ---- data ---------------------------------------------------------------------------------------
def one_class():
    write_folder("d", classes=("cat",))


def one_image():
    write_folder("d", classes=("cat",), each=1)


def tiny_images():
    write_folder("d")
    for path in Path("d").rglob("*.png"):
        Image.new("RGB", (1, 1), "red").save(path)


def wide_image():
    write_folder("d")
    Image.effect_noise((12_000, 40), 50).save("d/train/cat/wide.png")


def links_and_names():
    write_folder("d", classes=("cat", "żółw 龜"))
    Path("d/train/żółw 龜").rename("elsewhere")
    os.symlink(Path("elsewhere").absolute(), "d/train/żółw 龜")
    os.symlink(Path("d/val/cat/0.png").absolute(), "d/train/cat/ß link.png")


def missing_in_val():
    write_folder("d")
    shutil.rmtree("d/val/cat")


def dangling_link():
    write_folder("d")
    os.symlink("nowhere.png", "d/train/cat/dangling.png")


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("make, message", [
    (one_class, None), (one_image, "there are 1 training images"), (tiny_images, None), (wide_image, None),
    (links_and_names, None), (missing_in_val, "only one of train and val: cat"),
    (dangling_link, "cannot read .*train/cat/dangling.png"),
])
def test_odd_data_works_or_is_one_line(make, message, size):
    make()
    args = msf.Args(run_name="a", epochs=1, image_size=size, num_workers=2, **TINY)
    if message is None:
        assert math.isfinite(msf.main(args)["loss"])
        return
    with pytest.raises(SystemExit, match=f"^error: .*{message}[^\n]*$"):
        msf.main(args)


# ---- arguments ----------------------------------------------------------------------------------
class Started(Exception):
    """Training would begin now."""


class NoWriter:
    """In SummaryWriter's place: that one's thread may still write when a test removes its folder."""

    def __init__(self, folder, **_):
        Path(folder).mkdir(parents=True)
        self.file_writer = self

    def add_summary(self, *_):
        pass


@pytest.fixture
def no_training(monkeypatch):
    def begin(*given):
        raise Started

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", NoWriter)
    for script in SCRIPTS:
        monkeypatch.setattr(script, "step_indices", begin)
        script.digits = {}  # the data set is loaded once
        load_data = script.ImageData

        def image_data(args, train, device, script=script, load_data=load_data):
            script.digits[train] = script.digits.get(train) or load_data(args, train, device)
            script.digits[train].labels = script.digits[train].labels.clone()
            return script.digits[train]

        monkeypatch.setattr(script, "ImageData", image_data)


WHOLE = {"num_workers", "image_size", "epochs", "batch_size", "seed", "log_every", "knn_every", "topk", "bank_size",
         "label_seed", "num_candidates", "num_clusters", "hidden", "bn_splits"}


def numbers(script):
    """Name -> kind of every argument that takes numbers."""
    recipe = script.resolve(script.Args())[0]
    kinds = (int, float, tuple)
    return {name: value for name, value in vars(recipe).items()
            if isinstance(value, kinds) and not isinstance(value, bool)} | (
        dict(lam=0.5) if script is mnn else {})


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_that_make_no_sense_are_one_line_before_anything_is_written(script, no_training):
    accepted = []
    for name, value in numbers(script).items():
        for bad in (0, -1, 10**12, math.nan, math.inf, -math.inf, 1e-30):
            if isinstance(value, int) and name in WHOLE and not isinstance(bad, int):
                continue  # the command line takes whole numbers only
            number = tuple(bad for _ in value) if isinstance(value, tuple) else bad
            shutil.rmtree("runs", ignore_errors=True)
            try:
                script.main(script.Args(**{name: number}))
            except Started:
                accepted.append((name, bad))
            except SystemExit as error:
                assert re.fullmatch(r"error: [^\n]*", str(error)), (name, bad, error)
                assert not Path("runs").exists(), (name, bad)
    refused = {(name, bad) for name in numbers(script) for bad in (-1, math.inf, -math.inf)}
    assert not refused & set(accepted) and not any(bad != bad for _, bad in accepted)
    assert {("lr", 0), ("seed", 0), ("knn_every", 0)} <= set(accepted)


def values(field):
    """Anything that a field could hold, sensible or not."""
    text = strategies.text(max_size=20) | strategies.sampled_from(
        ["digits", "folder", "auto", "random", "1pct", "../x", "resnet18", "small", "\0", "x" * 300])
    number = strategies.floats() | strategies.integers(-(2**70), 2**70) | strategies.integers(-2, 300)
    if "tuple" in str(field.type):
        length = 4 if field.name == "jitter" else 2
        return strategies.tuples(*[number] * length)
    if field.type is bool:
        return strategies.booleans()
    if "str" in str(field.type) or "Literal" in str(field.type):
        return text if "float" not in str(field.type) else text | number
    return strategies.integers(-(2**70), 2**70) | strategies.integers(-2, 300) if "int" in str(field.type) else number


def free(script):
    """Fields that the command line takes as any text or number (choices are tyro's own business)."""
    return [field for field in dataclasses.fields(script.Args) if "Literal" not in str(field.type)]


def fuzz(script, examples):
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(strategies.data())
    def try_it(data):
        chosen = data.draw(strategies.lists(strategies.sampled_from(free(script)), max_size=4, unique=True))
        words = {field.name: data.draw(values(field)) for field in chosen}
        try:
            script.main(script.Args(**words))
        except Started:
            shutil.rmtree("runs", ignore_errors=True)
        except SystemExit as error:
            assert str(error).startswith("error: "), words
            assert not Path("runs").exists(), words

    try_it()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_argument_ends_in_a_traceback(script, no_training):
    fuzz(script, 60)


@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_argument_ends_in_a_traceback_long(script, no_training):
    fuzz(script, 1500)


def fuzz_eval(examples, monkeypatch):
    """Arguments on the command line, and arguments in the checkpoint of a run."""
    def begin(*given):
        raise Started

    monkeypatch.setattr(eval_linear, "ImageData", begin)
    monkeypatch.setattr(eval_linear, "load_backbone", lambda *given: (0, "none"))
    run = vars(msf.resolve(msf.Args())[0])
    anything = strategies.none() | strategies.booleans() | strategies.integers(-3, 70) | strategies.floats() | (
        strategies.sampled_from(["vit", "resnet50", "", "folder"]) | strategies.lists(strategies.integers(), max_size=2))

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(strategies.data())
    def try_it(data):
        chosen = data.draw(strategies.lists(strategies.sampled_from(free(eval_linear)), max_size=3, unique=True))
        words = {field.name: data.draw(values(field)) for field in chosen}
        stored = {name: data.draw(anything) for name in ("dataset", "arch", "stem", "image_size", "flip", "crop_scale")
                  if data.draw(strategies.integers(0, 3)) == 0}
        torch.save(dict(model=dict(x=torch.zeros(1)), step=3, args=run | stored), "last.pt")
        words = dict(checkpoint="last.pt") | words if data.draw(strategies.booleans()) else words
        try:
            eval_linear.main(eval_linear.Args(**words))
        except Started:
            pass
        except SystemExit as error:
            assert re.fullmatch("error: .*", str(error)), (words, stored)

    try_it()


def test_no_argument_and_no_checkpoint_ends_the_evaluation_in_a_traceback(monkeypatch):
    fuzz_eval(100, monkeypatch)


@pytest.mark.long
def test_no_argument_and_no_checkpoint_ends_the_evaluation_in_a_traceback_long(monkeypatch):
    fuzz_eval(1500, monkeypatch)


# ---- numbers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_collapse_is_said_once_and_logged(script, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(script, "augment", lambda images, size, **how: torch.ones(len(images), 3, 16, 16))
    script.main(script.Args(run_name="a", epochs=1, knn_every=0, log_every=4))  # all images look the same
    assert capsys.readouterr().out.count("warning: the embeddings collapsed") == 1
    spread = EventAccumulator("runs/a").Reload().Scalars("spread")
    assert len(spread) > 4 and max(event.value for event in spread) < 0.01


# ---- safety -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["msf.py", "cmsf_ssl.py", "cmsf_semi.py", "mnn.py", "eval_linear.py"])
def test_nothing_is_run_that_comes_from_a_file(name):
    text = (ROOT / name).read_text()
    assert text.count("torch.load(") == text.count("weights_only=True)")
    assert not re.search(r"(?<![.\w])(eval|exec|compile|__import__)\(|pickle\.loads?\(|os\.system|subprocess", text)
    assert not re.search(r"extractall|urlopen|requests", text)  # archives: torchvision's business


def test_names_in_a_label_file_stay_in_the_data_folder():
    write_folder("d")
    Path("secret.png").write_bytes(b"")
    for name in ("../../secret.png", str(Path("secret.png").absolute()), "cat/../../../secret.png"):
        Path("list.txt").write_text(f"{name}\n")
        with pytest.raises(SystemExit, match=r"^error: list.txt: 1 names are not in the data[^\n]*$"):
            cmsf_semi.main(cmsf_semi.Args(labels="list.txt", image_size=32, **TINY | dict(topk=4)))
    assert not Path("runs").exists()


def test_arguments_are_kept_as_plain_values():
    msf.main(msf.Args(run_name="a", epochs=1, knn_every=0))
    assert json.loads(json.dumps(load("a")["args"]))["dataset"] == "digits"
