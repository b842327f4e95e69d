"""The BiLSTM against torch's, and its indifference to padding."""

import jax
import jax.numpy as jnp
import numpy as np

from uajax.speech import recurrent


def test_agrees_with_torch(shared):
  golden = np.load(shared("golden/speech/bilstm_io.npz"))
  tensors = {k[2:]: golden[k] for k in golden if k.startswith("p/")}
  params = recurrent.from_torch(tensors, layers=2)
  y = jax.jit(recurrent.BiLSTM(24).apply)({"params": params}, golden["x"])
  np.testing.assert_allclose(y, golden["y"], atol=2e-6)


def test_padding_changes_nothing():
  net = recurrent.BiLSTM(5)
  x = jax.random.normal(jax.random.key(0), (2, 7, 3))
  variables = net.init(jax.random.key(1), x)
  padded = jnp.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=9.0)
  valid = jnp.broadcast_to(jnp.arange(11) < 7, (2, 11))
  np.testing.assert_allclose(
    net.apply(variables, padded, valid)[:, :7], net.apply(variables, x), atol=1e-6
  )
