"""From speech to f_exp, f_tone and emotion: trains the extractors of a person, keeps them, hears.

Every feature comes from sound alone, by one route (`hear`), whether the frame was trained on, held
out, or belongs to speech never heard before; pictures teach only through the tracked expression of
training frames (method.md A, B.3, G). Features are standardised with statistics kept beside the
parameters, so that what the avatar reads has the same scale everywhere.

    SUBJECT/extractors/parameters.npz   networks and statistics
    SUBJECT/extractors/extractors.json  settings, labels, provenance; written last
    SUBJECT/{train,val}_auds_exp, {train,val}_audiostyle, mser_emotion_{train,val}   .npz and .pth

Axes: f frames, s samples.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np
from jaxtyping import Array, Float

from uajax.emotion import control, distill, network
from uajax.emotion.control import Prototype
from uajax.emotion.distill import NEUTRAL, DistillConfig, Recording
from uajax.emotion.network import EmotionConfig, Ranges
from uajax.errors import UserError
from uajax.priors import fuse, lip, style
from uajax.priors.fit import FitConfig
from uajax.priors.lip import Lessons, LipConfig
from uajax.priors.style import StyleConfig
from uajax.progress import Progress
from uajax.saving import aside
from uajax.speech import encoders, features, wav2vec2
from uajax.speech.wav2vec2 import Wav2Vec2Config
from uajax.types import EMOTION, EXPRESSION, FPS, SAMPLE_RATE_HZ, Speech

VERSION = 1
FOLDER = "extractors"
SPLITS = ("train", "val")
LIMIT = 5.0  # standardised features are cut there: no recording drives the avatar further
PIECE, MARGIN = 1000, 250  # frames heard at a time, and before and after them
_SAMPLES = SAMPLE_RATE_HZ // FPS  # of a frame
LEEWAY_DB = 6.0  # how much louder or softer than the training speech is left as it is

CorpusItem = tuple[np.ndarray, np.ndarray, str, Any]  # wav, expression [f 64], label, intensity
Corpus = Iterable[CorpusItem] | Callable[[], Iterable[CorpusItem]]


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
  """Settings of all extractors; the defaults are the paper's sizes."""

  lip: LipConfig = LipConfig()
  style: StyleConfig = StyleConfig()
  emotion: EmotionConfig = EmotionConfig()
  distill: DistillConfig = DistillConfig()
  emotion_stride: int = 5  # frames between the windows heard; linear between them
  held_out: float = 0.1  # share of the training frames, at their end, that says when to stop
  wav2vec2: str = ""  # folder with Hugging Face weights; "" trains that branch from scratch
  seed: int = 0


PAPER = ExtractConfig()
SMALL = ExtractConfig(  # seconds on two cores, for demos and tests
  lip=LipConfig(
    width=8,
    residuals=(0, 1, 1, 0),
    centres=512,
    fit=FitConfig(steps=500, batch=40, rate=5e-3, block=50, patience=3, averaging=0.98),
  ),
  style=StyleConfig(
    hidden=64,
    layers=1,
    chunk=64,
    fuse_dropout=0.1,
    fit=FitConfig(steps=150, batch=8, rate=2e-3, block=25, patience=3, averaging=0.97),
  ),
  emotion=EmotionConfig(
    window_s=1.0,
    image=(64, 64),
    channels=1,
    convolutions=(8, 12, 16, 16, 16),
    pool=(1, 1),
    lstm=32,
    lstm_layers=1,
    lstm_pool="statistics",
    cepstra="standard",
    dropout=0.3,
    tap="F2",  # from scratch the waveform knows too little to stand alone
    wav=Wav2Vec2Config(
      conv_channels=16,
      conv_kernels=(16, 8, 4, 4),
      conv_strides=(10, 4, 4, 2),
      hidden=32,
      layers=1,
      heads=4,
      feed_forward=64,
      position_kernel=16,
      position_groups=4,
    ),
  ),
  distill=DistillConfig(
    fit=FitConfig(steps=200, batch=24, rate=1.5e-3, block=40, patience=3, averaging=0.97)
  ),
)


class Scale(NamedTuple):
  """Mean and deviation of a feature over the training speech."""

  mean: Float[np.ndarray, " d"]
  deviation: Float[np.ndarray, " d"]

  def apply(self, x: Float[Array | np.ndarray, "f d"]) -> Any:
    return ((x - self.mean[None, :]) / self.deviation[None, :]).astype(np.float32)


class Extractors(NamedTuple):
  """All that turns speech into priors and emotion for one person."""

  config: ExtractConfig
  params: dict  # "lip", "style", "fuse", "emotion" (and "align" where faces taught)
  scales: dict[str, Scale]  # "expression" (of the person), "f_exp", "f_tone", "emotion"
  ref: Float[np.ndarray, " 64"]  # resting expression, standardised
  spread: Ranges  # of the speech that taught emotion
  level_db: float  # of the person's speech
  labels: tuple[str, ...]  # of the discriminator, neutral first
  prototypes: dict[str, Prototype]
  provenance: dict  # what they were made from, and "notes": what a user should know


def train(
  subject: str | pathlib.Path,
  settings: ExtractConfig = PAPER,
  *,
  corpus: Corpus | None = None,
) -> Extractors:
  """Makes the subject's extractors and its feature files; what is there and unchanged stays.

  Needs aud.wav, expression.npy [T 64] and the transforms of both splits; au.csv and emotion.csv
  teach where they are there. Only training frames teach.

  Args:
    subject: a subject folder (method.md D.1).
    corpus: more speech of the same person: (wav, expression [f 64], label, intensity) each, or a
      function that gives them, called only when training is needed. Whether one was given is
      remembered, not what it held: remove SUBJECT/extractors to train anew on another.

  Raises:
    UserError: a file is missing, damaged or does not fit the others.
  """
  path = pathlib.Path(subject)
  material = read(path)
  provenance = _provenance(material, settings, corpus is not None)
  extractors = None
  if (path / FOLDER / "extractors.json").exists():
    found = load(path / FOLDER)
    if all(found.provenance.get(k) == v for k, v in provenance.items()):
      extractors = found
  if extractors is None:
    if callable(corpus):
      corpus = corpus()
    items = [_checked(*item) for item in corpus] if corpus is not None else []
    extractors = _learn(material, items, settings, provenance)
    save(path / FOLDER, extractors)
  _write_features(path, material, extractors)
  return extractors


def hear(
  extractors: Extractors,
  wav: Float[np.ndarray, " s"],
  frames: int | None = None,
  *,
  emotion: Float[np.ndarray, "*f 128"] | None = None,
  listen: encoders.Windows = features.mel_windows,
) -> Speech:
  """All features of speech, a row a video frame; arguments as in `hear_in_pieces`."""
  pieces = hear_in_pieces(extractors, wav, frames, emotion=emotion, listen=listen)
  return jax.tree.map(lambda *rows: np.concatenate(rows), *pieces)


def hear_in_pieces(
  extractors: Extractors,
  wav: Float[np.ndarray, " s"],
  frames: int | None = None,
  *,
  emotion: Float[np.ndarray, "*f 128"] | None = None,
  listen: encoders.Windows = features.mel_windows,
  piece: int = PIECE,
) -> Iterator[Speech]:
  """The features of speech of any length, a piece after the other, in memory that does not grow.

  Each piece is heard with 10 s before and after it, more than any feature looks at. Only the
  tone's LSTM has no end to what it remembers, but it learnt from 4 s at a time: pieces do not show
  (to 1e-4). Windows of other encoders than mel are made whole, at first.

  Args:
    wav: mono speech at 16 kHz in [-1, 1]; a memory map will do.
    frames: how many; None for all that the speech lasts.
    emotion: a standardised feature (`emotion.control.resolve`) for all frames or one for each, in
      place of what is heard.
    listen: what makes the audio windows (`speech.encoders`).
    piece: frames of each, but for the last.

  Speech much louder or softer than the person's own (beyond 6 dB) is brought to within that.

  Raises:
    UserError: what is given is no speech, or the emotion has the wrong shape.
  """
  wav = features.checked(wav)
  lasts = features.frame_count(wav.size)
  frames = lasts if frames is None else frames
  if emotion is not None:
    emotion = np.asarray(emotion, np.float32)
    if emotion.shape not in ((EMOTION,), (frames, EMOTION)):
      raise UserError(
        f"the emotion has shape {emotion.shape}: give [128], or [frames, 128] with {frames} frames"
      )
    emotion = np.broadcast_to(emotion, (frames, EMOTION))
  gain = np.float32(10 ** (_leeway(extractors.level_db - speech_level_db(wav)) / 20))
  windows = None if listen is features.mel_windows else listen(wav * gain, frames)
  loudest = None
  if emotion is None:
    magnitude, band_db = features.peaks(wav)
    loudest = features.Peaks(float(magnitude * gain), band_db + 20 * float(np.log10(gain)))
  # Five frames are 16 mel steps and 20 spectral steps: pieces that begin at such frames, where
  # emotion is heard too, are cut into the very windows that the whole is.
  unit = math.lcm(5, extractors.config.emotion_stride)
  piece, margin = max(piece // unit, 1) * unit, -(-MARGIN // unit) * unit
  begins = [*range(0, max(min(frames, lasts), 1), piece)]
  for begin, end in zip(begins, [*begins[1:], frames], strict=True):
    start, stop = max(begin - margin, 0), min(end + margin, frames)
    part = wav[start * _SAMPLES : (end + margin) * _SAMPLES] * gain
    rows = slice(begin - start, end - start)
    f_exp, f_tone = _express(extractors, part, stop - start, rows)
    audio: Any = features.mel_windows(part, stop - start)[rows] if windows is None else (
      windows[begin:end])
    felt: Any = _feel(extractors, part, frames - start, rows, loudest) if emotion is None else (
      emotion[begin:end])
    yield Speech(audio, f_exp, f_tone, felt)


def _express(
  extractors: Extractors, wav: Float[np.ndarray, " s"], frames: int, rows: slice
) -> tuple[Any, Any]:
  """f_exp and f_tone of some rows of `frames` that `wav` lasts."""
  c, scales = extractors.config, extractors.scales
  spoken = features.lip_windows(wav, frames, lead=c.lip.lead)[rows]
  expression = lip.express(extractors.params["lip"], spoken, extractors.ref, c.lip)
  toned = features.lip_windows(wav, frames, lead=c.style.lead)
  tone = style.tone(extractors.params["style"], toned, c.style)[rows]
  return (scales["f_exp"].apply(expression).clip(-LIMIT, LIMIT),
          scales["f_tone"].apply(tone).clip(-LIMIT, LIMIT))


def _feel(
  extractors: Extractors,
  wav: Float[np.ndarray, " s"],
  frames: int,
  rows: slice,
  peaks: features.Peaks | None,
) -> Float[np.ndarray, "f 128"]:
  """The emotion of some rows of a recording of `frames` that begins with `wav`."""
  c = extractors.config
  at = features.centres(frames, c.emotion_stride)
  # As far as the one on the way to which the last rows are.
  at = at[np.searchsorted(at, rows.start) : np.searchsorted(at, rows.stop - 1) + 1]
  tapped, _ = distill.feel(
    extractors.params["emotion"],
    features.views(wav, peaks),
    at,
    extractors.spread,
    len(extractors.labels),
    c.emotion,
  )
  felt = extractors.scales["emotion"].apply(tapped).clip(-LIMIT, LIMIT)
  return distill.between(at - rows.start, felt, rows.stop - rows.start)


def expression(extractors: Extractors, speech: Speech) -> Float[np.ndarray, "f 64"]:
  """The Lip Expert's expression in the tracker's own units."""
  f_exp, person = extractors.scales["f_exp"], extractors.scales["expression"]
  standard = speech.f_exp * f_exp.deviation[None, :] + f_exp.mean[None, :]
  return np.asarray(standard * person.deviation[None, :] + person.mean[None, :])


def speech_level_db(wav: Float[np.ndarray, " s"]) -> float:
  """How loud the loud parts are: the 90th percentile of the level of 20 ms pieces, in dB."""
  pieces = wav[: max(1, wav.size // 320) * 320]
  pieces = pieces.reshape(-1, min(320, pieces.size))
  # A minute at a time: squares of a long recording would take more than the recording itself.
  parts = [pieces[i : i + 3000] for i in range(0, len(pieces), 3000)]
  power = np.concatenate([np.square(part, dtype=np.float64).mean(axis=1) for part in parts])
  return float(10 * np.log10(np.percentile(power, 90) + 1e-10))


def _leeway(difference_db: float) -> float:
  """The part of a difference in level that is made up for."""
  return float(np.sign(difference_db) * max(0.0, abs(difference_db) - LEEWAY_DB))


# Keeping


def save(folder: str | pathlib.Path, extractors: Extractors) -> None:
  """Writes the extractors into `folder`, each file whole or not at all."""
  folder = pathlib.Path(folder)
  arrays = _arrays(extractors)
  stream = io.BytesIO()
  np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]
  record = {
    "version": VERSION,
    "parameters": _digest(stream.getvalue()),
    "config": _encode(extractors.config),
    "labels": list(extractors.labels),
    "prototypes": sorted(extractors.prototypes),
    "level_db": extractors.level_db,
    "provenance": extractors.provenance,
  }
  with aside(folder / "parameters.npz") as partial:
    partial.write_bytes(stream.getvalue())
  with aside(folder / "extractors.json") as partial:
    partial.write_text(json.dumps(record, indent=1, sort_keys=True))


def load(folder: str | pathlib.Path) -> Extractors:
  """Reads what `save` wrote; needs neither librosa nor the subject.

  Raises:
    UserError: missing, damaged, of another version, or the two files do not belong together.
  """
  folder = pathlib.Path(folder)
  remedy = "remove the folder and run `uajax extract` again"
  try:
    record = json.loads((folder / "extractors.json").read_text())
    blob = (folder / "parameters.npz").read_bytes()
  except FileNotFoundError as error:
    raise UserError(
      f"{folder} holds no extractors ({error.filename} is missing): run `uajax extract` on the"
      " subject first"
    ) from None
  except (OSError, ValueError) as error:
    raise UserError(f"{folder} cannot be read ({error}): {remedy}") from error
  try:
    if record["version"] != VERSION:
      raise UserError(
        f"{folder} was made by another version of uajax (format {record['version']}, this one"
        f" reads {VERSION}): {remedy}"
      )
    if record["parameters"] != _digest(blob):
      raise UserError(f"{folder}: parameters.npz is not the one that was saved: {remedy}")
    config = _decode(ExtractConfig, record["config"])
    with np.load(io.BytesIO(blob), allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    tree = flax.traverse_util.unflatten_dict(arrays, sep="/")
    extractors = Extractors(
      config=config,
      params=tree["params"],
      scales={k: Scale(v["mean"], v["deviation"]) for k, v in tree["scales"].items()},
      ref=tree["ref"],
      spread=Ranges(**tree["spread"]),
      level_db=float(record["level_db"]),
      labels=tuple(record["labels"]),
      prototypes={
        k: Prototype(tree["prototypes"][k]["levels"], tree["prototypes"][k]["vectors"])
        for k in record["prototypes"]
      },
      provenance=record["provenance"],
    )
    _require_shapes(extractors)
  except (KeyError, TypeError, ValueError, AttributeError, zipfile.BadZipFile) as error:
    raise UserError(f"{folder} is damaged ({error!r}): {remedy}") from error
  return extractors


def _arrays(extractors: Extractors) -> dict[str, np.ndarray]:
  tree = {
    "params": extractors.params,
    "scales": {k: v._asdict() for k, v in extractors.scales.items()},
    "ref": extractors.ref,
    "spread": extractors.spread._asdict(),
    "prototypes": {k: v._asdict() for k, v in extractors.prototypes.items()},
  }
  flat = flax.traverse_util.flatten_dict(tree, sep="/")
  return {name: np.asarray(value, np.float32) for name, value in flat.items()}


def _require_shapes(extractors: Extractors) -> None:
  """Raises ValueError where the parameters are not those of the settings."""
  c = extractors.config
  expected = {
    "lip": jax.eval_shape(lambda: lip.initialise(c.lip, 0)),
    **jax.eval_shape(lambda: fuse.initialise(c.style, 0)),
    "emotion": jax.eval_shape(lambda: network.initialise(c.emotion, len(extractors.labels), 0)),
  }
  flat: dict[str, Any] = dict(flax.traverse_util.flatten_dict(expected, sep="/"))
  found: dict[str, Any] = dict(flax.traverse_util.flatten_dict(extractors.params, sep="/"))
  found = {k: v for k, v in found.items() if not k.startswith("align/")}
  if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in flat.items()}:
    raise ValueError("the parameters do not fit the settings")
  sizes = dict(expression=EXPRESSION, f_exp=EXPRESSION, f_tone=EXPRESSION, emotion=EMOTION)
  for name, size in sizes.items():
    if any(x.shape != (size,) for x in extractors.scales[name]):
      raise ValueError(f"the scale of {name} has another size")
  if not all(np.isfinite(v).all() for v in _arrays(extractors).values()):
    raise ValueError("a parameter is not finite")


def _encode(config: ExtractConfig) -> dict:
  return json.loads(json.dumps(dataclasses.asdict(config)))


def _decode(kind, value):
  """A settings dataclass from plain JSON values; the defaults tell the fields' kinds.

  A field that came with a later version has its default, which is what there was before.

  Raises:
    TypeError, KeyError: a field that this version does not know.
  """
  pattern = kind()
  unknown = set(value) - {f.name for f in dataclasses.fields(kind)}
  if unknown:
    raise KeyError(f"{kind.__name__} has other fields: {sorted(unknown)}")
  made = {}
  for name in value:
    like = getattr(pattern, name)
    if dataclasses.is_dataclass(like):
      made[name] = _decode(type(like), value[name])
    elif isinstance(like, tuple):
      made[name] = tuple(value[name])
    else:
      made[name] = type(like)(value[name])
  return kind(**made)


# Reading a subject


class Material(NamedTuple):
  """What a subject folder teaches from; T frames of the video."""

  wav: np.ndarray
  expression: np.ndarray  # [T 64]
  ratio: np.ndarray  # [T]
  emotions: list[tuple[str, float]] | None
  ids: dict[str, np.ndarray]  # frame numbers of each split
  digests: dict[str, str]


def read(path: pathlib.Path) -> Material:
  """What a subject teaches from.

  Raises:
    UserError: a file is missing, damaged or does not fit the others.
  """
  from uajax import media
  from uajax.data import folder

  if not path.is_dir():
    raise UserError(f"subject folder {path} does not exist: make one with `uajax preprocess`")
  if not (path / "aud.wav").exists():
    raise UserError(f"{path / 'aud.wav'} is missing: run `uajax preprocess` again")
  wav, rate = media.read_wav(path / "aud.wav")
  if rate != SAMPLE_RATE_HZ:
    wav = media.read_audio(path / "aud.wav")
  wav = features.checked(wav)
  tracked = folder.read_expression(path)
  if tracked is None:
    raise UserError(
      f"{path / 'expression.npy'} is missing, the Lip Expert learns from it: run"
      " `uajax preprocess` again, or put the tracked expression there as float [frames, 64]"
    )
  ids = {split: folder.frame_ids(path, split) for split in SPLITS}
  top = max((int(i.max()) for i in ids.values() if len(i)), default=-1)
  if not len(ids["train"]) or top >= len(tracked):
    raise UserError(
      f"{path}: expression.npy has {len(tracked)} rows, the transforms name {len(ids['train'])}"
      f" training frames up to number {top}: run `uajax preprocess` again"
    )
  emotions = folder.read_emotions(path)
  if emotions is not None and len(emotions) < top + 1:
    raise UserError(
      f"{path / 'emotion.csv'} has {len(emotions)} rows for {top + 1} frames: complete it or"
      " remove it"
    )
  if emotions is not None:
    emotions = [(label.strip().lower(), float(x)) for label, x in emotions]
  names = ("aud.wav", "expression.npy", "track_params.pt", "emotion.csv", "au.csv")
  digests = {n: _digest((path / n).read_bytes()) for n in names if (path / n).exists()}
  digests["splits"] = _digest(b"".join(i.astype("<i8").tobytes() + b"|" for i in ids.values()))
  return Material(wav, tracked, _eye_closure(path, len(tracked)), emotions, ids, digests)


def _eye_closure(path: pathlib.Path, frames: int) -> Float[np.ndarray, " f"]:
  """clip(AU45, 0, 2) / 2 of every frame, 0 where it is not known."""
  ratio = np.zeros(frames, np.float32)
  if not (path / "au.csv").exists():
    return ratio
  try:
    with open(path / "au.csv", newline="") as file:
      rows = [{k.strip(): v for k, v in row.items() if k} for row in csv.DictReader(file)]
    values = np.array([float(row["AU45_r"]) for row in rows[:frames]], np.float32)
  except (KeyError, ValueError, TypeError, AttributeError, UnicodeDecodeError, csv.Error) as error:
    raise UserError(
      f"{path / 'au.csv'} has no readable column AU45_r ({error!r}): make it anew with OpenFace or"
      " `uajax preprocess`"
    ) from error
  ratio[: len(values)] = np.nan_to_num(np.clip(values, 0, 2)) / 2
  return ratio


def _provenance(material: Material, settings: ExtractConfig, corpus: bool) -> dict:
  return {
    "version": VERSION,
    "digests": material.digests,
    "settings": _encode(settings),
    "corpus": corpus,
  }


def _digest(blob: bytes) -> str:
  return hashlib.sha256(blob).hexdigest()


def _checked(wav, tracked, label, intensity) -> CorpusItem:
  wav = features.checked(wav)
  tracked = np.asarray(tracked, np.float32)
  if tracked.ndim != 2 or tracked.shape[1] != EXPRESSION or not np.isfinite(tracked).all():
    raise UserError(
      f"a corpus recording has expression of shape {tracked.shape}: give finite [frames, 64]"
    )
  return wav, tracked, str(label).strip().lower(), np.broadcast_to(intensity, len(tracked))


# Learning


def _learn(
  material: Material, items: Sequence[CorpusItem], settings: ExtractConfig, provenance: dict
) -> Extractors:
  own_learn, own_judge = _split(material, settings.held_out)
  spare = _spare(items)
  recordings = [(material.wav, material.expression, material.ratio, own_learn, own_judge)]
  for (wav, tracked, *_), judged in zip(items, spare, strict=True):
    flags = np.full(len(tracked), judged)
    recordings.append((wav, tracked, np.zeros(len(tracked), np.float32), ~flags, flags))
  taught = np.concatenate([r[1][r[3] | r[4]] for r in recordings])
  person = _scale(taught, floor=0.05)
  ref = person.apply(material.expression[own_learn].mean(axis=0)[None])[0]

  lessons = _lessons(recordings, person, settings.lip.lead)
  said = lip.train(lessons, ref, settings.lip, seed=settings.seed)
  frames = np.arange(len(lessons.starts))
  f_exp = np.concatenate(
    [
      lip.express(said.params, lessons.windows(part), ref, settings.lip)
      for part in np.array_split(frames, max(1, len(frames) // 4096))
    ]
  )
  known = lessons.learn | lessons.judge
  f_exp_scale = _scale(f_exp[known], floor=0.1, against=1.0)

  lessons = _lessons(recordings, person, settings.style.lead)
  fused = fuse.train(lessons, f_exp_scale.apply(f_exp), settings.style, seed=settings.seed + 1)
  tones = [
    style.tone(
      fused.params["style"],
      features.lip_windows(wav, len(tracked), lead=settings.style.lead),
      settings.style,
    )[learn | judge]
    for wav, tracked, _, learn, judge in recordings
  ]

  felt = _learn_emotion(material, items, spare, own_learn, own_judge, settings)
  return Extractors(
    config=dataclasses.replace(settings, emotion=felt.config),
    params={"lip": said.params, **fused.params, **felt.params},
    scales={
      "expression": person,
      "f_exp": f_exp_scale,
      "f_tone": _scale(np.concatenate(tones), floor=0.05),
      "emotion": felt.scale,
    },
    ref=ref,
    spread=felt.spread,
    level_db=speech_level_db(material.wav),
    labels=felt.labels,
    prototypes=felt.prototypes,
    provenance={
      **provenance,
      "notes": felt.notes,
      "scores": {"lip": said.score, "style": fused.score, "emotion": felt.score},
    },
  )


class _Felt(NamedTuple):
  """What `_learn_emotion` found."""

  config: EmotionConfig
  params: dict
  spread: Ranges
  labels: tuple[str, ...]
  scale: Scale
  prototypes: dict[str, Prototype]
  notes: list[str]
  score: float | None


def _learn_emotion(
  material: Material,
  items: Sequence[CorpusItem],
  spare: Sequence[bool],
  own_learn: np.ndarray,
  own_judge: np.ndarray,
  settings: ExtractConfig,
) -> _Felt:
  own = material.emotions or [(NEUTRAL, 0.0)] * len(material.expression)
  taught = np.flatnonzero(own_learn | own_judge)
  labels = {label for _, _, label, _ in items} | {own[f][0] for f in taught}
  labels = (NEUTRAL, *sorted(labels - {NEUTRAL}))
  clips = [(material.wav, own, own_learn, own_judge, material.emotions is not None)]
  for (wav, tracked, label, strength), judged in zip(items, spare, strict=True):
    flags = np.full(len(tracked), judged)
    clips.append((wav, [(label, float(x)) for x in strength], ~flags, flags, True))
  recordings = []
  for wav, said, learn, judge, known in clips:
    said = said[: len(learn)]
    # A label heard in held-out frames alone is not in `labels`; it is masked right below.
    names = [label if label in labels else NEUTRAL for label, _ in said]
    teaching = distill.shares(names, np.array([x for _, x in said], np.float32), labels)
    teaching *= ((learn | judge)[: len(said)] & known)[:, None]
    teaching = np.pad(teaching, ((0, len(learn) - len(said)), (0, 0)))
    recordings.append(Recording(features.views(wav), teaching, learn, judge))
  spread = distill.ranges(recordings)

  notes, pretrained, config = [], None, settings.emotion
  if settings.wav2vec2:
    wav_config, pretrained = wav2vec2.load(settings.wav2vec2)
    config = dataclasses.replace(config, wav=wav_config)
  else:
    notes.append("the wav2vec2 branch starts from scratch: no weights were given")
  total = np.sum([r.teaching.sum(axis=0) for r in recordings], axis=0)
  teaches, score = (total >= 5).sum() >= 2, None  # frames' worth of two labels at least
  if teaches:
    fitted = distill.train(
      recordings,
      spread,
      len(labels),
      config,
      settings.distill,
      seed=settings.seed + 2,
      listen=pretrained,
    )
    params = {"emotion": fitted.params["trunk"]}
    if "align" in fitted.params:
      params["align"] = fitted.params["align"]
    score = fitted.score
  else:
    trunk = distill.initialise(config, len(labels), settings.seed + 2, pretrained)
    params = {"emotion": trunk}
    notes.append(
      "the clip teaches no emotion (no labels, or all alike): the emotion feature follows the"
      " speech's prosody only, and no emotion can be asked for by name"
    )
    Progress("emotion network", 1, 1).close(notes[-1])

  rows, spoken, pure = [], [], []
  for r, (_, said, *_) in zip(recordings, clips, strict=True):
    at = np.flatnonzero((r.learn | r.judge)[: len(said)])[:: settings.emotion_stride]
    tapped, _ = distill.feel(params["emotion"], r.whole, at, spread, len(labels), config)
    rows.append(tapped)
    spoken += [said[f] for f in at]
    known = r.teaching[: len(said)].sum(axis=1) > 0
    pure.append(_pure(said, known, at, config.window_s))
  scale = _scale(np.concatenate(rows), floor=0.05)
  prototypes = {}
  if teaches:
    chosen = np.concatenate(pure)
    for label in labels:  # where it lasts for no whole window, those centred on it stand for it
      mine = np.array([name == label for name, _ in spoken])
      if not (chosen & mine).any():
        chosen |= mine
    prototypes = control.prototypes(
      scale.apply(np.concatenate(rows)[chosen]).clip(-LIMIT, LIMIT),
      [label for (label, _), c in zip(spoken, chosen, strict=True) if c],
      np.array([x for _, x in spoken], np.float32)[chosen],
    )
  return _Felt(config, params, spread, labels, scale, prototypes, notes, score)


def _pure(
  said: Sequence[tuple[str, float]], known: np.ndarray, at: np.ndarray, window_s: float
) -> np.ndarray:
  """Whether all that is known of each window around the frames `at` is one label and intensity."""
  said = [(label, round(20 * x)) for label, x in said]  # intensities alike to a twentieth
  codes = {pair: i for i, pair in enumerate(dict.fromkeys(said))}
  one_hot = np.eye(len(codes), dtype=np.float32)[[codes[pair] for pair in said]] * known[:, None]
  means = distill.window_means(one_hot, at, window_s)
  return means.max(axis=1) >= 0.999 * np.maximum(means.sum(axis=1), 1e-6)


def _split(material: Material, held_out: float) -> tuple[np.ndarray, np.ndarray]:
  """Which frames of the subject teach, and which of the training frames say when to stop."""
  ids = np.sort(material.ids["train"])
  tail = min(len(ids) - 1, max(1, round(held_out * len(ids))))
  learn, judge = np.zeros((2, len(material.expression)), bool)
  learn[ids[: len(ids) - tail]] = True
  judge[ids[len(ids) - tail :]] = True
  return learn, judge


def _spare(items: Sequence[CorpusItem]) -> list[bool]:
  """Which corpus recordings are kept back to judge by: every eighth, from the fifth on."""
  return [i % 8 == 4 for i in range(len(items))]


def _scale(rows: Float[np.ndarray, "f d"], *, floor: float, against: float | None = None) -> Scale:
  """Mean and deviation; none smaller than `floor` of the largest, or of `against`.

  The floor keeps numbers that hardly vary from being blown up to noise.
  """
  deviation = rows.std(axis=0)
  largest = float(deviation.max()) if against is None else against
  deviation = np.maximum(deviation, floor * largest if largest > 0 else 1.0)
  return Scale(rows.mean(axis=0).astype(np.float32), deviation.astype(np.float32))


def _lessons(recordings: Sequence[tuple], person: Scale, lead: int) -> Lessons:
  parts: list[Mapping[str, np.ndarray]] = []
  offset = 0
  for clip, (wav, tracked, ratio, learn, judge) in enumerate(recordings):
    spectrum = features.mel(wav)
    short = features.WINDOW - spectrum.shape[1]
    if short > 0:
      spectrum = np.pad(spectrum, ((0, 0), (0, short)), constant_values=features.SILENCE)
    frames, steps = len(tracked), spectrum.shape[1]
    parts.append(
      {
        "mel": spectrum,
        "starts": offset + features.lip_starts(frames, steps, lead=lead),
        "low": np.full(frames, offset),
        "high": np.full(frames, offset + steps - 1),
        "expression": person.apply(tracked),
        "ratio": ratio,
        "clip": np.full(frames, clip),
        "learn": learn,
        "judge": judge,
      }
    )
    offset += steps
  return Lessons(
    *(np.concatenate([p[k] for p in parts], axis=1 if k == "mel" else 0) for k in Lessons._fields)
  )


# The subject's feature files


def _write_features(path: pathlib.Path, material: Material, extractors: Extractors) -> None:
  """Writes the features of both splits, unless those there are exactly these.

  Also as .pth, which the official code reads, unless there are such that are not ours.
  """
  from uajax.data import folder

  record = path / FOLDER / "features.json"
  made_from = {
    "parameters": _digest((path / FOLDER / "parameters.npz").read_bytes()),
    "digests": material.digests,
    "standardised": True,
  }
  stems = [
    path / name
    for split in SPLITS
    for name in (f"{split}_auds_exp", f"{split}_audiostyle", f"mser_emotion_{split}")
  ]
  files = [stem.with_suffix(".npz") for stem in stems]
  official = [stem.with_suffix(".pth") for stem in stems]

  def state() -> dict:
    return made_from | {"files": {f.name: _digest(f.read_bytes()) for f in files}}

  try:
    before = json.loads(record.read_text())
  except (OSError, ValueError):  # none yet, or damaged
    before = {}
  ours = before.get("files", {})
  pth = all(not f.exists() or ours.get(f.name) == _digest(f.read_bytes()) for f in official)
  files += official if pth else []
  if all(f.exists() for f in files) and before == state():
    return
  last = max(int(ids.max()) for ids in material.ids.values())
  speech = hear(extractors, material.wav, last + 1)
  for split in SPLITS:
    rows = material.ids[split]
    folder.write_features(
      path,
      split,
      f_exp=np.asarray(speech.f_exp)[rows],
      f_tone=np.asarray(speech.f_tone)[rows],
      emotion=np.asarray(speech.emotion)[rows],
      pth=pth,
    )
  with aside(record) as partial:
    partial.write_text(json.dumps(state(), indent=1, sort_keys=True))
