"""Data sets of codes, for the second stage: written by `vqgan-accel tokenize`, read by `load_tokens`."""
