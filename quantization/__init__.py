"""Checkpoint types, packed layout and the code between them."""
