"""CUDA kernels: one file each, and what compiles, launches and dispatches them."""
