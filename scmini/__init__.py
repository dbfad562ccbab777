"""scmini: Self-Contrast alignment on one GPU, from raw data to the figure."""

__version__ = "0.1.0"
