"""The SGLang plugin: which kernel runs, and how it gets into stock SGLang."""
