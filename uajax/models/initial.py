"""Initial values of parameters: uniform, and cheap to compile.

A motion network has some sixty parameters, and XLA compiles `jax.random.uniform` anew for each:
minutes on a small machine before the first step. A hash of the element's number and the key
(MurmurHash3's finaliser, twice) is a dozen operations, and random enough to start from.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32


def uniform(low: float, high: float) -> Callable[..., Array]:
  """Initialiser: `init(key, shape, dtype)` is uniform in [low, high)."""

  def init(key, shape, dtype=jnp.float32) -> Float[Array, "..."]:
    words = jnp.asarray(key)
    if jnp.issubdtype(words.dtype, jax.dtypes.prng_key):
      words = jax.random.key_data(words)
    words = words.reshape(-1).astype(jnp.uint32)
    size = int(np.prod(shape, dtype=np.int64))
    bits = _mix(_mix(jnp.arange(size, dtype=jnp.uint32) + words[0]) ^ words[-1])
    unit = (bits >> 8).astype(dtype) * 2.0**-24
    return (low + (high - low) * unit).reshape(shape)

  return init


def within(limit: float) -> Callable[..., Array]:
  """Initialiser: uniform within +-limit."""
  return uniform(-limit, limit)


def _mix(x: UInt32[Array, " n"]) -> UInt32[Array, " n"]:
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
