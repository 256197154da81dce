"""Built-in logits processors, token samplers and decoding algorithms."""
