"""Triton kernels. Importing a module of this package needs triton; ``TRITON_INTERPRET=1`` runs them on a CPU, for tests."""
