"""Tokenizers, one file a library."""
