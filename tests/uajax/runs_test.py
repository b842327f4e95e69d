import dataclasses
import errno
import functools
import json
import random
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.uajax import tiny_run
from uajax import config, runs
from uajax.errors import UserError


def test_every_preset_survives_the_way_through_json():
  for name in config.PRESETS:
    experiment = config.preset(name)
    there = json.loads(json.dumps(runs.encode(experiment)))
    assert runs.decode(config.Experiment, there, "here") == experiment


@pytest.mark.parametrize("change, complaint", [
  ({"seed": "zero"}, "seed is 'zero'"),
  ({"model": {}}, "does not fit this version"),
  ({"surprise": 1}, "surprise"),
])
def test_experiments_that_do_not_fit_are_refused_by_name(change, complaint):
  values = runs.encode(config.quick()) | change
  with pytest.raises(UserError, match=complaint):
    runs.decode(config.Experiment, values, "run.json: experiment")


def test_a_run_from_before_the_eyes_were_weighed_is_read_as_it_was_trained():
  values = runs.encode(config.quick())
  for stage in ("mouth", "face", "fuse"):
    del values[stage]["weights"]["eyes"]
  there = runs.decode(config.Experiment, values, "run.json: experiment")
  assert there.face.weights.eyes == 0 < config.quick().face.weights.eyes
  assert dataclasses.replace(there.face.weights, eyes=config.quick().face.weights.eyes) == (
    config.quick().face.weights)


def test_a_run_from_before_modalities_could_be_left_out_has_them_all():
  values = runs.encode(config.quick())
  for name in ("modalities", "uncertainty", "blink_gain", "calibrated", "acts"):
    del values["model"]["motion"][name]
  for stage in ("mouth", "face", "fuse"):
    del values[stage]["silence"], values[stage]["noise"], values[stage]["weights"]["doubt"]
    del values[stage]["shut"]
  there = runs.decode(config.Experiment, values, "run.json: experiment")
  before = dataclasses.replace(config.quick().model.motion, blink_gain=1.0, calibrated=False,
                               acts=False)
  assert there.model.motion == before
  assert there.face.silence == there.face.noise == there.face.weights.doubt == 0
  assert there.face.shut == 0


def write(path, **record):
  path.mkdir(exist_ok=True)
  (path / "run.json").write_text(json.dumps(record))
  return path


def test_folders_that_are_no_run_say_so(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    runs.open_run(tmp_path / "nowhere")
  with pytest.raises(UserError, match="no run folder"):
    runs.open_run(tmp_path)
  with pytest.raises(UserError, match="another version .*format 99"):
    runs.open_run(write(tmp_path / "future", version=99))
  with pytest.raises(UserError, match="damaged"):
    runs.open_run(write(tmp_path / "odd"))
  (tmp_path / "odd" / "run.json").write_text('{"version"')
  with pytest.raises(UserError, match="damaged"):
    runs.open_run(tmp_path / "odd")


def test_a_run_is_never_made_over_something_else(tmp_path):
  (tmp_path / "precious.txt").write_text("mine")
  with pytest.raises(UserError, match="no run folder"):
    runs.create(tmp_path, tmp_path, config.quick())
  assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_run_without_checkpoint_says_what_to_do(tmp_path):
  run = runs.create(tmp_path / "run", tmp_path, config.quick())
  assert run.progress() == "not begun"
  with pytest.raises(UserError, match="uajax train"):
    run.avatar()


def test_an_adopted_avatar_comes_back_bit_for_bit(tmp_path):
  avatar = tiny_run.avatar()
  runs.adopt(tmp_path / "run", avatar, "elsewhere.pth")
  again = runs.open_run(tmp_path / "run")
  assert "complete" in again.progress()
  for field in dataclasses.fields(avatar):
    if field.name in ("face", "mouth"):
      for a, b in zip(getattr(avatar, field.name).splats,
                      getattr(again.avatar(), field.name).splats, strict=True):
        np.testing.assert_array_equal(a, b)
  with pytest.raises(UserError, match="already holds"):
    runs.adopt(tmp_path / "run", avatar, "elsewhere.pth")


avatar = functools.cache(tiny_run.avatar)


def state(number: int) -> dict:
  return {"step": np.full((), number, np.int32), "moments": np.arange(100.0) + number}


@pytest.fixture
def run(tmp_path):
  """Checkpoints 1 and 2."""
  made = runs.create(tmp_path / "run", tmp_path, tiny_run.EXPERIMENT)
  for number in (1, 2):
    made.save(avatar(number), state(number), runs.Progress(0, number, number))
  return made


def restored(run) -> int:
  """Of which checkpoint the parts come that `restore` gives."""
  found, training, at = run.restore(lambda *_: state(0))
  number = int(training["step"])
  np.testing.assert_array_equal(training["moments"], state(number)["moments"])
  np.testing.assert_array_equal(found.face.splats.means, avatar(number).face.splats.means)
  assert at.total == number
  return number


def test_damage_in_any_file_of_a_checkpoint_leads_to_the_one_before(run, caplog):
  assert restored(run) == 2
  rng = random.Random(0)
  folder = run.checkpoints / "2"
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  assert len(files) > 10
  for path in files:
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    for damaged in (whole[: rng.randrange(len(whole))], bytes(flipped)):
      caplog.clear()
      path.write_bytes(damaged)
      if path.relative_to(folder).as_posix() in runs.MARKS:  # nothing is read from them
        assert restored(run) == 2
      else:
        assert restored(run) == 1, path
        assert len(caplog.records) == 1 and "checkpoint 2 of" in caplog.text, path
    path.write_bytes(whole)
  assert restored(run) == 2


def test_a_checkpoint_of_an_earlier_version_has_no_sums_and_is_read(run):
  (run.checkpoints / "2" / runs.SUMS).unlink()
  assert restored(run) == 2


def test_an_unreadable_checkpoint_makes_room_for_a_new_one(tmp_path):
  experiment = dataclasses.replace(tiny_run.EXPERIMENT, keep=2)
  run = runs.create(tmp_path / "run", tmp_path, experiment)
  for number in (1, 2, 5):
    run.save(avatar(number), state(number), runs.Progress(0, number, number))
  assert run.steps() == [2, 5]
  (run.checkpoints / "5" / runs.SUMS).write_text("")
  assert restored(run) == 2
  with run.saver(newest=2) as saver:
    saver.save(avatar(4), state(4), runs.Progress(0, 4, 4))
    saver.save(avatar(5), state(5), runs.Progress(0, 5, 5))
  assert run.steps() == [4, 5] and restored(run) == 5


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(run):
  training = state(3) | {"moments": jnp.asarray(state(3)["moments"])}
  overwrite = jax.jit(lambda x: x - 1e6, donate_argnums=0)
  with run.saver(newest=2) as saver:
    saver.save(avatar(3), training, runs.Progress(0, 3, 3))
    training["step"][...] = 77
    for _ in range(3):
      training["moments"] = overwrite(training["moments"])
  assert restored(run) == 3


def test_a_checkpoint_that_fails_while_training_goes_on_is_told(run, monkeypatch):
  def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(runs, "_sums", full)
  told = pytest.raises(UserError, match="checkpoint 3 could not be saved.*No space.*make room")
  with told, run.saver(newest=2) as saver:
    saver.save(avatar(3), state(3), runs.Progress(0, 3, 3))
    for _ in range(1000):
      saver.check()
      time.sleep(0.01)
    pytest.fail("nobody said that it failed")
  monkeypatch.undo()
  assert restored(run) == 2
  assert sorted(path.name for path in run.checkpoints.iterdir()) == ["1", "2"]


def test_a_failed_save_costs_none_of_those_before_it(run):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with run.saver(2) as saver:
    saver.save(avatar(3), state(3), runs.Progress(0, 3, 3))
    saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
      with pytest.raises(UserError, match="checkpoint 4 could not be saved"):
        saver.save(avatar(4), state(4), runs.Progress(0, 4, 4))
        saver.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saver.save(avatar(5), state(5), runs.Progress(0, 5, 5))
  assert 3 in run.steps() and restored(run) == 5


def test_a_full_disk_leaves_the_checkpoints_before(run):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))  # as if the disk ended there
  try:
    with pytest.raises(UserError, match="checkpoint 3 could not be saved.*make room"):
      run.save(avatar(3), state(3), runs.Progress(0, 3, 3))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert sorted(path.name for path in run.checkpoints.iterdir()) == ["1", "2"]
  run.save(avatar(3), state(3), runs.Progress(0, 3, 3))
  assert restored(run) == 3


def test_a_checkpoint_that_goes_loses_its_name_before_its_files(run, monkeypatch):
  with monkeypatch.context() as patch:  # killed before the first file is deleted
    patch.setattr(runs.Saver, "_sweep", lambda _: None)
    for number in (3, 4):
      run.save(avatar(number), state(number), runs.Progress(0, number, number))
  assert run.steps() == [2, 3, 4] and all(run.read(step) for step in run.steps())
  run.save(avatar(5), state(5), runs.Progress(0, 5, 5))
  assert sorted(path.name for path in run.checkpoints.iterdir()) == ["3", "4", "5"]
