"""Differentiable Gaussian splatting: `rasterize`, what it returns and what it draws with."""

from kernels.splat.api import Rasterized, choose, rasterize

__all__ = ["Rasterized", "choose", "rasterize"]
