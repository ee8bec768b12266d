"""Embedded OpenAI-compatible server for machines without a Hopper GPU; README.md compares it with `transformers serve`."""
