"""Hooks: the specs, the registry that plugins fill, the loader that finds plugins, the manifest of what was loaded."""
