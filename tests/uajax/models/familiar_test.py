"""What training sounds like is familiar; what lies further out is strange by how far it does."""

import jax
import jax.numpy as jnp
import numpy as np

from uajax.models.familiar import Familiar, learn

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


def test_without_training_or_with_one_code_throughout_nothing_is_strange():
  far = jnp.asarray([[1e3] * 4])
  untaught = jax.jit(Familiar().init)(jax.random.key(0), far[0])["params"]
  assert ask(untaught, far) == 1
  params = learn(jnp.ones((5, 4)))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
  assert ask(params, jnp.ones((1, 4))) == 1
