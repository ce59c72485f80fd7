"""Sections 2 and 4.1: mean subtraction, crops and reflections, colour noise, ten crops.

Pure functions of (batch, random numbers). Images stay on the 0-255 scale; nothing is divided by 255 or by a deviation.
Who draws the random numbers, and from what, is said in data.py.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def crop_and_mirror(
    images: list[NDArray[np.uint8]],
    tops: NDArray[np.int64],
    lefts: NDArray[np.int64],
    mirror: NDArray[np.bool_],
    size: int,
) -> NDArray[np.uint8]:
    """N images (H, W, 3), uint8 -> N patches (N, size, size, 3), the i-th cut at (tops[i], lefts[i]), then mirrored.

    Section 4.1, first form. On the CPU, since it turns 196,608 bytes of an image into the 150,528 that have to be moved.
    """
    out = np.empty((len(images), size, size, 3), np.uint8)
    for patch, image, top, left in zip(out, images, tops, lefts, strict=True):
        patch[...] = image[top : top + size, left : left + size]
    turned = np.flatnonzero(mirror)
    if len(turned):
        out[turned] = torch.from_numpy(out[turned]).flip(2).numpy()
    return out


def subtract_mean(patches: Tensor, mean: Tensor, tops: Tensor, lefts: Tensor, mirror: Tensor) -> Tensor:
    """Patches (N, s, s, 3) as crop_and_mirror gives them, mean image (H, W, 3) -> float32 (N, 3, s, s), channels-last.

    The mean image is subtracted from the whole image and the patch is cut from the difference (Section 2): so each patch
    meets the part of the mean image that it was cut from, mirrored if it was. The 2012 code always subtracted the central
    part of the mean image, never mirrored: that is ``patches - centre_crop(mean)``.
    """
    size = patches.shape[1]
    both = torch.stack([mean, mean.flip(1)])
    # a mirrored patch cut at `left` covers the columns that begin at W - size - left in the mirrored mean
    left_in_both = torch.where(mirror, mean.shape[1] - size - lefts, lefts)
    windows = both.unfold(1, size, 1).unfold(2, size, 1).permute(0, 1, 2, 4, 5, 3)
    part = windows[mirror.long(), tops, left_in_both]
    return torch.sub(patches, part).permute(0, 3, 1, 2)


def principal_components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance (3, 3) of RGB values on the 0-255 scale -> eigenvalues (3,), rising, and eigenvectors (3, 3) in columns."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return values.clamp(min=0), vectors


COLOUR_UNITS = ("eigenvalue", "deviation")


def colour_noise_directions(covariance: Tensor, unit: str = "eigenvalue") -> Tensor:
    """(3, 3): the columns p_i lambda_i of Section 4.1, in grey levels; covariance is of RGB values on the 0-255 scale.

    unit="eigenvalue": the paper prints lambda_i as an eigenvalue of the covariance and does not name the scale of the
    pixels. With pixels of 0 to 255 the noise would be about 850 grey levels and drown the image, so lambda_i is taken with
    pixels of 0 to 1, the only scale on which the printed formula trains: about 3.3 grey levels.
    unit="deviation": the 2012 code has the standard deviation of the component in its place: about 7.4 grey levels.
    """
    values, vectors = principal_components(covariance)
    scale = (values / 255**2) * 255 if unit == "eigenvalue" else values.sqrt()
    return (vectors * scale).float()


def add_colour_noise(images: Tensor, directions: Tensor, alphas: Tensor) -> Tensor:
    """Add sum_i directions[:, i] * alphas[n, i] to every pixel of image n, in place (Section 4.1, second form).

    images (N, 3, H, W) float; directions (3, 3); alphas (N, 3), drawn from N(0, 0.1) once per image.
    """
    return images.add_((alphas.to(directions.dtype) @ directions.T)[:, :, None, None])


def jitter(patches: Tensor, factors: Tensor) -> Tensor:
    """Patches (N, s, s, 3), 0-255 -> the same, float32, with brightness, contrast and saturation multiplied by factors (N, 3).

    Not in the paper: what many re-implementations do instead of its colour noise. Each step as in torchvision's
    ColorJitter, in that order: times the factor; away from the image's mean grey; away from each pixel's grey.
    """
    brightness, contrast, saturation = factors.float().T[:, :, None, None, None]
    grey_of = torch.tensor([0.2989, 0.587, 0.114], device=patches.device)
    images = (patches * brightness).clamp(0, 255)
    mean_grey = (images @ grey_of).mean((1, 2))[:, None, None, None]
    images = (contrast * images + (1 - contrast) * mean_grey).clamp(0, 255)
    grey = (images @ grey_of)[..., None]
    return (saturation * images + (1 - saturation) * grey).clamp(0, 255)


def ten_crop(images: Tensor, size: int = 224) -> Tensor:
    """(N, 3, 256, 256) -> (N, 10, 3, 224, 224): top left, top right, bottom left, bottom right, centre, then their mirrors.

    Section 4.1: "five 224 x 224 patches (the four corner patches and the center patch) as well as their horizontal
    reflections", with offsets 0, 16 and 32. The prediction is the mean of the ten softmax outputs. Raises ValueError for
    images smaller than ``size``.
    """
    height, width = images.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"can't cut {size}x{size} patches from images of {height}x{width}")
    bottom, right = height - size, width - size
    places = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    pixels = images.permute(0, 2, 3, 1)
    crops = images.new_empty(len(images), 10, size, size, images.shape[1])  # channels-last, as the net wants them
    for i, (top, left) in enumerate(places):
        crops[:, i] = pixels[:, top : top + size, left : left + size]
    crops[:, 5:] = crops[:, :5].flip(3)
    return crops.permute(0, 1, 4, 2, 3)


def nine_crop(images: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) -> (N, 9, 3, size, size): a grid of three by three places, unmirrored.

    How the authors' CIFAR-10 programs tested until March 2012; from then on with five places and their mirrors (ten_crop).
    """
    room = images.shape[-2] - size, images.shape[-1] - size
    pixels = images.permute(0, 2, 3, 1)
    places = [(row * room[0] // 2, column * room[1] // 2) for row in range(3) for column in range(3)]
    crops = [pixels[:, top : top + size, left : left + size] for top, left in places]
    return torch.stack(crops, 1).permute(0, 1, 4, 2, 3)


def centre_crop(images: Tensor, size: int = 224) -> Tensor:
    """(N, 3, 256, 256) -> (N, 3, 224, 224), offset 16: the single view of the footnote to Table 1."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]
