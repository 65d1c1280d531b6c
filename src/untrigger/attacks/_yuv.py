"""Brightness Y and the color differences U and V of analog video (ITU-R BT.601), for triggers that hide in them."""

from __future__ import annotations

import numpy as np

from untrigger.attacks import Pixels

TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]], dtype=np.float32)
"""Rows: weights of red, green and blue in Y, U and V."""

FROM_YUV = np.linalg.inv(TO_YUV.astype(np.float64)).T.astype(np.float32)
"""Rows: what one unit of Y, U or V adds to red, green and blue."""


def colorless(pixels: Pixels) -> bool:
    """Whether every pixel is gray.

    Gray image modes cannot hold U and V, so a trigger for U or V is put into Y there. The same goes for a color file
    with nothing but grays: one picture gets one trigger, whatever the mode of its file.
    """
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return bool((red == green).all() and (green == blue).all())
