"""The section of the losses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vqgan_accel.sections import Section, TermSection


class LossConfig(Section):
    l1_weight: float = Field(0.8, ge=0, description="of the mean absolute difference of pixels in [-1, 1]")
    l2_weight: float = Field(0.2, ge=0, description="of their mean squared difference")
    perceptual_weight: float = Field(
        1.0,
        ge=0,
        description="of the perceptual distance; 0: its network is not even loaded",
    )
    perceptual_network: Literal["lpips_vgg", "lpips_alex", "lpips_squeeze", "mobilenet_v2"] = Field(
        "lpips_vgg",
        description="LPIPS (Zhang et al. 2018) over one of three backbones, or the MobileNetV2 feature distance, "
        "which is no LPIPS",
    )

    @property
    def terms(self) -> dict[str, TermSection]:
        """The further losses that are asked for: name -> section."""
        return {name: value for name, value in self if isinstance(value, TermSection)}

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.l1_weight + self.l2_weight + self.perceptual_weight == 0:
            raise ValueError("l1_weight, l2_weight and perceptual_weight are all 0; give at least one a positive value")
        return self
