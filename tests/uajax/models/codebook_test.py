"""What an untrained emotion encoder can tell: what it cannot, training never learns to show."""

import jax
import numpy as np
import pytest

from uajax.config import Planes
from uajax.models.codebook import EmotionEncoder


@pytest.mark.parametrize("planes", [
  Planes(features=8, resolution=8, multiples=(1,)),
  Planes(features=64, resolution=4, multiples=(1, 2))])
def test_emotions_and_places_differ_before_training(planes):
  net = EmotionEncoder(planes)
  emotions = jax.random.normal(jax.random.key(1), (6, 128))
  points = 0.05 * jax.random.normal(jax.random.key(2), (40, 3))
  params = jax.jit(net.init)(jax.random.key(0), emotions[0], points)
  felt = jax.jit(jax.vmap(net.apply, (None, 0, None)))(params, emotions, points)
  said = np.asarray(felt.features * felt.code[:, None])
  assert said.std(0).mean() > 0.02, "emotions differ"
  assert said.std(1).mean() > 0.003, "places differ"
