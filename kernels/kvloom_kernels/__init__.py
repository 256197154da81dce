"""Kernels: a leaf that imports nothing of kvloom. One file an operation, each with its plain-torch reference."""
