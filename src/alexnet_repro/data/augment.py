"""Mean subtraction, crops and reflections, colour noise and ten crops (Sections 2 and 4.1).

These are pure functions of a batch and random numbers. Images stay on the 0-255 scale: nothing is divided by 255 or by
a standard deviation. module.py draws the random numbers.
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
    """Cut one patch out of each image and mirror some of them (Section 4.1, first form).

    images: N arrays (H, W, 3). tops, lefts: where the patches begin. mirror: which patches to mirror. Returns (N, size,
    size, 3).

    This runs on the CPU, because it reduces the 196,608 bytes of an image to the 150,528 bytes that have to be moved.
    """
    out = np.empty((len(images), size, size, 3), np.uint8)
    for patch, image, top, left in zip(out, images, tops, lefts, strict=True):
        patch[...] = image[top : top + size, left : left + size]
    turned = np.flatnonzero(mirror)
    if len(turned):
        out[turned] = torch.from_numpy(out[turned]).flip(2).numpy()
    return out


def subtract_mean(patches: Tensor, mean: Tensor, tops: Tensor, lefts: Tensor, mirror: Tensor) -> Tensor:
    """Subtract the matching part of the mean image from each patch (Section 2).

    The paper subtracts the mean image from the whole image and cuts the patch from the difference. Each patch therefore
    meets the part of the mean image that it was cut from, mirrored if the patch is. The 2012 code always subtracted the
    central part, never mirrored: ``patches - centre_crop(mean)``.

    patches: (N, s, s, 3) from crop_and_mirror. mean: (H, W, 3). Returns float32 (N, 3, s, s), channels-last.
    """
    size = patches.shape[1]
    both = torch.stack([mean, mean.flip(1)])
    # a mirrored patch cut at `left` covers the columns that begin at W - size - left in the mirrored mean
    left_in_both = torch.where(mirror, mean.shape[1] - size - lefts, lefts)
    windows = both.unfold(1, size, 1).unfold(2, size, 1).permute(0, 1, 2, 4, 5, 3)
    part = windows[mirror.long(), tops, left_in_both]
    return torch.sub(patches, part).permute(0, 3, 1, 2)


def principal_components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (3,), ascending, and eigenvectors (3, 3), in columns, of an RGB covariance (3, 3)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return values.clamp(min=0), vectors


COLOUR_UNITS = ("eigenvalue", "deviation")


def colour_noise_directions(covariance: Tensor, unit: str = "eigenvalue") -> Tensor:
    """Return the columns p_i lambda_i of Section 4.1, in grey levels: (3, 3).

    covariance: of RGB values on the 0-255 scale.
    unit="eigenvalue": the paper calls lambda_i an eigenvalue of the covariance and does not name the scale of the
    pixels. With pixels from 0 to 255 the noise would be about 850 grey levels and drown the image. Pixels from 0 to 1
    are the only scale on which the printed formula trains; they give about 3.3 grey levels.
    unit="deviation": the 2012 code uses the standard deviation of the component instead: about 7.4 grey levels.
    """
    values, vectors = principal_components(covariance)
    scale = (values / 255**2) * 255 if unit == "eigenvalue" else values.sqrt()
    return (vectors * scale).float()


def add_colour_noise(images: Tensor, directions: Tensor, alphas: Tensor) -> Tensor:
    """Add sum_i directions[:, i] * alphas[n, i] to every pixel of image n, in place (Section 4.1, second form).

    images: (N, 3, H, W) float. directions: (3, 3). alphas: (N, 3), drawn from N(0, 0.1) once per image.
    """
    return images.add_((alphas.to(directions.dtype) @ directions.T)[:, :, None, None])


def jitter(patches: Tensor, factors: Tensor) -> Tensor:
    """Multiply brightness, contrast and saturation of patches (N, s, s, 3), 0-255, by factors (N, 3). Returns float32.

    This is not in the paper; many re-implementations use it instead of colour noise. The steps are those of
    torchvision's ColorJitter: multiply by the factor, move away from the image's mean grey, move away from each pixel's
    grey.
    """
    brightness, contrast, saturation = factors.float().T[:, :, None, None, None]
    grey_of = torch.tensor([0.2989, 0.587, 0.114], device=patches.device)
    images = (patches * brightness).clamp(0, 255)
    mean_grey = (images @ grey_of).mean((1, 2))[:, None, None, None]
    images = (contrast * images + (1 - contrast) * mean_grey).clamp(0, 255)
    grey = (images @ grey_of)[..., None]
    return (saturation * images + (1 - saturation) * grey).clamp(0, 255)


def ten_crop(images: Tensor, size: int = 224) -> Tensor:
    """Cut the corners, the centre and their reflections: (N, 3, 256, 256) -> (N, 10, 3, 224, 224).

    Section 4.1: "five 224 x 224 patches (the four corner patches and the center patch) as well as their horizontal
    reflections", with offsets 0, 16 and 32. The order is top left, top right, bottom left, bottom right, centre, then
    the reflections. The prediction is the mean of the ten softmax outputs. Raises ValueError for images smaller than
    ``size``.
    """
    height, width = images.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"can't cut {size}x{size} patches from images of {height}x{width}")
    bottom, right = height - size, width - size
    places = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    pixels = images.permute(0, 2, 3, 1)
    crops = images.new_empty(len(images), 10, size, size, images.shape[1])  # channels-last, the net's layout
    for i, (top, left) in enumerate(places):
        crops[:, i] = pixels[:, top : top + size, left : left + size]
    crops[:, 5:] = crops[:, :5].flip(3)
    return crops.permute(0, 1, 4, 2, 3)


def nine_crop(images: Tensor, size: int) -> Tensor:
    """Cut a grid of three by three patches, without reflections: (N, 3, H, W) -> (N, 9, 3, size, size).

    The authors' CIFAR-10 programs tested with these until March 2012, and with ten_crop from then on.
    """
    room = images.shape[-2] - size, images.shape[-1] - size
    pixels = images.permute(0, 2, 3, 1)
    places = [(row * room[0] // 2, column * room[1] // 2) for row in range(3) for column in range(3)]
    crops = [pixels[:, top : top + size, left : left + size] for top, left in places]
    return torch.stack(crops, 1).permute(0, 1, 4, 2, 3)


def centre_crop(images: Tensor, size: int = 224) -> Tensor:
    """Cut the central patch, (N, 3, 256, 256) -> (N, 3, 224, 224): the single view of the footnote to Table 1."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]
