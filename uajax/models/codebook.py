"""What a frame's emotion means at each position: multi-resolution code-books times tri-planes.

The emotion asks each code-book softly and gets one code a scale back, the same for every splat;
a position's features of that scale are weighed with it channel by channel (method.md B.4).

Axes: n positions, c channels, s scales, f = s c features.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uajax.config import Planes as PlanesConfig
from uajax.models.audio import Linear
from uajax.models.initial import within
from uajax.models.planes import Planes

ENTRIES = 64  # of the code-book of a scale, times the scale's multiple
# Official: 0.1 to 0.5. The soft mean of entries so much alike is the same for every emotion, and
# the other modalities explain the face before this one has anything to say.
START = 1.0


class Emotion(NamedTuple):
  """f_emotion(x) = features * code. Apart, so that the code can be folded into weights."""

  features: Float[Array, "n f"]
  code: Float[Array, " f"]


class EmotionEncoder(nn.Module):
  config: PlanesConfig

  def setup(self):
    width = self.config.features
    self.query = Linear(width)
    self.books = [self.param(f"codebook_{i}", within(START), (ENTRIES * multiple, width))
                  for i, multiple in enumerate(self.config.multiples)]
    self.planes = Planes(self.config)

  def __call__(self, emotion: Float[Array, " 128"], points: Float[Array, "n 3"]) -> Emotion:
    return Emotion(self.features(points), self.code(emotion))

  def features(self, points: Float[Array, "n 3"]) -> Float[Array, "n f"]:
    return jnp.concatenate(self.planes(points), -1)

  def code(self, emotion: Float[Array, " 128"]) -> Float[Array, " f"]:
    query = self.query(emotion)
    return jnp.concatenate([look_up(book, query) for book in self.books])


def look_up(book: Float[Array, "e c"], query: Float[Array, " c"]) -> Float[Array, " c"]:
  """The entries' mean, weighed by softmax of their similarity to the query over sqrt(c)."""
  return jax.nn.softmax(book @ query * query.shape[0] ** -0.5) @ book
