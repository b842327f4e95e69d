"""Settings of the compositing kernels by device.

A row says which implementation runs where the caller names none, and with which tile:
`python -m kernels.splat.bench` prints the times that the rows were chosen by.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
  """How the image is cut up. Never changes the picture, only the time it takes.

  Attributes:
    tile: side of a square tile in px; divides 16, the grid of the official extent rule.
    block: splats of one tile that `xla` handles together; `pallas` asks after each so many
      whether the tile is finished.
    group: blocks that `xla` handles at once; bounds its working memory.
    backend: of `pallas`: "mosaic" (NVIDIA, Hopper and later) or "interpret" (any, slow).
    pairs: tiles a splat touches, guessed generously where nobody says and none can be counted.
  """

  tile: int = 16
  block: int = 32
  group: int = 1024
  backend: str = "interpret"
  pairs: int = 16


# Platform and implementation: settings.
TUNED = {
    ("cpu", "xla"): Config(tile=8, block=32, group=64, pairs=32),
    ("cpu", "pallas"): Config(tile=16, backend="interpret"),
    ("gpu", "xla"): Config(tile=16, block=32, group=2048),
    ("gpu", "pallas"): Config(tile=16, backend="mosaic"),
}
DEFAULT = {"gpu": "pallas"}  # elsewhere "xla"


def pick(platform: str, implementation: str) -> Config:
  """The settings for an implementation on a platform ("cpu", "gpu", "tpu")."""
  return TUNED.get((platform, implementation), Config())
