"""Noise of any number and size, without the memory of it."""

import time

import numpy as np
import pytest
import torch

from pipelines.loader import ViewStream
from pipelines.sampler import Sampler
from pipelines.synthetic_source import POOL, POOL_BYTES, SyntheticSource
from pipelines.views import canvas
from ressl.config import DataConfig, ViewConfig, ViewsConfig
from ressl.config import SyntheticSource as Config

CPU = torch.device("cpu")


def source(device: torch.device = CPU, **changes) -> SyntheticSource:
    return SyntheticSource(Config(name="synthetic", **{"images": 300, "height": 12, "width": 10, **changes}), device)


def test_a_batch_keeps_the_promises_of_frames():
    noise = source()
    positions = np.array([0, 299, 64, 7])
    (frames,) = noise.stream([positions], salt=0)
    assert frames.index.tolist() == positions.tolist()
    assert frames.label.tolist() == noise.labels[positions].tolist()
    assert frames.size.tolist() == frames.original.tolist() == [[12, 10]] * 4
    assert (frames.stride.tolist(), frames.extent) == ([30] * 4, (12, 10))
    assert [t.dtype for t in frames.tensors()] == [
        torch.uint8, torch.int64, torch.int32, torch.int32, torch.int32, torch.int64, torch.int64,
    ]  # fmt: skip
    assert frames.offset.max() + 12 * 30 <= frames.pixels.numel()


def test_images_differ_until_the_pool_begins_again():
    (frames,) = source().stream([np.arange(POOL + 2)], salt=0)
    images = canvas(frames, frames.offset, frames.stride)
    assert len({image.numpy().tobytes() for image in images[:POOL]}) == POOL
    assert torch.equal(images[POOL:], images[:2])
    assert images.float().mean().sub(127.5).abs() < 2


def test_two_sources_of_one_config_are_the_same():
    (a,), (b,) = (source().stream([np.arange(9)], salt=salt) for salt in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_labels_are_of_all_classes_in_no_order():
    noise = source(images=5000, classes=7)
    assert noise.classes == tuple(f"noise {label}" for label in range(7))
    assert np.bincount(noise.labels, minlength=7).min() > 600
    assert len(set(noise.labels[:20].tolist())) > 3


def test_a_large_set_is_made_quickly_and_small():
    begin = time.process_time()
    noise = source(images=1_281_167, height=375, width=500)
    assert time.process_time() - begin < 5
    assert len(noise.labels) == 1_281_167
    assert noise.pixels.numel() == POOL * 375 * 500 * 3


def test_large_images_are_fewer():
    noise = source(height=3000, width=3000)
    assert noise.pool == POOL_BYTES // noise.bytes == 4
    assert noise.pixels.numel() <= POOL_BYTES


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_views_are_cut_from_noise(device):
    noise = source(torch.device(device))
    views = ViewsConfig(weak=ViewConfig(size=8), strong=(ViewConfig(size=8, jitter_prob=0.8),))
    data = DataConfig(source=Config(name="synthetic"))
    stream = ViewStream(noise, Sampler(300, 60, seed=1), views, data, torch.device(device), torch.float32)
    batches = list(stream.epoch(0))
    assert len(batches) == 5
    assert sorted(int(i) for batch in batches for i in batch.index) == list(range(300))
    assert all(batch.weak[0].isfinite().all() for batch in batches)
