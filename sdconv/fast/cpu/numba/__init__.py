"""The CPU kernels that Numba compiles."""
