"""Image tokenizers (VQ-VAE, VQ-GAN) on Hugging Face Accelerate."""

__version__ = "0.1.0"
