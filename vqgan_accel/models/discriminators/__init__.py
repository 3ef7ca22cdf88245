"""Discriminators: the networks that tell images from reconstructions."""
