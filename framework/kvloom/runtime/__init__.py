"""The device side: building and loading a model, planning memory, running steps."""
