r"""The rows of `ablation.py` on the procedural person, half the demo's steps: two CPU cores.

    uajax sweep experiments/ablation_demo.py demo/subject
    uajax train demo/subject --workdir runs/ablation --experiment experiments/ablation_demo.py

`make demo` makes that subject. One seed, 28 held-out frames of 128 px, two busy cores:

    row        PSNR dB   LPIPS    LMD of the mouth, px
    baseline   32.18     0.0126   0.68
    P          31.56     0.0135   0.52
    E          32.29     0.0117   0.68
    P+U, P+E+U: not measured yet
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
