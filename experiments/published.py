r"""UA-3DTalk as published: 50k mouth, 50k face and 10k fuse steps on one person.

    uajax train data/may --workdir runs/may --experiment experiments/published.py

Hardware: one GPU of 16 GB. Scores: not measured with this schedule yet; `experiments/quick.py`
holds what a tenth of it reached.
"""

from uajax import config


def get_config() -> config.Experiment:
  return config.paper()
