"""The CUDA kernels, their JIT, and the torch reference they are checked against."""
