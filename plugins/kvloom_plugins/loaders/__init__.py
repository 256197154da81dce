"""Weight loaders: one module a load format."""
