"""Every knob of a run, as frozen pydantic models. `config_file.py` reads them from YAML.

Nothing writes to a config after it is read: derived numbers are properties, computed where they are asked for.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ressl.config_optim import Optim
from ressl.config_parts import (
    Count,
    MaxSide,
    NotNegative,
    Positive,
    Probability,
    Range,
    Section,
    UserPath,
    Workers,
    require,
)

# --- data ------------------------------------------------------------------------------------------------------------


class FfcvSource(Section):
    """`.beton` files, decoded once, by FFCV's decoder in threads."""

    name: Literal["ffcv"]
    train: UserPath
    val: UserPath | None = None
    workers: Workers = 0
    cache: Literal["os", "process"] = "os"
    """os: each image is read where it is decoded, and the system keeps what fits into memory. process: threads read the
    pages that the next batches need and forget them after; for files larger than memory, with `shuffle: blocks`."""


class FolderSource(Section):
    """Directories of JPEG, PNG, WebP, BMP or TIFF files, one sub-directory for each class, or none."""

    name: Literal["folder"]
    train: UserPath
    val: UserPath | None = None
    workers: Workers = 0
    max_side: MaxSide = 512


class DaliSource(Section):
    """Image files, or WebDataset shards of them (`launch.py convert --to webdataset`), decoded by DALI: on the GPU,
    with its JPEG engines, where there is one."""

    name: Literal["dali"]
    train: UserPath
    val: UserPath | None = None
    workers: Workers = 0
    max_side: MaxSide = 512
    hw_decoder_load: Probability = 0.65
    """Share of the JPEG files that go to the GPU's JPEG engines; its other processors and the CPU take the rest."""


class ResidentSource(Section):
    """The whole data set in memory, decoded once, before the first step: what `launch.py convert --to tensor` wrote, or
    any file or directory that the sources `ffcv`, `folder` and `dali` read."""

    name: Literal["resident"]
    train: UserPath
    val: UserPath | None = None
    memory: Literal["device", "host"] = "device"
    """device: of the GPU. host: of the machine, copied to the GPU batch by batch through page-locked buffers."""
    pixels: Literal["rgb", "yuv420"] = "rgb"
    """yuv420: colour at half the resolution, in half the memory; a choice that changes the pixels."""
    shards: Annotated[int, Field(ge=1, le=4096)] = 1
    """Parts that the set is cut into and the ranks share; images are shuffled inside each. 1: every rank holds all."""
    budget_gb: Positive = 8.0
    """Memory that the images of one split may take in each rank, 10**9 bytes."""
    workers: Workers = 0
    max_side: MaxSide = 512


class SyntheticSource(Section):
    """Noise, in the device's memory: how fast a run would be if its images cost nothing."""

    name: Literal["synthetic"]
    images: Count = 1_281_167
    height: Annotated[int, Field(ge=8, le=8192)] = 375
    width: Annotated[int, Field(ge=8, le=8192)] = 500
    classes: Count = 1000
    val: None = None


Source = Annotated[
    FfcvSource | FolderSource | DaliSource | ResidentSource | SyntheticSource, Field(discriminator="name")
]


class DataConfig(Section):
    source: Source
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of the channels red, green, blue in [0, 1], subtracted from every view. Default: ImageNet."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    on_corrupt: Literal["replace", "fail"] = "replace"
    """An image that cannot be read: another one takes its place and the record says so, or the run stops."""
    max_bad: Probability = 0.01
    """Share of the training images that may be bad, since the run was last started; more end it. Ten may always."""
    prefetch: Annotated[int, Field(ge=1, le=16)] = 2
    """Batches prepared ahead, per rank."""
    shuffle: Literal["global", "blocks"] = "global"
    """Order of an epoch. global: any image may follow any other. blocks: blocks of `block` neighbours are shuffled,
    then the images inside each run of `window` blocks; for data that memory cannot hold, whose neighbours are read
    together. Neighbours should be unlike: `launch.py convert --shuffle` mixes the classes."""
    block: Count = 256
    window: Count = 64
    placement: Literal["auto", "none"] = "auto"
    """auto: each rank's threads keep to their own share of the cores, those beside its GPU where that is known."""


class ViewConfig(Section):
    """How one view of an image is drawn. Probabilities are per image; a probability of 0 leaves the step out."""

    size: Annotated[int, Field(ge=4, le=1024)]
    """Side of the square output, pixels."""
    crop_scale: Range = (0.2, 1.0)
    """Area of the random crop, as a fraction of the image's."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop."""
    flip_prob: Probability = 0.5
    jitter_prob: Probability = 0.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strength of brightness, contrast, saturation and hue, as in torchvision.transforms.ColorJitter."""
    grayscale_prob: Probability = 0.0
    blur_prob: Probability = 0.0
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the Gaussian blur, pixels of the view."""
    solarize_prob: Probability = 0.0
    randaugment: tuple[Annotated[int, Field(ge=1, le=14)], Annotated[int, Field(ge=0, le=30)]] | None = None
    """Number and magnitude (of 30) of random operations, Cubuk et al. 2020, before normalising; null: none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "crop_scale", "need 0 < low <= high <= 1", self.crop_scale)
        low, high = self.crop_ratio
        require(0 < low <= high, "crop_ratio", "need 0 < low <= high", self.crop_ratio)
        low, high = self.blur_sigma
        require(0 < low <= high <= 10, "blur_sigma", "need 0 < low <= high <= 10", self.blur_sigma)
        require(min(self.jitter) >= 0, "jitter", "strengths are not negative", self.jitter)
        require(self.jitter[3] <= 0.5, "jitter", "the hue's strength is at most 0.5", self.jitter)
        return self


class ProgressiveSizes(Section):
    """View sizes grow linearly over the epochs, as Howard 2018 (DAWNBench) and FFCV's ImageNet recipe do."""

    start: Annotated[float, Field(gt=0, le=1)]
    """Size of the first epoch's views, as a fraction of `size`."""
    until: Count
    """Epoch (counted from 0) from which views have their full size."""
    multiple: Count = 32
    """Sizes are rounded to multiples of this many pixels, and are never above `size`."""

    def size(self, full: int, epoch: int) -> int:
        """Pixels of a view's side in `epoch`."""
        if epoch >= self.until:
            return full
        share = self.start + (1 - self.start) * epoch / self.until
        return min(full, max(1, int(full * share / self.multiple + 0.5)) * self.multiple)


class ViewsConfig(Section):
    weak: ViewConfig
    """The teacher's view."""
    strong: Annotated[tuple[ViewConfig, ...], Field(min_length=1, max_length=16)]
    """The student's views: one, or several crops of falling size."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """torch: the definition. triton: its fused twin for GPUs. auto: triton on CUDA, torch elsewhere."""
    progressive: ProgressiveSizes | None = None
    """Smaller views in the first epochs; null: full size from the start."""


# --- encoder and method ----------------------------------------------------------------------------------------------


class LocalBatchNorm(Section):
    """Each rank normalises with the statistics of its own images."""

    name: Literal["local"] = "local"


class SyncBatchNorm(Section):
    """All ranks normalise with the statistics of the whole batch."""

    name: Literal["sync"]


class SplitBatchNorm(Section):
    """The batch of one device is cut into groups that are normalised apart, as if each were on a device of its own."""

    name: Literal["split"]
    groups: Annotated[int, Field(ge=2)]


class ShuffleBatchNorm(Section):
    """Ranks normalise apart and deal the teacher's images out over all ranks, so that no two views of the same images
    are normalised together. On one process there is nothing to deal: as `local`."""

    name: Literal["shuffle"]


BatchNorm = Annotated[LocalBatchNorm | SyncBatchNorm | SplitBatchNorm | ShuffleBatchNorm, Field(discriminator="name")]


class ResNet(Section):
    """torchvision's ResNet without its classifier."""

    name: Literal["resnet18", "resnet34", "resnet50"]
    stem: Literal["imagenet", "medium", "small"] = "imagenet"
    """imagenet: 7x7 stride 2 and max-pool. medium (64 px): 3x3 stride 1 and max-pool. small (32 px): 3x3 stride 1."""
    batchnorm: BatchNorm = LocalBatchNorm()


class SmallResNet(Section):
    """Three stages of basic blocks of width, 2 width and 4 width channels, for images up to 64 px and runs on a CPU."""

    name: Literal["resnet_small"]
    width: Count = 16
    blocks: Count = 1
    """Basic blocks in each stage."""
    batchnorm: BatchNorm = LocalBatchNorm()


Encoder = Annotated[ResNet | SmallResNet, Field(discriminator="name")]


Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]


class ReSSLConfig(Section):
    """Zheng et al. 2021, https://arxiv.org/abs/2107.09282. Defaults are the authors' ImageNet settings."""

    name: Literal["ressl"]
    hidden_dim: Count = 4096
    embed_dim: Count = 512
    queue_size: Count = 131072
    student_temperature: Temperature = 0.1
    teacher_temperature: Temperature = 0.04
    teacher_momentum: Probability = 0.999
    teacher_momentum_end: Probability | None = None
    """Where the run ends, on a cosine from `teacher_momentum`, as Grill et al. 2020 (BYOL) do; null: constant."""
    queue_dtype: Literal["float32", "bfloat16"] = "float32"
    """How the queue is stored. bfloat16: half the memory and half the reading, similarities off by up to 0.002."""
    loss_impl: Literal["auto", "torch", "chunked", "triton"] = "auto"
    """torch: the definition. chunked: never holds all similarities at once. triton: fused, for GPUs. auto: triton on
    CUDA where loss_precision is tf32 or bf16, else the definition while its similarities are small, else chunked."""
    loss_precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of the factors of the similarities in `triton`; sums are float32 in all of them, and so is all else."""


Method = ReSSLConfig  # ReSSLConfig | WCLConfig | ..., told apart by name, once there are more


# --- evaluation ------------------------------------------------------------------------------------------------------


class KnnConfig(Section):
    """Wu et al. 2018, https://arxiv.org/abs/1805.01978."""

    k: Count = 200
    temperature: Positive = 0.1


class LinearConfig(Section):
    """A linear classifier on frozen features, trained by SGD without weight decay."""

    epochs: Count = 100
    batch_size: Count = 256
    lr: Positive = 0.3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: to 0, at every step. step: a tenth of the rate from 60 % of the epochs on, a hundredth from 80 % on."""
    crops: Literal["random", "centre"] = "random"
    """random: new crops and flips each epoch, so every epoch passes the encoder. centre: features are made once."""
    crop_scale: Range = (0.08, 1.0)


class EvaluateConfig(Section):
    size: Annotated[int, Field(ge=4, le=1024)]
    """Side of the centre crop, pixels."""
    resize: Annotated[int, Field(ge=4, le=2048)] | None = None
    """The shorter side is resized to this before the centre crop of `size`; null: the same as `size`."""
    batch_size: Count = 256
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(self.resize is None or self.resize >= self.size, "resize", f"must not be below size={self.size}",
                 self.resize)  # fmt: skip
        return self


# --- run -------------------------------------------------------------------------------------------------------------


class CheckpointConfig(Section):
    """When the run is saved. Each rule that is due saves it; so do the last step, and a signal to stop."""

    epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs between checkpoints; 0: not by epochs."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; 0: not by steps."""
    minutes: NotNegative = 0.0
    """Minutes between checkpoints; 0: not by the clock."""
    keep: Count = 2
    """The newest ones that stay; and, with `knn_every`, the one of the best evaluation."""


class RunConfig(Section):
    out_dir: UserPath
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU, else the CPU."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Of the networks; the loss is float32 in all of them. tf32: float32, but faster, coarser convolutions on a GPU."""
    compile: bool = False
    """Compile the encoder's blocks with torch.compile: fewer, larger kernels; takes a minute or more at the start."""
    cuda_graphs: bool = False
    """Capture the whole step as a CUDA graph and replay it: no cost of launching kernels, for small batches."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: gradients travel between ranks in half the bytes."""
    log_every: Count = 50
    """Steps between reads of the loss from the device; each read waits for the device."""
    knn_every: Annotated[int, Field(ge=0)] = 0
    """Epochs between kNN evaluations while training; 0: none."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    skip_limit: Annotated[int, Field(ge=0)] = 10
    """Steps that may be left out, since the run was last started, because their loss or gradient was not finite; one
    more ends it."""
    hang_timeout: NotNegative = 300.0
    """Seconds without a step after which a hanging run ends with the stacks of its ranks, four times as many before the
    first step; 0: it waits for ever."""
    tensorboard: bool = False
    """Write the metrics to `out_dir`/tensorboard as well."""


class Config(Section):
    data: DataConfig
    views: ViewsConfig
    encoder: Encoder
    method: Method
    optim: Optim
    evaluate: EvaluateConfig
    run: RunConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(self.run.knn_every == 0 or self.data.source.val is not None, "run.knn_every",
                 "needs data.source.val to be set", self.run.knn_every)  # fmt: skip
        return self
