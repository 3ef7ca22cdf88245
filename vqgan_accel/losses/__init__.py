"""What is asked of a tokenizer: reconstruction, perceptual and adversarial losses."""
