"""Fakes and helpers for tests, ours and those of plugin authors."""
