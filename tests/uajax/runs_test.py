import dataclasses
import json

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
