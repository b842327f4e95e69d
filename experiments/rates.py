r"""How fast may the face's splats and networks learn in a tenth of the published steps?

    uajax sweep experiments/rates.py data/may --search optuna --trials 30 --stopping asha
    uajax train data/may --workdir runs/may_rates --experiment experiments/rates.py

Hardware: one GPU of 16 GB trains two at a time with `--gpus-per-trial 0.5`. Scores: not measured
yet.
"""

from uajax import config
from uajax.sweep.space import Axis, Range


def get_config() -> config.Experiment:
  return config.quick()


def space() -> dict[str, Axis]:
  return {
    "face.rates.network": Range(2e-4, 5e-3, log=True),
    "face.rates.means": Range(1e-4, 2e-3, log=True),
    "face.densify.grad_threshold": Range(2e-4, 1e-3, log=True),
  }
