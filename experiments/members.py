r"""Is the ensemble worth its cost? One, three and ten members a modality, quick schedule.

    uajax train data/may --workdir runs/may_members3 --experiment experiments/members.py
    uajax sweep experiments/members.py data/may

`get_config` is the middle one; `sweep` yields all three, which the second command trains side by
side.
"""

import dataclasses
from collections.abc import Iterator

from uajax import config


def with_members(members: int) -> config.Experiment:
  base = config.quick()
  motion = dataclasses.replace(base.model.motion, members=members)
  return dataclasses.replace(base, model=dataclasses.replace(base.model, motion=motion))


def get_config() -> config.Experiment:
  return with_members(3)


def sweep() -> Iterator[tuple[str, config.Experiment]]:
  for members in (1, 3, 10):
    yield f"members{members}", with_members(members)
