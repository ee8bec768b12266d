"""CUDA kernels, their JIT compilation, and the torch reference that defines their results."""
