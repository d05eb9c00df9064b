"""The fused kernels against the definition in pipelines/views.py, step by step and all in a row.

The definition runs on the CPU, the kernels on the GPU or, without one, in Triton's interpreter: so views are small.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.draws import ViewParams, draw_view
from pipelines.frames import Frames, pack
from pipelines.kernels.views import cut_views
from pipelines.randaugment import randaugment
from pipelines.views import blur_matrix, color_jitter, cut_view, normalise, resize_matrix
from ressl.config import ViewConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and std of a view that stays in [0, 1]
STRONG = ViewConfig(
    size=12, jitter_prob=0.8, grayscale_prob=0.3, blur_prob=0.5, blur_sigma=(0.1, 1.0), solarize_prob=0.4
)
SHAPES = ((20, 30), (9, 41), (1, 17), (33, 5))  # of a batch's images

# between two computations in float32, in units of [0, 1] before normalising
CROP, COLOUR, HUE, BLUR = 2e-6, 1e-5, 1e-5, 2e-6
CHAIN = 2e-5  # of all steps, divided by std
LARGE_CROP = 2e-5  # the place of a tap at 500 pixels is known to 3e-5 of a pixel


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 noise: no neighbours are alike, so that every tap's weight is seen."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def batch(images: list[np.ndarray]) -> Frames:
    sizes = np.array([image.shape[:2] for image in images])
    return pack(images, sizes, np.arange(len(images)), np.full(len(images), -1))


def pictures(shapes=SHAPES) -> Frames:
    return batch([picture(seed, *shape) for seed, shape in enumerate(shapes)])


def scattered(shapes, fill: int) -> Frames:
    """The same pictures with rows apart, in the reverse order and with gaps, in a buffer full of `fill`."""
    tight = pictures(shapes)
    pixels, offset, at = np.full(1 << 16, fill, np.uint8), [0] * len(shapes), 11
    strides = [3 * width + 7 * i for i, (_, width) in enumerate(shapes)]
    for i in reversed(range(len(shapes))):
        offset[i] = at
        for row in picture(i, *shapes[i]):
            pixels[at : at + row.size] = row.reshape(-1)
            at += strides[i]
        at += 5
    pixels = torch.from_numpy(pixels[: at + 3 * tight.extent[1]].copy())
    return replace(tight, pixels=pixels, offset=torch.tensor(offset), stride=torch.tensor(strides, dtype=torch.int32))


def plain(count: int, **changes: Tensor) -> ViewParams:
    """Parameters that take the whole image and change nothing, but for `changes`."""
    no = torch.zeros(count, dtype=torch.bool)
    none = torch.zeros(count, 0, dtype=torch.int64)
    return replace(
        ViewParams(
            box=torch.tensor([[0.0, 0, 1, 1]]).repeat(count, 1),
            flip=no,
            jitter=torch.tensor([[1.0, 1, 1, 0]]).repeat(count, 1),
            order=torch.arange(4).repeat(count, 1),
            grayscale=no,
            sigma=torch.zeros(count),
            solarize=no,
            operations=none,
            reverse=none.bool(),
        ),
        **changes,
    )


def draw(cfg: ViewConfig, frames: Frames, seed: int = 0) -> ViewParams:
    return draw_view(cfg, frames.original, frames.index, seed=seed, epoch=0, view=1)


def moved(params: ViewParams) -> ViewParams:
    return ViewParams(*(getattr(params, name).to(DEVICE) for name in params.__slots__))


def cut(frames: Frames, params: ViewParams, cfg: ViewConfig, mean=ZERO, std=ONE, dtype=torch.float32) -> Tensor:
    (view,) = cut_views(frames.to(DEVICE), [moved(params)], [cfg], mean=mean, std=std, dtype=dtype)
    return view.cpu()


def error(frames: Frames, params: ViewParams, cfg: ViewConfig) -> float:
    """The largest deviation from the definition, in units of [0, 1]."""
    return worst(cut(frames, params, cfg), cut_view(frames, params, cfg, mean=ZERO, std=ONE))


def worst(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def solarize_is_sure(frames: Frames, params: ViewParams, cfg: ViewConfig) -> Tensor:
    """(B, 3, size, size) bool: values on the threshold but for rounding may be inverted or not."""
    before = cut_view(frames, params, cfg.model_copy(update={"solarize_prob": 0.0}), mean=ZERO, std=ONE)
    return (before - 128 / 255).abs() > COLOUR


# --- crop, resize, flip ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 13, 28])
def test_crops_of_ragged_images_are_those_of_the_definition(size):
    """On and off the grid, shrunk and enlarged, of one row, of one column, of one pixel, mirrored and not."""
    shapes = [(50, 70), (40, 60), (90, 33), (20, 24), (20, 24), (9, 1), (1, 40), (1, 1), (3, 120), (20, 20)]
    box = [
        [0.2, 0.25, 0.5, 0.3],
        [0, 0, 1, 1],
        [0.123, 0.456, 0.789, 0.432],
        [0.35, 0.375, 0.15, 0.125],
        [0.95, 23 / 24, 0.05, 1 / 24],
        [0, 0, 1, 1],
        [0, 0.1, 1, 0.7],
        [0.3, 0.3, 0.2, 0.4],
        [0.1, 0.0417, 0.0003, 0.9],
        [2.9996 / 20, 5.0004 / 20, 7.0008 / 20, 7.9994 / 20],  # on the grid but for a rounding
    ]
    params = plain(len(box), box=torch.tensor(box), flip=torch.arange(len(box)) % 2 == 1)
    assert error(scattered(shapes, 255), params, ViewConfig(size=size)) < CROP


def test_random_crops_are_those_of_the_definition():
    frames = pictures([(7 + 5 * i, 60 - 9 * i) for i in range(6)])
    cfg = ViewConfig(size=7, crop_scale=(0.05, 1))
    for seed in range(3):
        assert error(frames, draw(cfg, frames, seed), cfg) < CROP


def test_a_box_at_the_far_corner_reads_no_byte_outside_of_its_image():
    """Also where its end lies beyond the image by a rounding, or all of it does."""
    shapes = ((6, 5), (8, 8))
    box = torch.tensor([[0.5, 0.5, 0.50001, 0.50001], [1.0, 1.0, 0.0, 0.0]])
    cfg = ViewConfig(size=5)
    black, white = (cut(scattered(shapes, fill), plain(2, box=box), cfg) for fill in (0, 255))
    assert torch.equal(black, white)
    corner = torch.from_numpy(picture(1, 8, 8)[7, 7].copy()).view(3, 1, 1) / 255
    assert worst(black[1], corner.expand(3, 5, 5)) < CROP


def test_a_large_crop_is_the_definition_s_up_to_the_rounding_of_places():
    frames, cfg = pictures([(375, 500)]), ViewConfig(size=32)
    assert error(frames, draw(cfg, frames), cfg) < LARGE_CROP


def test_a_flip_mirrors_the_images_it_is_meant_for():
    frames, cfg = pictures(), ViewConfig(size=9)
    flip = torch.tensor([True, False, False, True])
    straight, mixed = cut(frames, plain(4), cfg), cut(frames, plain(4, flip=flip), cfg)
    expected = torch.where(flip.view(4, 1, 1, 1), straight.flip(3), straight)
    assert torch.equal(mixed, expected)
    assert worst(straight, expected) > 0.1


def test_bytes_outside_the_images_never_reach_a_view():
    params = draw(STRONG, pictures())
    views = [cut(frames, params, STRONG) for frames in (scattered(SHAPES, 0), scattered(SHAPES, 255), pictures())]
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", range(4))
def test_each_jitter_is_that_of_the_definition(op):
    values = [-0.5, -0.1, 0.0, 0.003, 0.1, 0.5] if op == 3 else [0.0, 0.3, 0.97, 1.0, 1.4, 3.0]
    jitter = torch.tensor([[1.0, 1, 1, 0]]).repeat(6, 1)
    jitter[:, op] = torch.tensor(values)
    cfg = ViewConfig(size=8, jitter_prob=1.0)
    assert error(pictures([(8, 8)] * 6), plain(6, jitter=jitter), cfg) < (HUE if op == 3 else COLOUR)


def test_hues_of_gray_black_white_and_pure_colours_are_those_of_the_definition():
    colours = np.array(list(itertools.product((0, 128, 255), repeat=3)), np.uint8)
    image = np.concatenate([colours, colours[:22]]).reshape(7, 7, 3)
    jitter = torch.tensor([[1, 1, 1, turn] for turn in (-0.5, -0.25, 0.1, 0.5)])
    cfg = ViewConfig(size=7, jitter_prob=1.0)
    assert error(batch([image] * 4), plain(4, jitter=jitter), cfg) < HUE


@pytest.mark.parametrize("later", [{}, {"blur_prob": 1.0}])
def test_every_image_is_jittered_in_its_own_order(later):
    """In a view that ends with the colours, and in one that is blurred after them."""
    orders = torch.tensor(list(itertools.permutations(range(4))))
    params = plain(24, jitter=torch.tensor([[1.4, 0.5, 1.6, 0.12]]).repeat(24, 1), order=orders)
    frames = batch([picture(3, 8, 8)] * 24)
    cfg = ViewConfig(size=8, jitter_prob=1.0, **later)
    ours = cut(frames, params, cfg)
    assert worst(ours, cut_view(frames, params, cfg, mean=ZERO, std=ONE)) < COLOUR
    apart = torch.cdist(ours.flatten(1), ours.flatten(1), p=torch.inf)[~torch.eye(24, dtype=torch.bool)]
    assert (apart > 0.01).double().mean() > 0.9  # nearly every other order would have been noticed


@pytest.mark.parametrize("strength", [(0.4, 0.4, 0.0, 0.0), (0.4, 0.0, 0.3, 0.1), (0, 0, 0, 0.2), (0.0,) * 4])
def test_steps_of_strength_zero_are_left_out(strength):
    frames = pictures([(8, 8)] * 6)
    cfg = ViewConfig(size=8, jitter_prob=0.8, jitter=strength, grayscale_prob=0.3)
    assert error(frames, draw(cfg, frames), cfg) < COLOUR


@pytest.mark.parametrize("jitter_prob", [0.0, 0.5])
def test_grayscale_and_solarize_reach_the_images_they_are_meant_for(jitter_prob):
    due = torch.tensor([True, False, True, False])
    frames = pictures([(9, 9)] * 4)
    params = plain(4, grayscale=due, solarize=torch.tensor([True, True, False, False]))
    cfg = ViewConfig(size=9, jitter_prob=jitter_prob, grayscale_prob=0.5, solarize_prob=0.5)
    sure = solarize_is_sure(frames, params, cfg)
    ours, theirs = cut(frames, params, cfg), cut_view(frames, params, cfg, mean=ZERO, std=ONE)
    assert sure.double().mean() > 0.9
    assert worst(ours[sure], theirs[sure]) < COLOUR
    gray = (ours[:, 0] == ours[:, 1]).flatten(1).all(dim=1)
    assert torch.equal(gray, due)


def test_the_contrast_of_an_image_of_many_tiles_uses_the_mean_of_all():
    """More than one tile across and down, the last of them partly outside."""
    frames = pictures([(37, 37), (30, 50)])
    cfg = ViewConfig(size=37, jitter_prob=1.0)
    jitter = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.2, 0.4, 1.0, 0.0]])
    assert error(frames, plain(2, jitter=jitter), cfg) < CROP


# --- blur ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "largest"), [(13, 1.0), (5, 2.0), (28, 3.3)])
def test_the_blur_is_that_of_the_definition(size, largest):
    """Images of a sigma of 0 among them are not blurred."""
    sigma = torch.tensor([0.0, 0.1, 0.4 * largest, largest])
    cfg = ViewConfig(size=size, blur_prob=0.5, blur_sigma=(0.1, largest))
    assert error(pictures([(size, size)] * 4), plain(4, sigma=sigma), cfg) < BLUR


# --- all steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 13])
@pytest.mark.parametrize("jitter", [(0.4, 0.4, 0.4, 0.1), (0.4, 0.0, 0.4, 0.1)])
def test_all_steps_in_a_row_are_the_definition(size, jitter):
    frames = pictures(SHAPES + SHAPES[:2])
    cfg = STRONG.model_copy(update={"size": size, "jitter": jitter})
    params = draw(cfg, frames, seed=1)
    for due in (params.jitter[:, 0] != 1, params.grayscale, params.sigma > 0, params.solarize, params.flip):
        assert 0 < due.sum() < 6  # both cases of each step in one batch
    sure = solarize_is_sure(frames, params, cfg)
    ours, theirs = cut(frames, params, cfg, MEAN, STD), cut_view(frames, params, cfg, mean=MEAN, std=STD)
    assert sure.double().mean() > 0.99
    assert worst(ours[sure], theirs[sure]) < CHAIN


@pytest.mark.parametrize("cfg", [ViewConfig(size=10), STRONG, STRONG.model_copy(update={"blur_prob": 0.0})])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(cfg, dtype):
    """Within a unit of the last place: the interpreter cuts bfloat16 off where GPUs round."""
    frames = pictures()
    params = draw(cfg, frames)
    ours = cut(frames, params, cfg, MEAN, STD, dtype)
    theirs = cut_view(frames, params, cfg, mean=MEAN, std=STD)
    unit = torch.finfo(dtype).eps * 2 ** theirs.abs().clamp(min=1e-6).log2().floor()
    assert ours.dtype == dtype
    deviation = (ours.float() - theirs).abs()
    assert (deviation <= unit + CHAIN)[solarize_is_sure(frames, params, cfg)].all()
    assert deviation.max() > 1e-5  # it was rounded


def test_the_error_of_float32_is_that_of_the_definition():
    """Against the same law in float64, at most twice as large."""
    frames = pictures([(40, 40), (30, 50), (50, 33)])
    cfg = ViewConfig(size=16, jitter_prob=1.0, blur_prob=1.0, blur_sigma=(0.5, 1.0))
    params = draw(cfg, frames)
    size, box = frames.size.double(), params.box.double()
    rows = resize_matrix(box[:, 0] * size[:, 0], box[:, 2] * size[:, 0], 16, frames.extent[0])
    columns = resize_matrix(box[:, 1] * size[:, 1], box[:, 3] * size[:, 1], 16, frames.extent[1])
    columns = torch.where(params.flip.view(-1, 1, 1), columns.flip(1), columns)
    canvas = torch.zeros(3, 3, *frames.extent, dtype=torch.float64)
    for i, (height, width) in enumerate(frames.size.tolist()):
        canvas[i, :, :height, :width] = torch.from_numpy(picture(i, height, width)).permute(2, 0, 1)
    exact = torch.einsum("byh,bchw,bxw->bcyx", rows, canvas, columns) / 255
    steps = {"jitter_prob": 0.0, "blur_prob": 0.0}
    assert twice_at_most(frames, params, cfg.model_copy(update=steps), exact)
    exact = color_jitter(exact, params.jitter.double(), params.order, cfg.jitter)
    steps.pop("jitter_prob")
    assert twice_at_most(frames, params, cfg.model_copy(update=steps), exact)
    blur = blur_matrix(params.sigma.double(), 16, 1.0)
    exact = torch.einsum("byh,bchw,bxw->bcyx", blur, exact, blur)
    assert twice_at_most(frames, params, cfg, exact)


def twice_at_most(frames: Frames, params: ViewParams, cfg: ViewConfig, exact: Tensor) -> bool:
    theirs = worst(cut_view(frames, params, cfg, mean=ZERO, std=ONE), exact)
    return 0 < worst(cut(frames, params, cfg), exact) <= 2 * theirs < 1e-4


def test_randaugment_comes_before_normalising():
    frames = pictures()
    cfg = ViewConfig(size=12, jitter_prob=0.5, randaugment=(2, 9))
    params = draw(cfg, frames)
    before = cut(frames, params, cfg.model_copy(update={"randaugment": None})).to(DEVICE)
    after = randaugment(before, params.operations.to(DEVICE), params.reverse.to(DEVICE), 9)
    ours = cut(frames, params, cfg, MEAN, STD, torch.bfloat16)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, normalise(after, MEAN, STD).bfloat16().cpu())
    assert worst(after, before) > 0.1


@pytest.mark.parametrize("count", [1, 5])
def test_several_views_of_different_sizes_are_cut_in_one_call(count):
    frames = pictures((SHAPES + SHAPES)[:count])
    cfgs = [ViewConfig(size=11), STRONG, STRONG.model_copy(update={"size": 7, "blur_prob": 0.0})]
    params = [draw(cfg, frames, seed) for seed, cfg in enumerate(cfgs)]
    views = cut_views(frames.to(DEVICE), [moved(p) for p in params], cfgs, mean=MEAN, std=STD, dtype=torch.float32)
    assert [view.shape for view in views] == [(count, 3, size, size) for size in (11, 12, 7)]
    for view, p, cfg in zip(views, params, cfgs, strict=True):
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.device.type == DEVICE.type
        sure = solarize_is_sure(frames, p, cfg)
        assert worst(view.cpu()[sure], cut_view(frames, p, cfg, mean=MEAN, std=STD)[sure]) < CHAIN


def test_a_view_does_not_depend_on_the_other_images_of_its_batch():
    frames = pictures()
    params = draw(STRONG, frames)
    whole = cut(frames, params, STRONG)
    for i in range(len(SHAPES)):
        alone = ViewParams(*(getattr(params, name)[i : i + 1] for name in params.__slots__))
        assert torch.equal(cut(batch([picture(i, *SHAPES[i])]), alone, STRONG)[0], whole[i])


@pytest.fixture
def undefined_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def test_every_value_of_a_view_is_written_and_no_unwritten_one_is_read(undefined_memory_is_nan: None):
    frames = pictures()
    for off in (["blur_prob"], ["jitter_prob", "blur_prob"], ["jitter_prob"], []):
        cfg = STRONG.model_copy(update=dict.fromkeys(off, 0.0))
        assert cut(frames, draw(cfg, frames), cfg).isfinite().all()


@pytest.mark.gpu
def test_views_of_large_images_are_the_definition_and_nothing_waits_for_the_gpu():
    frames = pictures([(400, 500)] * 256)
    strong = STRONG.model_copy(update={"blur_sigma": (0.1, 2.0), "solarize_prob": 0.0})
    cfgs = [ViewConfig(size=224), *(strong.model_copy(update={"size": s}) for s in (224, 192, 160, 128, 96))]
    params = [draw(cfg, frames, seed) for seed, cfg in enumerate(cfgs)]
    on_gpu, there = [moved(p) for p in params], frames.to(DEVICE)
    views = cut_views(there, on_gpu, cfgs, mean=ZERO, std=ONE, dtype=torch.float32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = cut_views(there, on_gpu, cfgs, mean=ZERO, std=ONE, dtype=torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for view, other, p, cfg in zip(views, again, params, cfgs, strict=True):
        assert torch.equal(view, other)
        assert worst(view.cpu(), cut_view(frames, p, cfg, mean=ZERO, std=ONE)) < 5 * LARGE_CROP
