"""Data on disk as users have it, and mistakes answered by one line."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

import cmsf_ssl

from .conftest import TINY, data, write_folder


@pytest.mark.parametrize("size", [32, 96])
def test_images_of_every_mode_come_out_as_rgb(size):
    write_folder("d", side=120)
    split = data(cmsf_ssl, image_size=size, num_workers=1, **TINY)
    assert (split.images is None) == (size == 96)
    batches = list(split.batches(torch.arange(16).split(5)))
    indices = torch.cat([indices for indices, _, _ in batches])
    images = torch.cat([views[0] for _, views, _ in batches])
    assert indices.tolist() == list(range(16)) and images.shape == (16, 3, size, size)
    assert images.dtype == torch.uint8
    assert torch.cat([labels for _, _, labels in batches]).tolist() == [0] * 8 + [1] * 8
    for path, image in zip(split.files, images):
        with Image.open(path) as file:
            expected = split.center(file.convert("RGB"))
        assert torch.equal(image, expected), path


def test_two_crops_of_one_decoding_repeat_with_their_seed():
    write_folder("d", side=120)
    split = data(cmsf_ssl, image_size=96, num_workers=1, **TINY)
    order = [torch.tensor([3, 9]), torch.tensor([3, 0])]
    first, again, other = (list(split.batches(order, 2, seed)) for seed in (1, 1, 2))
    (_, late, _), = split.batches(order[1:], 2, 1, step=1)
    (_, (a, b), _), (_, (c, _), _) = first
    assert a.shape == (2, 3, 96, 96) and not torch.equal(a, b)
    assert not torch.equal(a[0], c[0])  # the same image in another step
    assert torch.equal(c, late[0])  # as when resumed
    assert torch.equal(a, again[0][1][0]) and not torch.equal(a, other[0][1][0])


@pytest.mark.parametrize("size", [32, 96])
def test_an_unreadable_image_is_named(size):
    write_folder("d", side=120)
    Path("d/train/cat/9.jpg").write_bytes(b"not an image")
    with pytest.raises(SystemExit, match=r"^error: .*train/cat/9.jpg[^\n]*$"):
        cmsf_ssl.main(cmsf_ssl.Args(image_size=size, num_workers=0, epochs=1, **TINY))


def write_tinyimagenet(root, each=8):
    write_folder(root, classes=("n01", "n02"), side=64, each=each)
    val = Path(root, "val", "images")
    val.mkdir()
    rows = []
    for i, path in enumerate(sorted(Path(root, "val").glob("n0*/*"))):
        path.rename(val / f"val_{i}{path.suffix}")
        rows.append(f"val_{i}{path.suffix}\t{path.parent.name}\t0\t0\t62\t62\n")
    Path(root, "val", "val_annotations.txt").write_text("".join(rows))
    for empty in Path(root, "val").glob("n0*"):
        empty.rmdir()


def write_cifar(name, each, monkeypatch):
    """CIFAR-10 or -100 under data/, as its archive unpacks; the last split's pixels [each, 3072]."""
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    ten = name == "cifar10"
    folder = Path("data", "cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    random = np.random.default_rng(0)
    for split in names:
        pixels = random.integers(0, 256, (each, 3072), dtype=np.uint8)
        labels = [(3, 1, 4, 1)[i % 4] for i in range(each)]
        with open(folder / split, "wb") as file:
            pickle.dump({"data": pixels, "labels" if ten else "fine_labels": labels}, file)
    classes = [str(i) for i in range(10 if ten else 100)]
    with open(folder / ("batches.meta" if ten else "meta"), "wb") as file:
        pickle.dump({"label_names" if ten else "fine_label_names": classes}, file)
    return pixels


def write_stl10(n, monkeypatch):
    """STL-10 under data/, as its archive unpacks; the train split's images [n, 3, 96, 96]."""
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    folder = Path("data/stl10_binary")
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("unlabeled", "test", "train"):
        pixels = random.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8)
        pixels.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")  # stored by columns
        labels = np.array([1, 2, 3, 4, 10], dtype=np.uint8)[np.arange(n) % 5]
        labels.tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(map(str, range(10))))
    return pixels


def test_tinyimagenet_as_it_is_distributed():
    write_tinyimagenet("tiny-imagenet-200")
    given = dict(dataset="tinyimagenet", data_dir="tiny-imagenet-200", batch_size=8, num_workers=1)
    train, val = data(cmsf_ssl, True, **given), data(cmsf_ssl, False, **given)
    assert train.images.shape == val.images.shape == (16, 3, 64, 64)
    assert train.classes == val.classes == ["n01", "n02"]
    for file, label in zip(val.files, val.labels.tolist()):
        number = int(Path(file).stem.removeprefix("val_"))
        assert label == number // 8


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_as_it_is_distributed(name, monkeypatch):
    pixels = write_cifar(name, 4, monkeypatch)
    test = data(cmsf_ssl, False, dataset=name)
    assert torch.equal(test.images, torch.from_numpy(pixels).view(4, 3, 32, 32))
    assert test.labels.tolist() == [3, 1, 4, 1]
    train = data(cmsf_ssl, True, dataset=name)
    assert len(train.labels) == (20 if name == "cifar10" else 4)


def test_stl_as_it_is_distributed(monkeypatch):
    pixels = write_stl10(5, monkeypatch)
    train = data(cmsf_ssl, True, dataset="stl10")
    assert train.images.shape == (10, 3, 96, 96)
    assert train.labels.tolist() == [0, 1, 2, 3, 9] + [-1] * 5
    assert torch.equal(train.images[:5], torch.from_numpy(pixels))


def test_digits_hold_out_other_writers():
    train, test = data(cmsf_ssl), data(cmsf_ssl, False)
    assert len(train.labels) == 1437 and len(test.labels) == 360
    assert train.images.shape == (1437, 3, 16, 16) and train.images.max() == 255
    assert torch.equal(train.images[:, 0], train.images[:, 2])


def finished_run():
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/last.pt").write_text("not a checkpoint")


def other_script():
    torch.save(dict(args=dict(temperature=1.0), step=1), "other.pt")


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(dataset="mnist"), "unknown --dataset mnist: one of digits, "),
        (dict(dataset="folder", data_dir="nowhere"), "no folder in .*nowhere .*train/CLASS"),
        (dict(batch_size=1438, bank_size=5000), "--batch-size 1438: there are 1437 training images"),
        (dict(topk=65), "need --topk <= --batch-size <= --bank-size"),
        (dict(bank_size=63), "need --topk <= --batch-size <= --bank-size"),
        (dict(batch_size=64, world=3), "--batch-size 64: need 3 x 2 or more"),
        (dict(resume="none.pt"), "cannot resume from none.pt"),
        (dict(setup=finished_run, resume="runs/a/last.pt"), "cannot resume from runs/a/last.pt"),
        (dict(setup=finished_run, run_name="a"), "runs/a/last.pt exists"),
        (dict(setup=other_script, resume="other.pt"), "cannot resume from other.pt"),
        (dict(run_name="../a"), "--run-name: letters, digits"),
        (dict(num_candidates=4), "raise --num-candidates"),
    ],
)
def test_a_mistake_is_answered_by_one_line(given, message, monkeypatch):
    given = dict(given)
    monkeypatch.setenv("WORLD_SIZE", str(given.pop("world", 1)))
    given.pop("setup", lambda: None)()
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit, match=message) as caught:
        cmsf_ssl.main(cmsf_ssl.Args(**given))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("error: ")
    assert sorted(Path().rglob("*")) == before  # nothing was written
