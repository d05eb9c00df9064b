"""What every source of images owes, whatever its format: the promises of `ressl.batch`, on the same tiny images."""

import io
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipelines import build_source
from pipelines.loader import Prober, ViewStream
from pipelines.sampler import Sampler, permutation
from ressl.batch import DataError
from ressl.config import DataConfig, EvaluateConfig, ViewConfig, ViewsConfig
from ressl.config import FolderSource as FolderConfig
from tools.convert import convert

CPU = torch.device("cpu")
COUNT, GLOBAL_BATCH, SEED = 39, 9, 11  # 4 steps, 3 images left out of each epoch
LOSSLESS = {
    "resident": {"name": "resident", "train": "tensor/train.safetensors"},
    "resident on the host": {"name": "resident", "train": "tensor/train.safetensors", "memory": "host"},
    "resident from files": {"name": "resident", "train": "png", "max_side": None},
    "folder": {"name": "folder", "train": "png", "max_side": None, "workers": 2},
    "ffcv": {"name": "ffcv", "train": "ffcv/train.beton", "workers": 2},
    "ffcv paged": {"name": "ffcv", "train": "ffcv/train.beton", "workers": 2, "cache": "process"},
    "dali": {"name": "dali", "train": "png", "max_side": None, "workers": 2},
    "dali shards": {"name": "dali", "train": "webdataset/train", "max_side": None, "workers": 2},
}
OTHERS = {
    "resident yuv420": {"name": "resident", "train": "tensor/train.safetensors", "pixels": "yuv420"},
    "synthetic": {"name": "synthetic", "images": COUNT, "height": 21, "width": 33, "classes": 3},
}
VIEWS = ViewsConfig(
    weak=ViewConfig(size=16),
    strong=(
        ViewConfig(size=16, jitter_prob=0.8, grayscale_prob=0.2, blur_prob=0.5, solarize_prob=0.2),
        ViewConfig(size=8, crop_scale=(0.1, 0.4), jitter_prob=0.8),
    ),
)
SHAPES = [(20 + 3 * (i % 5), 44 - 4 * (i % 7)) for i in range(COUNT)]
LABELS = [i // 13 for i in range(COUNT)]
OTHER_BATCH = 1e-5  # the same products, summed in another order by a matrix product of another size


def picture(seed: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC))


def write_folder(root: Path, suffix: str = "png") -> Path:
    for i, (shape, label) in enumerate(zip(SHAPES, LABELS, strict=True)):
        path = root / "abc"[label] / f"{i:02}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, *shape)).save(path)
    return root


def data_config(root: Path, **changes) -> DataConfig:
    return DataConfig(source=FolderConfig(name="folder", train=root), **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The images as PNG files, and all that they are converted to."""
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "png")
    for to in ("tensor", "ffcv", "webdataset"):
        mode = {"mode": "raw"} if to == "ffcv" else {}
        convert(str(root / "png"), root / to, to, console=Console(file=io.StringIO()), **mode)
    return root


@pytest.fixture(scope="module")
def sources(data):
    """Each source is opened when first asked for, then kept."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = open_source(data, (LOSSLESS | OTHERS)[name])
        return made[name]

    return get


def open_source(data: Path, chosen: dict, device: torch.device = CPU):
    """As a run would, from the config."""
    pytest.importorskip({"ffcv": "ffcv", "dali": "nvidia.dali"}.get(chosen["name"], "torch"))
    place = {"train": data / chosen["train"]} if "train" in chosen else {}
    cfg = DataConfig.model_validate({"source": chosen | place, "on_corrupt": "fail"})
    return build_source(cfg, "train", device, print)


@pytest.fixture(params=[*LOSSLESS, *OTHERS])
def source(request, sources):
    return sources(request.param)


@pytest.fixture(autouse=True)
def no_thread_is_left(request):
    """Numba keeps its own workers, which Python does not list."""
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + 5
    while (left := {t for t in threading.enumerate() if t not in before}) and time.monotonic() < end:
        time.sleep(0.01)
    assert left == set()


def stream(source, *, seed=SEED, rank=0, world_size=1, batch_size=GLOBAL_BATCH, accumulate=1, dtype=torch.float32):
    sampler = Sampler(len(source.labels), batch_size, seed, rank, world_size, accumulate)
    return ViewStream(source, sampler, VIEWS, data_config(Path("unused")), CPU, dtype)


def prober(source, *, rank=0, world_size=1, batch_size=4, val=None):
    cfg = EvaluateConfig(size=12, resize=14, batch_size=batch_size)
    return Prober(source, val, data_config(Path("unused")), cfg, "auto", CPU, SEED, rank, world_size)


def indices(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch.index]


def views(batch) -> tuple[torch.Tensor, ...]:
    return (*batch.weak, *batch.strong)


def numbers(params) -> list[torch.Tensor]:
    return [getattr(view, field) for view in params for field in view.__slots__]


def same(a, b) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip((*views(a), a.index, a.label), (*views(b), b.index, b.label), strict=True)
    )


def by_index(batches) -> dict[int, list[torch.Tensor]]:
    return {int(i): [view[row] for view in views(b)] for b in batches for row, i in enumerate(b.index)}


def assert_views_close(a: dict, b: dict, tolerance: float):
    assert a.keys() == b.keys()
    for index in a:
        for x, y in zip(a[index], b[index], strict=True):
            assert (x - y).abs().max() <= tolerance


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_have_the_shapes_types_and_layout_of_the_contract(source, dtype):
    batches = list(stream(source, dtype=dtype).epoch(0))
    assert len(batches) == stream(source).steps_per_epoch == 4
    for batch in batches:
        assert [tuple(view.shape) for view in batch.weak] == [(9, 3, 16, 16)]
        assert [tuple(view.shape) for view in batch.strong] == [(9, 3, 16, 16), (9, 3, 8, 8)]
        for view in views(batch):
            assert view.dtype == dtype
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert view.isfinite().all()
        assert batch.index.dtype == batch.label.dtype == torch.int64
        assert batch.index.shape == batch.label.shape == (9,)
        assert batch.labelled is None


def test_no_image_comes_twice_and_exactly_the_rest_is_left_out(source):
    seen = indices(stream(source).epoch(3))
    assert len(seen) == len(set(seen)) == COUNT - COUNT % GLOBAL_BATCH
    assert seen == permutation(COUNT, SEED, 3)[: len(seen)].tolist()


def test_labels_belong_to_their_images(source):
    for batch in stream(source).epoch(0):
        assert batch.label.tolist() == [source.labels[i] for i in batch.index]


@pytest.mark.parametrize("name", LOSSLESS)
def test_labels_are_those_of_the_files(sources, name):
    assert sources(name).labels.tolist() == LABELS


def test_the_same_arguments_give_the_same_bits(source):
    for a, b in zip(stream(source).epoch(2), stream(source).epoch(2), strict=True):
        assert same(a, b)


@pytest.mark.parametrize("start", [1, 3, 4])
def test_an_epoch_taken_up_later_is_the_tail_of_the_whole(source, start):
    whole, tail = list(stream(source).epoch(1)), list(stream(source).epoch(1, start_step=start))
    assert len(tail) == 4 - start
    for a, b in zip(whole[start:], tail, strict=True):
        assert same(a, b)


def test_epochs_and_seeds_differ_in_order_and_views(source):
    first, second = list(stream(source).epoch(0)), list(stream(source).epoch(1))
    third = list(stream(source, seed=1).epoch(0))
    assert len({tuple(indices(batches)) for batches in (first, second, third)}) == 3
    a = by_index(first)
    for b in (by_index(second), by_index(third)):
        common = a.keys() & b.keys()
        assert len(common) > 10
        assert all(not torch.equal(a[i][0], b[i][0]) for i in common)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (1, 2), (3, 2)])
def test_ranks_and_micro_batches_are_disjoint_and_share_out_the_steps_of_one_rank(source, world_size, accumulate):
    ranks = [
        list(stream(source, rank=rank, world_size=world_size, batch_size=24, accumulate=accumulate).epoch(1))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {accumulate}
    together = [index for batches in ranks for index in indices(batches)]
    assert len(set(together)) == 24
    assert together == indices(stream(source, batch_size=24).epoch(1))


def test_views_depend_neither_on_the_rank_nor_on_the_batch(source):
    one = by_index(stream(source).epoch(1))
    ranks = by_index(b for rank in range(3) for b in stream(source, rank=rank, world_size=3).epoch(1))
    single = by_index(stream(source, batch_size=36, accumulate=36).epoch(1))
    assert_views_close(one, ranks, OTHER_BATCH)
    assert_views_close(one, single, OTHER_BATCH)


def test_an_epoch_of_4_then_2_then_3_ranks_has_the_images_and_views_of_one_rank(source):
    """A run that is stopped after each step, and goes on with another number of ranks."""
    alone = stream(source, batch_size=12)
    for step, (frames, world_size) in enumerate(zip(alone.frames(1), (4, 2, 3), strict=True)):
        parts = []
        for rank in range(world_size):
            own = stream(source, rank=rank, world_size=world_size, batch_size=12)
            with closing(own.frames(1, start_step=step)) as rest:
                part = next(rest)
                parts.append((part.index, part.label, *numbers(own.params(part, 1))))
        whole = (frames.index, frames.label, *numbers(alone.params(frames, 1)))
        assert all(torch.equal(torch.cat(together), one) for *together, one in zip(*parts, whole, strict=True))


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_sources_give_the_same_views(sources, name):
    reference, other = stream(sources("resident")), stream(sources(name))
    for a, b in zip(reference.frames(1), other.frames(1), strict=True):
        assert torch.equal(a.index, b.index)
        ours, theirs = numbers(reference.params(a, 1)), numbers(other.params(b, 1))
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
        assert same(reference.cut(a, 1), other.cut(b, 1))


def test_frames_keep_the_slack_that_the_contract_asks_for(source):
    for frames in stream(source).frames(0):
        last_row = frames.offset + frames.stride.long() * (frames.size[:, 0] - 1)
        assert last_row.max() + 3 * frames.extent[1] <= frames.pixels.numel()
        assert frames.size.amax(dim=0).tolist() <= list(frames.extent)


def test_frames_stay_as_they_were_when_later_ones_are_asked_for(source):
    """A decoder reuses its memory; what it gave away must have been copied before."""
    held = list(stream(source).frames(0))
    for batch, again in zip((stream(source).cut(frames, 0) for frames in held), stream(source).epoch(0), strict=True):
        assert same(batch, again)


# --- leaving early, and two at once ----------------------------------------------------------------------------------


def test_an_epoch_can_be_left_early_and_the_next_one_started(source):
    before = set(threading.enumerate())
    for _ in range(3):
        epoch = stream(source, batch_size=2).epoch(0)
        next(epoch)
        epoch.close()
        assert set(threading.enumerate()) == before
    assert indices(stream(source).epoch(1)) == permutation(COUNT, SEED, 1)[:36].tolist()


def test_an_error_in_the_training_loop_leaves_no_thread(source):
    before = set(threading.enumerate())

    def train():
        for batch in stream(source, batch_size=2).epoch(0):
            if batch.index[0] >= 0:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        train()
    del raised
    end = time.monotonic() + 5
    while set(threading.enumerate()) != before and time.monotonic() < end:
        time.sleep(0.01)
    assert set(threading.enumerate()) == before


def test_two_streams_of_one_source_do_not_disturb_each_other(source):
    alone = [list(stream(source).epoch(0)), list(stream(source, batch_size=4).epoch(1))]
    together = [[], []]
    first, second = stream(source).epoch(0), stream(source, batch_size=4).epoch(1)
    for a, b in zip(first, second, strict=False):
        together[0].append(a)
        together[1].append(b)
    second.close()
    for apart, joint in zip(alone, together, strict=True):
        assert len(joint) == 4
        assert all(same(a, b) for a, b in zip(apart, joint, strict=False))


def test_two_threads_can_read_one_source(source):
    expected = list(stream(source).epoch(0))
    results = {}
    readers = [
        threading.Thread(target=lambda n=n: results.update({n: list(stream(source).epoch(0))})) for n in range(2)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert sorted(results) == [0, 1]
    assert all(same(a, b) for batches in results.values() for a, b in zip(batches, expected, strict=True))


# --- probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops", ["centre", "random"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_probe_gives_every_image_once_in_order_with_its_label(source, world_size, crops):
    index, label, sizes = [], [], []
    for rank in range(world_size):
        for images, labels, numbers in prober(source, rank=rank, world_size=world_size).probe("train", crops):
            assert images.shape == (len(numbers), 3, 12, 12)
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            index += numbers.tolist()
            label += labels.tolist()
            sizes.append(len(numbers))
    assert index == list(range(COUNT))
    assert label == source.labels.tolist()
    assert sizes == ([4] * 9 + [3] if world_size == 1 else [4, 4, 4, 1] * 3)


def test_centre_crops_are_the_same_each_time_and_random_ones_by_epoch(source):
    def images(crops, epoch):
        return torch.cat([batch for batch, _, _ in prober(source).probe("train", crops, epoch)])

    assert torch.equal(images("centre", 0), images("centre", 5))
    assert torch.equal(images("random", 1), images("random", 1))
    assert not torch.equal(images("random", 1), images("random", 2))
    assert not torch.equal(images("random", 1), images("centre", 1))


def test_more_ranks_than_images_leave_some_without_any(sources):
    parts = [list(prober(sources("resident"), rank=rank, world_size=40).probe("train")) for rank in range(40)]
    assert sum(len(part) for part in parts) == COUNT


def test_a_probe_beside_a_training_epoch_disturbs_neither(source):
    expected = list(stream(source).epoch(0))
    got, seen = [], []
    for batch in stream(source).epoch(0):
        got.append(batch)
        seen.append([int(i) for _, _, index in prober(source, batch_size=10).probe("train") for i in index])
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    assert seen == [list(range(COUNT))] * 4


def test_counts_and_classes_come_from_the_data(source):
    probes = prober(source, val=source)
    assert (probes.num_classes, probes.count("train"), probes.count("val")) == (3, COUNT, COUNT)
    assert len(source.classes) == 3


def test_a_split_that_is_not_there_is_refused(sources):
    with pytest.raises(DataError, match=r"data\.source\.val is not set"):
        list(prober(sources("resident")).probe("val"))


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*LOSSLESS, *OTHERS])
def test_on_a_gpu_every_source_gives_the_views_of_the_cpu(data, sources, name):
    device = torch.device("cuda")
    theirs = replace(stream(open_source(data, (LOSSLESS | OTHERS)[name], device)), device=device)
    for a, b in zip(stream(sources(name)).epoch(0), theirs.epoch(0), strict=True):
        assert torch.equal(a.index, b.index.cpu())
        for x, y in zip(views(a), views(b), strict=True):
            # a value at solarize's threshold may fall on the other side
            assert y.is_cuda and ((x - y.cpu()).abs() > 1e-3).float().mean() < 1e-3
