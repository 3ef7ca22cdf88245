"""The typed schema of a run: YAML plus dotted overrides in, one validated object out.

`load_config("configs/demo.yaml", ["training.max_steps=200"])` raises `ValueError` with one sentence per mistake before
anything else starts. Everything that needs the data set's size or the number of processes is checked by
`vqgan_accel.training.plan`, still before the first step.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from vqgan_accel.files import write_atomically
from vqgan_accel.recipes import recipes

GROUP_NORM_GROUPS = 32


class Duration(NamedTuple):
    """A length of training, written in YAML as `500 steps` or `7.5 epochs`."""

    value: float
    unit: Literal["steps", "epochs"]

    def steps(self, steps_per_epoch: int | None) -> int:
        """The duration in optimizer steps, rounded to the nearest. None: nothing but 0 is given in epochs."""
        return round(self.value * (steps_per_epoch or 0 if self.unit == "epochs" else 1))

    def __str__(self) -> str:
        unit = self.unit if self.value != 1 else self.unit[:-1]
        number = f"{self.value:.0f}" if self.value == int(self.value) else repr(self.value)
        return f"{number} {unit}"


def _parse_duration(value: object) -> object:
    match = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(steps?|epochs?)\s*", value)
        if isinstance(value, str)
        else None
    )
    if isinstance(value, Duration):
        return value
    if match is None:
        raise ValueError("a duration is a number and a unit, such as '500 steps' or '7.5 epochs'")
    unit: Literal["steps", "epochs"] = "steps" if match[2].startswith("step") else "epochs"
    if unit == "steps" and not float(match[1]).is_integer():
        raise ValueError("a duration in steps is a whole number, such as '500 steps'")
    return Duration(float(match[1]), unit)


DurationField = Annotated[Duration, BeforeValidator(_parse_duration), PlainSerializer(str)]


def _yaml_no(value: object) -> object:
    return "no" if value is False else value  # YAML 1.1 reads an unquoted no as false


PrecisionField = Annotated[Literal["auto", "no", "bf16"], BeforeValidator(_yaml_no)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    # folder: plain image files; hub: Hugging Face data sets; ffcv: betons, in training by FFCV's own loader; beton: the
    # same files by Pillow alone; auto: what data.path turns out to be
    backend: Literal["folder", "hub", "ffcv", "beton", "auto"] = "folder"
    path: str | None = None  # folder of images or betons, local data set, or (hub) its name on the Hugging Face hub
    subset: str | None = None  # hub: the configuration's name, for data sets that have several
    revision: str | None = None  # hub: branch, tag or commit of the data set
    image_column: str = "image"  # hub: the column that holds the image
    label_column: str | None = None  # hub, beton: the column or field of class numbers, which tokenize and make-beton
    # keep; null: `label`, if there is one
    streaming: bool = False  # hub: read in order while training, without downloading first
    shuffle_buffer: int = Field(1000, ge=1)  # streaming: images, over all processes, that are read and shuffled at once
    train_split: str = "train"  # folder: PATH/train; ffcv, beton: PATH/train.beton; hub: the split's name
    validation_split: str = "validation"  # the same of the validation split
    test_split: str = "test"  # the same of the test split
    validation_fraction: float | None = Field(None, gt=0, lt=1)  # folder, hub: this share of train_split, by a hash of
    # the names, is the validation split, and the rest is for training; null: validation_split
    validation_group: Literal["file", "folder"] = "file"  # what stays on one side: a file, or all files of a folder
    expected_hash: str | None = Field(None, pattern="^[0-9a-f]{64}$")  # of the training images' content, as
    # `vqgan-accel data-info CONFIG --hash` prints it: a run reads them all before its first step and refuses others
    image_size: int = Field(256, ge=4)  # pixels; every image becomes image_size x image_size
    crop_scale: Annotated[tuple[float, float], Field(strict=False)] | None = (0.7, 1.0)  # training: area of the random
    # square crop over the image's area, drawn as RandomResizedCrop(ratio=1) does; null: the central square
    horizontal_flip: bool = True  # training: flip with probability 1/2
    workers: int = Field(4, ge=0)  # loader processes per training process; ffcv: threads, no more than there are cores
    on_error: Literal["raise", "skip"] = "raise"  # a broken image stops the run, or is replaced, counted and reported

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale is [smallest, largest] with 0 < smallest <= largest <= 1, not {self.crop_scale}"
            )
        if self.streaming and self.backend not in ("hub", "auto"):
            raise ValueError(f"streaming is for backend hub, not for {self.backend}; set streaming=false")
        if self.streaming and self.validation_fraction is not None:
            raise ValueError(
                "validation_fraction needs the names of all images, which a stream has not; name slices such as "
                "train[:95%] and train[95%:] as the splits, or set streaming=false"
            )
        if self.streaming and self.expected_hash:
            raise ValueError("expected_hash means reading all images before the first step; set streaming=false")
        return self


class ConvolutionalConfig(Section):
    """What both autoencoders share: levels of blocks, each but perhaps the last with half the side of the one before.

    `autoencoder.type` is `maskgit` where it is not given.
    """

    channels: int = Field(128, gt=0)  # width of the first level; times each multiplier, a multiple of 32 (GroupNorm)
    channel_multipliers: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = (1, 2, 2, 4)  # one per level

    @model_validator(mode="after")
    def _check_widths(self) -> ConvolutionalConfig:
        for multiplier in self.channel_multipliers:
            if multiplier < 1 or self.channels * multiplier % GROUP_NORM_GROUPS:
                raise ValueError(
                    f"channels {self.channels} x multiplier {multiplier} = {self.channels * multiplier} "
                    "cannot be split "
                    f"into GroupNorm's {GROUP_NORM_GROUPS} groups; make every product a positive multiple of "
                    f"{GROUP_NORM_GROUPS}"
                )
        return self


class MaskGITConfig(ConvolutionalConfig):
    """The defaults are the original trainer's last revision (`head`) but for norm_variance, where that used `unbiased`.

    Its tables (`old`): upsample_conv false, norm_eps 1e-5, output_activation none, pixel_statistics imagenet.
    """

    type: Literal["maskgit"] = "maskgit"  # the networks of MaskGIT's tokenizer
    num_res_blocks: int = Field(2, ge=1)  # per level, and at the bottom
    upsample_conv: bool = True  # a 3x3 convolution after each nearest-neighbour upsampling
    norm_eps: float = Field(1e-6, gt=0)  # GroupNorm's epsilon
    norm_variance: Literal["biased", "unbiased"] = "biased"  # of GroupNorm: over n (torch's), or over n - 1
    output_activation: Literal["tanh", "none"] = "tanh"  # after the decoder's last convolution
    pixel_statistics: Literal["half", "imagenet"] = "half"  # what the networks see inside: [-1, 1], or (x - mean) / std

    @property
    def stride(self) -> int:
        """Pixels per latent position along one side."""
        return 2 ** len(self.channel_multipliers)


class TamingConfig(ConvolutionalConfig):
    """The VQGAN of taming-transformers (Esser et al. 2021), which diffusers has as `VQModel`."""

    type: Literal["taming"] = "taming"  # the networks of diffusers' VQModel
    num_res_blocks: int = Field(2, ge=1)  # per level of the encoder; the decoder has one more
    attention_levels: Annotated[tuple[int, ...], Field(strict=False)] = (-1,)  # levels with attention after every
    # block, beside the bottom, which always has it; 0 is the full resolution, -1 the coarsest level
    latent_channels: int = Field(256, gt=0)  # width between these networks and the quantizer's 1x1 convolutions

    @model_validator(mode="after")
    def _check_levels(self) -> TamingConfig:
        number = len(self.channel_multipliers)
        if bad := [level for level in self.attention_levels if not -number <= level < number]:
            raise ValueError(f"attention_levels has {bad[0]}, and the {number} levels are 0 to {number - 1}")
        counted = tuple(sorted({level % number for level in self.attention_levels}))
        object.__setattr__(self, "attention_levels", counted)  # one form of each layout, so that equal ones are equal
        return self

    @property
    def stride(self) -> int:
        """Pixels per latent position along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)


def _maskgit_unless_said(value: object) -> object:
    return {"type": "maskgit", **value} if isinstance(value, dict) else value


AutoencoderConfig = MaskGITConfig | TamingConfig
AutoencoderField = Annotated[AutoencoderConfig, BeforeValidator(_maskgit_unless_said), Field(discriminator="type")]


class CodebookConfig(Section):
    num_codes: int = Field(1024, ge=2)  # K, the size of the codebook
    embedding_dim: int = Field(256, ge=1)  # D, the numbers in a code's vector


class NearestCodeConfig(CodebookConfig):
    """What the three quantizers that pick the nearest code share."""

    commitment_cost: float = Field(0.25, ge=0)  # beta (van den Oord et al. 2017, eq. 3)
    l2_normalize: bool = False  # latents and codes are compared, and decoded, as unit vectors (Yu et al. 2021,
    # ViT-VQGAN)
    reinit_every_epochs: int | None = Field(None, ge=1)  # epochs between two replacements of the codes that no image of
    # the epoch before it used; null: never
    reinit_from: Literal["latents", "used_codes"] = "latents"  # what they become. latents: encoder outputs; used_codes:
    # perturbed copies of the codes in use


class StandardQuantizerConfig(NearestCodeConfig):
    """The nearest code; the codebook learns by gradient (van den Oord et al. 2017)."""

    type: Literal["standard"]  # nearest code, codebook by gradient


class EMAQuantizerConfig(NearestCodeConfig):
    """The nearest code; the codebook is a moving average of the latents that chose it."""

    type: Literal["ema"]  # nearest code, codebook as a moving average
    decay: float = Field(0.99, ge=0, lt=1)  # per optimizer step (van den Oord et al. 2017, appendix A.1)
    epsilon: float = Field(1e-5, gt=0)  # Laplace smoothing of the counts


class EntropyQuantizerConfig(NearestCodeConfig):
    """The standard quantizer and a loss that wants each token decided and all codes used."""

    type: Literal["entropy"]  # the standard one, with an entropy loss
    entropy_ratio: float = Field(0.1, ge=0)  # weight of the entropy loss (MaskGIT's tokenizer)
    entropy_temperature: float = Field(0.01, gt=0)  # of softmax(-distance / temperature)
    entropy_target: Literal["softmax", "argmax"] = "softmax"  # the distribution whose entropy it is: soft, or one-hot
    # in the forward pass and soft in the backward pass


class GumbelQuantizerConfig(CodebookConfig):
    """Logits of the codes, sampled with Gumbel noise in training (Jang et al. 2017; Ramesh et al. 2021)."""

    type: Literal["gumbel"]  # Gumbel-softmax
    hidden_channels: int | None = Field(None, ge=1)  # what the encoder emits, before a 1x1 convolution to one logit per
    # code; null: num_codes, as the original trainer has it
    straight_through: bool = False  # hard one-hot forward, soft gradient
    temperature_start: float = Field(1.0, gt=0)  # tau (Jang et al. 2017), cosine from start to end
    temperature_end: float = Field(0.0625, gt=0)  # tau after temperature_decay
    temperature_decay: DurationField = Duration(7.5, "epochs")  # the way from start to end
    kl_cost: float = Field(0.00859375, ge=0)  # weight of the KL loss; 6.6 / 768 (Ramesh et al. 2021, A.2: per pixel
    # value, 256 px at f = 16)
    kl_warmup: DurationField = Duration(0.24, "epochs")  # cosine from 0 to kl_cost

    @model_validator(mode="after")
    def _one_form(self) -> GumbelQuantizerConfig:
        if self.hidden_channels == self.num_codes:  # equal layouts are to be equal
            object.__setattr__(self, "hidden_channels", None)
        return self


QuantizerConfig = StandardQuantizerConfig | EMAQuantizerConfig | EntropyQuantizerConfig | GumbelQuantizerConfig


class LossConfig(Section):
    l1_weight: float = Field(0.8, ge=0)  # of the mean absolute difference of pixels in [-1, 1]
    l2_weight: float = Field(0.2, ge=0)  # of their mean squared difference
    perceptual_weight: float = Field(1.0, ge=0)  # of the perceptual distance; 0: its network is not even loaded
    perceptual_network: Literal["lpips_vgg", "lpips_alex", "lpips_squeeze", "mobilenet_v2"] = "lpips_vgg"  # LPIPS
    # (Zhang et al. 2018) over one of three backbones, or the MobileNetV2 feature distance, which is no LPIPS

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.l1_weight + self.l2_weight + self.perceptual_weight == 0:
            raise ValueError("l1_weight, l2_weight and perceptual_weight are all 0; give at least one a positive value")
        return self


class DiscriminatorConfig(Section):
    type: Literal["stylegan2"] = "stylegan2"  # the residual one of Karras et al. 2020
    channel_base: int = Field(32768, gt=0)  # channels at resolution r: min(channel_base / r, channel_max)
    channel_max: int = Field(512, gt=0)  # see channel_base
    minibatch_stddev_group: int = Field(4, ge=1)  # samples per group of the minibatch-stddev layer
    loss: Literal["hinge", "non_saturating"] = "non_saturating"  # of both networks (Lim & Ye 2017; Goodfellow et al.
    # 2014)
    start: DurationField = Duration(0, "epochs")  # adversarial training begins here; before it, D neither runs nor
    # learns
    warmup: DurationField = Duration(0, "steps")  # from then on D learns alone, before its loss reaches the tokenizer
    weight: float = Field(0.1, ge=0)  # of the generator's adversarial loss; times lambda where adaptive
    adaptive_weight: bool = False  # lambda of Esser et al. 2021, eq. 7
    r1_weight: float = Field(0.0, ge=0)  # coefficient of mean |grad D(x)|^2 as applied (Mescheder et al. 2018); 0: off
    r1_every: int = Field(16, ge=1)  # optimizer steps between two applications (lazy regularisation)


Metric = Literal["l2", "psnr", "ssim", "lpips", "mobilenet_distance", "rfid", "fd_mobilenet", "codebook"]
MetricNames = Annotated[tuple[Metric, ...], Field(strict=False)]
# metric in `metrics` -> the names it adds to the results; those in LOWER_IS_BETTER improve downwards
METRIC_RESULTS: dict[str, tuple[str, ...]] = {
    "l2": ("l2",),
    "psnr": ("psnr", "psnr_per_image"),
    "ssim": ("ssim",),
    "lpips": ("lpips",),
    "mobilenet_distance": ("mobilenet_distance",),
    "rfid": ("rfid",),
    "fd_mobilenet": ("fd_mobilenet",),
    "codebook": ("perplexity", "codebook_usage"),
}
LOWER_IS_BETTER = frozenset({"l2", "lpips", "mobilenet_distance", "rfid", "fd_mobilenet"})


class TrainingConfig(Section):
    max_epochs: float | None = Field(None, gt=0)  # training ends at max_epochs or max_steps, whichever comes first
    max_steps: int | None = Field(None, ge=1)  # optimizer steps
    init_from: str | None = None  # a run, a checkpoint, an import's or a tokenizer's folder, or USER/NAME on the hub,
    # whose weights training begins with; the discriminator's too, where there are some
    decoder_only: bool = False  # with init_from: encoder and codebook stay as they are, and so do all codes
    total_batch_size: int = Field(256, ge=1)  # images per optimizer step: processes x accumulation x per-process batch
    gradient_accumulation_steps: int = Field(1, ge=1)  # rounds per optimizer step; more of them take less memory
    mixed_precision: PrecisionField = "auto"  # auto: what `accelerate launch` says, else no
    compile: bool = False  # encoder, decoder and perceptual network by torch.compile (docs/performance.md says when)
    base_lr: float = Field(1e-4, gt=0)  # learning rate of both networks at base_batch_size
    base_batch_size: int = Field(256, ge=1)  # see base_lr and lr_scaling
    lr_scaling: Literal["sqrt", "linear", "none"] = "sqrt"  # lr = base_lr * f(total_batch_size / base_batch_size)
    lr_warmup: DurationField = Duration(0, "steps")  # linear from 0
    lr_decay: DurationField | None = None  # cosine from the start of training to lr_final_ratio; null: all of training
    lr_final_ratio: float = Field(0.1, ge=0, le=1)  # of the last learning rate to the first; 1: constant
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)  # AdamW, both networks
    eps: float = Field(1e-8, gt=0)  # AdamW, both networks
    weight_decay: float = Field(1e-4, ge=0)  # the tokenizer's convolution weights and all of D
    max_grad_norm: float | None = Field(None, gt=0)  # clip each network's gradient to this norm; null: do not
    ema_decay: float | None = Field(None, gt=0, lt=1)  # average of the tokenizer's weights, per step; null: none
    max_bad_steps: int = Field(10, ge=1)  # steps in a row with a non-finite loss before the run stops
    log_every: int = Field(50, ge=1)  # steps between two lines of metrics.jsonl
    validate_every: DurationField = Duration(1, "epochs")  # on the whole validation split; also after the last step
    validation_metrics: MetricNames = ("l2", "psnr", "ssim", "codebook")  # of the validations inside training
    checkpoint_every: DurationField = Duration(1, "epochs")  # also after the last step, a new best one and a signal
    keep_checkpoints: int = Field(3, ge=1)  # the newest ones; the best one stays besides
    best_metric: str = "psnr"  # of the validation results: whose best value `checkpoints/best` has

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.max_epochs is None and self.max_steps is None:
            raise ValueError("give max_epochs or max_steps: nothing says when training ends")
        if self.total_batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"total_batch_size {self.total_batch_size} is not divisible by gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas are two numbers in [0, 1), not {list(self.betas)}")
        if self.decoder_only and self.init_from is None:
            raise ValueError("decoder_only keeps an encoder as it is: say in init_from whose")
        results = [name for metric in self.validation_metrics for name in METRIC_RESULTS[metric]]
        if self.best_metric not in results:
            raise ValueError(
                f"best_metric '{self.best_metric}' is not among the validation results: {', '.join(results) or 'none'}"
            )
        for name, every in (("validate_every", self.validate_every), ("checkpoint_every", self.checkpoint_every)):
            if every.value == 0:
                raise ValueError(f"{name} is {every}; give at least 1 step")
        for limit, unit in ((self.max_epochs, "epochs"), (self.max_steps, "steps")):
            if limit is not None and self.lr_warmup.unit == unit and self.lr_warmup.value > limit:
                raise ValueError(f"lr_warmup ({self.lr_warmup}) is longer than training ({limit:g} {unit}); shorten it")
        return self


class EvaluationConfig(Section):
    split: Literal["train", "validation", "test"] = "validation"  # whose images are measured
    metrics: MetricNames = ("l2", "psnr", "ssim", "lpips", "rfid", "codebook")  # docs/evaluation.md defines each
    lpips_network: Literal["vgg", "alex", "squeeze"] = "vgg"  # of the metric lpips
    batch_size: int = Field(32, ge=1)  # images per process, also in validations, tokenize and codebook
    grid_images: int = Field(8, ge=0)  # originals over reconstructions in the picture


class WeightFiles(Section):
    """Files with the published weights of fixed networks, for machines without a network; null: download once."""

    vgg16: str | None = None  # torchvision's ImageNet state dict, for LPIPS
    alexnet: str | None = None  # the same of AlexNet
    squeezenet: str | None = None  # of SqueezeNet 1.1
    mobilenet_v2: str | None = None  # of MobileNetV2, for the MobileNetV2 feature distance and FD-MobileNetV2
    inception: str | None = None  # torch-fidelity's pt_inception-2015-12-05, for rFID


class TrackingConfig(Section):
    trackers: Annotated[tuple[Literal["wandb", "tensorboard"], ...], Field(strict=False)] = ()  # beside metrics.jsonl
    project: str = "vqgan_accel"  # the trackers' name for a set of runs
    run_name: str | None = None  # wandb's name for the run; null: the output folder's name
    wandb_mode: Literal["online", "offline"] = "online"  # offline: written to the run folder, for `wandb sync`


class Config(Section):
    """Everything that decides a run, section by section; `load_config` makes one of a YAML file, and the fields' own
    comments say units, ranges and sources. It does not change once it is made: `config.model_copy(update=...)` does.
    """

    output_dir: str = Field("runs/default", min_length=1)  # checkpoints, metrics.jsonl, pictures, the resolved config
    seed: int = Field(0, ge=0, lt=2**32)  # of the initial weights, the order of the images, crops, flips and noise
    data: DataConfig = DataConfig()  # where images come from, and what is done to them
    autoencoder: AutoencoderField = MaskGITConfig()  # encoder and decoder
    quantizer: QuantizerConfig = Field(StandardQuantizerConfig(type="standard"), discriminator="type")  # the codebook
    losses: LossConfig = LossConfig()  # between a reconstruction and its image
    discriminator: DiscriminatorConfig | None = None  # the second network; null: train without one
    training: TrainingConfig  # how long, how fast, and what is kept
    evaluation: EvaluationConfig = EvaluationConfig()  # what evaluate.py, tokenize and codebook read
    weights: WeightFiles = WeightFiles()  # files of fixed networks
    tracking: TrackingConfig = TrackingConfig()  # wandb and TensorBoard

    @model_validator(mode="after")
    def _check(self) -> Config:
        size, stride = self.data.image_size, self.autoencoder.stride
        if size % stride:
            raise ValueError(
                f"data.image_size {size} is not divisible by {stride}, the stride of an autoencoder with "
                f"{len(self.autoencoder.channel_multipliers)} levels (autoencoder.channel_multipliers)"
            )
        if self.discriminator and (size < 8 or size & (size - 1)):
            raise ValueError(
                f"the StyleGAN2 discriminator needs data.image_size to be a power of two of at least 8, not {size}; "
                "change it or set discriminator=null"
            )
        if self.discriminator:
            group = self.discriminator.minibatch_stddev_group
            micro_batch = self.training.total_batch_size // self.training.gradient_accumulation_steps
            if micro_batch % group:
                raise ValueError(
                    f"each accumulation round holds {micro_batch} images (training.total_batch_size / "
                    "training.gradient_accumulation_steps), which discriminator.minibatch_stddev_group "
                    f"{group} does not divide"
                )
        reinit = getattr(self.quantizer, "reinit_every_epochs", None)
        if self.training.decoder_only and reinit is not None:
            raise ValueError(
                f"training.decoder_only keeps the codebook, which quantizer.reinit_every_epochs={reinit} would change; "
                "set that to null"
            )
        if size < 11 and "ssim" in self.evaluation.metrics + self.training.validation_metrics:
            raise ValueError(
                f"SSIM's window of 11 pixels does not fit data.image_size {size}; remove 'ssim' from the metrics"
            )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or a recipe by its name (`vqgan-accel recipes` lists them), apply `section.key=value`
    overrides, validate.

    Raises FileNotFoundError for a missing file and ValueError, naming each wrong key and what would be right,
    otherwise.

    >>> config = load_config("demo", ["data.path=photographs", "training.max_steps=500"])
    >>> config.quantizer.num_codes, str(config.training.validate_every)
    (256, '135 steps')
    """
    path = config_file(Path(path))
    try:
        values = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    except RecursionError:  # omegaconf < 2.4
        raise ValueError(f"{path} cannot be read as YAML: an alias in it is recursive") from None
    if not isinstance(values, DictConfig):
        raise ValueError(f"{path} must hold sections such as 'data:' and 'training:', and it holds none")
    return parse_config(values, overrides, source=str(path))


def parse_config(values: DictConfig | dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> Config:
    """A Config from plain values and overrides; `source` is what error sentences name."""
    for override in overrides:
        if not re.match(r"[A-Za-z_][\w.]*=", override):
            raise ValueError(
                f"'{override}' is not an override; write section.key=value, such as training.max_steps=200"
            )
    try:
        given = OmegaConf.from_dotlist(list(overrides))
        merged = OmegaConf.merge(_without_other_types(OmegaConf.create(values), given, source), given)
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{source}: an override does not fit: {' '.join(str(error).split())}") from error
    try:
        return validated(OmegaConf.to_container(merged, resolve=True), source)
    except OmegaConfBaseException as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from error


def validated(values: Any, source: str) -> Config:
    """A Config from plain values as they are."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{source}: {sentences(error)}") from None


def literal(values: Any) -> Any:
    """Plain values as OmegaConf has to be given them, so that `${` in their strings stays what it is."""
    if isinstance(values, dict):
        return {key: literal(value) for key, value in values.items()}
    if isinstance(values, list):
        return [literal(value) for value in values]
    if isinstance(values, str):
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", values)
    return values


def _without_other_types(values: DictConfig, overrides: DictConfig, source: str) -> DictConfig:
    """The values of a file without what belongs to another type of a section than the one that an override asks for:
    `quantizer.type=standard` begins with that type's defaults. What is left out is said."""
    for name, annotation in UNIONS.items():
        section, other = values.get(name), overrides.get(name)
        kind = other.get("type") if isinstance(other, DictConfig) else None
        fields = next((part.model_fields for part in _sections(annotation) if _type_of(part) == kind), None)
        if not isinstance(section, DictConfig) or fields is None:
            continue
        dropped = {key: section.pop(key) for key in list(section) if key not in fields}
        if dropped and os.environ.get("RANK", "0") == "0":
            listed = ", ".join(f"{key} {value}" for key, value in dropped.items())
            print(f"{name}.type={kind} leaves out what {source} says of another type: {listed}", file=sys.stderr)
    return values


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back to an equal object."""
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(literal(config.model_dump(mode="json")))))


def flat_config(config: Config) -> dict[str, bool | int | float | str]:
    """Dotted keys to plain values; what is no number, bool or string is shown as one."""
    flat: dict[str, bool | int | float | str] = {}

    def visit(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)

    visit(config.model_dump(mode="json"), "")
    return flat


def config_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, for suggestions."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in _sections(field.annotation):
            keys += config_keys(section, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def _sections(annotation: Any) -> list[type[Section]]:
    candidates = [annotation, *get_args(annotation)]
    kind = type(Section)  # (on Python 3.10 tuple[int, ...] is a `type` too)
    return [candidate for candidate in candidates if isinstance(candidate, kind) and issubclass(candidate, Section)]


def _type_of(section: type[BaseModel]) -> str:
    return get_args(section.model_fields["type"].annotation)[0]


UNIONS = {"autoencoder": AutoencoderConfig, "quantizer": QuantizerConfig}  # sections of which there are several
UNION_TYPES = {name: [_type_of(section) for section in _sections(union)] for name, union in UNIONS.items()}


def sentences(error: ValidationError) -> str:
    """One line for each mistake, naming keys as the user writes them."""
    return "\n".join(_sentence(detail) for detail in error.errors())


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _sentence(detail: Any) -> str:
    """One pydantic error as a sentence that names the key as the user writes it."""
    location = detail["loc"]
    types = UNION_TYPES.get(str(location[0]).removesuffix("_config") if location else "", ())
    if len(location) > 1 and location[1] in types:
        location = location[:1] + location[2:]  # pydantic names the union's branch there
    key = ".".join(str(part) for part in location)
    given = detail.get("input")
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key '{key}'{_suggestion(key)}"
        case "missing":
            return f"'{key}' is missing"
        case "union_tag_not_found":
            return f"'{key}.type' is missing; give {_either(types)}"
        case "union_tag_invalid":
            return f"'{key}.type' is {given.get('type')!r} but must be {_either(types)}"
        case "value_error":
            return f"{key + ': ' if key else ''}{detail['msg'].removeprefix('Value error, ')}"
    if key == "training.mixed_precision" and given == "fp16":
        return (
            "'training.mixed_precision' cannot be fp16: one gradient scaler would serve two networks' "
            "optimizers, and its "
            "skipped steps would break the codebook's moving averages; use bf16 (same range as float32) or no"
        )
    return f"'{key}' is {given!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _suggestion(key: str) -> str:
    keys = config_keys()
    if key in keys:
        return f": '{key}' belongs to another {key.split('.')[0]}.type"
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    near = near or [known for known in keys if known.rsplit(".", 1)[-1] == leaf][:1]
    if not near:
        leaves = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
        near = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)]
    return f"; did you mean '{near[0]}'?" if near else f"; see the fields in {Path(__file__).name}"


def config_file(path: Path) -> Path:
    """The file itself, or that of the recipe of this name. FileNotFoundError says what there is instead."""
    if path.is_file():
        return path
    known = recipes()
    if path.as_posix() in known:
        return known[path.as_posix()]
    files = {file.name: file for file in path.parent.glob("*.yaml")}
    near = [str(files[name]) for name in difflib.get_close_matches(path.name, files, n=1)]
    near += difflib.get_close_matches(path.with_suffix("").as_posix(), known, n=1)
    near += [name for name in known if Path(name).name == path.stem]
    hint = f"; did you mean {near[0]}?" if near else ", nor a recipe of this name; `vqgan-accel recipes` lists them"
    raise FileNotFoundError(f"no config file at {path}{hint}")


def batch_scale(training: TrainingConfig) -> float:
    """Factor from base_lr to the learning rate in use."""
    ratio = training.total_batch_size / training.base_batch_size
    return {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[training.lr_scaling]
