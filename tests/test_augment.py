import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from alexnet_repro.data import augment

rng = np.random.default_rng(0)


def random_images(n: int, size: int = 256) -> np.ndarray:
    return rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_patch_equals_mean_subtraction_then_crop_then_mirror() -> None:
    images, mean = random_images(6), rng.uniform(90, 140, (256, 256, 3)).astype(np.float32)
    tops, lefts = np.array([0, 32, 5, 17, 32, 0]), np.array([0, 32, 9, 30, 0, 32])
    mirror = np.array([False, True, True, False, True, True])
    patches = augment.crop_and_mirror(list(images), tops, lefts, mirror, 224)
    assert patches.dtype == np.uint8
    got = augment.subtract_mean(
        torch.from_numpy(patches),
        torch.from_numpy(mean),
        torch.from_numpy(tops),
        torch.from_numpy(lefts),
        torch.from_numpy(mirror),
    )
    assert got.is_contiguous(memory_format=torch.channels_last)
    for n in range(6):
        whole = images[n].astype(np.float64) - mean
        expected = whole[tops[n] : tops[n] + 224, lefts[n] : lefts[n] + 224]
        if mirror[n]:
            expected = expected[:, ::-1]
        np.testing.assert_allclose(got[n].permute(1, 2, 0).numpy(), expected, atol=1e-4)


def test_ten_crops_have_the_offsets_of_2012() -> None:
    images = torch.randn(2, 3, 256, 256)
    crops = augment.ten_crop(images)
    assert crops.shape == (2, 10, 3, 224, 224)
    places = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    for i, (top, left) in enumerate(places):
        expected = images[:, :, top : top + 224, left : left + 224]
        assert torch.equal(crops[:, i], expected)
        assert torch.equal(crops[:, 5 + i], expected.flip(3))
    assert torch.equal(augment.centre_crop(images), crops[:, 4])


def test_ten_crops_of_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match="can't cut 224x224 patches from images of 200x256"):
        augment.ten_crop(torch.zeros(1, 3, 200, 256))


# cuda-convnet2's values for ILSVRC-2012: standard deviations and principal components of RGB values from 0 to 255.
DEVIATIONS = np.array([19.7208, 37.0939, 121.7801])
VECTORS = np.array([[0.4180, -0.8170, 0.3973], [-0.7126, -0.0235, 0.7012], [-0.5635, -0.5762, -0.5920]]).T


@pytest.mark.parametrize(
    ("unit", "scale", "grey_levels"),
    [
        # sum_i p_i alpha_i lambda_i with lambda in units of (pixel / 255)^2, then scaled back to 0-255
        ("eigenvalue", 0.1 * (DEVIATIONS / 255) ** 2 * 255, [3.3, 3.4, 3.4]),
        ("deviation", 0.1 * DEVIATIONS, [7.4, 7.2, 7.7]),  # as published for the 2012 program
    ],
)
def test_colour_noise_has_the_covariance_of_section_4_1(unit: str, scale: np.ndarray, grey_levels: list[float]) -> None:
    covariance = torch.from_numpy(VECTORS * DEVIATIONS**2 @ VECTORS.T)
    directions = augment.colour_noise_directions(covariance, unit)
    draws = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    noise = augment.add_colour_noise(torch.zeros(200_000, 3, 1, 1), directions, draws)[:, :, 0, 0]
    expected = VECTORS * scale**2 @ VECTORS.T
    np.testing.assert_allclose(np.cov(noise.numpy().T), expected, rtol=0.03, atol=0.05)
    assert noise.std(0).tolist() == pytest.approx(grey_levels, abs=0.1)


def test_jitter_equals_torchvision_image_by_image() -> None:
    patches = random_images(4, 32)
    factors = rng.uniform(0.6, 1.4, (4, 3))
    got = augment.jitter(torch.from_numpy(patches), torch.from_numpy(factors))
    for n, (brightness, contrast, saturation) in enumerate(factors):
        image = torch.from_numpy(patches[n]).permute(2, 0, 1).float() / 255
        image = functional.adjust_brightness(image, brightness)
        image = functional.adjust_contrast(image, contrast)
        image = functional.adjust_saturation(image, saturation)
        torch.testing.assert_close(got[n].permute(2, 0, 1), image * 255, atol=0.05, rtol=0)


def test_colour_noise_is_constant_over_an_image_and_differs_between_images() -> None:
    images = torch.randn(3, 3, 8, 8)
    alphas = torch.randn(3, 3)
    shift = augment.add_colour_noise(images.clone(), torch.eye(3) * 5, alphas) - images
    torch.testing.assert_close(shift, (5 * alphas)[:, :, None, None].expand_as(shift), atol=1e-5, rtol=1e-5)
