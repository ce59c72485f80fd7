"""Mean subtraction, crops and reflections, colour noise and ten crops (Sections 2 and 4.1).

These are pure functions of a batch and of random numbers, which module.py draws. Images stay on the 0-255 scale; they
are not divided by 255 or by a standard deviation.
"""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def crop_and_mirror(
    images: Iterable[NDArray[np.uint8]],
    tops: NDArray[np.int64],
    lefts: NDArray[np.int64],
    mirror: NDArray[np.bool_],
    size: int,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Cut one patch out of each image and mirror some of the patches (Section 4.1, first form).

    images: N arrays (H, W, 3). tops, lefts: (N,) first row and first column of each patch. mirror: (N,) whether to
    mirror each patch. out: (N or more, size, size, 3), to write the patches into; None: a new array. Returns (N, size, size, 3).

    This runs on the CPU to reduce the transfer to the GPU from 196,608 to 150,528 bytes per image.
    """
    out = np.empty((len(tops), size, size, 3), np.uint8) if out is None else out[: len(tops)]
    for patch, image, top, left in zip(out, images, tops, lefts, strict=True):
        patch[...] = image[top : top + size, left : left + size]
    turned = np.flatnonzero(mirror)
    if len(turned):
        out[turned] = torch.from_numpy(out[turned]).flip(2).numpy()
    return out


def subtract_mean(patches: Tensor, mean: Tensor, tops: Tensor, lefts: Tensor, mirror: Tensor) -> Tensor:
    """Subtract the matching part of the mean image from each patch (Section 2).

    The paper subtracts the mean image from the whole image and cuts the patch from the difference. The part to subtract
    therefore has the position of the patch and is mirrored if the patch is mirrored. The 2012 code always subtracts the
    central part, which is never mirrored: ``patches - centre_crop(mean)``.

    patches: (N, s, s, 3) from crop_and_mirror. mean: (H, W, 3). Returns float32 (N, 3, s, s), channels-last.
    """
    size = patches.shape[1]
    both = torch.stack([mean, mean.flip(1)])
    # a patch cut at `left` and then mirrored starts at column W - size - left of the mirrored mean
    left_in_both = torch.where(mirror, mean.shape[1] - size - lefts, lefts)
    windows = both.unfold(1, size, 1).unfold(2, size, 1).permute(0, 1, 2, 4, 5, 3)
    part = windows[mirror.long(), tops, left_in_both]
    return torch.sub(patches, part).permute(0, 3, 1, 2)


def principal_components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues and eigenvectors of an RGB covariance (3, 3).

    The eigenvalues (3,) are in ascending order. The columns of the second tensor (3, 3) are the eigenvectors.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    return values.clamp(min=0), vectors


COLOUR_UNITS = ("eigenvalue", "deviation")


def colour_noise_directions(covariance: Tensor, unit: str = "eigenvalue") -> Tensor:
    """Return a (3, 3) matrix with the columns p_i lambda_i of Section 4.1, in grey levels.

    covariance: covariance of RGB values on the 0-255 scale.
    unit: meaning of lambda_i.
        "eigenvalue": an eigenvalue of the covariance, as printed. The paper does not state the pixel scale. Pixels from
        0 to 255 would give noise of about 850 grey levels, which drowns the image. Training with the printed formula
        works only with pixels from 0 to 1, which give noise of about 3.3 grey levels.
        "deviation": the standard deviation of the component, as in the 2012 code, for noise of about 7.4 grey levels.
    """
    values, vectors = principal_components(covariance)
    scale = (values / 255**2) * 255 if unit == "eigenvalue" else values.sqrt()
    return (vectors * scale).float()


def add_colour_noise(images: Tensor, directions: Tensor, alphas: Tensor) -> Tensor:
    """Add colour noise to a batch of images, in place (Section 4.1, second form).

    The value added to every pixel of image n is sum_i directions[:, i] * alphas[n, i].

    images: (N, 3, H, W) float. directions: (3, 3). alphas: (N, 3), drawn from N(0, 0.1) once per image.
    """
    return images.add_((alphas.to(directions.dtype) @ directions.T)[:, :, None, None])


@lru_cache
def _grey_weights(device: torch.device) -> Tensor:
    """Return the shares of red, green and blue in grey, (3,), copied to a device once."""
    return torch.tensor([0.2989, 0.587, 0.114], device=device)


def jitter(patches: Tensor, factors: Tensor) -> Tensor:
    """Multiply the brightness, contrast and saturation of patches by the given factors.

    patches: (N, s, s, 3), on the 0-255 scale. factors: (N, 3). Returns float32.

    The paper does not use jitter; many re-implementations use it instead of colour noise. The steps are those of
    torchvision's ColorJitter: scale the pixels, then their difference from the image's mean grey level, then their
    difference from each pixel's grey level.
    """
    brightness, contrast, saturation = factors.float().T[:, :, None, None, None]
    grey_weights = _grey_weights(patches.device)
    images = (patches * brightness).clamp(0, 255)
    mean_grey = (images @ grey_weights).mean((1, 2))[:, None, None, None]
    images = (contrast * images + (1 - contrast) * mean_grey).clamp(0, 255)
    grey = (images @ grey_weights)[..., None]
    return (saturation * images + (1 - saturation) * grey).clamp(0, 255)


def ten_crop(images: Tensor, size: int = 224) -> Tensor:
    """Cut the corner and centre patches and their reflections: (N, 3, 256, 256) -> (N, 10, 3, 224, 224).

    Section 4.1: "five 224 x 224 patches (the four corner patches and the center patch) as well as their horizontal
    reflections", with offsets 0, 16 and 32. The order is top left, top right, bottom left, bottom right, centre,
    followed by the reflections in the same order. The prediction is the mean of the ten softmax outputs.

    Raises ValueError if an image is smaller than ``size``.
    """
    height, width = images.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"can't cut {size}x{size} patches from images of {height}x{width}")
    bottom, right = height - size, width - size
    places = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    pixels = images.permute(0, 2, 3, 1)
    crops = images.new_empty(len(images), 10, size, size, images.shape[1])  # channels-last, like the network
    for i, (top, left) in enumerate(places):
        crops[:, i] = pixels[:, top : top + size, left : left + size]
    crops[:, 5:] = crops[:, :5].flip(3)
    return crops.permute(0, 1, 4, 2, 3)


def nine_crop(images: Tensor, size: int) -> Tensor:
    """Cut a 3x3 grid of patches, without reflections: (N, 3, H, W) -> (N, 9, 3, size, size).

    The authors' CIFAR-10 programs used these crops for testing until March 2012, and ten_crop afterwards.
    """
    room = images.shape[-2] - size, images.shape[-1] - size
    pixels = images.permute(0, 2, 3, 1)
    places = [(row * room[0] // 2, column * room[1] // 2) for row in range(3) for column in range(3)]
    crops = [pixels[:, top : top + size, left : left + size] for top, left in places]
    return torch.stack(crops, 1).permute(0, 1, 4, 2, 3)


def centre_crop(images: Tensor, size: int = 224) -> Tensor:
    """Cut the central patch: (N, 3, 256, 256) -> (N, 3, 224, 224).

    This is the single view described in the footnote to Table 1.
    """
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]
