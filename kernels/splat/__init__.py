"""Differentiable Gaussian splatting: `rasterize` and what it returns."""

from kernels.splat.api import Rasterized, rasterize

__all__ = ["Rasterized", "rasterize"]
