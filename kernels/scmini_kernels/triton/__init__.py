"""The Triton kernels with their launchers and their tuned configurations."""
