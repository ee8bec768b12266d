"""Kernel choice, kernel runners, and the plugin for stock SGLang."""
