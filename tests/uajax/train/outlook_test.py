"""What is compiled ahead is what training will call, once the number of splats says it."""

import dataclasses

import jax
import jax.numpy as jnp

from tests.uajax import tiny_run
from uajax import config
from uajax.train import bench
from uajax.train.ahead import Call
from uajax.train.outlook import Given, Outlook, is_long
from uajax.train.step import enter, no_sums, phase_of, run_steps, turning_points


class Listed:
  """In place of what compiles: remembers what would be."""

  active = True

  def prepare(self, upcoming, about=None):
    self.steps, self.others = [], []
    for call in upcoming:
      if call.function is run_steps:
        state = call.arrays[0]
        stage = call.static["stage"]
        alive = getattr(state.avatar, "mouth" if stage.name == "mouth" else "face").alive
        self.steps.append((stage.name, call.static["phase"], len(alive)))
      else:
        self.others.append(call.function)


def looks(experiment, number, counts, first, every=100):
  """What is foreseen at steps of a stage at which so many splats live, in 512 slots."""
  avatar = tiny_run.avatar(splats=512, motion=experiment.model.motion)
  stage = experiment.stages()[number]
  material, chunk = bench.clip(experiment, 8, 2)
  draw = lambda avatar: Call("draw", {}, (avatar,))
  outlook, listed = Outlook(experiment, number, None, draw), Listed()
  for i, count in enumerate(counts):
    alive = jnp.arange(512) < count
    layers = {name: dataclasses.replace(getattr(avatar, name), alive=alive)
              for name in ("face", "mouth")}
    state = enter(stage, avatar.replace(**layers))
    given = Given(state, no_sums(), jnp.asarray(1), material, chunk, jax.random.key(0))
    outlook.prepare(listed, first + i * every, None, given)
    yield listed.steps


def experiment():
  fit = lambda stage: dataclasses.replace(
    stage, densify=dataclasses.replace(stage.densify, slots=512, max_slots=1024))
  whole = config.preset("paper")
  motion = dataclasses.replace(
    tiny_run.MOTION, audio_channels=whole.model.motion.audio_channels,
    audio_width=whole.model.motion.audio_width)
  return dataclasses.replace(whole, model=config.Model(motion=motion), mouth=fit(whole.mouth),
                             face=fit(whole.face))


FACE = [("face", "static", 512), ("face", "sample", 512), ("face", "ensemble", 512),
        ("face", "ensemble", 512)]
FUSE = [("fuse", "ensemble", 512)] * 2


def test_nothing_is_foreseen_for_splats_whose_number_changes():
  start = experiment().mouth.densify.start
  seen = list(looks(experiment(), 0, (500, 500, 120, 70, 66), start - 100))
  assert seen[:4] == [[]] * 4, "before growth begins, and while splats die in numbers"
  mouth = [("mouth", "sample", 128), ("mouth", "ensemble", 128), ("mouth", "ensemble", 128)]
  assert seen[4] == mouth + FACE + FUSE


def test_while_slots_fill_more_of_them_are_foreseen_and_nothing_beyond():
  start = experiment().face.densify.start
  few, many = looks(experiment(), 1, (250, 320), start + 100)
  assert few == FACE[1:] + FUSE, "a resumed run begins with what its checkpoint says"
  assert many == [("face", "static", 768)]


def test_slots_with_room_to_grow_are_expected_to_stay():
  fitting, sparse = looks(experiment(), 1, (250, 150), 0)
  assert fitting == FACE[1:] + FUSE and sparse == []


def test_the_last_stage_has_no_growth():
  assert next(looks(experiment(), 2, (400,), 0)) == FUSE[1:]


def test_the_published_schedule_tunes_what_fuses_the_face_and_a_short_one_nothing():
  long = lambda name: {
    (stage.name, phase_of(stage, step)) for stage in config.preset(name).stages()
    for step in (0, *turning_points(stage)) if step < stage.steps and is_long(stage, step)}
  assert long("paper") == {("face", "ensemble")}
  assert long("quick") == long("demo") == set()
