"""The random numbers of a view: where they come from, and that their laws are torchvision's."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.transforms import ColorJitter, RandomResizedCrop

from pipelines.draws import LANES, OPERATIONS, centre_view, draw_randaugment, draw_view, uniforms
from ressl.config import ViewConfig

DRAWS = 20_000
SIGMAS = 4  # a right law fails one bound in 16,000; the seeds are fixed, so what passes once passes always

STRONG = ViewConfig(
    size=32, crop_scale=(0.2, 1), jitter_prob=0.8, grayscale_prob=0.2, blur_prob=0.5, solarize_prob=0.1, flip_prob=0.5
)


def draw(cfg=STRONG, size=(400, 400), count=DRAWS, seed=0, epoch=0, view=1):
    original = torch.tensor([size], dtype=torch.int32).expand(count, 2)
    return draw_view(cfg, original, torch.arange(count), seed=seed, epoch=epoch, view=view)


def bits(index, **key) -> list:
    return (uniforms(torch.tensor(index), **key).double() * 2**24).long().tolist()


def spread_of_variance(x: np.ndarray) -> float:
    """The standard deviation of the variance of a sample like x."""
    deviation = x - x.mean()
    return math.sqrt(max(0.0, (deviation**4).mean() - x.var() ** 2) / len(x))


def assert_same_law(ours: np.ndarray, theirs: np.ndarray, grid: float = 0.0):
    """Equal mean and variance within the error of the samples; `grid` is the width of rounding in one of them."""
    mean_error = math.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
    assert abs(ours.mean() - theirs.mean()) <= SIGMAS * mean_error + grid
    variance_error = math.hypot(spread_of_variance(ours), spread_of_variance(theirs))
    assert abs(ours.var() - theirs.var()) <= SIGMAS * variance_error + 2 * grid * ours.std() + grid**2


def assert_uniform(x: np.ndarray, low: float, high: float):
    assert low <= x.min() <= x.max() <= high
    counts, _ = np.histogram(x, bins=50, range=(low, high))
    chi_square = ((counts - len(x) / 50) ** 2 / (len(x) / 50)).sum()
    assert abs(chi_square - 49) < SIGMAS * math.sqrt(2 * 49)


def assert_rate(x: torch.Tensor, rate: float):
    x = x.double()
    assert abs(x.mean().item() - rate) < SIGMAS * math.sqrt(rate * (1 - rate) / len(x))


# --- the bits --------------------------------------------------------------------------------------------------------


def test_the_bits_never_change():
    assert bits([0, 1, 1_281_166], seed=0, epoch=0, view=0, lanes=4) == [
        [16577532, 9667132, 14584650, 16624770],
        [10817320, 420333, 2143099, 8270036],
        [1267897, 156145, 3441169, 821661],
    ]
    assert bits([5, 2**40], seed=2**31 - 1, epoch=199, view=5, lanes=3) == [
        [11999771, 14338226, 8916617],
        [13608861, 4281467, 9227533],
    ]


def test_the_parameters_never_change():
    params = draw_view(STRONG, torch.tensor([[375, 500]]), torch.tensor([42]), seed=1, epoch=2, view=1)
    assert params.box[0].tolist() == pytest.approx([0.0431834, 0.2328065, 0.844386, 0.7226456], abs=1e-6)
    assert params.jitter[0].tolist() == pytest.approx([0.7985683, 1.330771, 1.023788, -0.065139], abs=1e-6)
    assert params.order[0].tolist() == [3, 1, 0, 2]
    assert params.sigma.item() == pytest.approx(1.3200443, abs=1e-6)
    assert (params.flip.item(), params.grayscale.item(), params.solarize.item()) == (True, True, False)


def test_the_bits_are_splitmix64_of_the_key():
    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    for seed, epoch, view, index in [(0, 0, 0, 0), (3, 1, 4, 15), (2**31 - 1, 999, 1 << 20, 2**50)]:
        row = mix(mix(index) ^ mix(mix(mix(seed) + epoch) + view))
        expected = [mix((row + lane * 0x9E3779B97F4A7C15) % 2**64) >> 40 for lane in range(LANES)]
        assert bits([index], seed=seed, epoch=epoch, view=view, lanes=LANES) == [expected]


def test_numbers_do_not_depend_on_the_batch_or_its_order():
    key = {"seed": 7, "epoch": 3, "view": 2, "lanes": LANES}
    whole = uniforms(torch.arange(64), **key)
    mixed = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(mixed, **key), whole[mixed])
    for i in (0, 17, 63):
        assert torch.equal(uniforms(torch.tensor([i]), **key), whole[i : i + 1])


def test_a_view_does_not_depend_on_the_batch_or_its_order():
    index = torch.tensor([3, 900, 14, 0, 55])
    size = torch.tensor([[30, 40], [500, 20], [7, 7], [64, 64], [1, 9]])
    whole = draw_view(STRONG, size, index, seed=1, epoch=1, view=1)
    for i in range(5):
        alone = draw_view(STRONG, size[i : i + 1], index[i : i + 1], seed=1, epoch=1, view=1)
        for name in whole.__slots__:
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[i]), name


def test_numbers_differ_by_seed_epoch_view_index_and_lane():
    keys = list(itertools.product(range(8), range(8), range(8)))
    rows = torch.cat([uniforms(torch.arange(8), seed=s, epoch=e, view=v, lanes=8) for s, e, v in keys])
    numbers = rows.flatten()  # 32,768 draws out of 2**24 values
    collisions = len(numbers) - len(numbers.unique())
    expected = len(numbers) ** 2 / 2 / 2**24
    assert collisions < expected + SIGMAS * math.sqrt(expected)


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"view": 1}])
def test_numbers_of_neighbouring_keys_are_not_correlated(other):
    key = {"seed": 0, "epoch": 0, "view": 0, "lanes": 4}
    index = torch.arange(DRAWS)
    a, b = uniforms(index, **key).double(), uniforms(index, **(key | other)).double()
    correlation = ((a - 0.5) * (b - 0.5)).mean(dim=0) * 12
    assert correlation.abs().max() < SIGMAS / math.sqrt(DRAWS)


def test_lanes_and_neighbouring_images_are_not_correlated():
    u = uniforms(torch.arange(DRAWS), seed=0, epoch=0, view=0, lanes=LANES).double() - 0.5
    lanes = (u.T @ u) * 12 / DRAWS
    pairs = lanes[~torch.eye(LANES, dtype=torch.bool)]
    # the largest of 630 such numbers stays below 5 sigma
    assert pairs.abs().max() < 5 / math.sqrt(DRAWS)
    assert ((u[1:] * u[:-1]).mean(dim=0) * 12).abs().max() < 5 / math.sqrt(DRAWS)


@pytest.mark.parametrize("lane", [0, 1, LANES - 1])
def test_numbers_are_uniform(lane):
    u = uniforms(torch.arange(DRAWS), seed=0, epoch=0, view=0, lanes=LANES)[:, lane].double().numpy()
    assert_uniform(u, 0, 1)
    assert abs(u.mean() - 0.5) < SIGMAS / math.sqrt(12 * DRAWS)
    assert u.max() < 1


# --- crops -----------------------------------------------------------------------------------------------------------


@functools.cache
def torchvision_crops(size, cfg) -> np.ndarray:
    """(DRAWS, 4) top, left, height, width in pixels."""
    image = torch.empty(1).expand(3, *size)  # only its shape is read
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        crops = [RandomResizedCrop.get_params(image, list(cfg.crop_scale), list(cfg.crop_ratio)) for _ in range(DRAWS)]
    return np.array(crops, float)


@pytest.mark.parametrize("size", [(4000, 4000), (2000, 4000), (4000, 2000), (1000, 5000), (5000, 1000)])
def test_crops_follow_the_law_of_torchvision(size):
    cfg = ViewConfig(size=32, crop_scale=(0.2, 1.0))
    theirs = torchvision_crops(size, cfg)
    ours = (draw(cfg, size).box.double() * torch.tensor([*size, *size])).numpy()
    pixel = 1 / min(size)  # they round to pixels
    total = size[0] * size[1]
    assert_same_law(ours[:, 2] * ours[:, 3] / total, theirs[:, 2] * theirs[:, 3] / total, pixel)
    assert_same_law(np.log(ours[:, 3] / ours[:, 2]), np.log(theirs[:, 3] / theirs[:, 2]), 2 * pixel)
    assert_same_law(ours[:, 0] / size[0], theirs[:, 0] / size[0], pixel)
    assert_same_law(ours[:, 1] / size[1], theirs[:, 1] / size[1], pixel)
    # where in the room that is left
    for side in (0, 1):
        free = [crops[crops[:, 2 + side] < 0.95 * size[side]] for crops in (ours, theirs)]
        ours_at, theirs_at = (c[:, side] / (size[side] - c[:, 2 + side]) for c in free)
        assert_same_law(ours_at, theirs_at, 20 * pixel)


@pytest.mark.parametrize("size", [(4000, 4000), (300, 450), (64, 5000)])
def test_crops_lie_inside_the_image_within_the_bounds_of_area_and_aspect(size):
    cfg = ViewConfig(size=32, crop_scale=(0.08, 0.5), crop_ratio=(0.5, 3.0))
    top, left, height, width = draw(cfg, size).box.double().unbind(1)
    slack = 1e-6
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + slack
    aspect = width * size[1] / (height * size[0])
    assert 0.5 - slack <= aspect.min() <= aspect.max() <= 3 + 3 * slack
    fallback = (height > 1 - slack) | (width > 1 - slack)
    area = (height * width)[~fallback]
    assert len(area) == 0 or 0.08 - slack <= area.min() <= area.max() <= 0.5 + slack


@pytest.mark.parametrize(("size", "largest"), [((1000, 5000), (1000, 4000 / 3)), ((5000, 1000), (4000 / 3, 1000))])
def test_the_fallback_is_the_largest_centred_crop_and_as_frequent_as_in_torchvision(size, largest):
    cfg = ViewConfig(size=32, crop_scale=(0.2, 1.0))
    ours = (draw(cfg, size).box.double() * torch.tensor([*size, *size])).numpy()
    theirs = torchvision_crops(size, cfg)
    expected = [(size[0] - largest[0]) / 2, (size[1] - largest[1]) / 2, *largest]
    fell = [np.abs(crops - expected).max(axis=1) < 1 for crops in (ours, theirs)]
    assert 0.1 < fell[0].mean() < 0.95  # both cases were drawn
    assert_same_law(*(f.astype(float) for f in fell))
    assert np.allclose(ours[fell[0]], expected, atol=0.01)


def test_an_image_beyond_every_ratio_always_gets_its_centre():
    box = draw(ViewConfig(size=32, crop_scale=(0.5, 1.0)), (100, 2000), count=100).box
    assert torch.allclose(box, torch.tensor([0, 0.5 - 1 / 30, 1, 1 / 15]).expand(100, 4), atol=1e-6)


def test_a_resized_copy_of_an_image_gets_the_same_parameters():
    """The boxes differ by the rounding of a ratio of floats, and only where no power of two is the factor."""
    ours, half, tenth = (draw(size=size, count=500) for size in [(3000, 4000), (1500, 2000), (300, 400)])
    assert torch.equal(ours.box, half.box)
    assert torch.allclose(ours.box, tenth.box, atol=1e-6)
    for name in ("flip", "jitter", "order", "grayscale", "sigma", "solarize"):
        assert torch.equal(getattr(ours, name), getattr(tenth, name))


def test_crops_of_different_views_and_epochs_differ():
    boxes = [draw(count=10, epoch=e, view=v).box for e in range(3) for v in range(3)]
    assert len(torch.cat(boxes).unique(dim=0)) == 90


# --- the rest --------------------------------------------------------------------------------------------------------


def test_each_step_has_its_rate():
    params = draw()
    jittered = (params.jitter != torch.tensor([1, 1, 1, 0])).any(dim=1)
    for happens, rate in [
        (params.flip, 0.5),
        (jittered, 0.8),
        (params.grayscale, 0.2),
        (params.sigma > 0, 0.5),
        (params.solarize, 0.1),
    ]:
        assert_rate(happens, rate)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_of_zero_or_one_is_exact(rate):
    names = ("flip_prob", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob")
    params = draw(ViewConfig(size=8, **dict.fromkeys(names, rate)), count=1000)
    jittered = (params.jitter != torch.tensor([1, 1, 1, 0])).all(dim=1)
    for happens in (params.flip, params.grayscale, params.solarize, params.sigma > 0, jittered):
        assert happens.double().mean() == rate


def test_steps_happen_independently_of_each_other():
    params = draw()
    jittered = params.jitter[:, 0] != 1
    events = torch.stack([params.flip, jittered, params.grayscale, params.sigma > 0, params.solarize]).double()
    off_diagonal = torch.corrcoef(events)[~torch.eye(5, dtype=torch.bool)]
    assert off_diagonal.abs().max() < SIGMAS / math.sqrt(DRAWS)


@pytest.mark.parametrize("strength", [(0.4, 0.4, 0.4, 0.1), (1.5, 0.2, 1.0, 0.5)])
def test_jitter_factors_are_uniform_over_the_ranges_of_torchvision(strength):
    params = draw(ViewConfig(size=8, jitter_prob=1.0, jitter=strength))
    theirs = ColorJitter(*strength)
    ranges = (theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue)
    for column, (low, high) in zip(params.jitter.double().unbind(1), ranges, strict=True):
        assert_uniform(column.numpy(), low - 1e-6, high + 1e-6)
        assert abs(column.mean() - (low + high) / 2) < SIGMAS * (high - low) / math.sqrt(12 * DRAWS)


def test_a_strength_of_zero_changes_nothing():
    params = draw(ViewConfig(size=8, jitter_prob=1.0, jitter=(0.4, 0.0, 0.4, 0.0)), count=1000)
    assert torch.equal(params.jitter[:, [1, 3]], torch.tensor([1.0, 0.0]).expand(1000, 2))


def test_all_orders_of_jitter_are_equally_likely():
    _, counts = draw().order.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    chi_square = ((counts - DRAWS / 24) ** 2 / (DRAWS / 24)).sum().item()
    assert abs(chi_square - 23) < SIGMAS * math.sqrt(2 * 23)


def test_sigma_is_uniform_over_its_range():
    sigma = draw().sigma.double()
    assert_uniform(sigma[sigma > 0].numpy(), 0.1 - 1e-6, 2.0 + 1e-6)


# --- RandAugment ------------------------------------------------------------------------------------------------------

RANDAUGMENT = STRONG.model_copy(update={"randaugment": (3, 10)})


def test_randaugment_takes_lanes_of_its_own():
    """All other numbers of a view are what they were before there was RandAugment."""
    assert LANES == 36
    key = {"seed": 4, "epoch": 2, "view": 3}
    index = torch.arange(50)
    whole = uniforms(index, **key, lanes=LANES + 6)
    assert torch.equal(whole[:, :LANES], uniforms(index, **key, lanes=LANES))
    assert torch.equal(whole[:, LANES:], uniforms(index, **key, lanes=6, first=LANES))
    operations, reverse = draw_randaugment(RANDAUGMENT, index, **key)
    assert torch.equal(operations, (whole[:, LANES::2] * 14).floor().long())
    assert torch.equal(reverse, whole[:, LANES + 1 :: 2] < 0.5)
    plain, augmented = (draw(cfg, count=50) for cfg in (STRONG, RANDAUGMENT))
    for name in plain.__slots__[:-2]:
        assert torch.equal(getattr(plain, name), getattr(augmented, name)), name
    assert plain.__slots__[-2:] == ("operations", "reverse")


def test_operations_and_their_ways_never_change():
    params = draw_view(RANDAUGMENT, torch.tensor([[375, 500]]), torch.tensor([42]), seed=1, epoch=2, view=1)
    assert params.operations.tolist() == [[8, 12, 1]]
    assert params.reverse.tolist() == [[True, True, True]]


def test_operations_are_uniform_and_half_of_them_go_the_other_way():
    params = draw(RANDAUGMENT)
    for turn in range(3):
        for operation in range(len(OPERATIONS)):
            assert_rate(params.operations[:, turn] == operation, 1 / 14)
        assert_rate(params.reverse[:, turn], 0.5)
    pairs = (params.operations[:, 0] * 14 + params.operations[:, 1]).bincount(minlength=196)
    chi_square = ((pairs - DRAWS / 196) ** 2 / (DRAWS / 196)).sum().item()
    assert abs(chi_square - 195) < SIGMAS * math.sqrt(2 * 195)
    assert abs(torch.corrcoef(torch.stack([params.operations[:, 0], params.reverse[:, 0]]).double())[0, 1]) < (
        SIGMAS / math.sqrt(DRAWS)
    )


@pytest.mark.parametrize("n", [1, 2, 14])
def test_there_are_n_operations_of_which_the_first_do_not_depend_on_n(n):
    params = draw(STRONG.model_copy(update={"randaugment": (n, 30)}), count=100)
    assert params.operations.shape == params.reverse.shape == (100, n)
    assert (params.operations.dtype, params.reverse.dtype) == (torch.int64, torch.bool)
    most = draw(STRONG.model_copy(update={"randaugment": (14, 5)}), count=100)
    assert torch.equal(params.operations, most.operations[:, :n])
    assert torch.equal(params.reverse, most.reverse[:, :n])


def test_without_randaugment_there_are_no_operations():
    sizes = torch.tensor([[30, 40]]).expand(7, 2)
    for params in (draw(STRONG, count=7), centre_view(sizes, size=8, resize=8)):
        assert params.operations.shape == params.reverse.shape == (7, 0)
        assert (params.operations.dtype, params.reverse.dtype) == (torch.int64, torch.bool)


# --- the centre ------------------------------------------------------------------------------------------------------


def test_the_centre_view_takes_the_centre_and_changes_nothing_else():
    params = centre_view(torch.tensor([[100, 200], [300, 200], [64, 64]]), size=56, resize=64)
    side = 56 / 64
    expected = [
        [(1 - side) / 2, (1 - side / 2) / 2, side, side / 2],
        [(1 - side / 1.5) / 2, (1 - side) / 2, side / 1.5, side],
        [(1 - side) / 2, (1 - side) / 2, side, side],
    ]
    assert torch.allclose(params.box, torch.tensor(expected))
    assert not (params.flip | params.grayscale | params.solarize | (params.sigma > 0)).any()
    assert params.jitter.tolist() == [[1, 1, 1, 0]] * 3
