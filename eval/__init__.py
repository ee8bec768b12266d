"""Evaluation of a served model over its OpenAI endpoints."""
