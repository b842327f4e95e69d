import importlib
import pathlib

import pytest

from uajax import config, runs
from uajax.sweep import space

FILES = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "experiments").glob("[!_]*.py"))


@pytest.mark.parametrize("name", FILES)
def test_an_experiment_gives_what_a_run_can_keep(name):
  module = importlib.import_module(f"experiments.{name}")
  variants = [("base", module.get_config())]
  if hasattr(module, "sweep"):
    variants += list(module.sweep())
  if hasattr(module, "space"):
    space.Space(module.get_config(), ("data/may",), settings=module.space()).check()
  assert len({label for label, _ in variants}) == len(variants)
  for _, experiment in variants:
    assert runs.decode(config.Experiment, runs.encode(experiment), "here") == experiment
  assert "uajax train" in module.__doc__, "its command stands in its docstring"
