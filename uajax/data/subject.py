"""A subject's frames as a TensorFlow Datasets builder over ArrayRecord files, without TensorFlow.

One record a frame: the pictures as they were encoded (or PNG, without loss) and all numbers.
Random access reads a frame in one go instead of five files. The records are a cache beside the
folder, made again when a file of it changes; what is read is equal to `folder.read` bit for bit.

Other programs have them by TFDS's own tools; a configuration is a way to hear:

    tfds build subject --imports uajax.data.subject --config mel --manual_dir data/me --data_dir DIR

    import uajax.data.subject
    frames = tfds.load("subject/mel", split="train", data_dir=DIR)   # frames[i], len(frames)

The command `tfds` itself imports more than TFDS installs (`pip install 'uajax[tfds]'`). Reading
wants no TensorFlow: tf.data cannot read ArrayRecord, so that `tfds.load` gives what
`tfds.data_source` gives. For a tf.data.Dataset build with `--file_format tfrecord`.

Axes: f frames of a split, h w pixels.
"""

import base64
import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import absl.logging
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from uajax import types
from uajax.data import folder
from uajax.errors import UserError
from uajax.progress import Progress
from uajax.speech import encoders

_CACHE = ".tfds"  # in the subject's folder
_PICTURES = ("image", "torso", "classes")  # encoded: JPEG, PNG (empty without), PNG


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
  """Which folder and which audio windows; in a cache the name holds a fingerprint of both."""

  subject: str = ""  # "": the `manual_dir` of the download
  audio: folder.Audio = "mel"


class Subject(tfds.core.GeneratorBasedBuilder):
  """One talking person, frame by frame, in the splits train and val."""

  VERSION = tfds.core.Version("1.1.0")
  RELEASE_NOTES = {"1.0.0": "First.", "1.1.0": "The eyes' box, and how the brows stand."}
  BUILDER_CONFIGS = [
    Config(name=audio, description=kind.name, audio=audio) for audio, kind in encoders.KINDS.items()
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Give the folder that `uajax preprocess` or the official scripts made as --manual_dir."
  )

  builder_config: Config

  def __init__(self, *, file_format: Any = None, **settings):
    super().__init__(file_format=file_format, **settings)  # pyright: ignore[reportCallIssue]
    if file_format is None and not self.info.initialized:  # nothing is written yet
      self.info.set_file_format("array_record", override=True)

  def as_dataset(self, split=None, **settings) -> Any:
    """A random-access source of ArrayRecord, a tf.data.Dataset of other formats."""
    if self.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
      return super().as_dataset(split, **settings)  # pyright: ignore[reportCallIssue]
    asked = [name for name, value in settings.items() if value and name != "decoders"]
    if asked:
      raise ValueError(f"records in ArrayRecord are read one by one, without {', '.join(asked)}")
    source: Any = self.as_data_source  # pyright takes its decorator for a signature
    return source(split, decoders=settings.get("decoders"))

  def _info(self) -> tfds.core.DatasetInfo:
    config = self.builder_config
    if config.subject:
      steps, channels = folder.window_shape(config.subject, config.audio)
    else:  # not known yet; the weights tell how many channels some have
      kind = encoders.KINDS[config.audio]
      steps, channels = kind.width, kind.channels
    shapes = {
      "viewmat": (4, 4),
      "K": (3, 3),
      "audio": (types.NEIGHBOURS, channels, steps),
      "action_units": (len(types.ACTION_UNITS),),
      "f_exp": (types.EXPRESSION,),
      "f_tone": (types.EXPRESSION,),
      "emotion": (types.EMOTION,),
    }
    # As bytes: lists of numbers are slow to parse.
    tensor = lambda shape, kind: tfds.features.Tensor(shape=shape, dtype=kind, encoding="bytes")
    features = {
      **{name: tfds.features.Scalar(np.object_) for name in _PICTURES},
      **{name: tensor(shape, np.float32) for name, shape in shapes.items()},
      "lips": tensor((4,), np.int32),
      "eyes": tensor((4,), np.int32),
      **{name: tfds.features.Scalar(np.float32) for name in types.Guide._fields},
      "id": tfds.features.Scalar(np.int32),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description="A talking person in the layout of TalkingGaussian and UA-3DTalk.",
      features=tfds.features.FeaturesDict(features),
      metadata=tfds.core.MetadataDict(),  # filled when the records are written, else read
      disable_shuffling=True,  # the order of the transforms files
    )

  def _split_generators(self, dl_manager):
    where, audio = self.builder_config.subject or dl_manager.manual_dir, self.builder_config.audio
    sources = {
      split: folder.Source(where, split, audio=audio, allow_missing_priors=True)
      for split in folder.SPLITS
    }
    plate = (pathlib.Path(where) / "bc.jpg").read_bytes()
    # Columns that are wanted of all frames at once lie here too, to be had without a scan.
    columns = {
      split: {n: c.tolist() for n, c in (*source.guide._asdict().items(), ("id", source.ids))}
      for split, source in sources.items()
    }
    metadata = self.info.metadata
    assert metadata is not None  # made in _info
    metadata.update(plate=base64.b64encode(plate).decode(), columns=columns)
    return {split: self._generate_examples(source) for split, source in sources.items()}

  def _generate_examples(self, source):
    progress = Progress(f"pack {source.split}", len(source))
    for i, number in enumerate(source.ids):
      torso = source.path / "torso_imgs" / f"{number}.png"
      classes: Any = source.pictures(i).classes  # decodes all, so that nothing damaged goes in
      yield i, {
        "image": (source.path / "gt_imgs" / f"{number}.jpg").read_bytes(),
        "torso": torso.read_bytes() if torso.exists() else b"",
        "classes": _png(classes),
        **_numbers(source, i),
      }
      progress.advance()
    progress.close()


class Source(Sequence):
  """A split out of the records: `source[i]` reads and decodes one `types.Frame`.

  Attributes as those of `folder.Source`: ids int [f], guide, height, width.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    split: folder.Split = "train",
    *,
    audio: folder.Audio = "mel",
    allow_missing_priors: bool = False,
    cache_dir: str | os.PathLike | None = None,
  ):
    """Prepares the records where need be. Raises UserError as `folder.Source`."""
    if not allow_missing_priors:
      folder.require_priors(path, split)
    self._builder = prepare(path, cache_dir, audio=audio)
    with _quiet():
      self._records: Any = self._builder.as_data_source(split=split)  # pyright: ignore
    metadata = self._builder.info.metadata
    assert metadata is not None
    columns = metadata["columns"][split]
    self.ids = np.asarray(columns["id"], np.int32)
    guide: list[Any] = [np.asarray(columns[n], np.float32) for n in types.Guide._fields]
    self.guide = types.Guide(*guide)
    self._plate = _decode(base64.b64decode(metadata["plate"]), "RGB")
    self.height, self.width = self._plate.shape[:2]

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> types.Frame:
    record = self._records[index]
    parts: list[Any] = [*self._shown(record, background=True), *_told(record)]
    return types.Frame(*parts)

  def pictures(self, index: int, *, background: bool = True) -> types.Pictures:
    """As `folder.Source.pictures`."""
    return self._shown(self._records[index], background)

  def classes(self, index: int) -> UInt8[np.ndarray, "h w"]:
    """As `folder.Source.classes`."""
    return _decode(self._records[index]["classes"], "L")

  def numbers(self, index: int) -> tuple[types.Camera, types.Controls, np.ndarray, np.ndarray]:
    """As `folder.Source.numbers`."""
    return _told(self._records[index])

  def _shown(self, record, background: bool) -> types.Pictures:
    behind = None
    if background:
      torso = record["torso"]
      behind = folder.over(_decode(torso, "RGBA"), self._plate) if torso else self._plate
    parts: list[Any] = [  # NumPy leaves, as everything on the host
      _decode(record["image"], "RGB"), behind, _decode(record["classes"], "L")
    ]
    return types.Pictures(*parts)


def read(
  path: str | os.PathLike,
  split: folder.Split = "train",
  *,
  audio: folder.Audio = "mel",
  allow_missing_priors: bool = False,
  cache_dir: str | os.PathLike | None = None,
) -> types.Clip:
  """A whole split in memory, out of the records; as `folder.read`."""
  source = Source(
    path, split, audio=audio, allow_missing_priors=allow_missing_priors, cache_dir=cache_dir
  )
  return folder.stack(source, source.guide, source.ids, workers=os.cpu_count() or 1)


def prepare(
  path: str | os.PathLike,
  cache_dir: str | os.PathLike | None = None,
  *,
  audio: folder.Audio = "mel",
) -> Subject:
  """The builder of a subject with its records written: those at hand if nothing has changed.

  They appear whole or not at all; those of an earlier state of the folder are removed then.
  Nothing is looked up or fetched over a network.

  Args:
    path: the subject's folder.
    cache_dir: where the records go (default: the folder `.tfds` in the subject's).
    audio: which audio windows the records hold.

  Raises:
    UserError: the folder lacks or mismatches something, or the records cannot be written.
  """
  path = pathlib.Path(path).resolve()
  name = f"{audio}_{_fingerprint(path, audio)}"
  cache_dir = pathlib.Path(cache_dir or path / _CACHE)
  config = Config(name=name, version=Subject.VERSION, subject=str(path), audio=audio)
  try:
    with _quiet():
      builder = Subject(data_dir=str(cache_dir), config=config)
      builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
      )
  except OSError as error:
    raise UserError(
      f"{cache_dir} cannot take the records of {path} ({error.strerror or error}): "
      "free some space there, or read with source=folder"
    ) from error
  for other in (cache_dir / builder.name).glob(f"{audio}_*"):
    if other.name.partition(".")[0] != name:
      shutil.rmtree(other, ignore_errors=True)
  return builder


def _numbers(source: folder.Source, index: int) -> dict[str, np.ndarray]:
  camera, controls, lips, eyes = source.numbers(index)
  guide = {name: column[index] for name, column in source.guide._asdict().items()}
  numbers = {**camera._asdict(), **controls._asdict(), "lips": lips, "eyes": eyes, **guide}
  return {**numbers, "id": source.ids[index]}


def _told(record) -> tuple[types.Camera, types.Controls, np.ndarray, np.ndarray]:
  """All of a record that is no picture."""
  controls = types.Controls(*(record[name] for name in types.Controls._fields))
  camera = types.Camera(record["viewmat"], record["K"])
  return camera, controls, record["lips"], record["eyes"]


def _fingerprint(path: pathlib.Path, audio: folder.Audio) -> str:
  """Changes with the records' version and any file that the reader looks at: names, sizes and
  times of change."""
  if not path.is_dir():
    raise UserError(f"{path} is not a folder: make a subject's folder with `uajax preprocess`")
  digest = hashlib.sha256(f"{audio} {Subject.VERSION} {path}".encode())
  for kind in ("", "gt_imgs", "torso_imgs", "parsing", "teeth_mask", "ori_imgs"):
    if not (path / kind).is_dir():
      continue
    with os.scandir(path / kind) as entries:
      for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.is_file() and (kind or entry.name in folder.TABLES):
          state = entry.stat()
          digest.update(f"{kind}/{entry.name} {state.st_size} {state.st_mtime_ns}\n".encode())
  return digest.hexdigest()[:16]


def _png(picture: np.ndarray) -> bytes:
  out = io.BytesIO()
  PIL.Image.fromarray(picture).save(out, "PNG", compress_level=1)
  return out.getvalue()


def _decode(encoded: bytes, mode: str) -> np.ndarray:
  with PIL.Image.open(io.BytesIO(encoded)) as image:
    return np.array(image if image.mode == mode else image.convert(mode))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """TFDS prints banners, warns of custom configurations and draws bars of its own."""
  before = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl.logging.set_verbosity(before)
