"""Poolers: one module a pooling type."""
