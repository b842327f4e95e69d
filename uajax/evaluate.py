"""How near the renders come to the truth: on frames held out, or between two films.

Measures of method.md D.7 on pictures of 8 bits, as a viewer sees them: PSNR and SSIM of the
whole frame and of the square around the lips, LPIPS where its weights are at hand. The report
is JSON; beside it lies a contact sheet (truth, render, difference).

Axes: f frames, h w pixels.
"""

import collections
import datetime
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from uajax import contact, losses, metrics, saving, synthesize
from uajax.errors import UserError
from uajax.progress import Progress

PICTURES = 6  # rows of the contact sheet
WORST = 5  # frames named in the report
DRIFT = 0.02  # share by which two films may differ in length
LPIPS_MIN_PX = 64  # AlexNet wants more than a few pixels

Measures = dict[str, float]


def evaluate(
  run_path: str | os.PathLike,
  split: Literal["train", "val"] = "val",
  out: str | os.PathLike | None = None,
  *,
  subject: str | os.PathLike | None = None,
) -> dict:
  """Renders every frame of a split with the newest avatar of a run and measures it.

  Args:
    run_path: a run folder.
    split: which frames of its subject; those of "val" were never trained on.
    out: the report, JSON (default: RUN/evaluation_SPLIT.json); the sheet lies beside it as PNG.
    subject: the subject folder, if it is no longer where it was when training.

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
  perceive, lpips_note = _perception((source.height, source.width))
  truths: collections.deque = collections.deque()  # read, their renders still to come

  def scenes() -> Iterator[synthesize.Scene]:
    for frame in synthesize.ahead(source.__getitem__, range(count)):
      truths.append((frame.image, frame.lips))
      yield synthesize.Scene(frame.controls, frame.camera, frame.background)

  rows: list[Measures] = []
  shown = _Shown(count)
  progress = Progress(f"evaluate {split}", count)
  for i, drawn in enumerate(synthesize.draw(avatar, scenes())):
    truth, lips = truths.popleft()
    row = measure(drawn.image, truth, lips, perceive)
    rows.append(row | {"uncertainty": float(drawn.uncertainty.mean())})
    psnr_db = row["psnr_db"]
    shown.add(i, truth, drawn.image, f"frame {source.ids[i]}  {psnr_db:.2f} dB", psnr_db)
    progress.advance(note=f"PSNR {psnr_db:.1f} dB")
  progress.close()
  worst = sorted(range(count), key=lambda i: rows[i]["psnr_db"])[:WORST]
  report = _summary(rows, lpips_note) | {
    "run": str(run.path),
    "trained": run.progress(),
    "subject": str(subject or run.subject),
    "split": split,
    "size_px": [source.width, source.height],
    "worst": [{"frame": int(source.ids[i]), "psnr_db": _round(rows[i]["psnr_db"])} for i in worst],
  }
  return _finish(report, out, shown)


def compare(
  pred: str | os.PathLike, truth: str | os.PathLike, out: str | os.PathLike | None = None
) -> dict:
  """Measures one film against another, frame by frame at 25 fps.

  Args:
    pred, truth: video files of equal size; lengths may differ by 2 %, the rest is left out.
    out: the report, JSON (default: beside `pred` as NAME_evaluation.json), the sheet as PNG.

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
  perceive, lpips_note = _perception((infos[0].height, infos[0].width))
  rows: list[Measures] = []
  shown = _Shown(total)
  lengths = [0, 0]
  films = itertools.zip_longest(media.read_frames(pred), media.read_frames(truth))
  progress = Progress("evaluate", total)
  for i, pair in enumerate(films):
    lengths = [n + (image is not None) for n, image in zip(lengths, pair, strict=True)]
    render, real = pair
    if render is None or real is None:
      continue  # only counted
    row = measure(render, real, None, perceive)
    rows.append(row)
    psnr_db = row["psnr_db"]
    shown.add(i, real, render, f"frame {i}  {psnr_db:.2f} dB", psnr_db)
    progress.advance()
  progress.close()
  if abs(lengths[0] - lengths[1]) > max(2, DRIFT * max(lengths)):
    raise UserError(
      f"{pred} has {lengths[0]} frames, {truth} has {lengths[1]}: cut them to the same speech"
    )
  worst = sorted(range(len(rows)), key=lambda i: rows[i]["psnr_db"])[:WORST]
  report = _summary(rows, lpips_note) | {
    "pred": str(pred),
    "truth": str(truth),
    "size_px": list(sizes[0]),
    "frames_of_each": lengths,
    "worst": [{"frame": i, "psnr_db": _round(rows[i]["psnr_db"])} for i in worst],
  }
  return _finish(report, out, shown)


def measure(
  render: UInt8[np.ndarray, "h w 3"],
  truth: UInt8[np.ndarray, "h w 3"],
  lips: Int[np.ndarray, " 4"] | None,
  perceive: Callable | None = None,
) -> Measures:
  """The measures of one frame.

  Args:
    lips: rows r0:r1, columns c0:c1 of the mouth region; None: not measured.
    perceive: float [h w 3] in 0..1 twice -> LPIPS; None: not measured.

  Returns:
    psnr_db (100 at most: equal pictures), ssim, and mouth_psnr_db, mouth_ssim, lpips if measured.
  """
  a, b = (image.astype(np.float32) / 255 for image in (render, truth))
  rect = np.asarray((0, len(a), 0, a.shape[1]) if lips is None else lips, np.int32)
  psnr, ssim, mouth_psnr, mouth_ssim = (float(value) for value in _distances(a, b, rect))
  row = {"psnr_db": min(psnr, 100.0), "ssim": ssim}
  if lips is not None:
    row |= {"mouth_psnr_db": min(mouth_psnr, 100.0), "mouth_ssim": mouth_ssim}
  if perceive is not None:
    row["lpips"] = float(perceive(a, b))
  return row


def summarize(report: Mapping) -> str:
  """A report in a few lines for the terminal."""
  what = f"{report['split']} split" if "split" in report else f"{report['pred']}"
  line = f"{what}, {report['frames']} frames: PSNR {report['psnr_db']:.2f} dB, "
  line += f"SSIM {report['ssim']:.4f}"
  if report["lpips"] is not None:
    line += f", LPIPS {report['lpips']:.4f}"
  if "mouth" in report:
    mouth = report["mouth"]
    line += f"; mouth PSNR {mouth['psnr_db']:.2f} dB, SSIM {mouth['ssim']:.4f}"
  lines = [line]
  if report["lpips"] is None:
    lines.append(f"LPIPS {report['lpips_note']}")
  lines.append(f"report {report['report']}, pictures {report['sheet']}")
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


def _perception(size: tuple[int, int]) -> tuple[Callable | None, str]:
  """LPIPS with its weights bound, or None and why."""
  from uajax import lpips

  if min(size) < LPIPS_MIN_PX:
    return None, f"not computed: needs pictures of at least {LPIPS_MIN_PX} px"
  try:
    params = lpips.load()
  except UserError as error:
    return None, f"not computed: {error}"
  return jax.jit(lambda a, b: lpips.lpips(params, a, b)), "AlexNet"


class _Shown:
  """Keeps the frames that the contact sheet will show: evenly spread, and the worst."""

  def __init__(self, total: int):
    even = np.linspace(0, max(total - 1, 0), min(PICTURES, total))
    self._at = set(np.round(even).astype(int).tolist())
    self._rows: list[tuple] = []
    self._worst: tuple | None = None

  def add(self, index: int, truth: np.ndarray, render: np.ndarray, label: str, db: float) -> None:
    row = (truth, render, label)
    if index in self._at:
      self._rows.append(row)
    if self._worst is None or db < self._worst[0]:
      self._worst = (db, row)

  def write(self, path: pathlib.Path) -> None:
    rows = list(self._rows)
    if self._worst is not None:
      truth, render, label = self._worst[1]
      rows.append((truth, render, f"worst: {label}"))
    truths, renders, labels = zip(*rows, strict=True)
    differences = [contact.compare(t, r) for t, r in zip(truths, renders, strict=True)]
    columns = {"truth": truths, "render": renders, "difference x4": differences}
    contact.write_sheet(path, columns, labels)


def _summary(rows: list[Measures], lpips_note: str) -> dict:
  if not rows:
    raise UserError("there are no frames to compare: give longer films")
  mean = lambda name: _round(float(np.mean([row[name] for row in rows])))
  summary: dict = {
    "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "frames": len(rows),
    "psnr_db": mean("psnr_db"),
    "ssim": mean("ssim"),
    "lpips": mean("lpips") if "lpips" in rows[0] else None,
    "lpips_note": lpips_note,
  }
  if "mouth_psnr_db" in rows[0]:
    summary["mouth"] = {name: mean(f"mouth_{name}") for name in ("psnr_db", "ssim")}
  if "uncertainty" in rows[0]:
    summary["mean_uncertainty"] = float(np.mean([row["uncertainty"] for row in rows]))
  return summary


def _finish(report: dict, out: pathlib.Path, shown: _Shown) -> dict:
  sheet = out.with_suffix(".png")
  report |= {"report": str(out), "sheet": str(sheet)}
  shown.write(sheet)
  with saving.aside(out) as partial:
    partial.write_text(json.dumps(report, indent=2) + "\n")
  return report


def _report_path(out: str | os.PathLike | None, default: pathlib.Path) -> pathlib.Path:
  path = default if out is None else pathlib.Path(out)
  if path.suffix.lower() != ".json":
    raise UserError(f"--out {path} does not end in .json: the report is JSON")
  return path


def _round(value: float) -> float:
  return round(value, 5) if math.isfinite(value) else value
