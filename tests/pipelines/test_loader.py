"""What the stream adds to source and views: sizes that grow, and the choice between definition and twin."""

from pathlib import Path

import pytest
import torch

from pipelines import build_loaders
from pipelines.loader import ViewStream
from ressl.batch import DataError
from ressl.config import Config, ProgressiveSizes

CPU = torch.device("cpu")


def config(out: Path, **views) -> Config:
    strong = {"size": 20, "jitter_prob": 0.8, "grayscale_prob": 0.2, "blur_prob": 0.5, "solarize_prob": 0.2}
    return Config.model_validate(
        {
            "data": {"source": {"name": "synthetic", "images": 24, "height": 30, "width": 40, "classes": 3}},
            "views": {"weak": {"size": 24}, "strong": [strong, {"size": 11}], **views},
            "encoder": {"name": "resnet_small"},
            "method": {"name": "ressl"},
            "optim": {"name": "sgd", "epochs": 9, "batch_size": 4, "lr": 0.1},
            "evaluate": {"size": 16},
            "run": {"out_dir": out, "device": "cpu"},
        }
    )


def stream(cfg: Config, dtype: torch.dtype = torch.float32) -> ViewStream:
    built = build_loaders(cfg, device=CPU, dtype=dtype).train
    assert isinstance(built, ViewStream)
    return built


def views(batch) -> list[torch.Tensor]:
    return [*batch.weak, *batch.strong]


# --- progressive sizes -----------------------------------------------------------------------------------------------


def test_sizes_grow_linearly_in_steps_and_end_at_the_full_one():
    sizes = ProgressiveSizes(start=0.6, until=10, multiple=32)
    assert [sizes.size(224, epoch) for epoch in (0, 2, 5, 8, 9, 10, 199)] == [128, 160, 192, 192, 224, 224, 224]
    assert [sizes.size(96, epoch) for epoch in (0, 5, 10)] == [64, 64, 96]
    assert ProgressiveSizes(start=0.1, until=4, multiple=32).size(28, 0) == 28  # never above the full size


def test_no_size_ever_shrinks():
    for start in (0.1, 0.5, 1.0):
        for full in (28, 96, 224):
            sizes = [ProgressiveSizes(start=start, until=20, multiple=8).size(full, epoch) for epoch in range(25)]
            assert sizes == sorted(sizes) and sizes[-1] == full and min(sizes) >= min(8, full)


def test_the_views_of_an_epoch_have_its_sizes_and_the_same_numbers_as_ever(tmp_path):
    plain = stream(config(tmp_path))
    growing = stream(config(tmp_path, progressive={"start": 0.5, "until": 4, "multiple": 4}))
    for epoch, sizes in ((0, [12, 12, 4]), (2, [20, 16, 8]), (4, [24, 20, 11]), (8, [24, 20, 11])):
        for frames in growing.frames(epoch):
            assert [view.shape[2:] for view in views(growing.cut(frames, epoch))] == [(size, size) for size in sizes]
            for ours, theirs in zip(growing.params(frames, epoch), plain.params(frames, epoch), strict=True):
                assert torch.equal(ours.box, theirs.box) and torch.equal(ours.jitter, theirs.jitter)


# --- the definition and its twin -------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the twin runs in Triton's interpreter only without a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_implementations_give_the_same_batches(tmp_path, dtype):
    definition, twin = (stream(config(tmp_path, impl=impl), dtype) for impl in ("torch", "triton"))
    for a, b in zip(definition.epoch(3), twin.epoch(3), strict=True):
        assert torch.equal(a.index, b.index)
        for x, y in zip(views(a), views(b), strict=True):
            assert x.dtype == y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
            assert (x.float() - y.float()).abs().max() < (1e-4 if dtype == torch.float32 else 0.02)
        break  # the interpreter is slow


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_twin_is_refused_where_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(DataError, match=r"views\.impl=triton needs a GPU: views\.impl=auto"):
        stream(config(tmp_path, impl="triton"))
    stream(config(tmp_path, impl="auto"))


@pytest.mark.gpu
def test_on_a_gpu_the_twin_is_taken_by_itself_and_gives_what_the_definition_gives(tmp_path):
    device = torch.device("cuda")
    auto, torch_only = (build_loaders(config(tmp_path, impl=impl), device=device).train for impl in ("auto", "torch"))
    for a, b in zip(auto.epoch(3), torch_only.epoch(3), strict=True):
        for x, y in zip(views(a), views(b), strict=True):
            assert x.is_cuda and (x - y).abs().max() < 1e-3
