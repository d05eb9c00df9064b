"""The kernel that draws a view's numbers, against `draw_view`: all are equal but for the last bits of crops."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.draws import LANES, ViewParams, draw_view, uniforms, view_key
from pipelines.kernels.draws import _mix64, _uniform, draw_views
from ressl.config import ViewConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STRONG = ViewConfig(size=32, jitter_prob=0.8, grayscale_prob=0.2, blur_prob=0.5, solarize_prob=0.1, randaugment=(2, 9))
OTHER = ViewConfig(
    size=32, crop_scale=(0.05, 0.6), crop_ratio=(0.5, 3.0), flip_prob=0.3, jitter_prob=1.0, jitter=(1.5, 0.0, 0.8, 0.5),
    blur_prob=1.0, blur_sigma=(0.5, 3.0),
)  # fmt: skip
EXACT = ("flip", "jitter", "order", "grayscale", "sigma", "solarize", "operations", "reverse")
KEYS = [(0, 0, 0), (3, 1, 4), (2**31 - 1, 999, 1 << 20)]  # seed, epoch, first view
COUNT = 150  # more than one program, the last of them partly full
# of numbers up to 1 with an exponential and a root in them (measured: 1.8e-7; a GPU's own exponential is less exact)
BOX = 1e-6


def images(count: int = COUNT) -> tuple[Tensor, Tensor]:
    """(count, 2) sizes from squares to stripes, (count,) indices up to 2**50."""
    generator = torch.Generator().manual_seed(0)
    size = torch.randint(1, 700, (count, 2), generator=generator, dtype=torch.int32)
    return size, torch.randint(0, 2**50, (count,), generator=generator)


def draw(cfg: ViewConfig, size: Tensor, index: Tensor, key: tuple[int, int, int]) -> ViewParams:
    seed, epoch, view = key
    (params,) = draw_views([cfg], size.to(DEVICE), index.to(DEVICE), seed=seed, epoch=epoch, first_view=view)
    return ViewParams(*(getattr(params, name).cpu() for name in params.__slots__))


@triton.jit
def _store_uniform(index, key, out, LANES: tl.constexpr, SIZE: tl.constexpr):  # noqa: N803
    at = tl.arange(0, SIZE)
    row = _mix64(_mix64(tl.load(index + at)) ^ key)
    for lane in range(LANES):
        tl.store(out + at * LANES + lane, _uniform(row, lane, SIZE))


@pytest.mark.parametrize("key", KEYS)
def test_the_bits_of_all_lanes_are_those_of_the_definition(key):
    index = torch.tensor([0, 1, 42, 1_281_166, 2**31, 2**40 + 7, 2**62, 2**63 - 1])
    out = torch.empty(8, LANES, device=DEVICE)
    _store_uniform[(1,)](index.to(DEVICE), view_key(*key), out, LANES=LANES, SIZE=8)
    seed, epoch, view = key
    assert torch.equal(out.cpu(), uniforms(index, seed=seed, epoch=epoch, view=view, lanes=LANES))


@pytest.mark.parametrize("cfg", [STRONG, OTHER])
@pytest.mark.parametrize("key", KEYS)
def test_every_number_is_that_of_the_definition(cfg, key):
    size, index = images()
    ours, (seed, epoch, view) = draw(cfg, size, index, key), key
    theirs = draw_view(cfg, size, index, seed=seed, epoch=epoch, view=view)
    for name in ours.__slots__:
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype, name
        assert getattr(ours, name).shape == getattr(theirs, name).shape, name
    for name in EXACT:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    # also for images of which no try, or a late one, fits: another try would be another crop
    assert (ours.box - theirs.box).abs().max() < BOX
    centred = (theirs.box[:, :2] - (1 - theirs.box[:, 2:]) / 2).abs().amax(dim=1) < 1e-6
    assert 0 < centred.sum() < COUNT


def test_views_are_numbered_one_after_another():
    size, index = images(3)
    views = draw_views([STRONG, OTHER, STRONG], size.to(DEVICE), index.to(DEVICE), seed=5, epoch=6, first_view=7)
    for number, (cfg, view) in enumerate(zip((STRONG, OTHER, STRONG), views, strict=True)):
        theirs = draw_view(cfg, size, index, seed=5, epoch=6, view=7 + number)
        assert torch.equal(view.jitter.cpu(), theirs.jitter)
        assert torch.equal(view.order.cpu(), theirs.order)
        assert torch.equal(view.operations.cpu(), theirs.operations)
        assert {getattr(view, name).device.type for name in view.__slots__} == {DEVICE.type}


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_of_zero_or_one_is_exact(rate):
    names = ("flip_prob", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob")
    params = draw(ViewConfig(size=8, **dict.fromkeys(names, rate)), *images(), (0, 0, 0))
    jittered = (params.jitter != torch.tensor([1, 1, 1, 0])).all(dim=1)
    for happens in (params.flip, params.grayscale, params.solarize, params.sigma > 0, jittered):
        assert happens.double().mean() == rate


def test_numbers_do_not_depend_on_the_batch_or_on_the_layout_of_its_tensors():
    size, index = images(6)
    whole = draw(STRONG, size, index, KEYS[1])
    mixed = draw(STRONG, size.repeat_interleave(2, dim=1)[:, ::2].flip(0), index.flip(0), KEYS[1])
    alone = draw(STRONG, size[2:3], index[2:3], KEYS[1])
    for name in whole.__slots__:
        assert torch.equal(getattr(mixed, name).flip(0), getattr(whole, name)), name
        assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[2]), name


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    size, index = (tensor.to(DEVICE) for tensor in images())
    draw_views([STRONG], size, index, seed=0, epoch=0, first_view=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw_views([STRONG], size, index, seed=0, epoch=1, first_view=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
