"""Built-in model families, one file each."""
