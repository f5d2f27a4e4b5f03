"""What the tests of the scripts that are not yet rewritten share."""

import signal
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
import torch.nn.functional as F
from PIL import Image

MODES = ("L", "P", "RGBA", "CMYK", "1", "LA", "RGB", "YCbCr")
TINY = dict(dataset="folder", data_dir="d", arch="resnet10", stem="small-stride")
TINY |= dict(batch_size=8, bank_size=16)


@pytest.fixture(autouse=True)
def signals_as_before():
    """The scripts catch these, and do not give them back."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.fixture
def few_digits(monkeypatch):
    """128 training images instead of 1437: an epoch takes a second."""
    digits = sklearn.datasets.load_digits()
    digits.images, digits.target = digits.images[-488:], digits.target[-488:]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: digits)


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


def load(name):
    return torch.load(Path("runs", name, "last.pt"), weights_only=True)


def flat(value, name=""):
    """Every leaf of nested dicts and lists, by its path."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{name}/{key}").items()}
    return {name: value}


def assert_same_state(a, b):
    keys = ("model", "optimizer", "step", "pushed")
    a, b = (flat({key: run[key] for key in keys}) for run in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        equal = torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]
        assert equal, name


def train_stop_and_resume(script, monkeypatch, step=6, **given):
    """Two epochs of four steps, and the same once more, stopped after a step and continued. Returns
    what main returned, and the checkpoint."""
    given = dict(epochs=2, warmup_epochs=0, batch_size=32, bank_size=50, log_every=1) | given
    result = script.main(script.Args(run_name="whole", **given))
    assert result["checkpoint"] == "runs/whole/last.pt" and 0 < result["loss"] < 4
    stop_at(step, script, monkeypatch)
    with pytest.raises(SystemExit, match=f"stopped at step {step}; continue with --resume"):
        script.main(script.Args(run_name="parts", **given))
    assert load("parts")["step"] == step
    script.main(script.Args(resume="runs/parts/last.pt"))
    whole = load("whole")
    assert_same_state(whole, load("parts"))
    backbone, _ = script.encoder("resnet10", "small-stride")
    saved = torch.load("runs/whole/backbone.pt", weights_only=True)
    backbone.load_state_dict(saved, strict=True)
    return result, whole


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def slow_loss(queries, neighbors, valid=None):
    """Mean over images of the mean over valid neighbours of ||q - m||^2, in loops."""
    per_image = []
    for i, query in enumerate(queries.double()):
        terms = []
        for j, row in enumerate(neighbors[i].double()):
            if valid is None or valid[i, j]:
                q, m = query / query.norm(), row / row.norm()
                terms.append(sum((a - b) ** 2 for a, b in zip(q.tolist(), m.tolist())))
        if terms:
            per_image.append(sum(terms) / len(terms))
    return sum(per_image) / len(per_image) if per_image else 0.0


def slow_neighbors(targets, bank, k):
    """All distances in float64, sorted: the k smallest of each target."""
    rows = []
    for target in targets.double():
        distances = [((target - row) ** 2).sum().item() for row in bank.double()]
        rows.append(sorted(range(len(bank)), key=lambda j: distances[j])[:k])
    return torch.tensor(rows, dtype=torch.int64)


def write_folder(root, side=40, classes=("cat", "dög"), each=8):
    """train/CLASS and val/CLASS with images of every mode and of different shapes."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for i in range(each):
                mode = MODES[i % len(MODES)]
                pixels = random.integers(0, 256, (side + i, side + 2 * i, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert(mode)
                image.save(folder / f"{i}.{'tif' if mode in ('CMYK', 'LA', 'YCbCr') else 'png'}")


def data(script, train=True, **given):
    args, _ = script.resolve(script.Args(**given))
    return script.ImageData(args, train, torch.device("cpu"))
