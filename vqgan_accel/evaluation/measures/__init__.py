"""The metrics, one class each; vqgan_accel/config/metrics.py lists them."""
