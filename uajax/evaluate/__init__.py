"""How near the renders come to the truth: on frames held out, or between two films.

Measures of method.md D.7 on pictures of 8 bits, as a viewer sees them: PSNR, SSIM and LPIPS of
the whole frame and of the square around the lips, how much pictures flicker; by the face's
landmarks (`faces`) LMD, trembling, action units and expression; whether lips and sound belong
together (`syncnet`). What needs a file that is not at hand is not computed, and the report says
what it needs. The report is JSON; beside it lie a page
with plots (HTML) and a contact sheet (truth, render, difference).

Axes: f frames, h w pixels.
"""

import collections
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from uajax import contact, losses, metrics, pretrained, saving, synthesize
from uajax.errors import UserError
from uajax.progress import Progress

if TYPE_CHECKING:
  from uajax.evaluate import faces, syncnet

PICTURES = 6  # rows of the contact sheet
WORST = 5  # frames named in the report
# Bad frames that the page shows: worst in what, how many, whether large is bad, how it is written.
SHOWN_WORST = (
  ("psnr_db", 3, False, "PSNR {:.2f} dB"), ("mouth_psnr_db", 3, False, "PSNR of mouth {:.2f} dB"),
  ("mouth_lmd_px", 3, True, "LMD of mouth {:.2f} px"),
)  # fmt: skip
DRIFT = 0.02  # share by which two films may differ in length
LPIPS_MIN_PX = 64  # AlexNet wants more than a few pixels
MOUTH_PX = 96  # to which the mouth is scaled for LPIPS
VGG_FRAMES = 32  # evenly spread; VGG-16 takes seconds a frame on a CPU
LANDMARKER = "face_landmarker.task"

Measures = dict[str, float]
Perceive = Mapping[str, Callable]  # name of the measure -> pictures [h w 3] in 0..1 twice -> LPIPS


def evaluate(
  run_path: str | os.PathLike,
  split: Literal["train", "val"] = "val",
  out: str | os.PathLike | None = None,
  *,
  subject: str | os.PathLike | None = None,
  pictures_only: bool = False,
) -> dict:
  """Renders every frame of a split with the newest avatar of a run and measures it.

  Args:
    run_path: a run folder.
    split: which frames of its subject; those of "val" were never trained on.
    out: the report, JSON (default: RUN/evaluation_SPLIT.json); the page lies beside it as HTML,
      the sheet as PNG.
    subject: the subject folder, if it is no longer where it was when training.
    pictures_only: leave out what reads faces.

  Returns:
    the report.

  Raises:
    UserError: the run or its subject cannot be read; disk full.
  """
  from uajax import runs

  run = runs.open_run(run_path)
  out = _report_path(out, run.path / f"evaluation_{split}.json")
  avatar = run.avatar()
  source = synthesize.open_source(run, split, subject)
  count = len(source)
  judge = _Judge(count, (source.height, source.width), pictures_only)
  truths: collections.deque = collections.deque()  # read, their renders still to come

  def scenes() -> Iterator[synthesize.Scene]:
    for frame in synthesize.ahead(source.__getitem__, range(count)):
      truths.append((frame.image, frame.lips))
      yield synthesize.Scene(frame.controls, frame.camera, frame.background)

  known = _Known.of(source.path)
  progress = Progress(f"evaluate {split}", count, compiles=True)
  for i, drawn in enumerate(synthesize.draw(avatar, scenes())):
    truth, lips = truths.popleft()
    number = int(source.ids[i])
    extra = {"uncertainty": float(drawn.uncertainty.mean())}
    if known is not None:
      extra |= known.measure(number, drawn.image, truth, lips)
    row = judge.add(number, drawn.image, truth, lips, extra)
    progress.advance(note=f"PSNR {row['psnr_db']:.1f} dB")
  progress.close()
  report = judge.report() | {
    "run": str(run.path),
    "trained": run.progress(),
    "subject": str(source.path),
    "split": split,
    # Reports with the same digest are of the same frames and cameras.
    "split_sha256": hashlib.sha256(
      (source.path / f"transforms_{split}.json").read_bytes()
    ).hexdigest(),
    "size_px": [source.width, source.height],
  }
  if known is not None:
    report["true_errors"] = known.judge(judge)
  report["sync"] = judge.sync(source.path / "aud.wav", source.path / "aud.wav")
  return _finish(report, out, judge)


def compare(
  pred: str | os.PathLike,
  truth: str | os.PathLike,
  out: str | os.PathLike | None = None,
  *,
  pictures_only: bool = False,
) -> dict:
  """Measures one film against another, frame by frame at 25 fps.

  Args:
    pred, truth: video files of equal size; lengths may differ by 2 %, the rest is left out.
    out: the report, JSON (default: beside `pred` as NAME_evaluation.json), page and sheet beside.
    pictures_only: leave out what reads faces.

  Raises:
    UserError: a film cannot be read, sizes or lengths differ; disk full.
  """
  from uajax import media

  pred, truth = pathlib.Path(pred), pathlib.Path(truth)
  out = _report_path(out, pred.with_name(f"{pred.stem}_evaluation.json"))
  infos = [media.probe(path) for path in (pred, truth)]
  sizes = [(info.width, info.height) for info in infos]
  if sizes[0] != sizes[1]:
    (a, b), (c, d) = sizes
    raise UserError(f"{pred} is {a}x{b}, {truth} is {c}x{d} pixels: scale one to the other's size")
  total = max(1, round(min(info.duration_s for info in infos) * 25))
  judge = _Judge(total, (infos[0].height, infos[0].width), pictures_only)
  lengths = [0, 0]
  films = itertools.zip_longest(media.read_frames(pred), media.read_frames(truth))
  progress = Progress("evaluate", total, compiles=True)
  for i, pair in enumerate(films):
    lengths = [n + (image is not None) for n, image in zip(lengths, pair, strict=True)]
    render, real = pair
    if render is None or real is None:
      continue  # only counted
    judge.add(i, render, real, None)
    progress.advance()
  progress.close()
  if abs(lengths[0] - lengths[1]) > max(2, DRIFT * max(lengths)):
    raise UserError(
      f"{pred} has {lengths[0]} frames, {truth} has {lengths[1]}: cut them to the same speech"
    )
  report = judge.report() | {
    "pred": str(pred),
    "truth": str(truth),
    "size_px": list(sizes[0]),
    "frames_of_each": lengths,
  }
  report["sync"] = judge.sync(pred, truth)
  return _finish(report, out, judge)


def measure(
  render: UInt8[np.ndarray, "h w 3"],
  truth: UInt8[np.ndarray, "h w 3"],
  lips: Int[np.ndarray, " 4"] | None,
  perceive: Perceive | None = None,
) -> Measures:
  """The measures of one frame.

  Args:
    lips: rows r0:r1, columns c0:c1 of the mouth region; None: not measured.
    perceive: LPIPS by the names of its nets; of the mouth, scaled to MOUTH_PX, it is taken too.

  Returns:
    psnr_db (100 at most: equal pictures), ssim, each of `perceive`, and the same with mouth_
    before their names.
  """
  a, b = (image.astype(np.float32) / 255 for image in (render, truth))
  rect = np.asarray((0, len(a), 0, a.shape[1]) if lips is None else lips, np.int32)
  psnr, ssim, mouth_psnr, mouth_ssim = (float(value) for value in _distances(a, b, rect))
  row = {"psnr_db": min(psnr, 100.0), "ssim": ssim}
  row |= {name: float(net(a, b)) for name, net in (perceive or {}).items()}
  if lips is None:
    return row
  row |= {"mouth_psnr_db": min(mouth_psnr, 100.0), "mouth_ssim": mouth_ssim}
  if perceive:
    mouths = _cut(a, rect), _cut(b, rect)
    row |= {f"mouth_{name}": float(net(*mouths)) for name, net in perceive.items()}
  return row


def summarize(report: Mapping) -> str:
  """A report in a few lines for the terminal."""
  what = f"{report['split']} split" if "split" in report else f"{report['pred']}"

  def say(head: str, figures: Mapping, names: Mapping[str, str]) -> str:
    known = [text.format(figures[n]) for n, text in names.items() if figures.get(n) is not None]
    return f"{head}: {', '.join(known)}"

  pictures = {
    "psnr_db": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}", "lpips": "LPIPS {:.4f}",
    "lpips_vgg": "LPIPS (VGG) {:.4f}",
  }  # fmt: skip
  lines = [say(f"{what}, {report['frames']} frames", report, pictures)]
  if "mouth" in report:
    lines.append(say("mouth", report["mouth"], pictures | {"lmd_px": "LMD {:.2f} px"}))
  if "face" in report:
    lines.append(say("face", report["face"], {
      "lmd_px": "LMD {:.2f} px", "aue_upper": "AUE upper {:.3f}", "aue_lower": "lower {:.3f}",
      "e_fid": "E-FID (blendshapes) {:.3f}", "jitter_px": "trembles by {:.2f} px",
      "truth_jitter_px": "the truth by {:.2f}",
    }))  # fmt: skip
  if report["sync"]:
    lines.append(say("lips and sound", report["sync"], {
      "confidence": "Sync-C {:.2f}", "distance": "Sync-D {:.2f}",
      "truth_confidence": "the truth's {:.2f}", "truth_distance": "and {:.2f}",
    }))  # fmt: skip
  if report.get("true_errors", {}).get("mouth_opening_correlation") is not None:
    lines.append(say("against what is known of the made-up person", report["true_errors"], {
      "mouth_opening_correlation": "mouth opening follows with correlation {:.3f}"}))
  lines += [f"{name}: not computed: {why}" for name, why in report["not_computed"].items()]
  lines.append(f"page {report['page']}, report {report['report']}, pictures {report['sheet']}")
  return "\n".join(lines)


@jax.jit
def _distances(a, b, rect):
  """PSNR and SSIM of the whole pictures, then of the region, where SSIM still sees around it."""
  r0, r1, c0, c1 = rect
  rows, columns = jnp.arange(a.shape[0])[:, None], jnp.arange(a.shape[1])[None, :]
  inside = (rows >= r0) & (rows < r1) & (columns >= c0) & (columns < c1)
  alike = jnp.mean(losses.ssim_map(a, b), axis=-1)
  return (
    metrics.psnr(a, b),
    metrics.ssim(a, b),
    metrics.psnr(a, b, inside),
    losses.mean_inside(alike, inside),
  )


@jax.jit
def _cut(image, rect):
  """The region of a picture, scaled to MOUTH_PX a side; `rect` is traced: compiled once."""
  begin, size = rect[::2].astype(jnp.float32), (rect[1::2] - rect[::2]).astype(jnp.float32)
  scale = MOUTH_PX / size
  shape = (MOUTH_PX, MOUTH_PX, 3)
  cut = jax.image.scale_and_translate(image, shape, (0, 1), scale, -begin * scale, "linear")
  return jnp.clip(cut, 0, 1)


class _Judge:
  """Measures the pairs of pictures of a film, given in order, and sums them up."""

  def __init__(self, total: int, size: tuple[int, int], pictures_only: bool):
    self.ids: list[int] = []
    self.rows: list[Measures] = []
    self.pairs: list[faces.Pair | None] = []
    self.lacking: dict[str, str] = {}  # what is not computed, and what it needs
    self.shown = _Shown(total)
    self._perceive = self._load_perception(size)
    self._vgg_at = set(np.round(np.linspace(0, max(total - 1, 0), VGG_FRAMES)).astype(int).tolist())
    self._before: tuple[int, np.ndarray] | None = None  # number and error of the last frame
    self._reader = None
    self.mesh: Any = None
    self._sync: syncnet.Params | None = None
    self._watchers: list[syncnet.Watcher] = []  # of the render, of the truth
    if not pictures_only:
      self._load_faces()

  def add(self, number: int, render, truth, lips, extra: Measures | None = None) -> Measures:
    """The measures of frame `number`; `extra` are kept beside them."""
    from uajax.data import folder

    pair = None
    if self._reader is not None:
      pair = self._reader.read(truth, render)
      self.pairs.append(pair)
    row: Measures = dict(extra or {})
    if pair is not None:
      from uajax.preprocess import landmarks

      flat = landmarks.to_ibug(pair.points)[..., :2]
      row["mouth_lmd_px"] = float(metrics.lmd(flat[0], flat[1]))
      for watcher, image in zip(self._watchers, (render, truth), strict=False):
        watcher.add(number, image, pair.points[0])  # both through the same square
      if lips is None:
        lips = folder.lip_square(flat[0], *truth.shape[:2])
    perceive = self._perceive
    if len(self.rows) not in self._vgg_at:
      perceive = {name: net for name, net in perceive.items() if name != "lpips_vgg"}
    row |= measure(render, truth, lips, perceive)
    error = render.astype(np.int16) - truth
    if self._before is not None and self._before[0] == number - 1:
      row["flicker"] = float(np.abs(error - self._before[1]).mean())
    self._before = number, error
    self.shown.add(number, truth, render, row)
    self.ids.append(number)
    self.rows.append(row)
    return row

  @functools.cached_property
  def faces(self) -> "faces.Compared | None":
    """What all faces say, once every frame was given; None where there are none."""
    from uajax.evaluate import faces

    if not any(pair is not None for pair in self.pairs):
      return None
    return faces.compare(self.pairs, np.array(self.ids), self.mesh)

  def report(self) -> dict[str, Any]:
    """The figures, means over all frames that have them."""
    if not self.rows:
      raise UserError("there are no frames to compare: give longer films")
    columns = self.columns()

    def mean(name: str) -> float | None:
      values = columns.get(name)
      return None if values is None else _number(float(np.nanmean(values)))

    if self._reader is not None and self.faces is None:
      self.lacking["face"] = "needs frames with a face in truth and render: none was found"
    pictures = ("psnr_db", "ssim", "lpips", "lpips_vgg")
    out: dict[str, Any] = {
      "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "frames": len(self.rows),
      **{name: mean(name) for name in (*pictures, "flicker")},
    }
    if "mouth_psnr_db" in columns:
      names = (*pictures, "lmd_px")
      out["mouth"] = {n: mean(f"mouth_{n}") for n in names if f"mouth_{n}" in columns}
    if "uncertainty" in columns:
      out["mean_uncertainty"] = float(np.mean(columns["uncertainty"]))
    if self.faces is not None:
      out["face"] = _rounded(self.faces.figures)
      if self.faces.figures["e_fid"] is None:
        self.lacking["e_fid"] = "needs two frames with a face"
      if self.faces.figures["jitter_px"] is None:
        self.lacking["jitter_px"] = "needs three frames in a row with a face"
    if "lpips_vgg" in columns:
      out["lpips_vgg_frames"] = int(np.isfinite(columns["lpips_vgg"]).sum())
    worst = np.argsort(columns["psnr_db"], kind="stable")[:WORST]
    out["worst"] = [
      {"frame": self.ids[i], "psnr_db": _number(self.rows[i]["psnr_db"])} for i in worst
    ]
    out["not_computed"] = self.lacking
    out["per_frame"] = {"frame": self.ids} | {
      name: [_number(float(value)) for value in values] for name, values in columns.items()
    }
    return out

  def sync(self, *sounds: pathlib.Path) -> dict[str, float | int]:
    """Sync-C, Sync-D and offset of the render with its sound, and of the truth with its own.

    Args:
      sounds: files with the sound of the render and of the truth; frame 0 begins with them.

    Returns:
      empty where it is not computed.
    """
    from uajax import media
    from uajax.evaluate import syncnet

    out: dict[str, float | int] = {}
    for prefix, watcher, sound in zip(("", "truth_"), self._watchers, sounds, strict=False):
      assert self._sync is not None
      try:
        speech = media.read_audio(sound)
      except UserError as error:
        self.lacking[f"{prefix}sync"] = f"needs sound: {error}"
        continue
      found = syncnet.judge(self._sync, watcher, speech)
      if found is None:
        self.lacking[f"{prefix}sync"] = (
          f"needs {syncnet.LEAST_FRAMES} frames in a row with a face, and their sound"
        )
        continue
      out |= {f"{prefix}{name}": value for name, value in _rounded(found._asdict()).items()}
    return out

  def columns(self) -> dict[str, np.ndarray]:
    """Per-frame measures by name, NaN where a frame lacks them."""
    names = dict.fromkeys(name for row in self.rows for name in row)
    out = {n: np.array([row.get(n, math.nan) for row in self.rows]) for n in names}
    return out | (self.faces.per_frame if self.faces is not None else {})

  def _load_perception(self, size: tuple[int, int]) -> Perceive:
    """LPIPS by both nets, as far as their weights are at hand."""
    from uajax import lpips

    out = {}
    nets: tuple[tuple[str, lpips.Net], ...] = (("lpips", "alex"), ("lpips_vgg", "vgg"))
    for name, net in nets:
      if min(size) < LPIPS_MIN_PX:
        self.lacking[name] = f"needs pictures of at least {LPIPS_MIN_PX} px"
        continue
      try:
        params = lpips.load(net)
      except UserError as error:
        self.lacking[name] = f"needs its weights: {error}"
        continue
      out[name] = functools.partial(_perceive, params)
    return out

  def _load_faces(self) -> None:
    from uajax.evaluate import faces, syncnet
    from uajax.preprocess import landmarks

    path = pretrained.find(LANDMARKER)
    if path is None:
      need = f"needs {LANDMARKER}: `uajax fetch {LANDMARKER}`"
      self.lacking |= {"face": need, "sync": need}
      return
    landmarker = landmarks.Landmarker(path)
    self._reader, self.mesh = faces.Reader(landmarker), landmarker.mesh
    try:
      self._sync = syncnet.load()
    except UserError as error:
      self.lacking["sync"] = f"needs its weights: {error}"
      return
    self._watchers = [syncnet.Watcher(self._sync) for _ in range(2)]


@jax.jit
def _perceive(params, a, b):
  from uajax import lpips

  return lpips.lpips(params, a, b)


class _Known:
  """What is known of a made-up person beside its pictures: `truth/truth.npz`."""

  def __init__(self, gap_px: np.ndarray, units: dict[str, np.ndarray]):
    self._gap_px, self._units = gap_px, units

  @classmethod
  def of(cls, subject: pathlib.Path) -> "_Known | None":
    """None where the subject was filmed and not made. Raises UserError for a damaged file."""
    file = subject / "truth" / "truth.npz"
    if not file.exists():
      return None
    try:
      with np.load(file, allow_pickle=False) as table:
        gap_px, units = table["lip_gap_px"], table["au"]
        names = [str(name) for name in table["au_names"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
      raise UserError(f"{file} is damaged ({error}): make the person anew, or remove it") from error
    if gap_px.ndim != 1 or units.shape != (len(gap_px), len(names)):
      raise UserError(f"{file} has tables that do not fit: make the person anew, or remove it")
    return cls(gap_px, dict(zip(names, units.T, strict=True)))

  def measure(self, number: int, render, truth, lips) -> Measures:
    """How wide the mouth is open in both pictures, and how wide it truly is; pixels."""
    from uajax.data import synthetic

    known = self._gap_px[number] if number < len(self._gap_px) else math.nan
    return {
      "opening_px": synthetic.mouth_opening(render, lips),
      "truth_opening_px": synthetic.mouth_opening(truth, lips),
      "known_opening_px": float(known),
    }

  def judge(self, judge: _Judge) -> dict[str, Any]:
    """Of the render, and as a yardstick of the true pictures, against what is known."""
    from uajax.evaluate import faces

    columns = judge.columns()
    known = columns["known_opening_px"]
    here = np.isfinite(known)
    seen = {"": columns["opening_px"], "true_picture_": columns["truth_opening_px"]}
    out: dict[str, Any] = {}
    for name, values in seen.items():
      out[f"{name}mouth_opening_correlation"] = faces.correlate(values[here], known[here])
      out[f"{name}mouth_opening_error_px"] = (
        float(np.abs(values - known)[here].mean()) if here.any() else None
      )
    if judge.faces is not None:
      rows = np.array(judge.ids)
      units = {
        name: np.where(rows < len(values), values[np.minimum(rows, len(values) - 1)], np.nan)
        for name, values in self._units.items()
      }
      out["action_unit_correlation"] = faces.judge(judge.faces.units, units)
    return _rounded(out)


class _Shown:
  """Keeps the frames that will be shown: evenly spread, and the worst in each of some ways."""

  def __init__(self, total: int):
    even = np.linspace(0, max(total - 1, 0), min(PICTURES, total))
    self._at = set(np.round(even).astype(int).tolist())
    self._count = 0
    self._rows: list[tuple] = []
    self._worst: dict[str, list[tuple]] = {name: [] for name, *_ in SHOWN_WORST}

  def add(self, number: int, truth: np.ndarray, render: np.ndarray, row: Measures) -> None:
    shown = (truth, render, f"frame {number}  {row['psnr_db']:.2f} dB")
    if self._count in self._at:
      self._rows.append(shown)
    self._count += 1
    for name, most, large, text in SHOWN_WORST:
      if name in row:
        worst = self._worst[name]
        label = f"frame {number}  among the worst: {text.format(row[name])}"
        worst.append((-row[name] if large else row[name], (truth, render, label)))
        worst.sort(key=lambda entry: entry[0])
        del worst[most:]

  def sheet(self) -> np.ndarray:
    """Evenly spread frames, then the worst by PSNR."""
    return _draw([*self._rows, self._worst["psnr_db"][0][1]])

  def worst(self) -> np.ndarray:
    return _draw([row for rows in self._worst.values() for _, row in rows])


def _draw(rows: list[tuple]) -> np.ndarray:
  truths, renders, labels = zip(*rows, strict=True)
  differences = [contact.compare(t, r) for t, r in zip(truths, renders, strict=True)]
  columns = {"truth": truths, "render": renders, "difference x4": differences}
  return contact.draw_sheet(columns, labels)


def _finish(report: dict, out: pathlib.Path, judge: _Judge) -> dict:
  from uajax.evaluate import report as pages

  sheet, page = out.with_suffix(".png"), out.with_suffix(".html")
  report |= {"report": str(out), "page": str(page), "sheet": str(sheet)}
  contact.write_png(sheet, judge.shown.sheet())
  units = judge.faces.units if judge.faces is not None else {}
  with saving.aside(page) as partial:
    partial.write_text(pages.draw(report, units, judge.shown.worst(), judge.shown.sheet()))
  with saving.aside(out) as partial:
    partial.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
  return report


def _report_path(out: str | os.PathLike | None, default: pathlib.Path) -> pathlib.Path:
  path = default if out is None else pathlib.Path(out)
  if path.suffix.lower() != ".json":
    raise UserError(f"--out {path} does not end in .json: the report is JSON")
  return path


def _number(value: float) -> float | None:
  """Rounded for the report; None where there is none (JSON knows no NaN)."""
  return round(value, 5) if math.isfinite(value) else None


def _rounded(tree: Any) -> Any:
  if isinstance(tree, dict):
    return {name: _rounded(value) for name, value in tree.items()}
  return _number(tree) if isinstance(tree, float) else tree
