import dataclasses

import jax
import numpy as np
import pytest

from tests.uajax.data import subject_folder
from uajax import config
from uajax.data import loader
from uajax.train import seeding
from uajax.types import FACE, HAIR, MOUTH


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
  path = tmp_path_factory.mktemp("subjects") / "tiny"
  subject_folder.make(path)
  return loader.open_source(path, "train", source="folder")


def test_carved_splats_project_into_the_head_with_its_colours(frames):
  stage = dataclasses.replace(config.FACE, splats=50)
  points, colors = seeding.scatter(stage, frames, jax.random.key(0))
  first = frames[0]
  head = np.isin(first.classes, (FACE, HAIR, MOUTH))
  row, column, seen = seeding._project(points, *first.camera, head.shape)
  assert (seen & head[row, column]).mean() > 0.9
  there = first.image[row, column] / 255
  assert np.abs(there - colors).mean() < 0.1
  everywhere, _ = seeding.scatter(dataclasses.replace(stage, splats=50), frames, jax.random.key(1))
  assert (points != everywhere).any()


def test_slots_beyond_the_first_splats_are_dead_and_finite(frames):
  stage = dataclasses.replace(config.MOUTH, splats=40)
  splats, alive = seeding.seed(stage, frames, jax.random.key(0))
  assert int(alive.sum()) == 40
  assert all(np.isfinite(leaf).all() for leaf in splats)


def test_too_many_splats_to_begin_with_is_an_error(frames):
  stage = dataclasses.replace(config.FACE, splats=100_000)
  with pytest.raises(ValueError, match="do not fit"):
    seeding.seed(stage, frames, jax.random.key(0))
