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

FOLDER = replace(msf.RECIPES["folder"], data_dir="photos", num_workers=0, image_size=32)


def load(is_train=True, **changes):
    return msf.ImageData(replace(FOLDER, **changes), is_train, CPU)


def labels_of(data):
    """Path within photos/ -> label."""
    names = [path.removeprefix("photos/") for path in data.paths]
    return dict(zip(names, data.labels.tolist()))


# ---- layouts of folders


def test_classes_are_the_folders_in_train_at_any_depth():
    picture("photos/train/cat/1.jpg")
    picture("photos/train/cat/indoors/deep/2.PNG")
    picture("photos/train/dog/album.jpg/3.webp")  # a folder that is named like a picture
    Path("photos/train/dog/notes.txt").touch()
    picture("photos/val/dog/4.jpg")
    assert labels_of(load()) == {
        "train/cat/1.jpg": 0,
        "train/cat/indoors/deep/2.PNG": 0,
        "train/dog/album.jpg/3.webp": 1,
    }
    assert labels_of(load(is_train=False)) == {"val/dog/4.jpg": 1}  # cat is missing in val/


def test_a_folder_without_train_holds_pictures_without_labels():
    picture("photos/a.jpg")
    picture("photos/2024/summer/b.jpg")
    assert labels_of(load()) == {"2024/summer/b.jpg": -1, "a.jpg": -1}
    assert len(load(is_train=False).labels) == 0


def test_test_pictures_do_not_train():
    picture("photos/a.jpg")
    picture("photos/val/cat/b.jpg")
    with pytest.raises(SystemExit, match="no images in .*photos/train"):
        load()


@pytest.mark.parametrize("name", ["unlabelled", "unlabeled"])
def test_unlabelled_pictures_beside_classes(name):
    picture("photos/train/cat/1.jpg")
    picture(f"photos/train/{name}/deep/2.jpg")
    picture("photos/train/zebra/3.jpg")
    picture("photos/train/loose.jpg")
    assert labels_of(load()) == {
        "train/cat/1.jpg": 0,
        "train/loose.jpg": -1,
        f"train/{name}/deep/2.jpg": -1,
        "train/zebra/3.jpg": 1,
    }


@pytest.mark.parametrize("root, labels", [("photos/train", [0, 1]), ("photos", [-1, -1])])
def test_names_that_begin_with_a_dot_or_an_at_sign_are_no_data(root, labels):
    picture(f"{root}/cat/1.jpg")
    picture(f"{root}/.ipynb_checkpoints/1.jpg")
    picture(f"{root}/cat/.ipynb_checkpoints/1-checkpoint.jpg")
    picture(f"{root}/@eaDir/1.jpg")
    picture(f"{root}/cat/@eaDir/deep/1.jpg")
    picture(f"{root}/cat/._1.jpg")
    picture(f"{root}/dog/1.jpg")
    data = load()
    assert data.paths == [f"{root}/cat/1.jpg", f"{root}/dog/1.jpg"]
    assert data.labels.tolist() == labels


def test_links_are_followed_and_a_circle_is_answered_by_one_line():
    picture("elsewhere/1.jpg")
    Path("photos/train").mkdir(parents=True)
    Path("photos/train/cat").symlink_to(Path("elsewhere").absolute())
    assert labels_of(load()) == {"train/cat/1.jpg": 0}
    Path("elsewhere/again").symlink_to(Path("elsewhere").absolute())
    with pytest.raises(SystemExit, match=r"Too many levels of symbolic links[^\n]*$"):
        load()


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture("photos/a.jpg")
    assert len(load(data_dir="~/photos").paths) == 1


def write_tiny_imagenet(root, each=1, rearranged=False):
    """Two classes; the val pictures are of n02 and n01."""
    for name in ("n01", "n02"):
        for i in range(each):
            picture(f"{root}/train/{name}/images/{name}_{i}.JPEG", 64)
    for name, file in (("n02", "val_0.JPEG"), ("n01", "val_1.JPEG")):
        picture(f"{root}/val/{name if rearranged else 'images'}/{file}", 64)
    if not rearranged:
        rows = "val_0.JPEG\tn02\t0\t0\t62\t62\nval_1.JPEG\tn01\t0\t0\t62\t62\n"
        Path(f"{root}/val/val_annotations.txt").write_text(rows)


@pytest.mark.parametrize("rearranged", [False, True])
def test_tiny_imagenet_as_it_is_distributed_and_with_val_in_class_folders(rearranged):
    write_tiny_imagenet("photos", rearranged=rearranged)
    train = load(dataset="tinyimagenet", image_size=64)
    val = load(dataset="tinyimagenet", image_size=64, is_train=False)
    assert train.images.shape == (2, 3, 64, 64) and train.labels.tolist() == [0, 1]
    labels = {Path(path).name: label for path, label in labels_of(val).items()}
    assert labels == {"val_0.JPEG": 1, "val_1.JPEG": 0}


# ---- data sets of torchvision, in the form of their archives


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision takes stand-ins of its archives' files."""
    for dataset in (torchvision.datasets.CIFAR10, torchvision.datasets.STL10):
        monkeypatch.setattr(dataset, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *given: True)


def random_bytes(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_cifar(name, each=4):
    """data/, with the same pixels [each, 3072], which are returned, in every file."""
    if name == "cifar10":
        folder = Path("data/cifar-10-batches-py")
        files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        classes_file, classes_key, labels_key = "batches.meta", "label_names", "labels"
    else:
        folder = Path("data/cifar-100-python")
        files = ["train", "test"]
        classes_file, classes_key, labels_key = "meta", "fine_label_names", "fine_labels"
    folder.mkdir(parents=True)
    pixels = random_bytes(each, 3072)
    labels = [[3, 1, 4, 1][i % 4] for i in range(each)]
    for file in files:
        (folder / file).write_bytes(pickle.dumps({"data": pixels, labels_key: labels}))
    names = [str(i) for i in range(100)]
    (folder / classes_file).write_bytes(pickle.dumps({classes_key: names}))
    return pixels


def write_stl10(each=3):
    """data/, with the same pixels [each, 3, 96, 96], which are returned, in every file."""
    folder = Path("data/stl10_binary")
    folder.mkdir(parents=True)
    pixels = random_bytes(each, 3, 96, 96)
    labels = np.array([[1, 2, 10][i % 3] for i in range(each)], dtype=np.uint8)
    for split in ("unlabeled", "test", "train"):
        pixels.transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")  # stored by columns
        labels.tofile(folder / f"{split}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(map(str, range(10))))
    return pixels


@pytest.mark.parametrize("name, train_images", [("cifar10", 20), ("cifar100", 4)])
def test_cifar(name, train_images, unchecked):
    pixels = write_cifar(name)
    test = msf.ImageData(msf.RECIPES[name], False, CPU)
    assert torch.equal(test.images, torch.from_numpy(pixels).view(4, 3, 32, 32))
    assert test.labels.tolist() == [3, 1, 4, 1]
    assert len(msf.ImageData(msf.RECIPES[name], True, CPU).labels) == train_images


def test_stl10_trains_on_unlabelled_images_too(unchecked):
    pixels = write_stl10()
    train = msf.ImageData(msf.RECIPES["stl10"], True, CPU)
    assert train.labels.tolist() == [0, 1, 9, -1, -1, -1]
    assert torch.equal(train.images[:3], torch.from_numpy(pixels))


def test_digits_of_other_writers_are_the_test_set():
    train = msf.ImageData(msf.RECIPES["digits"], True, CPU)
    test = msf.ImageData(msf.RECIPES["digits"], False, CPU)
    assert train.images.shape == (1437, 3, 16, 16) and train.images.max() == 255
    assert test.images.shape == (360, 3, 16, 16)


def train_on_a_stand_in(script, name):
    """Two steps of a recipe, but for batch and bank, on the files of a data set of this name."""
    if name == "tinyimagenet":
        write_tiny_imagenet("data", each=16)
    elif name == "stl10":
        write_stl10(each=16)
    elif name.startswith("cifar"):
        write_cifar(name, each=8 if name == "cifar10" else 32)
    else:
        labelled_pictures("data", each=16)
    changes = {"data_dir": "data", "batch_size": 16, "bank_size": 32, "epochs": 1, "run_name": "a"}
    changes |= {"num_workers": 0, "warmup_epochs": 0.0}
    result = script.main(replace(script.RECIPES[name], **changes))
    assert 0 < result["loss"] < 8 and 0 <= result["knn"] <= 100
    assert torch.load("runs/a/last.pt", weights_only=True)["pushed"] == 32  # two steps


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "tinyimagenet"])
def test_every_data_set_trains(script, name, unchecked, small_networks):
    train_on_a_stand_in(script, name)


@pytest.mark.long
@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("name", [name for name in msf.RECIPES if name != "digits"])
def test_every_recipe_starts(script, name, unchecked):
    train_on_a_stand_in(script, name)


# ---- odd pictures


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "RGB"])
def test_a_picture_of_any_mode_comes_out_as_rgb(mode):
    image = Image.fromarray(random_bytes(50, 60, 3)).convert(mode)
    path = "a.tif" if mode in ("CMYK", "LA") else "a.png"
    image.save(path)
    assert torch.equal(pil_to_tensor(msf.read_image(path)), pil_to_tensor(image.convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_become_eight(name):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    if name == "a.pgm":  # big-endian, after a header
        Path(name).write_bytes(b"P5 64 64 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(name)
    for channel in pil_to_tensor(msf.read_image(name)):
        assert channel.tolist() == (ramp // 256).tolist()


def test_sixteen_bits_in_the_mode_of_older_versions_of_pillow(monkeypatch):
    image = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.int32))
    image.format = "PNG"
    monkeypatch.setattr(msf.Image, "open", lambda path: image)
    assert pil_to_tensor(msf.read_image("a.png"))[0].tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_a_picture_of_unknown_range_is_refused_by_name(kind):
    Image.fromarray(np.arange(64 * 64).reshape(64, 64).astype(kind)).save("a.tif")
    with pytest.raises(OSError, match=r"cannot read a.tif: .*convert it to 8 or 16 bits"):
        msf.read_image("a.tif")


@pytest.mark.parametrize("size", [32, 96])
def test_an_extreme_shape_gives_crops(size):
    picture("photos/a.png", 1)
    Image.new("RGB", (3000, 40)).save("photos/b.png")
    (crops,) = load(image_size=size).batches(torch.tensor([[0, 1]]), num_crops=2)
    assert [crop.shape for crop in crops] == [(2, 3, size, size)] * 2


# ---- batches


def test_small_images_lie_in_memory_with_their_middle_kept():
    picture("photos/a.png", 100)
    picture("photos/b.png", 50)
    data = load(num_workers=1)
    for path, ours in zip(data.paths, data.images, strict=True):
        expected = pil_to_tensor(center_crop(resize(msf.read_image(path), 32), 32))
        assert torch.equal(ours, expected)


def test_large_images_are_read_by_workers():
    labelled_pictures(each=2, side=120)
    data = load(image_size=96, num_workers=2)
    assert data.images is None
    order = torch.tensor([[3, 0], [1, 2]])
    for indices, crops in zip(order, data.batches(order, num_crops=3)):
        assert [crop.shape for crop in crops] == [(2, 3, 96, 96)] * 3
        for crop in crops:  # red cats, blue dogs: the right picture for each index
            is_red = crop.mean((2, 3))[:, 0] > 0.5
            assert is_red.tolist() == (data.labels[indices] == 0).tolist()


def test_the_test_view_is_the_image_itself_in_the_middle():
    picture("photos/a.png", 300)
    ((images,),) = load(image_size=224).batches([torch.tensor([0])], num_crops=0)
    expected = pil_to_tensor(center_crop(resize(msf.read_image("photos/a.png"), 256), 224)) / 255
    torch.testing.assert_close(images[0], expected)

    digits = msf.ImageData(msf.RECIPES["digits"], True, CPU)
    ((images,),) = digits.batches([torch.arange(9)], num_crops=0)
    torch.testing.assert_close(images, digits.images[:9] / 255)


def test_every_epoch_has_its_own_order_whatever_the_number_of_processes():
    args = replace(FOLDER, batch_size=4, seed=5)
    epochs = [msf.epoch_order(11, epoch, args, 0, 1) for epoch in range(2)]
    assert not torch.equal(epochs[0], epochs[1])
    for epoch, order in enumerate(epochs):
        assert order.shape == (2, 4) and len(order.unique()) == 8 and order.max() < 11
        shares = [msf.epoch_order(11, epoch, args, rank, 2) for rank in range(2)]
        assert torch.equal(order, torch.cat(shares, dim=1))


# ---- what is missing is said in one line


@pytest.mark.parametrize(
    "dataset, hint",
    [
        ("cifar10", "unpack its archive there"),
        ("cifar100", "unpack its archive there"),
        ("stl10", "unpack its archive there"),
        ("tinyimagenet", "tiny-imagenet-200.zip"),
        ("imagenet", "need train/CLASS/*.JPEG and val/CLASS/*.JPEG"),
        ("folder", "need images, or train/CLASS/*.jpg"),
        ("small-folder", "need images, or train/CLASS/*.jpg"),
    ],
)
def test_missing_data_comes_with_the_hint_for_its_data_set(dataset, hint, monkeypatch):
    def no_network(*given, **options):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    monkeypatch.setattr(torchvision.datasets.stl10, "download_and_extract_archive", no_network)
    with pytest.raises(SystemExit) as caught:
        msf.main(replace(msf.RECIPES[dataset], data_dir="nowhere"))
    message = str(caught.value)
    assert message.startswith(f"cannot load {dataset} from --data-dir nowhere: ")
    assert hint in message and "\n" not in message
    assert not Path("runs").exists()
