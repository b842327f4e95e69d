r"""The rows of `ablation.py` on the procedural person, half the demo's steps: two CPU cores.

    uajax sweep experiments/ablation_demo.py demo/subject
    uajax train demo/subject --workdir runs/ablation --experiment experiments/ablation_demo.py

`make demo` makes that subject. One seed; 28 held-out frames of it, 128 px; two busy cores:

    row        PSNR dB   LPIPS    LMD of the mouth, px
    baseline   33.38     0.0090   0.70
    P          33.89     0.0090   0.39
    E          32.71     0.0099   0.65
    P+U        33.60     0.0088   0.38
    P+E+U      33.53     0.0090   0.40

So Prior Extraction is what the mouth needs; uncertainty and emotion bring nothing that held-out
frames of 12 s in so few steps would show. Of a real address in the same size (20 s, 46 frames) the
baseline has 38.08 dB, 0.0059 and 0.49 px, P 37.98, 0.0068 and 0.54, E 37.99, 0.0062 and 0.51, P+U
37.96, 0.0067 and 0.54, P+E+U 37.99, 0.0065 and 0.55.
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
