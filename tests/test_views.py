"""The batched views against torchvision: the same pixels, and the same random amounts."""

import math
from dataclasses import replace

import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF

import msf

PLAIN = replace(msf.RECIPES["digits"], crop_scale=(1.0, 1.0), rotation=0.0, jitter=(0, 0, 0, 0))
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


def pictures(n, side=40):
    """Smooth random pictures [n, 3, side, side] in 0..1; the first is black, the second white."""
    images = TF.resize(torch.rand(n, 3, 6, 6), [side, side], antialias=True)
    images[0] = 0
    images[1] = 1
    return images


def assert_same_distribution(ours, theirs, tolerance=0.03):
    """The largest gap between two empirical distribution functions is small."""
    grid = torch.cat([ours, theirs]).sort().values
    ours = torch.searchsorted(ours.sort().values, grid, right=True) / len(ours)
    theirs = torch.searchsorted(theirs.sort().values, grid, right=True) / len(theirs)
    assert (ours - theirs).abs().max() < tolerance


def test_standardize_is_torchvisions_normalize():
    images = pictures(4)
    expected = TF.normalize(images, MEAN.flatten().tolist(), STD.flatten().tolist())
    torch.testing.assert_close(msf.standardize(images), expected)


@pytest.mark.parametrize("size", [8, 24, 40, 64])
def test_a_crop_has_the_pixels_of_torchvision(size, monkeypatch):
    """Larger and smaller than the box, at the image's edges and inside."""
    images = pictures(8)
    top = torch.tensor([0.0, 0, 25, 3, 7, 10, 1, 0])
    left = torch.tensor([0.0, 22, 0, 5, 7, 1, 2, 0])
    height = torch.tensor([15.0, 18, 15, 24, 17, 8, 30, 40])
    width = torch.tensor([20.0, 18, 19, 16, 21, 30, 8, 40])
    starts, lengths = torch.stack([top, left]), torch.stack([height, width])
    monkeypatch.setattr(msf, "random_boxes", lambda *given: (starts, lengths))
    crops = msf.random_crop(images, replace(PLAIN, image_size=size))
    for i in range(8):
        box = [int(side[i]) for side in (top, left, height, width)]
        expected = TF.resized_crop(images[i], *box, [size, size], antialias=True)
        torch.testing.assert_close(crops[i], expected, atol=1e-5, rtol=0)


def test_boxes_are_drawn_as_by_torchvision():
    n = 10_000
    ours = msf.random_boxes(n, 32, (0.2, 1.0), "cpu")
    image = torch.empty(3, 32, 32)
    theirs = [T.RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]
    ours = torch.cat(ours)  # tops, lefts, heights, widths
    for ours_of_kind, theirs_of_kind in zip(ours, torch.tensor(theirs).float().T):
        assert_same_distribution(ours_of_kind, theirs_of_kind)


def test_boxes_lie_in_the_image():
    start, length = msf.random_boxes(10_000, 9, (0.01, 1.0), "cpu")
    assert start.amin(dim=1).tolist() == [0, 0] and length.min() >= 1
    assert (start + length).amax(dim=1).tolist() == [9, 9]


def test_rotation_has_the_pixels_of_torchvision(monkeypatch):
    images = pictures(6, 32)
    degrees = torch.tensor([-30.0, -10.0, 0.0, 5.0, 45.0, 90.0])
    draws = iter([torch.ones(6, 1, 1, 1), degrees.view(6, 1, 1, 1)])  # no flip, then the angles
    monkeypatch.setattr(msf, "uniform", lambda *given: next(draws))
    views = msf.flip_and_rotate(images, replace(PLAIN, rotation=90.0))
    for image, view, angle in zip(images, views, degrees.tolist()):
        expected = TF.rotate(image, angle, T.InterpolationMode.BILINEAR)
        torch.testing.assert_close(view, expected, atol=2e-4, rtol=0)


def test_rotation_is_uniform_and_either_way():
    """Read off from where a ray to the right, from the centre, comes to lie."""
    images = torch.zeros(4000, 3, 33, 33)
    images[:, :, 16, 28:] = 1
    views = msf.flip_and_rotate(images, replace(PLAIN, rotation=20.0))[:, 0]
    y, x = torch.meshgrid(torch.arange(33.0) - 16, torch.arange(33.0) - 16, indexing="ij")
    angles = torch.atan2(-(views * y).sum((1, 2)), (views * x).sum((1, 2))).rad2deg()
    assert_same_distribution(angles, torch.empty(20_000).uniform_(-20, 20), 0.05)


NAMES = ["adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"]


@pytest.mark.parametrize("operation", range(4))
def test_colour_operations_have_the_pixels_of_torchvision(operation, monkeypatch):
    """Each alone, with given amounts; the other three have strength 0 and must change nothing."""
    images = pictures(16)
    strengths = [0.0, 0.0, 0.0, 0.0]
    strengths[operation] = 0.5 if operation == 3 else 0.9
    shares = torch.linspace(-1, 1, 16).view(16, 1, 1, 1)
    monkeypatch.setattr(
        msf, "uniform", lambda images, low, high: shares if low else torch.zeros(16, 1, 1, 1)
    )
    views = msf.color_jitter(images, *strengths)
    for image, view, share in zip(images, views, shares.flatten().tolist()):
        amount = strengths[operation] * share + (0 if operation == 3 else 1)
        expected = getattr(TF, NAMES[operation])(image, amount)
        torch.testing.assert_close(view, expected, atol=2e-5, rtol=0)


def test_colour_amounts_are_drawn_as_by_torchvision():
    """Brightness scales a gray picture, so that the amount can be read off the view."""
    n = 5_000
    images = torch.full((n, 3, 4, 4), 0.4)
    ours = msf.color_jitter(images, 0.4, 0, 0, 0)[:, 0, 0, 0] / 0.4
    jitter = T.RandomApply([T.ColorJitter(brightness=0.4)], p=0.8)
    theirs = torch.stack([jitter(images[0])[0, 0, 0] / 0.4 for _ in range(n)])
    assert_same_distribution((ours * 1e4).round(), (theirs * 1e4).round(), 0.05)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_colour_operations_follow_the_order_that_is_drawn(order, monkeypatch):
    images = pictures(8)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(order))
    monkeypatch.setattr(msf, "uniform", lambda images, low, high: torch.full((8, 1, 1, 1), 0.5))
    views = msf.color_jitter(images, 0.4, 0.6, 0.8, 0.2)
    amounts = [1.2, 1.3, 1.4, 0.1]
    for operation in order:
        images = getattr(TF, NAMES[operation])(images, amounts[operation])
    torch.testing.assert_close(views, images, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [32, 224])
def test_blur_has_the_pixels_of_torchvision_away_from_edges(size, monkeypatch):
    images = pictures(4, size)[1:]
    sigmas = torch.tensor([0.1, 0.7, 1.99])
    monkeypatch.setattr(msf, "uniform", lambda *given: sigmas.view(3, 1, 1, 1))
    views = msf.gaussian_blur(images)
    inside = slice(12, size - 12)
    for image, view, sigma in zip(images, views, sigmas.tolist()):
        expected = TF.gaussian_blur(image, [25, 25], [sigma] * 2)  # 6 sigma either way
        torch.testing.assert_close(view[:, inside, inside], expected[:, inside, inside])


def test_blur_at_an_edge_averages_the_pixels_that_there_are(monkeypatch):
    sigma = 1.3
    image = torch.rand(3, 5, 5)
    monkeypatch.setattr(msf, "uniform", lambda *given: torch.full((1, 1, 1, 1), sigma))
    (view,) = msf.gaussian_blur(image[None])
    for row, column in [(0, 0), (4, 2), (2, 2), (3, 4)]:
        total = torch.zeros(3)
        weights = 0.0
        for y in range(5):
            for x in range(5):
                weight = math.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * sigma**2))
                total += weight * image[:, y, x]
                weights += weight
        torch.testing.assert_close(view[:, row, column], total / weights)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_flip_gray_and_blur_have_their_probabilities(p):
    images = pictures(8, 24)[3:].repeat(500, 1, 1, 1)
    flipped = msf.flip_and_rotate(images, replace(PLAIN, flip=p))
    mirrored = (flipped == images.flip(3)).all(3).all(2).all(1)
    assert torch.equal((flipped == images).all(3).all(2).all(1), ~mirrored)
    assert mirrored.float().mean().item() == pytest.approx(p, abs=0.03)

    gray = msf.strong_view(images, replace(PLAIN, gray=p)) * STD + MEAN
    is_gray = gray.std(dim=1).amax((1, 2)) < 1e-4
    assert is_gray.float().mean().item() == pytest.approx(p, abs=0.03)

    plain = msf.strong_view(images, PLAIN)
    blurred = (msf.strong_view(images, replace(PLAIN, blur=p)) - plain).abs().amax((1, 2, 3)) > 1e-5
    assert 0.9 * p - 0.03 <= blurred.float().mean().item() <= p + 0.03  # sigma 0.1 changes nothing


def test_the_weak_view_only_crops_flips_and_rotates():
    crops = pictures(8, 32)
    views = msf.weak_view(crops, replace(msf.RECIPES["imagenet"], flip=0.0))
    assert views.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(views * STD + MEAN, crops)
