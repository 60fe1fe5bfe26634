"""The CUDA backend: layout (planes as kernels want them), plan (which kernel), toolchain (NVRTC), backend (torch)."""
