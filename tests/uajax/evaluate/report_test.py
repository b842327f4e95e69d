"""The page of an evaluation, and the parts that pages are made of."""

import json
import re
import xml.etree.ElementTree

import numpy as np

from uajax import evaluate, page


def parse(text):
  """Well-formed but for the head's void elements."""
  text = re.sub(r"<(meta|img)([^>]*)>", r"<\1\2/>", text.split("\n", 1)[1])
  return xml.etree.ElementTree.fromstring(text)


def test_the_page_of_two_films_is_whole_in_itself(tmp_path):
  from uajax import media

  name = tmp_path / "<b>&.mp4"
  y, x = np.mgrid[:64, :64] / 8.0
  images = [np.repeat((128 + 60 * np.sin(x + i) + y)[..., None], 3, -1) for i in range(6)]
  media.write_video(name, [image.astype(np.uint8) for image in images], quality=4)
  report = evaluate.compare(name, name)
  text = (tmp_path / "<b>&_evaluation.html").read_text()
  assert not re.search(r"(src|href)=\"(?!data:)|https?:|<script|<b>|@import|url\(", text)
  assert "&lt;b&gt;&amp;.mp4" in text and text.count("data:image/jpeg;base64,") == 2
  assert parse(text).tag == "html" and "100.00" in text
  assert report["not_computed"]["face"].startswith("needs ") and "face: needs" in text
  saved = json.loads((tmp_path / "<b>&_evaluation.json").read_text())
  assert saved["per_frame"]["flicker"] == [None, 0, 0, 0, 0, 0] and saved["flicker"] == 0


def test_plots_leave_gaps_and_mark_frames():
  values = np.array([0.0, 1.0, np.nan, 2.0, 4.0])
  text = page.plot("a<b", {"x": values, "y": values / 2}, grey=[(1, 2)], dashed=[3])
  assert text.count("<polyline") == 4 and text.count("<rect") == 1 and text.count("<line") == 1
  assert "a&lt;b" in text and "0.00 to 4.00" in text
  xml.etree.ElementTree.fromstring(text)
  assert "<polyline" not in page.plot("", {"x": np.full(3, np.nan)})
