import math

import numpy as np
import pytest

from tools.quality import psnr, ssim


def noise(height=30, width=41, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(height=60, width=80):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], axis=2).astype(np.uint8)


def plain_ssim(a, b):
    """The definition, window by window, in double precision."""
    x, y = (image.astype(np.float64) @ (0.299, 0.587, 0.114) for image in (a, b))
    rows, columns = min(7, x.shape[0]), min(7, x.shape[1])
    scores = []
    for top in range(x.shape[0] - rows + 1):
        for left in range(x.shape[1] - columns + 1):
            p, q = (plane[top : top + rows, left : left + columns] for plane in (x, y))
            covariance = np.mean((p - p.mean()) * (q - q.mean()))
            luminance = (2 * p.mean() * q.mean() + 6.5025) / (p.mean() ** 2 + q.mean() ** 2 + 6.5025)
            scores.append(luminance * (2 * covariance + 58.5225) / (p.var() + q.var() + 58.5225))
    return np.mean(scores)


def test_equal_images_are_infinitely_near_and_fully_alike():
    assert psnr(noise(), noise()) == math.inf
    assert ssim(noise(), noise()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("step", "decibels"), [(1, 48.1308), (10, 28.1308), (255, 0)])
def test_a_step_everywhere_has_the_ratio_of_255_to_it(step, decibels):
    a = np.zeros((20, 30, 3), np.uint8)
    assert psnr(a, a + np.uint8(step)) == pytest.approx(decibels, abs=1e-4)
    assert psnr(a + np.uint8(step), a) == psnr(a, a + np.uint8(step))


def test_psnr_counts_all_three_colours():
    a, b = picture(), picture()
    b[:, :, 2] ^= 3
    errors = [(int(p) - int(q)) ** 2 for p, q in zip(a.ravel(), b.ravel(), strict=True)]
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 * len(errors) / sum(errors)))


@pytest.mark.parametrize("shape", [(30, 41), (7, 7), (8, 100), (3, 20), (1, 1)])
def test_ssim_is_what_the_definition_says(shape):
    for a, b in (
        (noise(*shape), noise(*shape, seed=1)),
        (picture(*shape), noise(*shape) // 8 + picture(*shape) // 2),
        (picture(*shape), np.clip(picture(*shape).astype(int) + 40, 0, 255).astype(np.uint8)),
    ):
        assert ssim(a, b) == pytest.approx(plain_ssim(a, b), abs=2e-5)
        assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-6)


def test_flat_images_differ_in_luminance_alone():
    dark, light = np.full((20, 20, 3), 50, np.uint8), np.full((20, 20, 3), 200, np.uint8)
    assert ssim(dark, light) == pytest.approx((2 * 50 * 200 + 6.5025) / (50**2 + 200**2 + 6.5025), abs=1e-5)


def test_a_negative_is_unlike_and_more_noise_is_less_like():
    image = picture()
    strengths = [ssim(image, np.clip(image + noise(60, 80) / 255.0 * k, 0, 255).astype(np.uint8)) for k in (8, 32, 128)]
    assert strengths == sorted(strengths, reverse=True) and strengths[0] < 1
    assert ssim(noise(), 255 - noise()) < 0


def test_images_of_two_sizes_or_of_another_kind_are_refused():
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=r"two sizes cannot be compared: \(30, 41\) and \(30, 40\)"):
            measure(noise(), noise(width=40))
        for wrong in (noise().astype(np.float32), noise()[:, :, 0], noise()[:0]):
            with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8"):
                measure(wrong, wrong)
