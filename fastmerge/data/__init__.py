"""Data sets as tensors and loaders."""
