import jax.numpy as jnp
import numpy as np

from uajax import config
from uajax.train import optimizer


def test_the_rate_falls_to_a_half_and_a_tenth_without_a_jump():
  rates = config.FACE.rates
  at = lambda step: float(optimizer.decay(rates, jnp.asarray(step)))
  np.testing.assert_allclose([at(0), at(40_000), at(50_000)], [1, 0.5, 0.1], rtol=1e-6)
  assert abs(at(39_999) - at(40_000)) < 1e-4


def test_only_the_members_in_use_move():
  """Of audio the second; style is silent."""
  new = {"fusion": {"ensembles": {"audio": jnp.ones((3, 2)), "style": jnp.ones((3, 2))}},
         "head": jnp.ones(2)}
  old = {"fusion": {"ensembles": {"audio": jnp.zeros((3, 2)), "style": jnp.zeros((3, 2))}},
         "head": jnp.zeros(2)}
  heard = jnp.zeros((4, 3), bool).at[0, 1].set(True)
  mixed = optimizer._rest(new, old, heard)
  np.testing.assert_array_equal(mixed["fusion"]["ensembles"]["audio"][:, 0], [0, 1, 0])
  np.testing.assert_array_equal(mixed["fusion"]["ensembles"]["style"][:, 0], [0, 0, 0])
  np.testing.assert_array_equal(mixed["head"], 1)
