"""What a sweep varies: names, values and ranges become experiments, or one clear line."""

import dataclasses
import math

import pytest

from uajax import config
from uajax.errors import UserError
from uajax.sweep import space
from uajax.sweep.space import Range

BASE = config.demo()


def test_a_setting_of_any_depth_and_kind_is_replaced_and_nothing_else():
  changes = {
    "seed": 4, "face.densify.slots": 99, "face.rates.network": 1, "backdrop": "green",
    "model.motion.planes.multiples": [1, 2], "model.motion.still_heads": False,
  }  # fmt: skip
  made = space.replaced(BASE, changes)
  assert (made.seed, made.face.densify.slots, made.backdrop) == (4, 99, "green")
  assert made.face.rates.network == 1.0 and isinstance(made.face.rates.network, float)
  assert made.model.motion.planes.multiples == (1, 2) and not made.model.motion.still_heads
  back = space.replaced(made, {name: None for name in ()} | {
    name: value for name, value in space.differences(made, BASE).items()})
  assert back == BASE and set(space.differences(BASE, made)) == set(changes)


@pytest.mark.parametrize("name, value, said", [
  ("face.densify.slot", 9, "did you mean face.densify.slots"),
  ("face.densify", 9, "no setting face.densify"),
  ("face.densify.slots.x", 9, "no setting"),
  ("face.densify.slots", 1.5, "cannot be 1.5: it is 3072"),
  ("seed", True, "cannot be True"),
  ("backdrop", "blue", "cannot be 'blue'"),
  ("face.rates.network", "NaN", "cannot be 'NaN'"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line_with_the_remedy(name, value, said):
  with pytest.raises(UserError, match=said) as failed:
    space.replaced(BASE, {name: value})
  assert "\n" not in str(failed.value)


def test_axes_on_the_command_line_are_read_as_values_and_never_run():
  assert space.parse_axis("face.densify.slots=1024,2048") == ("face.densify.slots", (1024, 2048))
  assert space.parse_axis("--face.densify.grad-threshold=1e-4, 2e-4") == (
    "face.densify.grad_threshold", (1e-4, 2e-4))
  assert space.parse_axis("model.audio=mel,phones")[1] == ("mel", "phones")
  assert space.parse_axis("a=[1,2],[1,2,4]")[1] == ([1, 2], [1, 2, 4])
  assert space.parse_axis("a=true,NaN")[1] == (True, "NaN")
  assert space.parse_axis("a=__import__('os').getcwd()")[1] == ("__import__('os').getcwd()",)
  for text in ("face.steps", "=3", "face.steps="):
    with pytest.raises(UserError, match="NAME=VALUE"):
      space.parse_axis(text)


def test_a_grid_is_every_combination_once():
  points = space.grid({"a": (1, 2), "b": ("x", "y", "z")})
  assert points[:2] == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}]
  assert len({tuple(point.items()) for point in points}) == 6
  with pytest.raises(UserError, match="b is a range"):
    space.grid({"a": (1,), "b": Range(0.0, 1.0)})


def test_draws_stay_within_reach_both_ends_and_do_not_depend_on_how_many_there_are():
  axes = {"whole": Range(3, 5), "few": Range(2, 1000, log=True), "log": Range(1e-4, 1e-1, log=True),
          "word": ("x", "y")}  # fmt: skip
  drawn = [space.draw(axes, 7, number) for number in range(400)]
  assert drawn[5] == space.draw(axes, 7, 5) != space.draw(axes, 8, 5)
  assert {point["whole"] for point in drawn} == {3, 4, 5}
  assert {point["word"] for point in drawn} == {"x", "y"}
  assert all(isinstance(point["few"], int) and 2 <= point["few"] <= 1000 for point in drawn)
  logs = sorted(math.log10(point["log"]) for point in drawn)
  assert logs[0] >= -4 and logs[-1] <= -1 and abs(logs[200] + 2.5) < 0.3


@pytest.mark.parametrize("axis, said", [
  ((), "no value"), (Range(2, 2), "low < high"), (Range(0.0, 1.0, log=True), "0 < low"),
  (Range(0.0, float("inf")), "low < high"), ((1024, "many"), "cannot be 'many'"),
])  # fmt: skip
def test_a_bad_axis_is_found_before_anything_runs(axis, said):
  with pytest.raises(UserError, match=said):
    space.Space(BASE, ("s",), settings={"face.densify.slots": axis}).check()


def module(tmp_path, text: str):
  from uajax import cli

  path = tmp_path / "mine.py"
  path.write_text("import dataclasses\nfrom uajax import config\n"
                  "from uajax.sweep.space import Range\n" + text)
  return cli._run_file(path)


def test_a_file_and_the_command_line_together_make_the_space(tmp_path):
  made = module(tmp_path, """
def space():
  return {"face.rates.network": Range(1e-4, 1e-2, log=True), "seed": (0, 1)}
def sweep():
  for batch in (1, 2):
    yield f"batch{batch}", dataclasses.replace(config.demo(), batch=batch)
""")
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
  subjects = [tmp_path / "a", tmp_path / "b"]
  wanted = dataclasses.replace(BASE, scene_m=0.3)
  found = space.of_module(made, BASE, wanted, subjects, ["seed=5,6,7"])
  found.check()
  assert list(found.axes) == ["subject", "variant", "face.rates.network", "seed"]
  assert found.axes["seed"] == (5, 6, 7)
  point = {"subject": str(subjects[1]), "variant": "batch2", "face.rates.network": 1e-3, "seed": 6}
  subject, experiment = found.at(point)
  assert subject == str(subjects[1])
  want = space.replaced(BASE, {"batch": 2, "scene_m": 0.3, "seed": 6, "face.rates.network": 1e-3})
  assert experiment == want, "the command line's change holds for every variant"


@pytest.mark.parametrize("text, said", [
  ("def space():\n  return {'seed': 3}", "tuple of values"),
  ("def space():\n  return 1 / 0", "ZeroDivisionError"),
  ("def sweep():\n  yield 'a', 3", "yields 'a' with a int"),
])  # fmt: skip
def test_a_bad_file_is_one_line(tmp_path, text, said):
  with pytest.raises(UserError, match=said):
    space.of_module(module(tmp_path, text), BASE, BASE, [tmp_path], [])
