"""Fusion of what several ensembles believe about a latent code: `fuse`."""

from kernels.fusion.api import Fused, fuse

__all__ = ["Fused", "fuse"]
