"""Built-in quantization methods, one file each."""
