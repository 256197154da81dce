"""Scheduling policies: who is served first, and who gives way."""
