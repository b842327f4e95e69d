"""What the compiled loop is fed: the frames of each chunk of steps, and their pictures.

The pictures of a clip lie on the device where they fit, and are copied from there. Where they do
not, they stay on disk, and threads read those of the next chunk while the device trains on this
one. What trains sees the same chunks either way: it is the same program, down to its last bit.
Axes: f frames, s steps of a chunk, b batch, h w pixels.
"""

import concurrent.futures
import functools
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uajax import hosts, memory
from uajax.config import Experiment, Stage
from uajax.data import folder
from uajax.data.loader import Source
from uajax.progress import Progress
from uajax.train.step import FRAMES, Chunk, Material, draw, spread
from uajax.types import MOUTH, Pictures

Place = Literal["auto", "resident", "streamed"]

PIXEL_BYTES = 7  # image, background, classes
LONGEST = 64  # steps of a chunk
CHUNK_BYTES = 2**27  # of the pictures of a chunk; up to three chunks are in memory at a time
DEVICE_SHARE, HOST_SHARE = 0.5, 0.25  # of the free memory that pictures may take
_log = logging.getLogger("uajax")


class Feed:
  """A clip for training. A context manager: at its end nothing is read any more.

  Attributes:
    material: what is not cut into chunks.
    steps: of a chunk.
    streamed: whether pictures are read as training goes.
  """

  def __init__(self, source: Source, experiment: Experiment, mesh: Mesh | None,
               place: Place = "auto"):
    """Reads what is to lie on the device.

    Args:
      source: the clip on disk.
      mesh: of the devices that train.
      place: where pictures lie; "auto" puts them on the device where half of its free memory
        holds them (a quarter where it shares the host's).

    Raises:
      UserError: a picture is damaged.
    """
    self._source, self._experiment, self._mesh = source, experiment, mesh
    self.streamed = bool(hosts.largest(_is_streamed(source, mesh, place)))
    self.steps = _chunk_steps(source, experiment)
    self.material, self._pictures = _upload(source, mesh, self.streamed)
    self._reader = concurrent.futures.ThreadPoolExecutor(1)

  def __enter__(self) -> "Feed":
    return self

  def __exit__(self, *_) -> None:
    self._reader.shutdown(cancel_futures=True)

  def chunks(self, stage: Stage, key, first: int, ends: Iterable[int]
             ) -> Iterator[tuple[int, Chunk]]:
    """Yields the steps from `first` on as (end, chunk): the chunk serves the steps before `end`.

    Args:
      key: of the stage.
      ends: rising steps at which a chunk must end.
    """
    before: tuple = ()
    for begin, end in self._spans(first, ends):
      frames = draw(self._experiment, stage, self.steps, self.material.guide,
                    self.material.mouth_share, jnp.asarray(begin), key)
      background = stage.name == "fuse"  # the others do not look at it
      reading = None
      if self.streamed:
        reading = self._reader.submit(self._read, frames, end - begin, background)
      if before:
        yield self._chunk(*before)
      before = begin, end, frames, background, reading
    if before:
      yield self._chunk(*before)

  def _spans(self, first: int, ends: Iterable[int]) -> Iterator[tuple[int, int]]:
    for end in ends:
      while first < end:
        yield first, min(first + self.steps, end)
        first = min(first + self.steps, end)

  def _chunk(self, begin: int, end: int, frames, background: bool, reading
             ) -> tuple[int, Chunk]:
    if reading is not None:
      pictures = jax.tree.map(self._share, reading.result())
    else:
      assert self._pictures is not None  # they are on the device, or read
      pictures = self._pictures if background else self._pictures._replace(background=None)
      pictures = _take(pictures, frames, self._mesh)
    return end, Chunk(jnp.asarray(begin), frames, pictures)

  def _read(self, frames, count: int, background: bool) -> Pictures:
    """The pictures of the first `count` steps, as many steps long as any chunk. In a thread."""
    share = self._experiment.batch // hosts.count()  # of this process's devices
    wanted = np.asarray(frames)[:count, hosts.number() * share : (hosts.number() + 1) * share]
    read = lambda frame: self._source.pictures(frame, background=background)
    rows = folder.gather(read, wanted.reshape(-1).tolist(), length=self.steps * wanted.shape[1])
    return jax.tree.map(lambda leaf: leaf.reshape(self.steps, -1, *leaf.shape[1:]), rows)

  def _share(self, array: np.ndarray) -> jax.Array:
    """[s b ...], this process's share of b, each frame on the device that trains on it."""
    if self._mesh is None:
      return jax.device_put(array)
    return jax.make_array_from_process_local_data(
      NamedSharding(self._mesh, PartitionSpec(None, FRAMES)), array,
      (len(array), self._experiment.batch, *array.shape[2:]))


def _is_streamed(source: Source, mesh: Mesh | None, place: Place) -> bool:
  size = PIXEL_BYTES * source.height * source.width * len(source)
  if place == "auto":
    free, share, where = _room(mesh)
    place = "streamed" if free is not None and size > share * free else "resident"
    why = "the free memory is unknown" if free is None else (
      f"{_gib(size)} {'exceed' if place == 'streamed' else 'fit into'} {share:.0%} of the "
      f"{_gib(free)} free on {where}")
  else:
    why = f"{_gib(size)}, as asked for"
  say = "stay on disk and are read as training goes" if place == "streamed" else "lie on the device"
  _log.warning("pictures %s (%s)", say, why)
  return place == "streamed"


def _room(mesh: Mesh | None) -> tuple[int | None, float, str]:
  """Free bytes for each copy of the pictures, the share of them to take, and of what."""
  devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
  stats = [device.memory_stats() or {} for device in devices]
  if all("bytes_limit" in s for s in stats):
    return min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats), DEVICE_SHARE, "a device"
  free = memory.free_bytes()
  return None if free is None else free // len(devices), HOST_SHARE, "the host"


def _chunk_steps(source: Source, experiment: Experiment) -> int:
  """Steps of a chunk: as many as are allowed, and an even part of those between two log lines."""
  step_bytes = PIXEL_BYTES * source.height * source.width * experiment.batch
  most = min(max(CHUNK_BYTES // step_bytes, 1), LONGEST)
  return math.ceil(experiment.log_every / math.ceil(experiment.log_every / most))


def _upload(source: Source, mesh: Mesh | None, streamed: bool) -> tuple[Material, Pictures | None]:
  """What lies on every device: the material, and the pictures unless they are streamed."""
  camera, controls, lips, eyes = folder.gather(source.numbers, range(len(source)))
  shares: Any = np.empty(len(source), np.float32)
  pictures = None
  progress = Progress("read frames", len(source))

  def share(index: int, classes) -> None:
    shares[index] = np.mean(classes == MOUTH)
    progress.advance()

  if streamed:
    folder.gather(lambda i: share(i, source.classes(i)), range(len(source)))
  else:
    pictures = _all_pictures(source, mesh, share)
  progress.close()
  return spread(Material(camera, controls, lips, eyes, source.guide, shares), mesh), pictures


def _all_pictures(source: Source, mesh: Mesh | None, look) -> Pictures:
  """Every picture on the device, part by part: the host never holds them all."""

  def read(index: int) -> Pictures:
    pictures = source.pictures(index)
    look(index, pictures.classes)
    return pictures

  count = len(source)
  parts = math.ceil(count / max(1, CHUNK_BYTES // (PIXEL_BYTES * source.height * source.width)))
  part = math.ceil(count / parts)  # the last may be longer than what is left: nobody looks there
  whole = None
  for begin in range(0, count, part):
    rows = folder.gather(read, range(begin, min(begin + part, count)), length=part)
    whole = _place(whole, spread(rows, mesh), begin, parts)
  assert whole is not None  # a clip has frames
  return whole


@functools.partial(jax.jit, static_argnames="parts", donate_argnames="whole")
def _place(whole: Pictures | None, rows: Pictures, begin, parts: int) -> Pictures:
  """`rows` put at row `begin` of what holds as many of them as there are `parts`."""
  if whole is None:
    whole = jax.tree.map(lambda r: jnp.zeros((parts * len(r), *r.shape[1:]), r.dtype), rows)
  put = lambda all_, r: jax.lax.dynamic_update_slice_in_dim(all_, r, begin, 0)
  return jax.tree.map(put, whole, rows)


@functools.partial(jax.jit, static_argnames="mesh")
def _take(pictures: Pictures, frames, mesh: Mesh | None) -> Pictures:
  """The pictures of `frames` [s b], each on the device that trains on it."""
  taken = jax.tree.map(lambda leaf: leaf[frames], pictures)
  if mesh is None:
    return taken
  return jax.lax.with_sharding_constraint(
    taken, NamedSharding(mesh, PartitionSpec(None, FRAMES)))


def _gib(size: float) -> str:
  return f"{size / 2**30:.1f} GiB"
