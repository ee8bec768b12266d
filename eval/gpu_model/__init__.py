"""The model that stock SGLang serves on a Hopper GPU: shape, fast training step, quantisation-aware training, export."""
