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
      rule. On GPUs `pallas` needs a width of 16 and a height in eights.
    large: the tile for large images, where it takes less memory and a fifth more time; neither
      this nor `coarse` with the official extent rule.
    coarse: the tile for large images of few splats, which cover many tiles each.
    block: splats of one tile that `xla`, and `pallas` on TPUs, handle together.
    group: blocks that `xla` handles at once; bounds its working memory. Their number is
      rounded up to a multiple of it.
    backend: of `pallas`: "mosaic" (NVIDIA, Hopper and later), "tpu", or for tests on any
      device, slowly, "interpret" and "tpu interpret".
    pairs: tiles a splat touches, guessed generously where nobody says and none can be counted.
    least: pairs guessed however few splats there are: they may be large.
  """

  tile: tuple[int, int] = (16, 8)
  large: tuple[int, int] | None = None
  coarse: tuple[int, int] | None = None
  block: int = 32
  group: int = 1024
  backend: str = "interpret"
  pairs: int = 16
  least: int = 0


# Platform and implementation: settings.
TUNED = {
    ("cpu", "xla"): Config(tile=(8, 8), block=32, group=64, pairs=32),
    ("cpu", "pallas"): Config(backend="interpret"),
    ("gpu", "xla"): Config(tile=(16, 16), block=32, group=2048, least=2**18),
    ("gpu", "pallas"): Config(backend="mosaic", large=(16, 16), coarse=(16, 32), least=2**18),
    ("tpu", "pallas"): Config(tile=(16, 16), block=128, group=1, backend="tpu"),
}
# The kernels for TPUs have been lowered and interpreted but never run, hence none for "tpu".
DEFAULT = {"gpu": "pallas"}  # elsewhere "xla"


LARGE = 2**20  # pixels of an image
FEW = 8  # pixels a splat


def pick(platform: str, implementation: str) -> Config:
  """The settings for an implementation on a platform ("cpu", "gpu", "tpu")."""
  return TUNED.get((platform, implementation), Config())


def coarsen(config: Config, splats: int, pixels: int) -> Config:
  """The settings for so many splats and pixels of an image."""
  tile = config.coarse if pixels >= FEW * splats else config.large
  return dataclasses.replace(config, tile=tile) if tile and pixels >= LARGE else config
