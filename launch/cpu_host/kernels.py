"""Names of the CPU host's kernels; imports nothing."""

TRANSFORMERS = "transformers"  # transformers' own experts on dequantised FP32 weights, to compare with
CPU_KERNELS = ("reference", "w4a16", TRANSFORMERS)
