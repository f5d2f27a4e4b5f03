"""Data as users have it: layouts on disk, odd pictures, and one clear line where it cannot be."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scripts import CPU, METHODS, labelled_pictures, picture
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

import msf


def load(dataset="folder", is_train=True, **changes):
    """A split of the files in data/."""
    args = replace(msf.RECIPES[dataset], num_workers=0)
    return msf.ImageData(replace(args, **changes), is_train, CPU)


def labels_of(data):
    """Path within data/ -> label."""
    names = [path.removeprefix("data/") for path in data.paths]
    return dict(zip(names, data.labels.tolist()))


# ---- layouts of folders


def test_the_class_is_the_first_folder_in_train():
    expected = {
        "train/cat/1.jpg": 0,
        "train/cat/indoors/deep/2.PNG": 0,
        "train/dog/album.jpg/3.webp": 1,  # a folder that is named like a picture
        "train/loose.jpg": -1,
        "train/unlabeled/4.jpg": -1,
        "train/unlabelled/deep/5.jpg": -1,
        "train/zebra/6.jpg": 2,
    }
    for name in expected:
        picture(f"data/{name}")
    Path("data/train/cat/notes.txt").touch()
    picture("data/val/dog/7.jpg")  # of the second class, though cat is missing in val/
    assert labels_of(load()) == expected
    assert labels_of(load(is_train=False)) == {"val/dog/7.jpg": 1}


def test_a_folder_without_train_and_val_holds_pictures_without_labels():
    picture("data/a.jpg")
    picture("data/2024/summer/b.jpg")
    assert labels_of(load()) == {"2024/summer/b.jpg": -1, "a.jpg": -1}
    assert len(load(is_train=False).labels) == 0
    picture("data/val/cat/c.jpg")
    with pytest.raises(SystemExit, match="no images in .*data/train"):
        load()


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture("data/a.jpg")
    assert len(load(data_dir="~/data").paths) == 1


def test_links_are_followed():
    picture("elsewhere/1.jpg")
    Path("data/train").mkdir(parents=True)
    Path("data/train/cat").symlink_to(Path("elsewhere").absolute())
    assert labels_of(load()) == {"train/cat/1.jpg": 0}


@pytest.mark.parametrize("root, labels", [("data/train", [0, 1]), ("data", [-1, -1])])
def test_names_that_begin_with_a_dot_or_an_at_sign_are_no_data(root, labels):
    picture(f"{root}/.ipynb_checkpoints/1.jpg")
    picture(f"{root}/@eaDir/1.jpg")
    picture(f"{root}/cat/@eaDir/deep/1.jpg")
    picture(f"{root}/cat/._1.jpg")
    picture(f"{root}/dog/1.jpg")
    picture(f"{root}/cat/1.jpg")
    data = load()
    assert data.paths == [f"{root}/cat/1.jpg", f"{root}/dog/1.jpg"]
    assert data.labels.tolist() == labels


# ---- known data sets, in the form of their archives

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 3, 96, 96), dtype=np.uint8)
LABELS = [3, 1, 9, 1] * 4


@pytest.fixture
def archives(monkeypatch):
    """In data/: stand-ins for Tiny ImageNet, CIFAR and STL-10, with 16 images a file."""
    for name in ("n01", "n02"):
        for i in range(8):
            picture(f"data/train/{name}/images/{name}_{i}.JPEG", 64)
    picture("data/val/images/val_0.JPEG", 64)
    picture("data/val/images/val_1.JPEG", 64)
    rows = "val_0.JPEG\tn02\t0\t0\t62\t62\nval_1.JPEG\tn01\t0\t0\t62\t62\n"
    Path("data/val/val_annotations.txt").write_text(rows)

    cifar10 = Path("data/cifar-10-batches-py")
    cifar100 = Path("data/cifar-100-python")
    cifar10.mkdir()
    cifar100.mkdir()
    pixels = PIXELS[:, :, :32, :32].reshape(16, 3072)
    for file in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (cifar10 / file).write_bytes(pickle.dumps({"data": pixels, "labels": LABELS}))
    for file in ("train", "test"):
        (cifar100 / file).write_bytes(pickle.dumps({"data": pixels, "fine_labels": LABELS}))
    (cifar10 / "batches.meta").write_bytes(pickle.dumps({"label_names": []}))
    (cifar100 / "meta").write_bytes(pickle.dumps({"fine_label_names": []}))

    stl10 = Path("data/stl10_binary")
    stl10.mkdir()
    for split in ("train", "test", "unlabeled"):
        PIXELS.transpose(0, 1, 3, 2).tofile(stl10 / f"{split}_X.bin")  # stored by columns
    for split in ("train", "test"):
        (stl10 / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in LABELS))
    (stl10 / "class_names.txt").touch()

    for module in (torchvision.datasets.cifar, torchvision.datasets.stl10):
        monkeypatch.setattr(module, "check_integrity", lambda *given: True)


def test_tiny_imagenet(archives):
    assert load("tinyimagenet").labels.tolist() == [0] * 8 + [1] * 8
    val = load("tinyimagenet", is_train=False)
    assert labels_of(val) == {"val/images/val_0.JPEG": 1, "val/images/val_1.JPEG": 0}


def test_tiny_imagenet_with_the_test_images_in_class_folders(archives):
    Path("data/val/n02").mkdir()
    Path("data/val/images/val_0.JPEG").rename("data/val/n02/val_0.JPEG")
    Path("data/val/images").rename("data/val/n01")
    for _ in range(2):  # with the list of the distributed form, and without
        val = load("tinyimagenet", is_train=False)
        assert labels_of(val) == {"val/n01/val_1.JPEG": 0, "val/n02/val_0.JPEG": 1}
        Path("data/val/val_annotations.txt").unlink(missing_ok=True)


@pytest.mark.parametrize("name, train_images", [("cifar10", 80), ("cifar100", 16)])
def test_cifar(name, train_images, archives):
    test = load(name, is_train=False)
    assert np.array_equal(test.images, PIXELS[:, :, :32, :32])
    assert test.labels.tolist() == LABELS
    assert len(load(name).labels) == train_images


def test_stl10_trains_on_unlabelled_images_too(archives):
    train = load("stl10")
    assert np.array_equal(train.images, np.concatenate([PIXELS, PIXELS]))
    assert train.labels.tolist() == LABELS + [-1] * 16


def test_digits_of_other_writers_are_the_test_set():
    train = load("digits")
    test = load("digits", is_train=False)
    assert train.images.shape == (1437, 3, 16, 16) and train.images.max() == 255
    assert test.images.shape == (360, 3, 16, 16)


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("name", [name for name in msf.RECIPES if name != "digits"])
def test_every_recipe_trains(script, name, archives, small_networks):
    """One epoch, with a smaller batch and bank."""
    changes = {"batch_size": 16, "bank_size": 32, "epochs": 1, "warmup_epochs": 0.0}
    result = script.main(replace(script.RECIPES[name], num_workers=0, **changes))
    assert 0 < result["loss"] < 8 and 0 <= result["knn"] <= 100


@pytest.mark.long
@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("name", [name for name in msf.RECIPES if name != "digits"])
def test_every_recipe_trains_its_own_network(script, name, archives):
    test_every_recipe_trains(script, name, archives, small_networks=None)


# ---- odd pictures


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_a_picture_of_any_mode_comes_out_as_rgb(mode):
    picture("a.png")
    image = Image.open("a.png").convert(mode)
    image.save("a.tif")
    assert torch.equal(pil_to_tensor(msf.read_image("a.tif")), pil_to_tensor(image.convert("RGB")))


@pytest.mark.filterwarnings("error")  # Pillow may warn of such pictures
def test_a_picture_with_transparent_colours_comes_out_as_rgb():
    picture("a.png")
    image = Image.open("a.png").quantize(16)
    image.save("a.png", transparency=bytes(range(16)))
    assert torch.equal(pil_to_tensor(msf.read_image("a.png")), pil_to_tensor(image.convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_become_eight(name):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    if name == "a.pgm":  # big-endian, after a header
        Path(name).write_bytes(b"P5 64 64 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(name)
    expected = (ramp // 256).tolist()
    assert pil_to_tensor(msf.read_image(name)).tolist() == [expected] * 3


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_a_picture_of_unknown_range_is_refused_by_name(kind):
    Image.fromarray(np.arange(64 * 64).reshape(64, 64).astype(kind)).save("a.tif")
    with pytest.raises(OSError, match=r"cannot read a.tif: .*convert it to 8 or unsigned 16 bits"):
        msf.read_image("a.tif")


# ---- batches


@pytest.mark.parametrize("size", [32, 96])
def test_a_batch_has_crops_of_its_images(size):
    """Small images lie in memory, large ones are read by workers."""
    labelled_pictures("data", each=2, side=120)
    data = load(image_size=size, num_workers=2)
    assert (data.images is None) == (size == 96)
    order = torch.tensor([[3, 0], [1, 2]])
    for indices, crops in zip(order, data.batches(order, num_crops=3)):
        assert [crop.shape for crop in crops] == [(2, 3, size, size)] * 3
        for crop in crops:  # red cats, blue dogs: the right picture for each index
            is_red = crop.mean((2, 3))[:, 0] > 0.5
            assert is_red.tolist() == (data.labels[indices] == 0).tolist()
            assert 0.9 < crop.max() < 1.01


@pytest.mark.parametrize("size", [32, 96])
def test_the_crops_of_an_image_differ(size):
    picture("data/a.png", 120)
    (crops,) = load(image_size=size).batches([torch.tensor([0])], num_crops=2)
    assert not torch.equal(*crops)


@pytest.mark.parametrize("size, resized", [(32, 32), (224, 256)])
def test_the_test_view_is_the_middle_of_the_image(size, resized):
    picture("data/a.png", 300)
    picture("data/b.png", 50)
    data = load(image_size=size)
    (images,) = data.eval_batches([torch.tensor([0, 1])])
    for path, image in zip(data.paths, images, strict=True):
        expected = center_crop(resize(msf.read_image(path), resized), size)
        torch.testing.assert_close(image, pil_to_tensor(expected) / 255)


def test_every_epoch_has_its_own_order_whatever_the_number_of_processes():
    args = replace(msf.RECIPES["folder"], batch_size=4, seed=5)
    epochs = [msf.epoch_order(11, epoch, args, 0, 1) for epoch in range(2)]
    assert not torch.equal(epochs[0], epochs[1])
    for epoch, order in enumerate(epochs):
        assert order.shape == (2, 4) and len(order.unique()) == 8 and order.max() < 11
        shares = [msf.epoch_order(11, epoch, args, rank, 2) for rank in range(2)]
        assert torch.equal(order, torch.cat(shares, dim=1))


# ---- what is missing is said in one line


@pytest.mark.parametrize("name", ["tinyimagenet", "imagenet"])
def test_a_folder_above_imagenet_is_not_taken_for_loose_pictures(name):
    picture("data/unpacked/train/n01/1.JPEG")
    with pytest.raises(SystemExit, match=f"cannot load {name} .*no images in .*data/train"):
        load(name)


@pytest.mark.parametrize(
    "dataset, hint",
    [
        ("cifar100", "kriz/cifar-100-python.tar.gz there"),
        ("stl10", "stl10_binary.tar.gz there"),
        ("tinyimagenet", "tiny-imagenet-200.zip"),
        ("imagenet", "need train/CLASS/*.JPEG and val/CLASS/*.JPEG"),
        ("small-folder", "need images in any folders, or train/CLASS/*.jpg"),
    ],
)
def test_missing_data_comes_with_the_hint_for_its_data_set(dataset, hint, monkeypatch):
    def no_network(*given, **options):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(SystemExit) as caught:
        msf.main(replace(msf.RECIPES[dataset], data_dir="nowhere"))
    message = str(caught.value)
    assert message.startswith(f"cannot load {dataset} from --data-dir nowhere: ")
    assert hint in message and "\n" not in message
