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

  def numbers(
    self, index: int
  ) -> tuple[types.Camera, types.Controls, np.ndarray, np.ndarray]: ...


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


class Batches(Iterator[types.Frame]):
  """Endless batches in a new order each epoch, a function of the seed and the step alone.

  A batch never spans two epochs; what does not fill one is left out of its epoch. Several hosts
  share each batch: host h of n has its rows [h b/n, (h+1) b/n), so that all of them together have
  the same batches, however many they are. A host reads its own rows only.

      batches = Batches(open_source(path), 16, seed=0)
      state = batches.state()                  # small, for JSON; the same on every host
      batches = Batches(open_source(path), 16, seed=0)
      batches.restore(state)                   # goes on at once, also on another number of hosts

  Attributes:
    step: of the batch that comes next, from 0.
  """

  def __init__(
    self,
    frames: Sequence[types.Frame],
    batch: int,
    seed: int,
    start_step: int = 0,
    *,
    host: int | None = None,
    hosts: int | None = None,
    workers: int = 4,
  ):
    """Opens the stream at `start_step`; nothing before it is read.

    Args:
      frames: a random-access source (`open_source`).
      batch: frames a batch over all hosts, at most len(frames).
      seed: of the order.
      host, hosts: which of how many hosts this is; by default what JAX knows.
      workers: threads that read ahead, a batch each.

    Raises:
      ValueError: a batch that there are not frames for, or that the hosts cannot share.
    """
    import uajax.hosts

    host = uajax.hosts.number() if host is None else host
    hosts = uajax.hosts.count() if hosts is None else hosts
    if not 0 < batch <= len(frames):
      raise ValueError(f"batch is 1..{len(frames)}, not {batch}")
    if batch % hosts or not 0 <= host < hosts:
      raise ValueError(f"host {host} of {hosts} cannot have its share of a batch of {batch}")
    self._frames, self._batch, self._seed, self._workers = frames, batch, seed, workers
    self._rows = slice(host * batch // hosts, (host + 1) * batch // hosts)
    self._open(start_step)

  def __next__(self) -> types.Frame:
    batch = next(self._stream)
    self.step += 1
    return batch

  def state(self) -> dict[str, int]:
    """Where the stream stands, and what it is a stream of."""
    return {"step": self.step, **self._kind()}

  def restore(self, state: dict[str, int]) -> None:
    """Goes on where `state` was taken.

    Raises:
      UserError: it is of another stream.
    """
    kind = {name: state.get(name) for name in self._kind()}
    if kind != self._kind() or not isinstance(state.get("step"), int) or state["step"] < 0:
      raise UserError(
        f"the frames were drawn by {state}, here it is {self._kind()}: go on with the same "
        "subject, batch and seed, or begin anew"
      )
    self._open(state["step"])

  def _kind(self) -> dict[str, int]:
    return {"seed": self._seed, "batch": self._batch, "frames": len(self._frames)}

  def _open(self, step: int) -> None:
    import grain
    import jax

    frames, rows = self._frames, self._rows
    whole = len(frames) // self._batch * self._batch

    def read(numbers: np.ndarray) -> types.Frame:
      taken = [frames[int(i)] for i in numbers[rows]]
      return jax.tree.map(lambda *leaves: np.stack(leaves), *taken)

    order = grain.MapDataset.source(range(len(frames))).seed(self._seed).shuffle()
    data = order.slice(slice(0, whole)).repeat().batch(self._batch).map(read)
    options = grain.ReadOptions(
      num_threads=self._workers, prefetch_buffer_size=max(self._workers, 2)
    )
    self._stream = iter(data[step:].to_iter_dataset(options))
    self.step = step


def _packs(path: str | os.PathLike, source: Store) -> bool:
  """Whether records can be written and read here."""
  needs = ("tensorflow_datasets", "array_record", "importlib_resources")
  lacking = [name for name in needs if importlib.util.find_spec(name) is None]
  if source == "tfds" and lacking:
    raise UserError(f"source=tfds wants {', '.join(lacking)}: install it, or use source=folder")
  return not lacking and (source == "tfds" or os.access(path, os.W_OK))
