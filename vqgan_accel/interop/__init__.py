"""Checkpoints of other trainers, in and out."""
