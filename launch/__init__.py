"""Command line `hopper-moe`: checks, serving, demo."""
