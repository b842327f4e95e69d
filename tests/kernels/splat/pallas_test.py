"""The Pallas kernels: they lower for the devices from any machine, and draw right on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.splat import api, rasterize, tuning
from kernels.splat.cases import CASES, scene

HAS_GPU = any(d.platform == "gpu" for d in jax.devices())


def picture(inputs, implementation):
  def loss(means, opacities, features):
    out = rasterize(**inputs | dict(means=means, opacities=opacities, features=features),
                    detached=(1,), capacity=8192, implementation=implementation)
    return sum(jnp.sum(x**2) for x in out[:4])

  return loss, tuple(jnp.asarray(inputs[k]) for k in ("means", "opacities", "features"))


@pytest.mark.parametrize("gradient", (False, True))
def test_lowers_for_cuda_without_a_gpu(monkeypatch, gradient):
  monkeypatch.setitem(tuning.TUNED, ("cpu", "pallas"), tuning.pick("gpu", "pallas"))
  loss, args = picture(scene(CASES["sharp"]), "pallas")
  run = jax.jit(jax.grad(loss, (0, 1, 2)) if gradient else loss)
  text = run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  # Compositing both ways, projection, shading.
  assert text.count("mosaic_gpu") >= (4 if gradient else 1)


def test_a_batch_under_vmap_lowers_for_cuda(monkeypatch):
  monkeypatch.setitem(tuning.TUNED, ("cpu", "pallas"), tuning.pick("gpu", "pallas"))
  loss, args = picture(scene(CASES["sharp"]), "pallas")
  batch = [jnp.stack([x, x]) for x in args]
  run = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))
  assert "mosaic_gpu" in run.trace(*batch).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("platform", ("cuda", "tpu"))
def test_plain_xla_lowers_for_devices(platform):
  loss, args = picture(scene(CASES["sharp"]), "xla")
  jax.jit(jax.grad(loss, (0, 1, 2))).trace(*args).lower(lowering_platforms=(platform,))


def test_what_is_too_wide_for_registers_is_drawn_by_plain_xla(monkeypatch):
  inputs = scene(CASES["sharp"]) | dict(features=np.ones((150, 61), np.float32), capacity=8192)
  with pytest.raises(ValueError, match="65 channels.*at most 64"):
    rasterize(**inputs, implementation="pallas")
  monkeypatch.setattr(api, "_choose", lambda platform: ("pallas", "for the test"))
  shown = rasterize(**inputs)
  np.testing.assert_array_equal(shown.features, rasterize(**inputs, implementation="xla").features)


@pytest.mark.device
@pytest.mark.skipif(not HAS_GPU, reason="no GPU: the Mosaic kernels run on none but NVIDIA's")
@pytest.mark.parametrize("name", ("sharp", "crowded", "demo crowded", "head 10k"))
def test_draws_right_on_a_gpu(name):
  inputs = scene(CASES[name])
  learnt = ("means", "quats", "scales", "opacities", "colors", "features")
  point = {k: jnp.asarray(inputs[k]) for k in learnt}
  rest = {k: x for k, x in inputs.items() if k not in learnt}
  n = len(inputs["means"])
  small = inputs["width"] * n < 10_000
  peers = ("xla", "reference") if small else ("xla",)

  def draw(point, probe, implementation):
    out = rasterize(**point, **rest, probe=probe, detached=(1,), implementation=implementation,
                    capacity=2**20)
    keys = jax.random.split(jax.random.key(0), 4)
    return sum(jnp.sum(x * jax.random.normal(k, x.shape)) for k, x in zip(keys, out[:4],
                                                                         strict=True)), out

  run = jax.jit(jax.grad(draw, (0, 1), has_aux=True), static_argnums=2)
  go = functools.partial(run, point, jnp.zeros((1, n, 2)))
  grads, out = go("pallas")
  again, _ = go("pallas")
  jax.tree.map(np.testing.assert_array_equal, grads, again)  # the same bits every time
  assert out.overflow == 0
  for peer in peers:
    expected, shown = go(peer)
    for got, want in zip(out[:4], shown[:4], strict=True):
      # Where a pixel finishes one splat earlier by rounding, up to 0.01 of light may differ.
      gap = np.abs(np.asarray(got) - np.asarray(want))
      assert np.mean(gap > 1e-4) < 1e-5 and gap.max() < 0.05
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
      assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)


@pytest.mark.device
@pytest.mark.skipif(not HAS_GPU, reason="no GPU: nothing but the default there is tested here")
def test_a_gpu_draws_with_pallas_by_default(recwarn):
  inputs = scene(CASES["sharp"])
  default, pallas = rasterize(**inputs), rasterize(**inputs, implementation="pallas")
  np.testing.assert_array_equal(default.color, pallas.color)
  assert not [w for w in recwarn if "kernels.splat" in str(w.message)]
