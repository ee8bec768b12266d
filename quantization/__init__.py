"""Checkpoint formats, packed layouts, conversion between them, and the quantisation method that SGLang calls."""
