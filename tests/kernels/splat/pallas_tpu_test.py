"""The Pallas kernels for TPUs: they lower from any machine, and interpreted they draw right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.splat import rasterize, tuning
from kernels.splat.cases import CASES, scene

CONFIG = tuning.pick("tpu", "pallas")


def picture(inputs, implementation):
  """A weighed sum of the images, to be differentiated, and the arrays that it depends on."""
  names = ("means", "opacities", "colors", "features")
  shown = ("color", "alpha", "depth", "features")

  def loss(*learnt):
    out = rasterize(**inputs | dict(zip(names, learnt, strict=True)), detached=(1,),
                    capacity=8192, implementation=implementation)
    images = [getattr(out, name) for name in shown]
    return sum(jnp.sum(x * jax.random.normal(jax.random.key(i), x.shape))
               for i, x in enumerate(images)), images

  return loss, tuple(jnp.asarray(inputs[name]) for name in names)


def gradient(loss):
  return jax.grad(loss, (0, 1, 2, 3), has_aux=True)


def assert_same(drawn, expected):
  for got, want in zip(drawn[1], expected[1], strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4)
  for got, want in zip(drawn[0], expected[0], strict=True):
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)


@pytest.fixture
def interpreted(monkeypatch):
  config = dataclasses.replace(CONFIG, backend="tpu interpret")
  monkeypatch.setitem(tuning.TUNED, ("cpu", "pallas"), config)


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("mapped", (False, True))
def test_lowers_for_tpu_without_one(monkeypatch, backward, mapped):
  monkeypatch.setitem(tuning.TUNED, ("cpu", "pallas"), CONFIG)
  loss, args = picture(scene(CASES["sharp"]), "pallas")
  run = gradient(loss) if backward else loss
  if mapped:
    run, args = jax.vmap(run), jax.tree.map(lambda x: jnp.stack([x, x]), args)
  text = jax.jit(run).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") >= 1 + backward


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ("sharp", "crowded"))
def test_agrees_with_the_reference(name):
  # Compiled but once for both cases, since the one `jit` is that of `rasterize`.
  inputs = scene(CASES[name]) | dict(extent="official")
  assert_same(*(gradient(loss)(*args) for loss, args in (
      picture(inputs, kind) for kind in ("pallas", "reference"))))


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_many_chunks_a_tile_and_early_exits_draw_as_plain_xla_does_under_vmap():
  # Nearly opaque splats, most of them in a few tiles.
  inputs = scene(dataclasses.replace(CASES["crowded"], splats=1000))
  inputs["opacities"] = 0.5 + 0.5 * inputs["opacities"]
  loss, (means, *rest) = picture(inputs, "pallas")
  both = jnp.stack([means, means + 0.01])
  mapped = jax.jit(jax.vmap(lambda means: gradient(loss)(means, *rest)))(both)
  plain = jax.jit(gradient(picture(inputs, "xla")[0]))
  for i in range(2):
    assert_same([[x[i] for x in part] for part in mapped], plain(both[i], *rest))


@pytest.mark.parametrize("change", (dict(tile=(8, 8)), dict(block=64)))
def test_what_fills_no_registers_is_refused(monkeypatch, change):
  config = dataclasses.replace(CONFIG, **change)
  monkeypatch.setitem(tuning.TUNED, ("cpu", "pallas"), config)
  loss, args = picture(scene(CASES["sharp"]), "pallas")
  with pytest.raises(ValueError, match="multiples of 128"):
    loss(*args)
