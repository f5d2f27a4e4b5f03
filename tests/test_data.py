"""Data as users have it: layouts on disk, odd pictures, and one clear line where it cannot be."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

import mnn
import msf

CPU = torch.device("cpu")
FOLDER = replace(msf.RECIPES["folder"], data_dir="photos", num_workers=0, image_size=32)


def picture(path, side=40, color=None):
    """Write a picture of random pixels, or of one colour."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if color:
        Image.new("RGB", (side, side), color).save(path)
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (side, side + 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def labelled_pictures(root="photos", each=8, side=40):
    """train/cat, train/dog, val/cat and val/dog; cats are red, dogs are blue."""
    for split in ("train", "val"):
        for i in range(each):
            picture(f"{root}/{split}/cat/{i}.jpg", side, "red")
            picture(f"{root}/{split}/dog/{i}.jpg", side, "blue")


def load(is_train=True, **changes):
    return msf.ImageData(replace(FOLDER, **changes), is_train, CPU)


def names(data):
    """The files of a data set, as the ends of their paths."""
    return [path.removeprefix("photos/") for path in data.paths]


def knn_data(images, labels):
    """Images in memory, uint8 [N, 3, H, H] or None, with labels."""
    data = msf.ImageData(msf.RECIPES["digits"], False, CPU)
    data.images = images
    data.labels = torch.as_tensor(labels)
    return data


# ---- layouts of folders


def test_classes_are_the_folders_in_train_at_any_depth():
    picture("photos/train/cat/1.jpg")
    picture("photos/train/cat/indoors/deep/2.PNG")
    picture("photos/train/dog/1.jpg")
    picture("photos/train/dog/notes.txt.webp")
    Path("photos/train/dog/notes.txt").touch()
    picture("photos/val/dog/3.jpg")
    data = load()
    assert names(data) == [
        "train/cat/1.jpg",
        "train/cat/indoors/deep/2.PNG",
        "train/dog/1.jpg",
        "train/dog/notes.txt.webp",
    ]
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert load(is_train=False).labels.tolist() == [1]  # the class missing in val/ keeps its number


def test_a_folder_without_train_holds_pictures_without_labels():
    picture("photos/a.jpg")
    picture("photos/2024/summer/b.jpg")
    data = load()
    assert names(data) == ["2024/summer/b.jpg", "a.jpg"]
    assert data.labels.tolist() == [-1, -1]
    assert len(load(is_train=False).labels) == 0


@pytest.mark.parametrize("name", ["unlabelled", "unlabeled"])
def test_unlabelled_pictures_beside_classes(name):
    picture("photos/train/cat/1.jpg")
    picture(f"photos/train/{name}/2.jpg")
    picture(f"photos/train/{name}/deep/3.jpg")
    picture("photos/train/zebra/4.jpg")
    picture("photos/train/loose.jpg")
    data = load()
    labels = dict(zip(names(data), data.labels.tolist()))
    assert labels == {
        "train/cat/1.jpg": 0,
        "train/loose.jpg": -1,
        f"train/{name}/2.jpg": -1,
        f"train/{name}/deep/3.jpg": -1,
        "train/zebra/4.jpg": 1,
    }


@pytest.mark.parametrize("labelled", [True, False])
def test_names_that_begin_with_a_dot_or_an_at_sign_are_no_data(labelled):
    root = "photos/train/" if labelled else "photos/"
    picture(f"{root}cat/1.jpg")
    picture(f"{root}.ipynb_checkpoints/1.jpg")
    picture(f"{root}cat/.ipynb_checkpoints/1-checkpoint.jpg")
    picture(f"{root}@eaDir/1.jpg")
    picture(f"{root}cat/@eaDir/deep/1.jpg")
    picture(f"{root}cat/._1.jpg")
    picture(f"{root}dog/1.jpg")
    data = load()
    assert [Path(path).parent.name for path in data.paths] == ["cat", "dog"]
    assert data.labels.tolist() == ([0, 1] if labelled else [-1, -1])


def test_a_folder_that_is_named_like_a_picture_is_a_folder():
    picture("photos/train/cat/album.jpg/1.jpg")
    assert names(load()) == ["train/cat/album.jpg/1.jpg"]


def test_linked_folders_are_followed():
    picture("elsewhere/1.jpg")
    Path("photos/train").mkdir(parents=True)
    Path("photos/train/cat").symlink_to(Path("elsewhere").absolute())
    assert names(load()) == ["train/cat/1.jpg"]


def test_a_link_in_a_circle_is_answered_by_one_line():
    picture("photos/train/cat/1.jpg")
    Path("photos/train/cat/again").symlink_to(Path("photos/train/cat").absolute())
    with pytest.raises(SystemExit, match=r"Too many levels of symbolic links"):
        load()


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture("photos/a.jpg")
    assert len(load(data_dir="~/photos").paths) == 1


def write_tiny_imagenet(root, each=1, rearranged=False):
    """Two classes; the val pictures are of n02, n01 and n02."""
    for name in ("n01", "n02"):
        for i in range(each):
            picture(f"{root}/train/{name}/images/{name}_{i}.JPEG", 64)
    for name, file in (("n02", "val_0.JPEG"), ("n01", "val_1.JPEG"), ("n02", "val_2.JPEG")):
        picture(f"{root}/val/{name if rearranged else 'images'}/{file}", 64)
    if not rearranged:
        rows = [
            "val_0.JPEG\tn02\t0\t0\t62\t62",
            "val_1.JPEG\tn01\t0\t0\t62\t62",
            "val_2.JPEG\tn02\t1",
        ]
        Path(f"{root}/val/val_annotations.txt").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("rearranged", [False, True])
def test_tiny_imagenet_as_it_is_distributed_and_with_val_in_class_folders(rearranged):
    write_tiny_imagenet("photos", rearranged=rearranged)
    tiny = replace(msf.RECIPES["tinyimagenet"], data_dir="photos", num_workers=0)
    train = msf.ImageData(tiny, True, CPU)
    val = msf.ImageData(tiny, False, CPU)
    assert train.images.shape == (2, 3, 64, 64) and train.labels.tolist() == [0, 1]
    labels = {Path(path).name: label for path, label in zip(val.paths, val.labels.tolist())}
    assert labels == {"val_0.JPEG": 1, "val_1.JPEG": 0, "val_2.JPEG": 1}


# ---- data sets of torchvision, in the form of their archives


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision takes stand-ins of its archives' files."""
    for dataset in (torchvision.datasets.CIFAR10, torchvision.datasets.STL10):
        monkeypatch.setattr(dataset, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *given: True)


def write_cifar(name, each=4):
    """data/, with `each` images in every file; the pixels [each, 3072] of the last one."""
    ten = name == "cifar10"
    folder = Path("data", "cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    splits = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    labels = [[3, 1, 4, 1][i % 4] for i in range(each)]
    for split in splits:
        pixels = np.random.default_rng(0).integers(0, 256, (each, 3072), dtype=np.uint8)
        content = {"data": pixels, "labels" if ten else "fine_labels": labels}
        (folder / split).write_bytes(pickle.dumps(content))
    classes = {"label_names" if ten else "fine_label_names": [str(i) for i in range(100)]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(classes))
    return pixels


def write_stl10(each=3):
    """data/, with `each` images in every file; the pixels [each, 3, 96, 96]."""
    folder = Path("data/stl10_binary")
    folder.mkdir(parents=True)
    labels = np.array([[1, 2, 10][i % 3] for i in range(each)], dtype=np.uint8)
    for split in ("unlabeled", "test", "train"):
        pixels = np.random.default_rng(0).integers(0, 256, (each, 3, 96, 96), dtype=np.uint8)
        pixels.transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")  # stored by columns
        labels.tofile(folder / f"{split}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(map(str, range(10))))
    return pixels


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, unchecked):
    pixels = write_cifar(name)
    test = msf.ImageData(msf.RECIPES[name], False, CPU)
    assert torch.equal(test.images, torch.from_numpy(pixels).view(4, 3, 32, 32))
    assert test.labels.tolist() == [3, 1, 4, 1]
    train = msf.ImageData(msf.RECIPES[name], True, CPU)
    assert len(train.labels) == (20 if name == "cifar10" else 4)


def test_stl10_trains_on_unlabelled_images_too(unchecked):
    pixels = write_stl10()
    train = msf.ImageData(msf.RECIPES["stl10"], True, CPU)
    assert train.labels.tolist() == [0, 1, 9, -1, -1, -1]
    assert torch.equal(train.images[:3], torch.from_numpy(pixels))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "tinyimagenet"])
def test_the_recipes_of_mnn_for_small_images_start(name, unchecked):
    """Two steps each; the recipes but for the batch and the bank."""
    data_dir = "tiny" if name == "tinyimagenet" else "data"
    if name == "tinyimagenet":
        write_tiny_imagenet("tiny", each=16)
    elif name == "stl10":
        write_stl10(each=16)
    else:
        write_cifar(name, each=8 if name == "cifar10" else 32)
    changes = {"data_dir": data_dir, "batch_size": 16, "bank_size": 32, "epochs": 1}
    recipe = mnn.RECIPES[name]
    assert (recipe.bn_splits, recipe.weak_flip, recipe.hidden, recipe.topk) == (8, 0.9, 2048, 5)
    result = mnn.main(replace(recipe, num_workers=0, warmup_epochs=0.0, run_name="a", **changes))
    assert 0 < result["loss"] < 8 and 0 <= result["knn"] <= 100
    assert torch.load("runs/a/last.pt", weights_only=True)["step"] == 2


def test_digits_of_other_writers_are_the_test_set():
    train = msf.ImageData(msf.RECIPES["digits"], True, CPU)
    test = msf.ImageData(msf.RECIPES["digits"], False, CPU)
    assert train.images.shape == (1437, 3, 16, 16) and train.images.max() == 255
    assert test.images.shape == (360, 3, 16, 16)
    assert torch.equal(train.images[:, 0], train.images[:, 2])


# ---- odd pictures


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "RGB", "YCbCr"])
def test_a_picture_of_any_mode_comes_out_as_rgb(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    path = "a.tif" if mode in ("CMYK", "LA", "YCbCr") else "a.png"
    image.save(path)
    assert torch.equal(pil_to_tensor(msf.read_image(path)), pil_to_tensor(image.convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_become_eight(name):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    if name == "a.pgm":  # big-endian, after a header
        Path(name).write_bytes(b"P5 64 64 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(name)
    red, green, blue = pil_to_tensor(msf.read_image(name))
    assert red.tolist() == (ramp // 256).tolist() == green.tolist() == blue.tolist()


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


def test_an_extreme_shape_trains():
    picture("photos/a.png", 1)
    Image.new("RGB", (3000, 40)).save("photos/b.png")
    for size in (32, 96):
        data = load(image_size=size)
        (crops,) = data.batches(torch.tensor([[0, 1]]), crops=2)
        assert [crop.shape for crop in crops] == [(2, 3, size, size)] * 2


# ---- batches


def test_small_images_lie_in_memory_with_their_middle_kept():
    labelled_pictures(each=2, side=100)
    picture("photos/train/cat/7.png", 100)
    data = load(num_workers=1)
    assert data.images.shape == (5, 3, 32, 32) and data.images.dtype == torch.uint8
    image = msf.read_image("photos/train/cat/7.png")
    expected = pil_to_tensor(center_crop(resize(image, 32), 32))
    assert torch.equal(data.images[names(data).index("train/cat/7.png")], expected)


def test_large_images_are_read_by_workers():
    labelled_pictures(each=2, side=120)
    data = load(image_size=96, num_workers=2)
    assert data.images is None
    order = torch.tensor([[3, 0], [1, 2]])
    for indices, crops in zip(order, data.batches(order, crops=3)):
        assert len(crops) == 3
        for crop in crops:  # red cats, blue dogs: the right picture for each index
            assert crop.shape == (2, 3, 96, 96)
            is_red = crop.mean((2, 3))[:, 0] > 0.5
            assert is_red.tolist() == (data.labels[indices] == 0).tolist()


def test_the_test_view_is_the_image_itself_in_the_middle():
    picture("photos/train/cat/1.png", 300)
    data = load(image_size=224)
    ((images,),) = data.batches([torch.tensor([0])], crops=0)
    image = msf.read_image("photos/train/cat/1.png")
    expected = pil_to_tensor(center_crop(resize(image, 256), 224)) / 255
    torch.testing.assert_close(images[0], expected)

    digits = msf.ImageData(msf.RECIPES["digits"], True, CPU)
    ((images,),) = digits.batches([torch.arange(9)], crops=0)
    torch.testing.assert_close(images, digits.images[:9] / 255)


def test_crops_differ_and_repeat_with_the_seed():
    picture("photos/train/cat/1.png", 120)
    data = load(image_size=96, num_workers=1)

    def crops(seed):
        torch.manual_seed(seed)
        (views,) = data.batches(torch.tensor([[0, 0]]), crops=2)
        return torch.stack(views).flatten(0, 1)

    first = crops(1)
    assert len({view.sum().item() for view in first}) == 4
    assert torch.equal(first, crops(1))
    assert not torch.equal(first, crops(2))


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_epoch_has_its_own_order_whatever_the_number_of_processes(world_size):
    args = replace(FOLDER, batch_size=4, seed=5)
    epochs = []
    for epoch in range(3):
        shares = [msf.epoch_order(11, epoch, args, rank, world_size) for rank in range(world_size)]
        order = torch.cat(shares, dim=1)  # [steps, batch]
        assert order.shape == (2, 4)
        assert len(order.unique()) == 8 and order.max() < 11
        assert torch.equal(order, msf.epoch_order(11, epoch, args, 0, 1))
        epochs.append(order.tolist())
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


# ---- what is missing or wrong is said in one line


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

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    monkeypatch.setattr(torchvision.datasets.stl10, "download_and_extract_archive", no_network)
    args = replace(msf.RECIPES[dataset], data_dir="nowhere", batch_size=64)
    with pytest.raises(SystemExit) as caught:
        msf.main(args)
    message = str(caught.value)
    assert (
        message.startswith(f"cannot load {dataset} from --data-dir nowhere: ") and hint in message
    )
    assert "\n" not in message
    assert not Path("runs").exists()


def test_a_train_folder_without_pictures_is_no_data():
    Path("photos/train/cat").mkdir(parents=True)
    picture("photos/val/cat/1.jpg")
    with pytest.raises(SystemExit, match=r"no images in .*photos/train"):
        load()
