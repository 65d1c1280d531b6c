"""Image similarity: PSNR and SSIM of two images of the same size, to check how visible a trigger is."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_PEAK = 255.0
_SIDE, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def psnr(image: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Peak signal-to-noise ratio in decibels, ``10 log10(255^2 / mean squared difference)``; infinite for equal ones.

    Args:
        image: levels 0..255 of any number type, [H, W] or [H, W, channels].
        reference: an image of the same shape.

    Raises:
        ValueError: the shapes differ or are no image's.
    """
    a, b = _pair(image, reference)
    error = float(np.mean((a - b) ** 2))
    return 10 * math.log10(_PEAK**2 / error) if error else math.inf


def ssim(image: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Mean structural similarity in [-1, 1]; 1 for equal pictures.

    Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity",
    IEEE Trans. Image Processing 13(4), 2004: a Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01,
    K2 = 0.03, averaged over the positions where the whole window lies inside. Colors are reduced to brightness, as in
    the paper: a change of hue alone does not lower SSIM, but does lower `psnr`. An image below 11 pixels gets a window
    of its own length in that direction.

    Args:
        image: levels 0..255 of any number type, [H, W] or red, green and blue [H, W, 3].
        reference: an image of the same shape.

    Raises:
        ValueError: the shapes differ or are no image's.
    """
    a, b = (_gray(pixels) for pixels in _pair(image, reference))
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * _PEAK) ** 2, (_K2 * _PEAK) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    mean = np.mean(likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.clip(mean, -1, 1))  # rounding may leave the range


def _pair(image: npt.ArrayLike, reference: npt.ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(image, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"pictures of different shapes, {a.shape} and {b.shape}; give two of the same shape")
    if a.ndim not in (2, 3) or not a.size:
        raise ValueError(f"a picture of shape {a.shape}; give [H, W] or [H, W, channels]")
    return a, b


def _gray(picture: Floats) -> Floats:
    if picture.ndim == 2:
        return picture
    if picture.shape[2] != 3:
        raise ValueError(f"ssim takes gray or RGB, not {picture.shape[2]} channels; convert the picture")
    return picture @ _LUMA


def _blur(plane: Floats) -> Floats:
    """Gaussian means at every position where the whole window lies inside: along one axis, then the other."""
    for _ in range(2):
        side = min(_SIDE, len(plane))
        weights = np.exp(-((np.arange(side) - (side - 1) / 2) ** 2) / (2 * _SIGMA**2))
        weights /= weights.sum()
        count = len(plane) - side + 1
        plane = sum((w * plane[k : k + count] for k, w in enumerate(weights)), np.zeros((count, plane.shape[1]))).T
    return plane
