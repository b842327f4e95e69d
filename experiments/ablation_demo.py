r"""The rows of `ablation.py` on the procedural person, half the demo's steps: two CPU cores.

    uajax sweep experiments/ablation_demo.py demo/subject
    uajax train demo/subject --workdir runs/ablation --experiment experiments/ablation_demo.py

`make demo` makes that subject.
"""

import dataclasses
import pathlib
import runpy
from collections.abc import Iterator

from uajax import config

_ROWS = runpy.run_path(str(pathlib.Path(__file__).with_name("ablation.py")))


def get_config() -> config.Experiment:
  base = config.demo()
  return dataclasses.replace(
    base, **{stage.name: config.shorten(stage, stage.steps // 2) for stage in base.stages()})


def sweep() -> Iterator[tuple[str, config.Experiment]]:
  for name in _ROWS["ROWS"]:
    yield name, _ROWS["row"](get_config(), name)
