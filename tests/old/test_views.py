"""The batched views against torchvision: the same pixels, and boxes of the same distribution."""

import math

import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF

import cmsf_ssl

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))


def pictures(n, height=40, width=48):
    """Smooth random uint8 pictures, with black, white and gray ones among them."""
    images = TF.resize(torch.rand(n, 3, 6, 6), [height, width], antialias=True)
    images = (images * 255).round().byte()
    images[0], images[1], images[2] = 0, 255, images[2, :1]
    return images


def restore(views):
    """Undo the normalisation."""
    return views * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)


def same_distribution(a, b, tolerance=0.025):
    """The largest gap between two empirical distribution functions (Kolmogorov and Smirnov)."""
    grid = torch.cat([a, b]).sort().values
    cdf_a = torch.searchsorted(a.sort().values, grid, right=True) / len(a)
    cdf_b = torch.searchsorted(b.sort().values, grid, right=True) / len(b)
    return (cdf_a - cdf_b).abs().max() < tolerance


@pytest.mark.parametrize("size", [24, 40, 64])
def test_crop_and_flip_have_the_pixels_of_torchvision(size):
    images = pictures(12)
    top, left = torch.randint(0, 12, (2, 12))
    height, width = torch.randint(14, 24, (2, 12))
    flip = torch.arange(12) % 2 == 0
    boxes = [side.float() for side in (top, left, height, width)]
    views = cmsf_ssl.warp(images, boxes, size, flip, torch.zeros(12))
    for i in range(12):
        box = [side[i].item() for side in (top, left, height, width)]
        expected = TF.resized_crop(images[i] / 255, *box, [size, size], antialias=False)
        expected = TF.hflip(expected) if flip[i] else expected
        torch.testing.assert_close(views[i], expected, atol=1e-4, rtol=0)


def test_test_view_is_the_image_itself():
    images = pictures(4, 32, 32)
    torch.testing.assert_close(restore(cmsf_ssl.augment(images, 32)), images / 255, atol=1e-4, rtol=0)
    resized = TF.resize(images / 255, [64, 64], antialias=True)
    torch.testing.assert_close(restore(cmsf_ssl.augment(images, 64)), resized, atol=1e-4, rtol=0)


def test_rotation_has_the_pixels_of_torchvision():
    images = pictures(6, 32, 32)
    degrees = torch.tensor([-30.0, -10.0, 0.0, 5.0, 45.0, 90.0])
    whole = [torch.full((6,), side) for side in (0.0, 0.0, 32.0, 32.0)]
    views = cmsf_ssl.warp(images, whole, 32, torch.zeros(6, dtype=torch.bool), degrees)
    for image, view, angle in zip(images, views, degrees):
        turn = dict(angle=angle.item(), interpolation=T.InterpolationMode.BILINEAR)
        expected = TF.rotate(image / 255, **turn)
        inside = TF.rotate(torch.ones(1, 32, 32), **turn)[0] > 0.999  # repeats edges, not black
        assert inside.float().mean() > 0.6
        torch.testing.assert_close(view[:, inside], expected[:, inside], atol=2e-4, rtol=0)


@pytest.mark.parametrize("operation", range(4))
def test_colour_operations_have_the_pixels_of_torchvision(operation):
    images = pictures(16) / 255
    amounts = torch.empty(16).uniform_(-0.5, 0.5) if operation == 3 else torch.empty(16).uniform_(0, 2)
    views = cmsf_ssl.adjust(images, operation, amounts.view(-1, 1, 1, 1))
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    for image, view, amount in zip(images, views, amounts):
        expected = getattr(TF, names[operation])(image, amount.item())
        torch.testing.assert_close(view, expected, atol=2e-5, rtol=0)


def blurred(images, sigmas, monkeypatch, blur=1.0):
    """Views of uint8 images, where the random numbers drawn are those that stand for sigmas."""
    numbers = (torch.tensor(sigmas) - 0.1) / 1.9
    monkeypatch.setattr(torch, "rand", lambda *shape, device: numbers.view(shape))
    return restore(cmsf_ssl.augment(images, images.shape[-1], blur=blur))


@pytest.mark.parametrize("size", [32, 224])
def test_blur_has_the_pixels_of_torchvision_away_from_edges(size, monkeypatch):
    images, sigmas = pictures(4, size, size)[1:], [0.1, 0.7, 1.99]
    views = blurred(images, sigmas, monkeypatch)
    for image, view, sigma in zip(images / 255, views, sigmas):
        expected = TF.gaussian_blur(image, [25, 25], [sigma] * 2)  # 6 sigma either way
        inside = slice(12, size - 12)
        torch.testing.assert_close(view[:, inside, inside], expected[:, inside, inside], atol=1e-5, rtol=0)
    views = blurred(images, sigmas, monkeypatch, blur=0.5)  # 0, 0.32 and 0.99 are drawn: not the last
    assert (views[1] - images[1] / 255).abs().max() > 0.01
    torch.testing.assert_close(views[2], images[2] / 255, atol=5e-6, rtol=0)


def test_blur_at_an_edge_averages_the_pixels_that_there_are(monkeypatch):
    images, sigma = torch.randint(0, 256, (1, 3, 5, 5), dtype=torch.uint8), 1.3
    (view,), image = blurred(images, [sigma], monkeypatch).double(), images[0].double() / 255
    for row, column in (0, 0), (4, 2), (2, 2), (3, 4):
        total, weights = torch.zeros(3, dtype=torch.float64), 0.0
        for y in range(5):
            for x in range(5):
                weight = math.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * sigma**2))
                total, weights = total + weight * image[:, y, x], weights + weight
        torch.testing.assert_close(view[:, row, column], total / weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize("height, width, scale", [(32, 32, (0.2, 1.0)), (40, 90, (0.08, 0.9))])
def test_boxes_are_distributed_as_in_torchvision(height, width, scale):
    n, image = 20_000, torch.empty(3, height, width)
    ours = cmsf_ssl.random_boxes(n, height, width, scale, "cpu")
    theirs = [T.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)]
    for a, b in zip(ours, zip(*theirs)):
        assert same_distribution(a.float(), torch.tensor(b).float())
    top, left, h, w = ours
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_flip_gray_and_blur_have_their_probabilities(p):
    images = pictures(8, 24, 24)[3:].repeat(800, 1, 1, 1)
    plain = cmsf_ssl.augment(images, 24)
    flipped = cmsf_ssl.augment(images, 24, flip=p)
    mirrored = (flipped - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-3
    assert mirrored.float().mean().item() == pytest.approx(p, abs=0.03)
    assert torch.equal((flipped - plain).abs().amax((1, 2, 3)) < 1e-3, ~mirrored)
    gray = restore(cmsf_ssl.augment(images, 24, gray=p))
    assert (gray.std(1).amax((1, 2)) < 1e-4).float().mean().item() == pytest.approx(p, abs=0.03)
    blurred = (cmsf_ssl.augment(images, 24, blur=p) - plain).abs().amax((1, 2, 3)) > 1e-6
    assert blurred.float().mean().item() <= p + 0.03
    assert blurred.float().mean().item() >= 0.9 * p - 0.03  # sigma near 0.1 changes next to nothing


def test_views_are_random_for_each_image_and_repeat_with_the_seed():
    images = pictures(8, 32, 32)[3:4].repeat(16, 1, 1, 1)
    strong = dict(scale=(0.2, 1), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5)
    torch.manual_seed(3)
    views = cmsf_ssl.augment(images, 32, **strong)
    assert len({view.sum().item() for view in views}) == 16
    torch.manual_seed(3)
    assert torch.equal(views, cmsf_ssl.augment(images, 32, **strong))
    assert views.dtype == torch.float32 and views.shape == (16, 3, 32, 32)
