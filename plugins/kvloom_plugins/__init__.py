"""Every other built-in: attention, executors, loaders, schedulers, tokenizers."""
