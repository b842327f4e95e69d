"""The page of an evaluation: figures with what they mean, plots over time, the worst frames.

Axes: f frames, h w pixels.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from uajax import page

# Figure -> what it is, and how it is written. `mouth.` and `face.` are parts of the report.
_FIGURES = {
  "psnr_db": ("PSNR, dB: higher is nearer", "{:.2f}"),
  "mouth.psnr_db": ("PSNR of the mouth's square, dB", "{:.2f}"),
  "ssim": ("SSIM: 1 is equal", "{:.4f}"),
  "mouth.ssim": ("SSIM of the mouth", "{:.4f}"),
  "lpips": ("LPIPS (AlexNet): 0 is equal", "{:.4f}"),
  "mouth.lpips": ("LPIPS (AlexNet) of the mouth, scaled to 96 px", "{:.4f}"),
  "lpips_vgg": ("LPIPS (VGG-16)", "{:.4f}"),
  "mouth.lpips_vgg": ("LPIPS (VGG-16) of the mouth", "{:.4f}"),
  "flicker": (
    "flicker: mean change of the error from frame to frame, of 255 levels", "{:.2f}",
  ),
  "face.lmd_px": ("LMD of 68 landmarks, px (each set centred)", "{:.3f}"),
  "face.mouth_lmd_px": ("LMD of the mouth's 20 landmarks, px", "{:.3f}"),
  "face.eye_distance_px": ("distance of the eyes, px, to judge pixels by", "{:.1f}"),
  "face.mouth_opening_correlation": (
    "gap of the inner lips, by landmarks of render and truth: correlation", "{:.3f}",
  ),
  "face.jitter_px": ("trembling of the render's landmarks, px", "{:.3f}"),
  "face.truth_jitter_px": ("the same of the truth's", "{:.3f}"),
  "face.aue_upper": ("AUE, upper face: summed squared errors of 8 action units", "{:.3f}"),
  "face.aue_lower": ("AUE, lower face: of 9 action units", "{:.3f}"),
  "face.e_fid": ("E-FID by 51 blendshape scores", "{:.4f}"),
  "face.frames": ("frames in which both faces were found", "{}"),
  "sync.confidence": ("Sync-C of lips and sound (SyncNet): higher is better", "{:.2f}"),
  "sync.distance": ("Sync-D: lower is better", "{:.2f}"),
  "sync.offset_frames": ("frames by which SyncNet takes the sound for late", "{}"),
  "sync.truth_confidence": ("Sync-C of the truth", "{:.2f}"),
  "sync.truth_distance": ("Sync-D of the truth", "{:.2f}"),
  "sync.truth_offset_frames": ("frames by which the truth's sound is late", "{}"),
  "true_errors.mouth_opening_correlation": (
    "mouth opening of the render with what it truly was: correlation", "{:.3f}",
  ),
  "true_errors.true_picture_mouth_opening_correlation": (
    "the same of the true pictures: as good as the measure gets", "{:.3f}",
  ),
  "true_errors.mouth_opening_error_px": ("its mean error, px", "{:.2f}"),
  "true_errors.true_picture_mouth_opening_error_px": ("the same of the true pictures", "{:.2f}"),
  "mean_uncertainty": ("mean uncertainty of the motion", "{:.3g}"),
}  # fmt: skip
# Title -> name of the line -> column of the report's per_frame.
_PLOTS = {
  "PSNR, dB": {"whole": "psnr_db", "mouth": "mouth_psnr_db"},
  "SSIM": {"whole": "ssim", "mouth": "mouth_ssim"},
  "LPIPS (AlexNet)": {"whole": "lpips", "mouth": "mouth_lpips"},
  "landmark distance, px": {"68 landmarks": "lmd_px", "mouth": "mouth_lmd_px"},
  "gap of the inner lips by landmarks, mm": {"render": "gap_mm", "truth": "truth_gap_mm"},
  "opening of the mouth by pixels, px": {
    "render": "opening_px", "true picture": "truth_opening_px", "known": "known_opening_px",
  },
  "flicker, of 255 levels": {"change of the error": "flicker"},
  "uncertainty": {"mean": "uncertainty"},
}  # fmt: skip
_UNITS = {
  "AU12": "smile", "AU04": "brows drawn down", "AU01": "inner brows raised", "AU45": "eyes closed",
}  # fmt: skip


def draw(
  report: Mapping[str, Any],
  units: Mapping[str, Float[np.ndarray, "f 2"]],
  worst: UInt8[np.ndarray, "h w 3"],
  sheet: UInt8[np.ndarray, "h w 3"],
) -> str:
  """The page.

  Args:
    report: as `evaluate` gives it.
    units: action units by name, of truth and render; empty where no face was read.
    worst, sheet: pictures of the worst frames, and of evenly spread ones.
  """
  if "split" in report:
    title = f"{report['run']}, {report['split']} split"
  else:
    title = f"{report['pred']} against {report['truth']}"
  width, height = report["size_px"]
  return page.document(title, [
    page.paragraph(
      f"{report['frames']} frames of {width} x {height} px, made {report['made_at']}. Landmarks and"
      " action units are read by MediaPipe's face landmarker, not by face_alignment and OpenFace:"
      " compare such figures with others made here only."
    ),
    page.heading("Figures"),
    page.table(_figures(report)),
    *_action_units(report),
    page.heading("Not computed"),
    page.bullets([f"{n}: {why}" for n, why in report["not_computed"].items()], "nothing"),
    page.heading("Over time"),
    *_plots(report, units),
    page.heading("Worst frames"),
    page.picture(worst, "truth, render and difference of the worst frames"),
    page.heading("Evenly spread frames, and the worst by PSNR"),
    page.picture(sheet, "truth, render and difference"),
  ])  # fmt: skip


def _figures(report: Mapping[str, Any]) -> list[tuple[str, str]]:
  rows = []
  for name, (what, form) in _FIGURES.items():
    part, _, leaf = name.rpartition(".")
    value = (report.get(part, {}) if part else report).get(leaf)
    if value is not None:
      rows.append((what, form.format(value)))
  return rows


def _action_units(report: Mapping[str, Any]) -> list[str]:
  """A table of the squared error of each unit, with the correlations where truth is known."""
  if "face" not in report:
    return []
  known = report.get("true_errors", {}).get("action_unit_correlation", {})
  rows = [["action unit", "mean squared error, of 0..5"]]
  if known:
    rows[0] += ["correlation of the render with what is known", "of the true pictures"]
  for name, error in report["face"]["au_squared_errors"].items():
    row = [name, f"{error:.3f}"]
    if known:
      row += [_maybe(known.get(name, {}).get(k)) for k in ("render", "true_picture")]
    rows.append(row)
  return [page.heading("Action units"), page.table(rows)]


def _plots(report: Mapping[str, Any], units: Mapping[str, np.ndarray]) -> list[str]:
  ids = np.array(report["per_frame"]["frame"])
  cuts = (np.flatnonzero(np.diff(ids) != 1) + 1).tolist()
  out = [page.paragraph("Dashed: frames are missing there.")] if cuts else []
  for title, lines in _PLOTS.items():
    columns = {name: report["per_frame"].get(column) for name, column in lines.items()}
    series = {name: np.array(c, np.float64) for name, c in columns.items() if c is not None}
    if series:
      out.append(page.plot(title, series, dashed=cuts))
  for name, what in _UNITS.items():
    if name in units:
      series = {"render": units[name][:, 1], "truth": units[name][:, 0]}
      out.append(page.plot(f"{what} ({name}), 0 to 5", series, dashed=cuts))
  return out


def _maybe(value: float | None) -> str:
  return "" if value is None else f"{value:.2f}"
