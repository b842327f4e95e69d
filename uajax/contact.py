"""Pictures of how well it went: contact sheets of frames side by side, and curves.

A contact sheet has one row a frame and one column a kind of picture (truth, render, ...).
Axes: h w pixels. Everything here is NumPy on the host; files are written aside, then renamed.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw

from uajax import saving

GAP_PX = 4
STRIP_PX = 14  # a line of text
PAPER, INK = (24, 24, 24), (230, 230, 230)


def compare(truth: np.ndarray, render: np.ndarray, gain: float = 4.0) -> np.ndarray:
  """uint8 [h w 3] twice -> uint8 [h w 3], the absolute difference times `gain`."""
  gap = np.abs(truth.astype(np.float32) - render.astype(np.float32))
  return np.clip(gain * gap, 0, 255).astype(np.uint8)


def draw_sheet(
  columns: Mapping[str, Sequence[np.ndarray]],
  labels: Sequence[str] | None = None,
  *,
  height_px: int = 256,
) -> np.ndarray:
  """Lays out frames as a grid with a heading a column and a label a row.

  Args:
    columns: heading -> its frames, uint8 [h w 3] or [h w]; every column as many, any sizes.
    labels: a line under each row; none if None.
    height_px: rows higher than this are scaled down to it.

  Returns:
    uint8 [h w 3].

  Raises:
    ValueError: no frames, or columns of unequal length.
  """
  count = {len(frames) for frames in columns.values()}
  if len(count) != 1 or 0 in count:
    raise ValueError(f"columns must be equally long and not empty, got lengths {sorted(count)}")
  rows = count.pop()
  cells = [[_fit(frame, height_px) for frame in frames] for frames in columns.values()]
  widths = [max(cell.width for cell in column) for column in cells]
  heights = [max(column[r].height for column in cells) for r in range(rows)]
  strip = STRIP_PX if labels is not None else 0
  sheet = Picture.new(
    "RGB",
    (
      sum(widths) + GAP_PX * (len(widths) + 1),
      STRIP_PX + sum(heights) + (strip + GAP_PX) * rows + GAP_PX,
    ),
    PAPER,
  )
  pen = ImageDraw.Draw(sheet)
  x = GAP_PX
  for heading, column, width in zip(columns, cells, widths, strict=True):
    pen.text((x, 1), heading, fill=INK)
    y = STRIP_PX + GAP_PX
    for cell, height in zip(column, heights, strict=True):
      sheet.paste(cell, (x, y))
      y += height + strip + GAP_PX
    x += width + GAP_PX
  y = STRIP_PX + GAP_PX
  for r, height in enumerate(heights):
    if labels is not None:
      pen.text((GAP_PX, y + height), labels[r], fill=INK)
    y += height + strip + GAP_PX
  return np.asarray(sheet)


def write_sheet(
  path: str | os.PathLike,
  columns: Mapping[str, Sequence[np.ndarray]],
  labels: Sequence[str] | None = None,
  *,
  height_px: int = 256,
) -> pathlib.Path:
  """`draw_sheet` as a PNG file. Returns its path."""
  return write_png(path, draw_sheet(columns, labels, height_px=height_px))


def write_curves(
  path: str | os.PathLike,
  series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  *,
  title: str = "",
  x_label: str = "step",
  y_label: str = "",
  log_y: bool = False,
) -> pathlib.Path:
  """Lines over one axis as a PNG file: name -> (x, y). Values that are not finite leave gaps."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure  # not pyplot: it keeps global state and wants a display

  figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
  axes = figure.add_subplot()
  for name, (x, y) in series.items():
    values = np.asarray(y, np.float64)
    axes.plot(np.asarray(x), np.where(np.isfinite(values), values, np.nan), label=name, lw=1.4)
  axes.set(title=title, xlabel=x_label, ylabel=y_label)
  if log_y:
    axes.set_yscale("log")
  axes.grid(alpha=0.3)
  if series:
    axes.legend()
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return write_png(path, np.asarray(canvas.buffer_rgba())[..., :3])


def write_png(path: str | os.PathLike, image: np.ndarray) -> pathlib.Path:
  """uint8 [h w 3] or [h w] -> PNG file, whole or not at all. Makes the folder."""
  path = pathlib.Path(path)
  with saving.aside(path) as partial:
    Picture.fromarray(np.ascontiguousarray(image)).save(partial, "PNG")
  return path


def _fit(frame: np.ndarray, height_px: int) -> Picture.Image:
  picture = Picture.fromarray(np.ascontiguousarray(frame)).convert("RGB")
  if picture.height > height_px:
    width = max(1, round(picture.width * height_px / picture.height))
    picture = picture.resize((width, height_px), Picture.Resampling.LANCZOS)
  return picture
