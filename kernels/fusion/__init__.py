"""Product of ensemble Gaussians: `fuse`, what it returns and what it fuses with."""

from kernels.fusion.api import Fused, choose, fuse

__all__ = ["Fused", "choose", "fuse"]
