"""Settings of the compositing kernels by device.

A row says which implementation runs where the caller names none, and with which tile:
`python -m kernels.splat.bench` prints the times that the rows were chosen by.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
  """How the image is cut up. Never changes the picture, only the time it takes.

  Attributes:
    tile: width and height of a tile in px; both divide 16, the grid of the official extent
      rule. `pallas` takes (16, 8) only: a pixel a thread.
    block: splats of one tile that `xla` handles together.
    group: blocks that `xla` handles at once; bounds its working memory.
    backend: of `pallas`: "mosaic" (NVIDIA, Hopper and later) or "interpret" (any, slow).
    pairs: tiles a splat touches, guessed generously where nobody says and none can be counted.
  """

  tile: tuple[int, int] = (16, 8)
  block: int = 32
  group: int = 1024
  backend: str = "interpret"
  pairs: int = 16


# Platform and implementation: settings.
TUNED = {
    ("cpu", "xla"): Config(tile=(8, 8), block=32, group=64, pairs=32),
    ("cpu", "pallas"): Config(backend="interpret"),
    ("gpu", "xla"): Config(tile=(16, 16), block=32, group=2048),
    ("gpu", "pallas"): Config(backend="mosaic"),
}
DEFAULT = {"gpu": "pallas"}  # elsewhere "xla"


def pick(platform: str, implementation: str) -> Config:
  """The settings for an implementation on a platform ("cpu", "gpu", "tpu")."""
  return TUNED.get((platform, implementation), Config())
