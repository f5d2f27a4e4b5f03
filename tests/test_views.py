"""The batched views against torchvision: the same pixels, and the same random amounts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF

import msf

PLAIN = replace(msf.RECIPES["digits"], crop_scale=(1.0, 1.0), rotation=0.0, jitter=(0, 0, 0, 0))
SHARES = torch.linspace(0, 1, 11)


@pytest.fixture
def given_draws(monkeypatch):
    """What is drawn for 11 images goes from the lowest to the highest number, by SHARES."""

    def draw(images, low, high):
        return low + (high - low) * SHARES[: len(images)].view(-1, 1, 1, 1)

    monkeypatch.setattr(msf, "uniform", draw)


def pictures(n, side=40):
    """Smooth random pictures [n, 3, side, side] in 0..1; the first is black, the second white."""
    images = TF.resize(torch.rand(n, 3, 6, 6), [side, side], antialias=True)
    images[0] = 0
    images[1] = 1
    return images


def assert_same_distribution(ours, theirs):
    """The largest gap between two empirical distribution functions is small."""
    grid = torch.cat([ours, theirs]).sort().values
    ours = torch.searchsorted(ours.sort().values, grid, right=True) / len(ours)
    theirs = torch.searchsorted(theirs.sort().values, grid, right=True) / len(theirs)
    assert (ours - theirs).abs().max() < 0.03


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


def test_all_else_is_drawn_uniformly_for_every_image():
    drawn = msf.uniform(torch.empty(10_000, 3, 2, 2), -1, 3)
    assert drawn.shape == (10_000, 1, 1, 1)
    assert_same_distribution(drawn.flatten(), torch.empty(10_000).uniform_(-1, 3))


def test_rotation_has_the_pixels_of_torchvision(given_draws):
    images = pictures(11, 32)
    views = msf.flip_and_rotate(images, replace(PLAIN, rotation=50.0))
    for image, view, share in zip(images, views, SHARES.tolist()):
        expected = TF.rotate(image, 100 * share - 50, T.InterpolationMode.BILINEAR)
        torch.testing.assert_close(view, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "strengths, order",
    [
        ((0.9, 0, 0, 0), (0, 1, 2, 3)),
        ((0, 0.9, 0, 0), (0, 1, 2, 3)),
        ((0, 0, 0.9, 0), (0, 1, 2, 3)),
        ((0, 0, 0, 0.5), (0, 1, 2, 3)),
        ((0.4, 0.6, 0.8, 0.2), (3, 1, 0, 2)),
        ((0.4, 0.6, 0.8, 0.2), (2, 3, 1, 0)),
    ],
)
def test_colour_jitter_has_the_pixels_of_torchvision(strengths, order, given_draws, monkeypatch):
    """In the order that is drawn, and with probability 0.8."""
    operations = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(order))
    images = pictures(11)
    views = msf.color_jitter(images, *strengths)
    for image, view, share in zip(images, views, SHARES.tolist()):
        if share < 0.79:
            for operation in order:
                amount = strengths[operation] * (2 * share - 1)
                unchanged = 0 if operation == 3 else 1
                image = operations[operation](image, unchanged + amount)
        torch.testing.assert_close(view, image, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [5, 224])
def test_blur_has_the_pixels_of_torchvision(size, given_draws):
    """But at an edge, where it averages the pixels that there are."""
    images = pictures(11, size)
    views = msf.gaussian_blur(images)
    padded = F.pad(torch.cat([images, torch.ones(11, 1, size, size)], dim=1), [12] * 4)
    for image, view, share in zip(padded, views, SHARES.tolist()):
        blurred = TF.gaussian_blur(image, [25, 25], [0.1 + 1.9 * share] * 2)  # 6 sigma either way
        blurred = blurred[:, 12:-12, 12:-12]
        # The last channel, of ones, tells which share of the weights fell on pixels.
        torch.testing.assert_close(view, blurred[:3] / blurred[3:], atol=1e-5, rtol=0)


def test_blur_makes_no_denormal_numbers(given_draws):
    """CPUs multiply them slowly."""
    images = torch.zeros(11, 3, 224, 224)
    images[:, :, 112, 112] = 1
    views = msf.gaussian_blur(images)
    assert ((views == 0) | (views >= torch.finfo(torch.float32).tiny)).all()


def test_flip_gray_and_blur_have_their_probabilities(given_draws):
    images = pictures(11, 24)
    chosen = (SHARES < 0.35).view(11, 1, 1, 1)
    flipped = torch.where(chosen, images.flip(3), images)
    assert torch.equal(msf.flip_and_rotate(images, replace(PLAIN, flip=0.35)), flipped)
    for name, change in (("gray", TF.rgb_to_grayscale), ("blur", msf.gaussian_blur)):
        view = msf.strong_view(images, replace(PLAIN, flip=0.35, **{name: 0.35}))
        expected = msf.standardize(torch.where(chosen, change(flipped), flipped))
        torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)


def test_the_weak_view_flips_and_rotates_without_other_colours(given_draws):
    images = pictures(11, 32)
    args = replace(msf.RECIPES["imagenet"], rotation=20.0)
    view = msf.weak_view(images, args)
    assert view.is_contiguous(memory_format=torch.channels_last)
    expected = msf.flip_and_rotate(images, args)
    expected = TF.normalize(expected, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(view, expected)
