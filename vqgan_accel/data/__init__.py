"""Where images come from, and in which order: functions of position alone."""

from vqgan_accel.data.tokens import load_tokens

__all__ = ["load_tokens"]
