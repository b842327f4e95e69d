"""A subject's folder: the layout of TalkingGaussian and UA-3DTalk, read and written.

```
aud.wav  aud_mel.npy [T 16 80]  (others: `speech.encoders.KINDS`)  au.csv  bc.jpg
transforms_{train,val}.json   {focal_len, cx, cy, frames: [{img_id, aud_id, transform_matrix}]}
ori_imgs/<i>.jpg  ori_imgs/<i>.lms  gt_imgs/<i>.jpg  torso_imgs/<i>.png  parsing/<i>.png
teeth_mask/<i>.npy            bool [h w]
{train,val}_auds_exp  {train,val}_audiostyle  mser_emotion_{train,val}    .npz or .pth
expression.npy [T 64]  emotion.csv (frame,label,intensity)                ours, where known
gaze.csv (frame,yaw_deg,pitch_deg: to the picture's right, up; in the head's axes)      likewise
```
Frame numbers i start at 0 and index the audio windows and the rows of au.csv; the priors are
indexed by the position in the split (method.md D.1, A.5). Everything in a folder is checked
before use: others may have made it.

Axes: f frames of a split, T frames of the video, h w pixels, d channels and w steps of an
audio window.
"""

import collections
import concurrent.futures
import contextlib
import csv
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8

from uajax import pretrained, types
from uajax.config import Audio
from uajax.errors import UserError
from uajax.saving import aside
from uajax.speech import encoders

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
PICTURES = ("ori_imgs", "gt_imgs", "torso_imgs", "parsing", "teeth_mask")  # a file a frame each

WINDOWS = {audio: kind.file for audio, kind in encoders.KINDS.items()}
_PRIOR_WIDTHS = (types.EXPRESSION, types.EXPRESSION, types.EMOTION)


def _prior_files(split: Split) -> tuple[str, str, str]:
  """f_exp, f_tone, emotion (method.md A.5)."""
  return f"{split}_auds_exp", f"{split}_audiostyle", f"mser_emotion_{split}"


# Every file beside the folders of pictures that what is read can depend on.
TABLES = frozenset((
  *("bc.jpg", "au.csv", "aud.wav", "aud.npy", *WINDOWS.values()),
  *(f"transforms_{split}.json" for split in SPLITS),
  *(f"{stem}{end}" for split in SPLITS for stem in _prior_files(split) for end in (".npz", ".pth")),
))
# Colours of parsing/<i>.png, read as RGB. All others are background.
COLOURS = {
  types.BACKGROUND: (255, 255, 255),
  types.FACE: (0, 0, 255),
  types.HAIR: (0, 0, 0),
  types.MOUTH: (100, 100, 100),
  types.NECK: (0, 255, 0),
  types.TORSO: (255, 0, 0),
}
LATE = 5  # frames at the end of a video that may lack a window or a row; they are left out
READERS = 8  # threads that decode pictures; libjpeg and zlib free the interpreter


class Source(Sequence):
  """A split on disk: `source[i]` reads and decodes one `types.Frame`.

  Opening it checks all tables against each other and that every file is there; the pictures
  are checked as they are read.

  Attributes:
    ids: int [f], frame numbers in the source video.
    guide: types.Guide of float32 [f].
    height, width: of every picture, in pixels.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    split: Split = "train",
    *,
    audio: Audio = "mel",
    allow_missing_priors: bool = False,
  ):
    """Raises UserError naming the file that lacks or mismatches, with the remedy."""
    self.path, self.split, self.audio = pathlib.Path(path), split, audio
    poses, focal_px, ids, positions = _transforms(self.path, split)
    windows = read_windows(self.path, audio)
    rows = _action_units(self.path)
    # The last frames of a video may outlast its sound by a window or two, and OpenFace may count
    # one or two fewer; only those may go.
    for count, what, remedy in (
      (len(windows), f"{WINDOWS[audio]} has {{}} audio windows", "recompute the audio features"),
      (len(rows["AU45"]), "au.csv has {} rows", "preprocess again"),
    ):
      if ids.max() >= count + LATE or ids.min() >= count:
        raise UserError(
          f"{self.path / what.format(count)}, none for frame {ids.max()} of "
          f"transforms_{split}.json: {remedy}"
        )
    known = ids < min(len(windows), len(rows["AU45"]))
    self.ids, poses, positions = ids[known], poses[known], positions[known]
    self._plate = _image(self.path / "bc.jpg", "RGB")
    self.height, self.width = self._plate.shape[:2]
    self._torso, self._teeth = _require_pictures(self.path, self.ids)
    points = [_landmarks(self.path / "ori_imgs" / f"{i}.lms") for i in self.ids]
    heights = [np.ptp(p[60:68, 1]) for p in points]
    au25 = np.clip(rows["AU25"], 0, np.percentile(rows["AU25"], 95))
    guide: dict[str, Any] = dict(  # NumPy leaves, as everything on the host
      lip_height_px=np.asarray(heights, np.float32),
      blink=(rows["AU45"][self.ids] / 2).astype(np.float32),
      au25=au25[self.ids].astype(np.float32),
      brow=(rows["AU01"] - rows["AU04"])[self.ids].astype(np.float32),
    )
    self.guide = types.Guide(**guide)
    self._lips = [lip_square(p, self.height, self.width) for p in points]
    self._eyes = [_eyes(p, self.height, self.width) for p in points]
    self._cameras = [_camera(c2w, focal_px, self.width, self.height) for c2w in poses]
    self._units = np.stack([rows[u][self.ids] for u in types.ACTION_UNITS], -1).astype(np.float32)
    self._windows = neighbours(windows, self.ids)
    self._priors = _priors(self.path, split, positions, allow_missing_priors)

  def __len__(self) -> int:
    return len(self.ids)

  def __getitem__(self, index: int) -> types.Frame:
    parts: list[Any] = [*self.pictures(index), *self.numbers(index)]
    return types.Frame(*parts)

  def pictures(self, index: int, *, background: bool = True) -> types.Pictures:
    """Uint8 arrays. Half of the time goes into the background: leave it out where it can be."""
    number, size = self.ids[index], (self.height, self.width)
    behind = None
    if background:
      behind = self._plate
      if self._torso:
        torso = _image(self.path / "torso_imgs" / f"{number}.png", "RGBA", size)
        behind = over(torso, self._plate)
    parts: list[Any] = [  # NumPy leaves, as everything on the host
      _image(self.path / "gt_imgs" / f"{number}.jpg", "RGB", size), behind, self.classes(index)
    ]
    return types.Pictures(*parts)

  def classes(self, index: int) -> UInt8[np.ndarray, "h w"]:
    """What each pixel of a frame is, types.BACKGROUND .. types.TORSO."""
    number, size = self.ids[index], (self.height, self.width)
    classes = _classes(_image(self.path / "parsing" / f"{number}.png", "RGB", size))
    if number in self._teeth:
      mask = _array(self.path / "teeth_mask" / f"{number}.npy")
      if mask.shape != size:
        raise UserError(
          f"{self.path / 'teeth_mask' / f'{number}.npy'} is {mask.shape}, not {size} like bc.jpg: "
          "make the teeth masks anew, or remove the folder teeth_mask to go without"
        )
      classes[mask.astype(bool)] = types.MOUTH  # never the face's (Q16)
    return classes

  def numbers(self, index: int) -> tuple[types.Camera, types.Controls, np.ndarray, np.ndarray]:
    """Camera, controls, lips and eyes of a frame: all of it that is no picture."""
    controls = types.Controls(
      self._windows[index], self._units[index], *(table[index] for table in self._priors)
    )
    return self._cameras[index], controls, self._lips[index], self._eyes[index]


def read(
  path: str | os.PathLike,
  split: Split = "train",
  *,
  audio: Audio = "mel",
  allow_missing_priors: bool = False,
) -> types.Clip:
  """A whole split in memory: NumPy, pictures uint8, 7 bytes a pixel and frame.

  Cameras have cx = w/2, cy = h/2: as the official reader, the file's are ignored (Q19).
  Where `torso_imgs` or `teeth_mask` lack, the background is the plate and no teeth are known.
  At most the last 5 frames of the video are left out where the sound or au.csv ends before them.

  Args:
    path: the subject's folder.
    split: "train" or "val".
    audio: which windows drive the avatar. Mel windows are computed where the file lacks.
    allow_missing_priors: read zeros for f_exp, f_tone or emotion where their file lacks.

  Raises:
    UserError: a file lacks, is damaged or does not match the others.
  """
  source = Source(path, split, audio=audio, allow_missing_priors=allow_missing_priors)
  return stack(source, source.guide, source.ids, workers=READERS)


def stack(
  frames: Sequence[types.Frame], guide: types.Guide, ids: Int[np.ndarray, " f"], *, workers: int = 1
) -> types.Clip:
  """A clip out of a random-access source, each picture decoded into its final place."""
  whole = gather(frames.__getitem__, range(len(frames)), workers=workers)
  return types.Clip(whole, guide, cast(Any, np.asarray(ids)))


def gather(
  read: Callable[[int], Any],
  indices: Sequence[int],
  *,
  length: int | None = None,
  workers: int = READERS,
) -> Any:
  """What `read` gives for each index, a tree of arrays, stacked along a new first axis.

  Args:
    indices: at least one.
    length: of the first axis, if it is to be longer than there are indices; rows without one
      hold anything.
    workers: threads that read, each row into its final place.
  """
  import jax  # only for its trees: NumPy in, NumPy out

  first, tree = jax.tree.flatten(read(indices[0]))
  rows = length or len(indices)
  out = [np.empty((rows, *np.shape(leaf)), np.asarray(leaf).dtype) for leaf in first]

  def fill(row: int) -> None:
    leaves = jax.tree.leaves(read(indices[row])) if row else first
    for whole, leaf in zip(out, leaves, strict=True):
      whole[row] = leaf

  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    collections.deque(pool.map(fill, range(len(indices))), maxlen=0)
  return jax.tree.unflatten(tree, out)


def check(path: str | os.PathLike, *, audio: Audio = "mel", priors: bool = True) -> None:
  """Cross-checks both splits: tables, files there, sizes (headers only, nothing is decoded).

  Raises:
    UserError: naming the first file that lacks or mismatches, with the remedy.
  """
  for split in SPLITS:
    source = Source(path, split, audio=audio, allow_missing_priors=not priors)
    size = (source.width, source.height)
    kinds = [("gt_imgs", "jpg"), ("parsing", "png")] + [("torso_imgs", "png")] * source._torso
    files = [source.path / k / f"{i}.{end}" for k, end in kinds for i in source.ids]
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
      for file, found in zip(files, pool.map(_image_size, files), strict=True):
        _require_size(file, found, size)


def read_windows(path: str | os.PathLike, audio: Audio = "mel") -> Float32[np.ndarray, "T w d"]:
  """The audio windows of the whole video, one a frame.

  Mel windows are computed from aud.wav where aud_mel.npy lacks; DeepSpeech ones may also lie in
  aud.npy, where the official preprocessing puts them.

  Raises:
    UserError: no such file, wrong shape, not finite.
  """
  path = pathlib.Path(path)
  if audio not in WINDOWS:
    raise ValueError(f"audio is one of {', '.join(WINDOWS)}, not {audio!r}")
  file = _window_file(path, audio)
  if not file.exists() and audio == "mel" and (path / "aud.wav").exists():
    windows = _mel_windows(path)
  else:
    _require(file, _window_remedy(path, audio))
    windows = _array(file)
  return encoders.check(windows, audio, file)


def read_window_file(file: str | os.PathLike, audio: Audio) -> Float32[np.ndarray, "f w d"]:
  """Audio windows that others made, from a .npy file. Raises UserError as `read_windows`."""
  file = pathlib.Path(file)
  _require(file, "give the .npy file of the audio windows")
  return encoders.check(_array(file), audio, file)


def make_windows(
  path: str | os.PathLike, audio: Audio, weights: str | os.PathLike | None = None
) -> None:
  """Makes a subject's audio windows where they lack, and notes by which encoder.

  Those by the same encoder of the same sound stay; so do those that others made, unless weights
  are given to make them with. Mel windows need no making.

  Args:
    weights: as in `speech.encoders.make`; by default the ones noted.

  Raises:
    UserError: the encoder cannot be had, no sound or transforms, a disk that is full.
  """
  path = pathlib.Path(path)
  frames = 1 + max(int(frame_ids(path, split).max()) for split in SPLITS)
  if audio == "mel":
    return
  noted = path / "extractors" / encoders.record_name(audio)
  if _window_file(path, audio).exists() and not noted.exists() and weights is None:
    read_windows(path, audio)
    return
  encoder = encoders.recalled(noted.parent, audio) if weights is None else encoders.make(
    audio, weights)
  _require(path / "aud.wav", "preprocess the video again")
  sound = {"sound": pretrained.digest(path / "aud.wav"), "frames": frames}
  file = path / WINDOWS[audio]
  note = lambda: encoders.record(encoder) | sound | {"windows": pretrained.digest(file)}
  try:
    if json.loads(noted.read_text()) == note():
      return
  except (OSError, ValueError):  # none yet, or damaged: made anew
    pass
  from uajax import media

  windows = encoder.windows(media.read_audio(path / "aud.wav"), frames)
  noted.unlink(missing_ok=True)  # it tells of earlier ones
  with aside(file) as partial:
    np.save(partial, windows)
  with aside(noted) as partial:
    partial.write_text(json.dumps(note(), indent=1, sort_keys=True))


def window_shape(path: str | os.PathLike, audio: Audio) -> tuple[int, ...]:
  """Steps and channels of the audio windows of a subject. Raises UserError as `read_windows`."""
  known = encoders.KINDS[audio]
  if known.channels is not None:
    return known.width, known.channels
  return read_windows(path, audio).shape[1:]


def neighbours(
  windows: Float[np.ndarray, "T w d"], ids: Int[np.ndarray, " f"]
) -> Float32[np.ndarray, "f 8 d w"]:
  """What frame i hears: windows [i - 4, i + 4), zeros beyond the ends, channels first."""
  half = types.NEIGHBOURS // 2
  padded = np.pad(np.asarray(windows, np.float32), ((half, half), (0, 0), (0, 0)))
  around = padded[np.asarray(ids)[:, None] + np.arange(types.NEIGHBOURS)[None, :]]
  return np.ascontiguousarray(around.swapaxes(2, 3))


def require_priors(path: str | os.PathLike, split: Split) -> None:
  """Raises UserError where a file of f_exp, f_tone or emotion lacks."""
  path = pathlib.Path(path)
  lacking = [stem for stem in _prior_files(split) if _prior_file(path, stem) is None]
  if path.is_dir() and lacking:
    raise UserError(f"{path} lacks {', '.join(lacking)} (.npz or .pth): run `uajax extract {path}`")


def frame_ids(path: str | os.PathLike, split: Split) -> Int[np.ndarray, " f"]:
  """Frame numbers of a split, in the order of its transforms file."""
  return _transforms(pathlib.Path(path), split)[2]


def read_expression(path: str | os.PathLike) -> Float32[np.ndarray, "T 64"] | None:
  """The tracked expression of every frame of the video, or None where the folder has none.

  That of the official tracker serves where ours lacks: the first 64 of its 79 (method.md A.1.4).
  """
  file = pathlib.Path(path) / "expression.npy"
  official = pathlib.Path(path) / "track_params.pt"
  if file.exists():
    table = _array(file)
  elif official.exists():
    from uajax import torchfile

    file, tracked = official, torchfile.load(official)
    table = np.asarray(tracked.get("exp") if isinstance(tracked, dict) else None)
    table = table[:, : types.EXPRESSION] if table.ndim == 2 and table.dtype.kind == "f" else table
  else:
    return None
  if table.ndim != 2 or table.shape[1] != types.EXPRESSION:
    raise UserError(f"{file} has the shape {table.shape}, not [frames, 64]: preprocess again")
  return _finite(table, file).astype(np.float32)


def read_emotions(path: str | os.PathLike) -> list[tuple[str, float]] | None:
  """Label and intensity 0..1 of every frame of the video, or None where the folder has none."""
  file = pathlib.Path(path) / "emotion.csv"
  if not file.exists():
    return None
  rows = _csv(file)
  try:
    return [(row["label"].strip(), float(row["intensity"])) for row in rows]
  except (KeyError, ValueError, AttributeError) as error:
    raise UserError(
      f"{file} is damaged: its columns are frame, label, intensity: mend or remove it"
    ) from error


def over(
  torso: UInt8[np.ndarray, "h w 4"], plate: UInt8[np.ndarray, "h w 3"]
) -> UInt8[np.ndarray, "h w 3"]:
  """The torso by its alpha over the plate, rounded."""
  alpha = torso[..., 3:].astype(np.uint16)
  mixed = torso[..., :3] * alpha + plate * (255 - alpha)
  return ((mixed + 127) // 255).astype(np.uint8)


# Writing


class Content(NamedTuple):
  """One frame to be written."""

  truth: UInt8[np.ndarray, "h w 3"]  # the person over the plate
  torso_rgba: UInt8[np.ndarray, "h w 4"]
  classes: UInt8[np.ndarray, "h w"]
  landmarks: Float[np.ndarray, "68 2"]  # x y in pixels
  teeth: Bool[np.ndarray, "h w"] | None = None
  original: UInt8[np.ndarray, "h w 3"] | None = None  # the camera's picture; else the truth


def write_pictures(path: pathlib.Path, number: int, content: Content) -> None:
  """Writes the files of frame `number` into a folder that holds all of PICTURES."""
  palette = np.asarray([COLOURS[c] for c in range(len(COLOURS))], np.uint8)
  original = content.truth if content.original is None else content.original
  teeth = np.zeros(content.classes.shape, bool) if content.teeth is None else content.teeth
  lines = "".join(f"{x:f} {y:f}\n" for x, y in np.asarray(content.landmarks, np.float64))
  _save_jpeg(path / "ori_imgs" / f"{number}.jpg", original)
  _save_jpeg(path / "gt_imgs" / f"{number}.jpg", content.truth)
  _save_png(path / "torso_imgs" / f"{number}.png", content.torso_rgba)
  _save_png(path / "parsing" / f"{number}.png", palette[content.classes])
  np.save(path / "teeth_mask" / f"{number}.npy", teeth)
  (path / "ori_imgs" / f"{number}.lms").write_text(lines)


class Writer:
  """Writes a subject's folder frame by frame. Made by `writer`."""

  def __init__(self, path: pathlib.Path):
    self.path = path  # where the files lie until all is done; more may be put there
    self.pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
    self._waiting: collections.deque = collections.deque()
    self._size: tuple[int, ...] = ()
    self._numbers: list[int] = []
    self.finished = False
    self._count: int | None = None  # of frames, where not all have pictures
    self._source: pathlib.Path | None = None  # of pictures that are adopted
    for name in PICTURES:
      (path / name).mkdir()

  def frame(
    self,
    number: int,
    *,
    truth: UInt8[np.ndarray, "h w 3"],
    torso_rgba: UInt8[np.ndarray, "h w 4"],
    parsing_classes: UInt8[np.ndarray, "h w"],
    landmarks: Float[np.ndarray, "68 2"],
    teeth: Bool[np.ndarray, "h w"] | None = None,
    original: UInt8[np.ndarray, "h w 3"] | None = None,
  ) -> None:
    """Writes frame `number` (any order, each once).

    Raises:
      ValueError: shapes or types that are not those of the first frame.
    """
    original = truth if original is None else original
    size = truth.shape[:2]
    self._size = self._size or size
    teeth = np.zeros(size, bool) if teeth is None else teeth
    for name, array, shape in (
      ("truth", truth, (*self._size, 3)),
      ("original", original, (*self._size, 3)),
      ("torso_rgba", torso_rgba, (*self._size, 4)),
      ("parsing_classes", parsing_classes, self._size),
      ("teeth", teeth, self._size),
      ("landmarks", landmarks, (68, 2)),
    ):
      if array.shape != shape:
        raise ValueError(f"frame {number}: {name} has the shape {array.shape}, not {shape}")
      if name in ("truth", "original", "torso_rgba") and array.dtype != np.uint8:
        raise ValueError(f"frame {number}: {name} is {array.dtype}, not uint8")
    # The caller may reuse its arrays at once: what is encoded later is copied now.
    content = Content(
      truth=truth.copy(),
      torso_rgba=torso_rgba.copy(),
      classes=parsing_classes.copy(),
      landmarks=np.array(landmarks),
      teeth=teeth.astype(bool),
      original=original.copy(),
    )
    self._numbers.append(int(number))
    self._waiting.append(self.pool.submit(write_pictures, self.path, int(number), content))
    while len(self._waiting) > 16:
      self._waiting.popleft().result()

  def adopt(
    self, source: pathlib.Path, numbers: Sequence[int], count: int, size: tuple[int, int]
  ) -> None:
    """Takes over what `write_pictures` put into a folder on the same disk, instead of `frame`.

    Args:
      source: the folder; its picture folders are moved away once all else is written.
      numbers: the frames that are there. Others of 0 .. count-1 are left out of both splits;
        the tables have their rows all the same, and no number changes (method.md Q60).
      count: of all frames.
      size: height and width of the pictures.
    """
    self._source = source
    self._numbers, self._count, self._size = [int(n) for n in numbers], count, size

  def take_adopted(self) -> None:
    """Moves the adopted pictures here: the last thing that is done."""
    if self._source is not None:
      for name in PICTURES:
        (self.path / name).rmdir()
        os.replace(self._source / name, self.path / name)

  def finish(
    self,
    *,
    speech: Float[np.ndarray, " n"],
    viewmats: Float[np.ndarray, "f 4 4"],
    focal_px: float,
    action_units: Mapping[str, Float[np.ndarray, " f"]],
    plate: UInt8[np.ndarray, "h w 3"],
    windows: Mapping[Audio, Float[np.ndarray, "f w d"]],
    expression: Float[np.ndarray, "f 64"] | None = None,
    emotions: Sequence[tuple[str, float]] | None = None,
  ) -> None:
    """Writes the tables; row i of each belongs to frame i, 0 .. f-1 all written or adopted.

    The first 10/11 of the frames that have pictures are for training, the rest for validation.

    Args:
      speech: 16 kHz mono in [-1, 1].
      viewmats: world to camera, OpenCV axes, metres.
      focal_px: of the camera whose centre is that of the picture.
      action_units: types.ACTION_UNITS and AU25 at least, each [f], 0..5.
      plate: the empty background.
      windows: audio windows by kind.
      expression: tracked expression of each frame.
      emotions: label and intensity 0..1 of each frame.

    Raises:
      ValueError: a table of another length than there are frames, or not finite.
    """
    from uajax import media

    while self._waiting:
      self._waiting.popleft().result()
    listed = sorted(self._numbers)
    count = len(listed) if self._count is None else self._count
    whole = listed == list(range(count)) if self._count is None else listed == sorted(set(listed))
    if not whole or len(listed) < 2 or not 0 <= listed[0] <= listed[-1] < count:
      raise ValueError(f"the frames are not 0..{count - 1}, each once, and at least two")
    if plate.shape != (*self._size, 3) or plate.dtype != np.uint8:
      raise ValueError(f"plate is {plate.dtype} {plate.shape}, not uint8 {(*self._size, 3)}")
    lacking = {*types.ACTION_UNITS, "AU25"} - set(action_units)
    if lacking:
      raise ValueError(f"action_units lack {', '.join(sorted(lacking))}")
    tables = {"viewmats": viewmats, **action_units, **windows}
    if expression is not None:
      tables["expression"] = expression
    for name, table in tables.items():
      if len(table) != count or not np.isfinite(table).all():
        raise ValueError(f"{name} has {len(table)} rows for {count} frames, or is not finite")
    if emotions is not None and len(emotions) != count:
      raise ValueError(f"emotions has {len(emotions)} rows for {count} frames")

    media.write_wav(self.path / "aud.wav", speech)
    _save_jpeg(self.path / "bc.jpg", plate)
    for kind, table in windows.items():
      np.save(self.path / WINDOWS[kind], np.asarray(table, np.float32))
    if expression is not None:
      np.save(self.path / "expression.npy", np.asarray(expression, np.float32))
    _write_csv(
      self.path / "au.csv",
      ["frame", " timestamp", " confidence", " success", *(f" {u}_r" for u in action_units)],
      (
        [i + 1, f"{i / types.FPS:.3f}", "1.00", 1, *(f"{u[i]:.6f}" for u in action_units.values())]
        for i in range(count)
      ),
    )
    if emotions is not None:
      rows = ([i, label, f"{x:.6f}"] for i, (label, x) in enumerate(emotions))
      _write_csv(self.path / "emotion.csv", ["frame", "label", "intensity"], rows)
    height, width = self._size
    c2ws = np.linalg.inv(np.asarray(viewmats, np.float64))
    c2ws[:, :3, 1:3] *= -1
    train = len(listed) * 10 // 11
    for split, numbers in (("train", listed[:train]), ("val", listed[train:])):
      frames = [
        {"img_id": i, "aud_id": i, "transform_matrix": c2ws[i].tolist()} for i in numbers
      ]
      document = {"focal_len": float(focal_px), "cx": width / 2, "cy": height / 2, "frames": frames}
      (self.path / f"transforms_{split}.json").write_text(json.dumps(document))
    self.finished = True


@contextlib.contextmanager
def writer(path: str | os.PathLike) -> Iterator[Writer]:
  """Writes a new subject folder: `with writer(path) as w: w.frame(0, ...); w.finish(...)`.

  Files lie in PATH.partial (`w.path`, where more may be put) until the block ends well; then
  the folder takes its name. When the block fails they are removed.

  Raises:
    UserError: a folder that holds something is at `path`, the disk is full, no permission.
  """
  with aside(path, folder=True) as partial:
    w = Writer(partial)
    try:
      yield w
    finally:
      w.pool.shutdown(wait=True, cancel_futures=True)
    if not w.finished:
      raise RuntimeError("finish() was not called: the folder is not whole")
    w.take_adopted()


def write(path: str | os.PathLike, frames: Iterable[Content], **tables) -> None:
  """Writes a new subject folder of these frames, 0 .. f-1; `tables` as in `Writer.finish`."""
  with writer(path) as w:
    for number, content in enumerate(frames):
      fields = content._asdict()
      w.frame(number, parsing_classes=fields.pop("classes"), **fields)
    w.finish(**tables)


def write_features(
  path: str | os.PathLike,
  split: Split,
  *,
  f_exp: Float[np.ndarray, "f 64"],
  f_tone: Float[np.ndarray, "f 64"],
  emotion: Float[np.ndarray, "f 128"],
  pth: bool = False,
) -> None:
  """Writes the priors of a split, row i for its i-th frame, as .npz files with key "features".

  Stored as the official code wants them, [f 1 64], [f 1 64], [f 1 128] float32. With `pth` the
  same also as .pth, which the official code reads.

  Raises:
    ValueError: a table that has not a row a frame, or is not finite.
    UserError: no such split, the disk is full.
  """
  path = pathlib.Path(path)
  count = len(frame_ids(path, split))
  tables = {}
  for stem, width, table in zip(_prior_files(split), _PRIOR_WIDTHS, (f_exp, f_tone, emotion),
                                strict=True):
    table = np.asarray(table, np.float32)
    if table.shape != (count, width) or not np.isfinite(table).all():
      raise ValueError(f"{stem} is {table.shape}, not {(count, width)}, or is not finite")
    tables[stem] = table[:, None, :]
  for stem, table in tables.items():
    with aside(path / f"{stem}.npz") as partial:
      np.savez(partial, features=table)
    if pth:
      from uajax import torchfile

      with aside(path / f"{stem}.pth") as partial:
        torchfile.save(partial, table)


# Reading, piece by piece


def _prior_file(path: pathlib.Path, stem: str) -> pathlib.Path | None:
  files = (path / f"{stem}{end}" for end in (".npz", ".pth"))
  return next((file for file in files if file.exists()), None)


def _priors(path, split, positions, allow_missing) -> list[np.ndarray]:
  if not allow_missing:
    require_priors(path, split)
  tables = []
  for stem, width in zip(_prior_files(split), _PRIOR_WIDTHS, strict=True):
    file = _prior_file(path, stem)
    if file is None:
      tables.append(np.zeros((len(positions), width), np.float32))
      continue
    table = _prior(file, width)
    if len(table) <= positions.max():
      raise UserError(
        f"{file} has {len(table)} rows for the {positions.max() + 1} frames of "
        f"transforms_{split}.json: run `uajax extract {path}`"
      )
    tables.append(table[positions])
  return tables


def _prior(file: pathlib.Path, width: int) -> np.ndarray:
  if file.suffix == ".npz":
    table = _array(file, key="features")
  else:
    from uajax import torchfile

    loaded = torchfile.load(file)
    try:  # a tensor, or a list of one a frame
      if isinstance(loaded, (list, tuple)):
        table = np.stack([np.asarray(row, np.float32).reshape(width) for row in loaded])
      else:
        table = np.asarray(loaded, np.float32)
    except (TypeError, ValueError) as error:
      raise UserError(f"{file} holds no rows of {width} numbers: extract it anew") from error
  if table.ndim not in (2, 3) or table.size != len(table) * width:
    raise UserError(f"{file} has the shape {table.shape}, not [frames, {width}]: extract it anew")
  return _finite(table.reshape(-1, width), file).astype(np.float32)


def _transforms(path, split) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
  """c2w [f 4 4] (OpenGL axes), focal length in pixels, frame numbers, positions in the file."""
  if split not in SPLITS:
    raise ValueError(f"split is train or val, not {split!r}")
  if not path.is_dir():
    raise UserError(f"{path} is not a folder: make a subject's folder with `uajax preprocess`")
  file = path / f"transforms_{split}.json"
  _require(file, "this is no subject's folder, or not a whole one: preprocess the video again")
  try:
    document = json.loads(file.read_text())
    frames = document["frames"]
    poses = np.asarray([f["transform_matrix"] for f in frames], np.float64)
    ids = np.asarray([f["img_id"] for f in frames])
    focal_px = float(document["focal_len"])
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{file} is damaged ({error}): preprocess the video again") from error
  if poses.shape != (len(ids), 4, 4) or not len(ids):
    raise UserError(f"{file} names no frames or poses that are not 4x4: preprocess again")
  whole = np.issubdtype(ids.dtype, np.integer) and ids.min() >= 0
  if not whole or len(np.unique(ids)) != len(ids):
    raise UserError(f"{file} has an img_id that is negative, double or no number: preprocess again")
  sound = np.isfinite(poses).all() and (np.abs(np.linalg.det(poses[:, :3, :3])) > 1e-6).all()
  if not sound or not 0 < focal_px < np.inf:
    raise UserError(f"{file} has a pose or focal length that is no camera's: preprocess again")
  return poses, focal_px, ids.astype(np.int32), np.arange(len(ids))


def _camera(c2w, focal_px: float, width: int, height: int) -> types.Camera:
  """From OpenGL axes (y up, looking down -z) to OpenCV's."""
  c2w = c2w.copy()
  c2w[:3, 1:3] *= -1
  k = [[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]]
  matrices: tuple[Any, Any] = np.linalg.inv(c2w).astype(np.float32), np.asarray(k, np.float32)
  return types.Camera(*matrices)


def _action_units(path) -> dict[str, np.ndarray]:
  """Columns of au.csv by name ("AU45"), clipped to OpenFace's range; AU45 to 0..2."""
  file = path / "au.csv"
  _require(file, "preprocess the video again, or put OpenFace's table of it there")
  rows = _csv(file)
  names = (*types.ACTION_UNITS, "AU25")
  try:
    columns = {u: np.asarray([float(row[f"{u}_r"]) for row in rows]) for u in names}
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"{file} lacks a column or a number ({error}): preprocess again") from error
  for name, column in columns.items():
    _finite(column, file)
    columns[name] = np.clip(column, 0, 2 if name == "AU45" else 5)
  return columns


def _csv(file: pathlib.Path) -> list[dict[str, str]]:
  """Rows by column name, without the space that OpenFace puts before each."""
  try:
    with open(file, newline="") as lines:
      return [
        {k.strip(): v for k, v in row.items() if k is not None} for row in csv.DictReader(lines)
      ]
  except (csv.Error, UnicodeDecodeError) as error:
    raise UserError(f"{file} is no table of comma-separated values ({error})") from error


def _write_csv(file: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
  with open(file, "w", newline="") as lines:
    table = csv.writer(lines)
    table.writerow(header)
    table.writerows(rows)


def _landmarks(file: pathlib.Path) -> np.ndarray:
  """[68 2], x y in pixels."""
  _require(file, "no face was found in this frame: preprocess the video again")
  try:
    points = np.asarray([line.split() for line in file.read_text().splitlines() if line.strip()])
    points = points.astype(np.float64)
  except ValueError as error:
    raise UserError(f"{file} is damaged: 68 lines of x y are wanted: preprocess again") from error
  if points.shape != (68, 2):
    raise UserError(f"{file} has the shape {points.shape}, not 68 lines of x y: preprocess again")
  return _finite(points, file)


def lip_square(points: np.ndarray, height: int, width: int) -> np.ndarray:
  """The square about the outer lips, inside the picture and never empty (Q18)."""
  sides = []
  low, high = points[48:60].min(0).astype(int), points[48:60].max(0).astype(int)
  half = max(1, int((high - low).max()) // 2)
  for axis, size in ((1, height), (0, width)):
    middle = int(low[axis] + high[axis]) // 2
    begin = min(max(middle - half, 0), size - 1)
    sides += [begin, max(min(middle + half, size), begin + 1)]
  return np.asarray(sides, np.int32)


def _eyes(points: np.ndarray, height: int, width: int) -> np.ndarray:
  """The box about brows and eyes with a quarter of its height more above and below, likewise.

  Landmarks lie amid the brows, and below the lower lids folds move, too.
  """
  marks = np.concatenate([points[17:27], points[36:48]])
  low, high = marks.min(0), marks.max(0)
  room = 0.25 * (high[1] - low[1])
  sides = []
  for axis, size in ((1, height), (0, width)):
    begin = min(max(int(low[axis] - room), 0), size - 1)
    sides += [begin, max(min(int(np.ceil(high[axis] + room)), size), begin + 1)]
  return np.asarray(sides, np.int32)


def _require_pictures(path: pathlib.Path, ids: np.ndarray) -> tuple[bool, frozenset[int]]:
  """Is there a torso; which frames have a teeth mask. Every other picture must be there."""

  def numbers(kind: str, end: str) -> set[int]:
    folder = path / kind
    names = os.listdir(folder) if folder.is_dir() else []
    stems = (name[: -len(end)] for name in names if name.endswith(end))
    return {int(stem) for stem in stems if stem.isdecimal()}

  torso = (path / "torso_imgs").is_dir()
  kinds = [("gt_imgs", ".jpg"), ("parsing", ".png")] + [("torso_imgs", ".png")] * torso
  for kind, end in kinds:
    lacking = set(ids.tolist()) - numbers(kind, end)
    if lacking:
      raise UserError(
        f"{path / kind} lacks {len(lacking)} of {len(ids)} pictures, first {min(lacking)}{end}: "
        "preprocess the video again"
      )
  return torso, frozenset(numbers("teeth_mask", ".npy"))


def _classes(colours: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
  red, green, blue = (colours[..., i].astype(np.uint32) for i in range(3))
  packed = red << 16 | green << 8 | blue
  classes = np.full(packed.shape, types.BACKGROUND, np.uint8)
  for kind, (r, g, b) in COLOURS.items():
    classes[packed == (r << 16 | g << 8 | b)] = kind
  return classes


def _image(file: pathlib.Path, mode: str, size: tuple[int, int] | None = None) -> np.ndarray:
  import PIL.Image

  _require(file, "preprocess the video again")
  try:
    with PIL.Image.open(file) as image:
      if size is not None:
        _require_size(file, image.size, size[::-1])
      return np.array(image if image.mode == mode else image.convert(mode))
  except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
    raise UserError(f"{file} is a damaged picture ({error}): preprocess again") from error


def _image_size(file: pathlib.Path) -> tuple[int, int]:
  import PIL.Image

  try:
    with PIL.Image.open(file) as image:
      return image.size
  except (OSError, SyntaxError, ValueError) as error:
    raise UserError(f"{file} is a damaged picture ({error}): preprocess again") from error


def _require_size(file: pathlib.Path, found: tuple[int, ...], size: tuple[int, ...]) -> None:
  if found != size:
    raise UserError(
      f"{file} is {found[0]}x{found[1]}, bc.jpg is {size[0]}x{size[1]}: all pictures of a subject "
      "have one size: preprocess again"
    )


def _save_jpeg(file: pathlib.Path, picture: np.ndarray) -> None:
  import PIL.Image

  # Full colour resolution: thin lips and teeth are learnt from these.
  PIL.Image.fromarray(picture).save(file, quality=97, subsampling=0)


def _save_png(file: pathlib.Path, picture: np.ndarray) -> None:
  import PIL.Image

  PIL.Image.fromarray(picture).save(file, compress_level=1)  # three times the speed of the default


def _array(file: pathlib.Path, key: str | None = None) -> np.ndarray:
  """A .npy file, or one array of a .npz; never one that would run code."""
  try:
    with open(file, "rb") as stream:
      loaded = np.load(stream, allow_pickle=False)
      array = loaded if key is None else loaded[key]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f"{file} is damaged ({error}): make it anew") from error
  if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
    raise UserError(f"{file} holds no plain array of numbers: make it anew")
  return array


def _window_file(path: pathlib.Path, audio: Audio) -> pathlib.Path:
  file = path / WINDOWS[audio]
  official = path / "aud.npy"
  return official if audio == "deepspeech" and official.exists() and not file.exists() else file


def _window_remedy(path: pathlib.Path, audio: Audio) -> str:
  there = [other for other, name in WINDOWS.items() if (path / name).exists()]
  others = f", or choose --model.audio {' or '.join(there)}" if there else ""
  if encoders.KINDS[audio].elsewhere:
    return f"the official preprocessing makes it{others}"
  weights = " --audio-weights FOLDER" if encoders.KINDS[audio].model else ""
  return f"run `uajax extract {path} --audio {audio}{weights}`{others}"


def _mel_windows(path: pathlib.Path) -> np.ndarray:
  from uajax import media
  from uajax.speech import features

  samples = media.read_audio(path / "aud.wav")
  frames = 1 + max(int(frame_ids(path, split).max()) for split in SPLITS)
  return np.asarray(features.mel_windows(samples, frames))


def _finite(array: np.ndarray, file: pathlib.Path) -> np.ndarray:
  if not np.isfinite(array).all():
    raise UserError(f"{file} holds values that are not finite: make it anew")
  return array


def _require(file: pathlib.Path, remedy: str) -> None:
  if not file.is_file():
    raise UserError(f"{file} is missing: {remedy}")
