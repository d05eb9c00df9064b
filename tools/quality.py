"""How far an image is from another of the same size: PSNR and SSIM, in numpy alone, so that a forked worker can."""

import numpy as np

WINDOW = 7  # pixels; a side of SSIM's uniform window
MIDDLE = np.float32(128)
LUMA = (0.299, 0.587, 0.114)  # of R, G, B (ITU-R BT.601)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two (H, W, 3) uint8 images, over all three colours; inf where they are equal.

    Raises ValueError for other shapes or types.
    """
    _check(a, b)
    difference = a.astype(np.int16) - b
    error = float(np.mean(np.square(difference, dtype=np.int32)))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of the luma of two (H, W, 3) uint8 images: 1 where they are equal, less elsewhere.

    Wang et al. 2004 ("Image Quality Assessment: From Error Visibility to Structural Similarity", section III.B) with
    K1 = 0.01, K2 = 0.03 and a uniform window of 7 x 7 pixels, cut to the image's sides where those are less, at every
    place where it lies inside the image; variances are of the whole population. Raises ValueError for other shapes or
    types.
    """
    _check(a, b)
    x, y = _luma(a), _luma(b)
    mean_x, mean_y = _window_means(x), _window_means(y)
    variances = _window_means(x * x + y * y) - (mean_x * mean_x + mean_y * mean_y)
    covariance = _window_means(x * y) - mean_x * mean_y
    mean_x += MIDDLE
    mean_y += MIDDLE
    c1, c2 = np.float32((0.01 * 255) ** 2), np.float32((0.03 * 255) ** 2)
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    score /= (mean_x * mean_x + mean_y * mean_y + c1) * (variances + c2)
    return float(score.mean(dtype=np.float64))


def _check(a: np.ndarray, b: np.ndarray) -> None:
    for image in (a, b):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"expected (H, W, 3) uint8 images, not {image.shape} {image.dtype}")
    if a.shape != b.shape:
        raise ValueError(f"images of two sizes cannot be compared: {a.shape[:2]} and {b.shape[:2]}")


def _luma(image: np.ndarray) -> np.ndarray:
    """(H, W) float32, less MIDDLE: variances of small numbers lose fewer digits."""
    return image @ np.asarray(LUMA, np.float32) - MIDDLE


def _window_means(plane: np.ndarray) -> np.ndarray:
    """Means over all windows. Added up and not taken from running sums, which lose digits."""
    rows, columns = min(WINDOW, plane.shape[0]), min(WINDOW, plane.shape[1])
    height, width = plane.shape[0] - rows + 1, plane.shape[1] - columns + 1
    down = plane[:height].copy()
    for start in range(1, rows):
        down += plane[start : start + height]
    total = down[:, :width].copy()
    for start in range(1, columns):
        total += down[:, start : start + width]
    return np.divide(total, rows * columns, out=total)
