"""The tiny DeepSeek-V4 model: shape, tokenizer, training on a CPU, export."""
