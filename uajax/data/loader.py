"""One door to a subject's frames, whatever they are stored as, and batches drawn from them.

Axes: f frames of a split, b frames of a batch.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Int, UInt8

from uajax import types
from uajax.data import folder
from uajax.errors import UserError

Store = Literal["auto", "folder", "tfds"]


class Source(Protocol):
  """A split on disk, whatever it is stored as: `source[i]` reads and decodes one frame.

  Attributes:
    ids: int [f], frame numbers in the source video.
    guide: types.Guide of float32 [f].
    height, width: of every picture, in pixels.
  """

  ids: Int[np.ndarray, " f"]
  guide: types.Guide
  height: int
  width: int

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> types.Frame: ...

  def pictures(self, index: int, *, background: bool = True) -> types.Pictures: ...

  def classes(self, index: int) -> UInt8[np.ndarray, "h w"]: ...

  def numbers(self, index: int) -> tuple[types.Camera, types.Controls, np.ndarray]: ...


def load(
  path: str | os.PathLike,
  split: folder.Split = "train",
  *,
  audio: folder.Audio = "mel",
  source: Store = "auto",
  allow_missing_priors: bool = False,
) -> types.Clip:
  """A split in memory; equal bit for bit from either store.

  Args:
    path: the subject's folder.
    split: "train" or "val".
    audio: which windows drive the avatar.
    source: "folder" decodes the loose files; "tfds" the records of `uajax.data.subject`, made on
      the first call and again when the folder changes; "auto" takes the records where they can
      be had (TensorFlow Datasets is installed and the place can be written).
    allow_missing_priors: zeros where f_exp, f_tone or emotion lack.

  Raises:
    UserError: the folder lacks or mismatches something.
  """
  settings = {"audio": audio, "allow_missing_priors": allow_missing_priors}
  if source == "folder" or not _packs(path, source):
    return folder.read(path, split, **settings)
  from uajax.data import subject

  try:
    return subject.read(path, split, **settings)
  except UserError:
    if source == "tfds":
      raise
    return folder.read(path, split, **settings)  # fails again if it is the folder's fault


def open_source(
  path: str | os.PathLike,
  split: folder.Split = "train",
  *,
  audio: folder.Audio = "mel",
  source: Store = "auto",
  allow_missing_priors: bool = False,
) -> Source:
  """The same frames one at a time, for subjects larger than memory. Arguments as `load`."""
  settings = {"audio": audio, "allow_missing_priors": allow_missing_priors}
  if source == "folder" or not _packs(path, source):
    return folder.Source(path, split, **settings)
  from uajax.data import subject

  try:
    return subject.Source(path, split, **settings)
  except UserError:
    if source == "tfds":
      raise
    return folder.Source(path, split, **settings)


def batches(
  frames: Sequence[types.Frame], batch: int, seed: int, start_step: int = 0, *, workers: int = 4
) -> Iterator[types.Frame]:
  """Endless batches in a new order each epoch, a function of the seed and the step alone.

  Begun at `start_step` it yields what an iterator begun at 0 yields from that step on, at once.
  A batch never spans two epochs; what does not fill one is left out of its epoch.

  Args:
    frames: a random-access source (`open_source`).
    batch: frames a batch, at most len(frames).
    seed: of the order.
    start_step: batches to pass over.
    workers: threads that read ahead.
  """
  import grain
  import jax

  if not 0 < batch <= len(frames):
    raise ValueError(f"batch is 1..{len(frames)}, not {batch}")
  steps = len(frames) // batch
  order = grain.MapDataset.source(range(len(frames))).seed(seed).shuffle()
  order = order.slice(slice(0, steps * batch)).repeat()
  data = order.map(lambda i: frames[i]).batch(
    batch, batch_fn=lambda rows: jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
  )
  options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * batch)
  return iter(data[start_step:].to_iter_dataset(options))


def _packs(path: str | os.PathLike, source: Store) -> bool:
  """Whether records can be written and read here."""
  needs = ("tensorflow_datasets", "array_record", "importlib_resources")
  lacking = [name for name in needs if importlib.util.find_spec(name) is None]
  if source == "tfds" and lacking:
    raise UserError(f"source=tfds wants {', '.join(lacking)}: install it, or use source=folder")
  return not lacking and (source == "tfds" or os.access(path, os.W_OK))
