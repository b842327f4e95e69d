"""What training sounds like is familiar; what lies further out is strange by how far it does."""

import jax
import jax.numpy as jnp
import numpy as np

from uajax.models.familiar import MOST, Familiar, learn

ask = jax.jit(jax.vmap(lambda params, code: Familiar().apply({"params": params}, code), (None, 0)))


def test_training_is_familiar_and_disturbance_strange_by_how_strong_it_is():
  """Codes that live in three of eight directions, very unequally, as real ones do."""
  rng = np.random.default_rng(0)
  codes = 1 + rng.normal(size=(600, 3)) * [5, 1, 0.5] @ np.linalg.qr(rng.normal(size=(8, 3)))[0].T
  codes, unheard = (jnp.asarray(x, jnp.float32) for x in np.split(codes, 2))
  params = jax.jit(learn)(codes)
  assert 0.9 < np.mean(ask(params, codes) == 1) < 0.97
  assert np.mean(ask(params, unheard)) < 1.1
  noise = jnp.asarray(rng.normal(size=unheard.shape), jnp.float32)
  factors = [float(ask(params, unheard + level * noise).mean()) for level in (0.1, 1, 3, 10)]
  assert (np.diff(factors) > 0).all() and factors[0] < 1.2 and factors[2] > 3


def test_nothing_is_strange_before_training_or_where_its_frames_are_one():
  far = jnp.asarray([[1e3] * 4])
  untaught = jax.jit(Familiar().init)(jax.random.key(0), far[0])["params"]
  rounded = 7 * (1 + 1e-7 * np.random.default_rng(1).normal(size=(50, 4)))
  for params in (untaught, *map(jax.jit(learn), (jnp.ones((1, 4)), jnp.zeros((5, 4)), rounded))):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert ask(params, far) == 1


def test_a_word_in_much_silence_is_not_strange_and_nothing_is_without_bound():
  rng = np.random.default_rng(2)
  codes = jnp.asarray(np.concatenate([np.zeros((970, 4)), rng.normal(size=(30, 4))]), jnp.float32)
  params = learn(codes)
  assert 1 < ask(params, codes[970:]).mean() < 200
  assert ask(params, jnp.asarray([[1e12, 0, 0, 0]])) == MOST
