"""What is learnt: autoencoders, quantizers, discriminators. Knows nothing of training or of Accelerate."""
