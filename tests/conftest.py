import io
import os
import signal
import sys
import traceback
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for the CPU, where results repeat bit for bit
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; run by -m long only")


def pytest_collection_modifyitems(config, items):
    if "long" not in config.option.markexpr:
        skip = pytest.mark.skip(reason="long: run by -m long")
        for item in items:
            if "long" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, where runs/ and data/ start out missing."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def check_pictures(folder, steps, images, labels, rows):
    """The pictures of neighbours in a run's event file: at these steps, the last one as loops draw it.
    rows: lists of indices of images uint8 [N, 3, H, W]; the first is the one searched for, -1: none."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torchvision.transforms.functional import pil_to_tensor

    events = EventAccumulator(folder, size_guidance=dict(images=0)).Reload()
    assert events.Tags()["images"] == ["neighbors"]
    events = events.Images("neighbors")
    assert [event.step for event in events] == steps
    picture = pil_to_tensor(Image.open(io.BytesIO(events[-1].encoded_image_string)))
    assert picture.shape == (3, 64 * len(rows), 64 * len(rows[0]))
    assert (events[-1].height, events[-1].width) == picture.shape[1:]
    scale, green, red = 56 / images.shape[-1], [0, 255, 0], [255, 0, 0]
    for r, row in enumerate(rows):
        for c, index in enumerate(row):
            tile = picture[:, 64 * r : 64 * (r + 1), 64 * c : 64 * (c + 1)]
            if index < 0:
                assert not tile.any(), (r, c)
                continue
            right = labels[index] == labels[row[0]] and labels[index] >= 0
            for y, x in (0, 0), (3, 30), (63, 63), (33, 60):
                assert tile[:, y, x].tolist() == (green if right else red), (r, c)
            for y, x in (0, 0), (55, 55), (17, 30), (30, 3):
                expected = images[index, :, int(y / scale), int(x / scale)]
                assert torch.equal(tile[:, 4 + y, 4 + x], expected), (r, c)


def first_of_twelve(known):
    """The images that pictures show: of twelve equal parts of those with a label, the first."""
    part = -(-len(known) // 12)
    return known[::part]


def stop_at(step, script, monkeypatch):
    """SIGTERM while the batch of this step is drawn; in memory, that is when the step begins."""
    original = script.step_indices

    def step_indices(n, args, start, rank, world):
        for number, indices in enumerate(original(n, args, start, rank, world), start + 1):
            if number == step:
                monkeypatch.setattr(script, "step_indices", original)
                signal.raise_signal(signal.SIGTERM)
            yield indices

    monkeypatch.setattr(script, "step_indices", step_indices)


def work(rank, jobs, answers):
    """One of two processes: call each function that comes with (rank, 2, folder)."""
    torch.set_num_threads(1)
    kept = dict(os.environ)
    for function, folder in iter(jobs.get, None):
        os.chdir(folder)
        try:
            answers.put(function(rank, 2, folder))
        except BaseException:
            answers.put(traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(kept)


@pytest.fixture(scope="session")
def processes():
    """Two processes that live as long as the tests: importing torch in them takes seconds."""
    context = mp.get_context("spawn")
    queues = [(context.Queue(), context.Queue()) for _ in range(2)]
    pair = [context.Process(target=work, args=(rank, *x)) for rank, x in enumerate(queues)]
    for process in pair:
        process.start()
    yield queues
    for process, (jobs, _) in zip(pair, queues):
        jobs.put(None)
        process.join(20)
        process.kill()


@pytest.fixture
def one_and_two(processes, tmp_path):
    """Call function(rank, world, folder) in two processes at once and, unless told not to, alone."""
    def call(function, alone=True):
        for jobs, _ in processes:
            jobs.put((function, str(tmp_path)))
        errors = [answers.get(timeout=300) for _, answers in processes]
        assert errors == [None, None], "\n".join(map(str, errors))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        if alone:
            function(0, 1, str(tmp_path))
        torch.set_num_threads(threads)

    return call


def as_torchrun(rank, world, port):
    """Set what torchrun sets."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world))
