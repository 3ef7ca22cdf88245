from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images import noise
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from vqgan_accel.data.crops import evaluation_view
from vqgan_accel.data.transforms import to_rgb, training_crop, training_view

SIZES = [(64, 64), (80, 50), (40, 52), (30, 200), (7, 5)]


def reopened(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(file)


def pixels(image):
    return np.asarray(to_rgb(image)).tolist()


def crops_of_both(width, height, scale, count=1500):
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    rng = np.random.default_rng(1)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (1.0, 1.0)) for _ in range(count)])
    ours = np.array([training_crop(width, height, scale, rng) for _ in range(count)])
    assert (theirs[:, 2] == theirs[:, 3]).all()
    return ours, theirs[:, [1, 0, 2]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [(0.7, 1.0), (0.08, 1.0)])
def test_crops_are_distributed_as_torchvisions(size, scale):
    ours, theirs = crops_of_both(*size, scale)
    for column in range(3):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001
    # where in its range the crop lies, which the three separate distributions would not tell
    for axis in range(2):
        slack = np.maximum(size[axis] - ours[:, 2], 1), np.maximum(size[axis] - theirs[:, 2], 1)
        assert ks_2samp(ours[:, axis] / slack[0], theirs[:, axis] / slack[1]).pvalue > 0.001


def test_that_comparison_would_see_another_scale():
    ours, _ = crops_of_both(64, 64, (0.65, 1.0))
    _, theirs = crops_of_both(64, 64, (0.7, 1.0))
    assert ks_2samp(ours[:, 2], theirs[:, 2]).pvalue < 1e-6


def test_a_crop_that_never_fits_becomes_the_central_square():
    assert training_crop(30, 1000, (0.7, 1.0), np.random.default_rng(0)) == (0, 485, 30)
    assert training_crop(1, 1, (0.1, 0.2), np.random.default_rng(0)) == (0, 0, 1)


def one_level_apart(a, b):
    """As torch's resize and Pillow's are, at a few pixels."""
    apart = (a.int() - b.int()).abs()
    return apart.max() <= 1 and apart.float().mean() < 0.1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("image_size", [16, 48])
def test_training_pixels_are_torchvisions_for_the_same_crop_and_flip(size, image_size):
    image = noise(*size)
    flips = []
    for index in range(12):
        rng = np.random.default_rng((2, 5, 2, index))
        left, top, side = training_crop(*size, (0.5, 1.0), rng)
        expected = F.resized_crop(image, top, left, side, side, [image_size] * 2, InterpolationMode.BILINEAR)
        flips.append(rng.random() < 0.5)
        expected = F.pil_to_tensor(F.hflip(expected) if flips[-1] else expected)
        view = training_view(image, image_size, (0.5, 1.0), True, seed=5, epoch=2, index=index)
        assert view.dtype == torch.uint8 and one_level_apart(view, expected)
    assert len(set(flips)) == 2


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_pixels_are_the_central_square_resized(size):
    image = noise(*size)
    left, top = (size[0] - min(size)) // 2, (size[1] - min(size)) // 2
    square = F.crop(image, top, left, min(size), min(size))
    assert torch.equal(evaluation_view(image, 24), F.pil_to_tensor(F.resize(square, [24, 24])))
    assert one_level_apart(training_view(image, 24, None, False, 0, 0, 0), evaluation_view(image, 24))


def test_a_square_of_the_right_size_keeps_its_pixels():
    image = noise(32, 32)
    assert torch.equal(evaluation_view(image, 32), F.pil_to_tensor(image))


def test_half_of_the_views_are_flipped_and_only_where_asked():
    image = noise(16, 16)
    plain, mirrored = F.pil_to_tensor(image), F.pil_to_tensor(ImageOps.mirror(image))
    views = [training_view(image, 16, None, True, 0, 0, index) for index in range(400)]
    flipped = sum(torch.equal(view, mirrored) for view in views)
    assert flipped + sum(torch.equal(view, plain) for view in views) == 400
    assert 160 < flipped < 240  # 4 standard deviations
    assert all(torch.equal(training_view(image, 16, None, False, 0, 0, index), plain) for index in range(20))


def test_each_of_seed_epoch_and_index_changes_the_view_and_nothing_else_does():
    image = noise(40, 40)
    base = training_view(image, 16, (0.5, 1.0), True, 1, 1, 1)
    for key in [(2, 1, 1), (1, 2, 1), (1, 1, 2)]:
        assert not torch.equal(training_view(image, 16, (0.5, 1.0), True, *key), base)
    np.random.seed(9)
    torch.manual_seed(9)
    assert torch.equal(training_view(image, 16, (0.5, 1.0), True, 1, 1, 1), base)


SIDES = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 999, 4000]))


@pytest.mark.seconds
@given(SIDES, SIDES, st.sampled_from([4, 17]), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_size_from_one_pixel_to_extreme_aspects_gives_a_square(width, height, image_size, seed):
    image = Image.new("RGB", (width, height), (10, 20, 30))
    left, top, side = training_crop(width, height, (0.01, 1.0), np.random.default_rng(seed))
    assert 0 <= left <= left + side <= width and 0 <= top <= top + side <= height and side > 0
    colour = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, image_size, image_size)
    assert torch.equal(training_view(image, image_size, (0.01, 1.0), True, seed, 0, 0), colour)
    assert torch.equal(evaluation_view(image, image_size), colour)


def test_grey_and_bilevel_pixels_become_equal_channels():
    grey = Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8))
    assert pixels(reopened(grey, "PNG")) == [[[0] * 3, [100] * 3, [255] * 3]]
    assert pixels(reopened(grey.convert("1", dither=0), "PNG")) == [[[0] * 3, [0] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bit_grey_is_scaled_not_clipped(mode):
    values = np.array([[0, 128, 129, 257, 25700, 65535]], dtype=np.uint16 if mode == "I;16" else np.int32)
    image = Image.fromarray(values)
    assert image.mode == mode
    assert pixels(image) == [[[value] * 3 for value in (0, 0, 1, 1, 100, 255)]]
    if mode == "I;16":
        assert pixels(reopened(image, "PNG")) == pixels(image)


def test_transparent_pixels_show_white():
    rgba = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 51))
    assert pixels(reopened(rgba, "PNG")) == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]

    la = Image.new("LA", (2, 1), (100, 255))
    la.putpixel((1, 0), (0, 0))
    assert pixels(reopened(la, "PNG")) == [[[100] * 3, [255] * 3]]

    pa = Image.new("PA", (2, 1), (1, 255))
    pa.putpalette([9, 9, 9, 0, 0, 200])
    pa.putpixel((1, 0), (0, 0))
    assert pixels(pa) == [[[0, 0, 200], [255, 255, 255]]]

    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 200, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    assert pixels(reopened(palette, "PNG")) == [[[0, 0, 200], [9, 9, 9]]]
    assert pixels(reopened(palette, "PNG", transparency=1)) == [[[0, 0, 200], [255, 255, 255]]]

    keyed = reopened(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert pixels(keyed) == [[[255, 255, 255]]]


def test_cmyk_is_converted():
    assert pixels(Image.new("CMYK", (1, 1), (0, 255, 255, 0))) == [[[255, 0, 0]]]
    red = pixels(reopened(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[4][4]
    assert np.abs(np.array(red) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    image = noise(5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = np.asarray(image)
    across = array.transpose(1, 0, 2)
    upright = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: across,
        6: across[:, ::-1],
        7: across[::-1, ::-1],
        8: across[::-1],
    }[orientation]
    assert pixels(reopened(image, "PNG", exif=exif)) == upright.tolist()
    assert to_rgb(reopened(image, "JPEG", exif=exif)).size == (upright.shape[1], upright.shape[0])


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("tags", [b"nonsense", b"MM\0*\0\0", b"II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_does_not_cost_the_image(format, tags):
    image = noise(8, 8)
    assert pixels(reopened(image, format, exif=b"Exif\0\0" + tags)) == pixels(reopened(image, format))


@pytest.mark.parametrize(("format", "options"), [("WEBP", {"lossless": True}), ("GIF", {})])
def test_an_animation_gives_its_first_frame(format, options):
    frames = [Image.new("RGB", (4, 4), colour) for colour in [(255, 0, 0), (0, 0, 255)]]
    animation = reopened(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert animation.n_frames == 2
    assert pixels(animation) == np.asarray(frames[0]).tolist()


def test_floating_point_pixels_are_refused():
    with pytest.raises(ValueError, match="floating-point numbers of unknown range"):
        to_rgb(Image.new("F", (2, 2)))
