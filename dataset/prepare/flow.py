"""Optical flow stored as JPEG: the usual convention of two 8-bit channels clipped at 20 pixels.

Farneback's method with the parameters of mmaction2 (its alternative, TV-L1, is not in OpenCV's standard packages), from
one frame of the file to the next, in pixels of the stored frame. Red is x and green is y, as `(flow + 20) * 255 / 40`,
so 127.5 is no motion; blue is constant. The JPEG has no chroma subsampling, which would mix x and y of neighbouring
pixels.
"""

import numpy as np

BOUND = 20.0  # pixels; larger motion is clipped
REST = 128  # no motion
FARNEBACK = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}


def flow_between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 frames in OpenCV's order to the motion from the first to the second, (H, W, 2) float32 pixels."""
    import cv2

    grey = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in (first, second)]
    start = np.zeros((*grey[0].shape, 2), dtype=np.float32)
    return cv2.calcOpticalFlowFarneback(grey[0], grey[1], start, **FARNEBACK)


def flow_picture(flow: np.ndarray) -> np.ndarray:
    """(H, W, 2) pixels to the stored picture (H, W, 3) uint8 in OpenCV's order: blue, green = y, red = x."""
    levels = np.rint((flow.clip(-BOUND, BOUND) + BOUND) * (255 / (2 * BOUND))).astype(np.uint8)
    picture = np.full((*flow.shape[:2], 3), REST, dtype=np.uint8)
    picture[..., 2], picture[..., 1] = levels[..., 0], levels[..., 1]
    return picture


def motion_of(picture: np.ndarray) -> np.ndarray:
    """The inverse of `flow_picture`: (H, W, 3) to (H, W, 2) pixels, exact to BOUND / 255."""
    return picture[..., [2, 1]].astype(np.float32) * (2 * BOUND / 255) - BOUND
