"""Work on the frames of a clip by several processes, piece by piece.

A clip's used frames are cut into pieces; what is found out about a piece goes into one file, which
also says that the piece is done: an interrupted run takes up there. Pieces do not depend on how
many processes there are, nor does what is found.

Axes: f frames of a piece, h w pixels, p landmarks, b blendshapes.
"""

import collections
import concurrent.futures
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from uajax import memory, saving
from uajax.data import folder
from uajax.errors import UserError
from uajax.preprocess import landmarks, lips, masks
from uajax.types import FACE, HAIR

PIECE_BYTES = 24_000_000  # of pictures in a piece,
PIECE_FRAMES = 32  # which has so many at most
JOB_BYTES = 600_000_000  # of memory that a process may need
CLASSES = 6
JUDGE_EVERY = 5  # frames: each of these is compared with the one before, which costs
PARSE_EVERY = 2  # frames: the head's outline in those between is carried along with the landmarks

Run = Callable[[Callable[..., Any], Iterator[tuple]], Iterator[Any]]


class Piece(NamedTuple):
  """Frames [begin, end), with as many more before and after as their smoothing looks at."""

  begin: int
  end: int
  before: int
  after: int

  @property
  def first(self) -> int:
    return self.begin - self.before

  @property
  def last(self) -> int:
    return self.end + self.after


def cut(runs: Sequence[tuple[int, int]], size: int, around: int = 0) -> list[Piece]:
  """Pieces of runs [begin, end) of pictures of `size` x `size`; `around`: frames of context."""
  length = min(max(PIECE_BYTES // (size * size * 3), 4), PIECE_FRAMES)
  out = []
  for begin, end in runs:
    for a in range(begin, end, length):
      b = min(a + length, end)
      out.append(Piece(a, b, min(around, a - begin), min(around, end - b)))
  return out


def result(into: pathlib.Path, piece: Piece) -> pathlib.Path:
  """The file of what was found out about a piece."""
  return into / f"{piece.begin}.npz"


def sample(into: pathlib.Path, frame: int) -> pathlib.Path:
  """The picture of a frame that `layers` keeps for the plate."""
  return into / f"picture_{frame}.npy"


def feed(
  pictures: Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]], pieces: Sequence[Piece]
) -> Iterator[tuple[Piece, UInt8[np.ndarray, "f h w 3"]]]:
  """The pictures of each piece, from numbered ones that hold at least those, in order."""
  held: dict[int, np.ndarray] = {}
  for piece in pieces:
    held = {f: image for f, image in held.items() if f >= piece.first}
    while piece.last - 1 not in held:
      f, image = next(pictures)
      if f >= piece.first:
        held[f] = image
    yield piece, np.stack([held[f] for f in range(piece.first, piece.last)])


def usual_jobs() -> int:
  """As many processes as there are cores to run on, and memory for."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  free = memory.free_bytes()
  return cores if free is None else max(min(cores, free // JOB_BYTES), 1)


@contextlib.contextmanager
def pool(jobs: int) -> Iterator[Run]:
  """A function that maps over arguments in order, by `jobs` processes (1: in this one).

  Raises:
    UserError: a process was killed, as systems do that run out of memory.
  """
  if jobs == 1:
    yield lambda function, tasks: (function(*task) for task in tasks)
    return
  context = multiprocessing.get_context("spawn")
  line, end = context.Pipe(duplex=False)  # nothing is said on it: that it ends is the sign
  processes = concurrent.futures.ProcessPoolExecutor(
    jobs, context, initializer=_begin, initargs=(line,)
  )

  def run(function, tasks) -> Iterator[Any]:
    waiting: collections.deque = collections.deque()
    try:
      for task in tasks:
        waiting.append(processes.submit(function, *task))
        if len(waiting) > jobs:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    except concurrent.futures.BrokenExecutor as error:
      raise UserError(
        "a process of the preprocessing was killed, perhaps for want of memory: run the same"
        " command again, with --jobs 1"
      ) from error

  try:
    yield run
  except BaseException:
    end.close()  # pieces under way are not waited for: they are done again
    raise
  finally:
    processes.shutdown(wait=True, cancel_futures=True)
    end.close()
    line.close()


def _begin(line: multiprocessing.connection.Connection) -> None:
  """Leaves Ctrl-C to the parent, and ends when that lets the line go, or is no more."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def listen() -> None:
    with contextlib.suppress(EOFError, OSError):
      line.recv()
    os._exit(1)

  threading.Thread(target=listen, daemon=True).start()


def steady(
  into: pathlib.Path,
  piece: Piece,
  images: UInt8[np.ndarray, "f h w 3"],
  rois: list[landmarks.Roi],
  bundle: pathlib.Path,
  looks: int,
) -> int:
  """Landmarks and blendshape scores of a piece, saved; returns the number of frames."""
  landmarker = _landmarker(bundle)
  found = [
    landmarks.steady(image, roi, landmarker, looks)
    for image, roi in zip(images, rois, strict=True)
  ]
  save(
    result(into, piece),
    points=np.stack([p for p, _ in found]).astype(np.float32),
    scores=np.stack([s for _, s in found]).astype(np.float32),
  )
  return piece.end - piece.begin


def layers(
  into: pathlib.Path,
  piece: Piece,
  images: UInt8[np.ndarray, "f h w 3"],
  points: Float[np.ndarray, "f p 3"],
  rois: list[landmarks.Roi],
  networks: tuple[pathlib.Path, pathlib.Path | None, pathlib.Path | None],
  samples: list[int],
  mouths: list[int],
) -> int:
  """Classes of a piece's pixels, saved, the inner mouth still face.

  Beside them the pictures of the frames `samples`, and the lips.Charts of the frames `mouths`.
  Also saved: how much of the head overlaps with the head of the frame before (NaN where there is
  none), and of every JUDGE_EVERY-th frame how steady its layers are and how well the face ends at
  the jaw (else NaN). Returns the number of frames.
  """
  soft = _soft(_segmenter(*networks), images, points, rois)
  classes, overlaps, steadiness, jaws, before = [], [], [], [], None
  for f, mixed in zip(range(piece.first, piece.last), masks.smooth(soft), strict=True):
    if f >= piece.end or f < piece.begin - 1 or mixed is None:
      continue
    found = masks.classify(mixed)
    if f >= piece.begin:
      head = np.isin(found, (FACE, HAIR))
      classes.append(found)
      both, steady, jaw = np.nan, np.full(len(masks.LAYERS), np.nan), np.nan
      if before is not None:
        was = np.isin(before, (FACE, HAIR))
        both = (head & was).sum() / max((head | was).sum(), 1)
        if f % JUDGE_EVERY == 0:
          marks = points[f - piece.first]
          steady = masks.find_steadiness(before, points[f - 1 - piece.first], found, marks)
          jaw = masks.find_jaw_agreement(found, marks)
      overlaps.append(both)
      steadiness.append(steady)
      jaws.append(jaw)
    before = found
  for f in samples:
    if piece.begin <= f < piece.end:
      with saving.aside(sample(into, f)) as partial:
        np.save(partial, images[f - piece.first])
  here = [f - piece.first for f in mouths if piece.begin <= f < piece.end]
  charts = lips.chart(images[here], points[here])._asdict() if here else {}
  save(
    result(into, piece),
    classes=np.stack(classes),
    overlaps=np.array(overlaps),
    steadiness=np.stack(steadiness),
    jaws=np.array(jaws),
    **{f"mouth_{name}": value for name, value in charts.items()},
  )
  return piece.end - piece.begin


def learn_lips(into: pathlib.Path, pieces: Sequence[Piece]) -> lips.Look | None:
  """What the clip's lips look like, from the charts that `layers` saved."""
  found = [load(result(into, piece)) or {} for piece in pieces]
  charts = [lips.Charts(*(p[f"mouth_{name}"] for name in lips.Charts._fields))
            for p in found if "mouth_middle" in p]  # fmt: skip
  return lips.learn(lips.join(charts)) if charts else None


def _soft(segmenter, images, points, rois) -> Iterator[np.ndarray]:
  """Soft layers of frames in a row: every PARSE_EVERY-th read, the others carried from these."""
  last = len(images) - 1
  a = 0
  known = segmenter(images[0], points[0], rois[0])
  yield known
  while a < last:
    b = min(a + PARSE_EVERY, last)
    after = segmenter(images[b], points[b], rois[b])
    for f in range(a + 1, b):
      yield masks.carry(known, after, points[a], points[b], points[f], (f - a) / (b - a))
    yield after
    a, known = b, after


def pictures(
  into: pathlib.Path,
  piece: Piece,
  images: UInt8[np.ndarray, "f h w 3"],
  points: Float[np.ndarray, "f p 3"],
  classes_file: pathlib.Path,
  plate_file: pathlib.Path,
  lips_file: pathlib.Path,
) -> int:
  """Writes a piece's files into the picture folders of `into`; returns the number of frames.

  Saved beside: each class's share of the picture, whether it shows teeth, lips.measure_reds and
  lips.measure_gaps.
  """
  plate = np.load(plate_file, allow_pickle=False)
  known = load(lips_file)
  look = lips.Look(**known) if known else None
  found = load(classes_file)
  if found is None:
    raise UserError(f"{classes_file} is damaged: remove {into.parent} and run again")
  charts = lips.chart(images, points)
  edges = lips.find(charts, look)
  shares, with_teeth = [], []
  each = zip(
    range(piece.begin, piece.end), images, points, found["classes"], lips.outline(charts, edges),
    strict=True,
  )  # fmt: skip
  for f, image, marks, classes, inner in each:
    classes = masks.open_mouth(classes, inner)
    shares.append(np.bincount(classes.ravel(), minlength=CLASSES) / classes.size)
    teeth = np.zeros(classes.shape, bool)
    if look is not None:  # else the mouth never opens
      teeth = masks.find_teeth(image, classes, look.teeth)
    with_teeth.append(bool(teeth.any()))
    content = folder.Content(
      truth=masks.put_behind(image, classes, plate),
      torso_rgba=masks.cut_torso(image, classes),
      classes=classes,
      landmarks=landmarks.to_ibug(marks)[:, :2],
      teeth=teeth,
      original=image,
    )
    folder.write_pictures(into, f, content)
  save(
    result(into, piece), shares=np.stack(shares), teeth=np.array(with_teeth),
    reds=lips.measure_reds(charts, edges), gaps=lips.measure_gaps(edges),
  )  # fmt: skip
  return piece.end - piece.begin


def save(path: pathlib.Path, **arrays) -> None:
  """Writes a .npz, whole or not at all."""
  with saving.aside(path) as partial:
    np.savez_compressed(partial, **arrays)


def load(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """What `save` wrote; None where there is none, or it is damaged."""
  try:
    with np.load(path, allow_pickle=False) as data:
      return dict(data)
  except Exception:  # zipfile and NumPy raise many kinds for damaged files
    return None


# Read once a process. One thread each: sums then do not depend on the number of processes.


@functools.cache
def _landmarker(bundle: pathlib.Path) -> landmarks.Landmarker:
  return landmarks.Landmarker(bundle, threads=1)


@functools.cache
def _segmenter(person, hair, parser) -> masks.Segmenter:
  return masks.Segmenter(person, hair, parser, threads=1)
