"""Contact sheets and curves: what lands in the PNG."""

import numpy as np
import pytest
from PIL import Image as Picture

from uajax import contact


def test_a_sheet_shows_every_frame_where_it_belongs(tmp_path):
  red = np.full((20, 30, 3), [255, 0, 0], np.uint8)
  grey = np.full((20, 30), 128, np.uint8)
  path = contact.write_sheet(
    tmp_path / "new" / "sheet.png", {"truth": [red, red], "map": [grey, grey]}, ["a", "b"]
  )
  sheet = np.asarray(Picture.open(path))
  assert (sheet == [255, 0, 0]).all(-1).sum() == 2 * 20 * 30
  assert (sheet == [128, 128, 128]).all(-1).sum() >= 2 * 20 * 30
  reds = np.nonzero((sheet == [255, 0, 0]).all(-1))[1]
  assert reds.max() < np.nonzero((sheet == [128, 128, 128]).all(-1))[1].max()
  assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]  # nothing left aside


def test_large_frames_are_scaled_down():
  big = np.zeros((900, 600, 3), np.uint8)
  assert contact.draw_sheet({"x": [big]}, height_px=100).shape[0] < 130


def test_unequal_columns_are_refused():
  frame = np.zeros((4, 4, 3), np.uint8)
  with pytest.raises(ValueError, match="equally long"):
    contact.draw_sheet({"a": [frame], "b": []})


def test_difference_is_amplified_and_saturates():
  a, b = np.zeros((1, 2, 3), np.uint8), np.array([[[10] * 3, [200] * 3]], np.uint8)
  assert contact.compare(a, b)[0, :, 0].tolist() == [40, 255]


def test_curves_survive_what_is_not_finite(tmp_path):
  path = contact.write_curves(tmp_path / "c.png", {"loss": ([0, 1, 2], [1.0, np.nan, 0.5])})
  assert Picture.open(path).size[0] > 400
