"""What a process compiled, the next one finds: kernels are lowered alike whatever came before."""

import jax
import jax.numpy as jnp

from kernels.fusion import pallas as fusion
from kernels.splat import rasterize, tuning
from kernels.splat.cases import CASES, scene


def lowered(function, *args):
  jax.clear_caches()  # as in a process that has lowered nothing yet
  return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_kernels_are_lowered_alike_whatever_was_lowered_before(monkeypatch):
  monkeypatch.setitem(tuning.TUNED, ("cpu", "pallas"), tuning.pick("gpu", "pallas"))
  inputs = scene(CASES["sharp"])

  def picture(means):
    out = rasterize(**inputs | dict(means=means), capacity=8192, implementation="pallas")
    return jnp.sum(out.color**2)

  def fused(answers):
    return fusion.fuse(list(answers), 1, 10.0)[0].sum()

  means, answers = jnp.asarray(inputs["means"]), jnp.ones((2, 3, 8, 130))
  first = lowered(jax.grad(picture), means), lowered(jax.grad(fused), answers)
  assert all("mosaic_gpu" in text for text in first)
  assert (lowered(jax.grad(picture), means), lowered(jax.grad(fused), answers)) == first
