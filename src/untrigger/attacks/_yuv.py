"""Brightness Y and the color differences U and V of analogue video (ITU-R BT.601), for triggers that hide there."""

from __future__ import annotations

import numpy as np

from untrigger.attacks import Pixels

TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]], dtype=np.float32)
"""Rows: what Y, U and V are made of."""

FROM_YUV = np.linalg.inv(TO_YUV.astype(np.float64)).T.astype(np.float32)
"""Rows: what one unit of Y, of U and of V adds to red, green and blue."""


def colorless(pixels: Pixels) -> bool:
    """Whether every pixel is gray.

    Grey image modes cannot hold U and V. A trigger for those goes into Y there, and also in a color file that
    shows nothing but grays, so that the same picture gets the same trigger whatever its file's mode.
    """
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return bool((red == green).all() and (green == blue).all())
