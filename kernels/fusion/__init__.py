"""Product of ensemble Gaussians: `fuse`, `fuse_answers` for networks, and what they fuse with."""

from kernels.fusion.api import Fused, Implementation, choose, fuse, fuse_answers

__all__ = ["Fused", "Implementation", "choose", "fuse", "fuse_answers"]
