"""Evaluation: the figures are those of the pictures, the report and the sheet are whole."""

import json

import numpy as np
import pytest
from PIL import Image as Picture

from tests.uajax import tiny_run
from tests.uajax.data import subject_folder
from uajax import evaluate, media
from uajax.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("evaluate")
  subject_folder.make(folder / "subject")
  return tiny_run.make(folder / "run", folder / "subject")


def film(path, frames, shift=0.0, size=(48, 64), seed=0):
  """A smooth moving pattern, `shift` brighter."""
  y, x = np.mgrid[: size[0], : size[1]] / 10.0
  wave = [np.sin(x + 0.2 * i) + np.cos(y) for i in range(frames)]
  images = [np.repeat((128 + shift + 40 * w)[..., None], 3, -1).astype(np.uint8) for w in wave]
  media.write_video(path, images, quality=4)
  return path


def test_measures_are_those_of_the_pictures():
  truth = np.full((40, 40, 3), 100, np.uint8)
  render = truth.copy()
  render[10:20, 10:20] += 51  # 0.2 in a sixteenth of the picture
  row = evaluate.measure(render, truth, np.array([10, 20, 10, 20]))
  assert row["psnr_db"] == pytest.approx(-10 * np.log10(0.04 / 16), abs=1e-3)
  assert row["mouth_psnr_db"] == pytest.approx(-10 * np.log10(0.04), abs=1e-3)
  assert row["mouth_ssim"] < row["ssim"] < 1 and "lpips" not in row
  same = evaluate.measure(truth, truth, None, {"lpips": lambda a, b: abs(a - b).sum()})
  assert same == {"psnr_db": 100.0, "ssim": pytest.approx(1, abs=1e-4), "lpips": 0.0}


def test_a_run_is_measured_on_its_held_out_frames(run):
  report = evaluate.evaluate(run.path)
  saved = json.loads((run.path / "evaluation_val.json").read_text())
  assert saved == report and report["frames"] == 2 and report["size_px"] == [40, 32]
  assert 0 < report["psnr_db"] < 40 and -1 <= report["ssim"] < 1
  assert {row["frame"] for row in report["worst"]} == {10, 11}
  assert report["mouth"]["psnr_db"] > 0 and report["mean_uncertainty"] > 0
  assert report["lpips"] is None and "needs pictures" in report["not_computed"]["lpips"]
  height = Picture.open(run.path / "evaluation_val.png").size[1]
  assert height > 3 * 32  # two frames, and the worst of them once more
  assert len(saved["split_sha256"]) == 64 and saved["per_frame"]["frame"] == [10, 11]
  assert (run.path / "evaluation_val.html").exists()
  said = evaluate.summarize(report)
  assert "2 frames: PSNR" in said and "not computed" in said


def test_a_moved_subject_is_found_where_it_is_said_to_be(run, tmp_path):
  moved = tmp_path / "moved"
  run.subject.rename(moved)
  try:
    with pytest.raises(UserError, match="--subject"):
      evaluate.evaluate(run.path, out=tmp_path / "r.json")
    report = evaluate.evaluate(run.path, out=tmp_path / "r.json", subject=moved)
    assert report["frames"] == 2
  finally:
    moved.rename(run.subject)


def test_two_films(tmp_path):
  a, b = film(tmp_path / "a.mp4", 30), film(tmp_path / "b.mp4", 31, shift=10)
  same = evaluate.compare(a, a)
  assert same["psnr_db"] == 100 and same["frames"] == 30
  assert (tmp_path / "a_evaluation.json").exists() and (tmp_path / "a_evaluation.png").exists()
  report = evaluate.compare(a, b, tmp_path / "ab.json")
  assert report["psnr_db"] == pytest.approx(20 * np.log10(255 / 10), abs=1.0)
  assert report["frames"] == 30 and report["frames_of_each"] == [30, 31]


def test_films_that_do_not_belong_together_are_refused(tmp_path):
  a = film(tmp_path / "a.mp4", 30)
  with pytest.raises(UserError, match="64x48.*32x48"):
    evaluate.compare(a, film(tmp_path / "small.mp4", 30, size=(48, 32)))
  with pytest.raises(UserError, match="30 frames.*20"):
    evaluate.compare(a, film(tmp_path / "short.mp4", 20))
  with pytest.raises(UserError, match=".json: the report"):
    evaluate.compare(a, a, tmp_path / "out.txt")
  text = tmp_path / "text.mp4"
  text.write_text("no film")
  with pytest.raises(UserError, match="text.mp4"):
    evaluate.compare(a, text)
  assert not list(tmp_path.glob("*.json"))


def test_the_mouth_is_cut_out_and_scaled():
  r, c = np.mgrid[:60, :80].astype(np.float32)
  picture = np.stack([r, c, r + c], -1) / 160
  found = np.asarray(evaluate._cut(picture, np.array([10, 34, 20, 52], np.int32)))
  at = (np.arange(evaluate.MOUTH_PX) + 0.5) / evaluate.MOUTH_PX
  rows, columns = 10 + 24 * at - 0.5, 20 + 32 * at - 0.5  # of the pixels' centres
  np.testing.assert_allclose(found[..., 0], np.tile(rows[:, None], 96) / 160, atol=1e-5)
  np.testing.assert_allclose(found[..., 1], np.tile(columns, (96, 1)) / 160, atol=1e-5)


def test_flicker_is_the_change_of_the_error_between_neighbours():
  judge = evaluate._Judge(4, (16, 16), True)
  truth = np.full((16, 16, 3), 100, np.uint8)
  for number, error in ((0, 0), (1, 10), (2, 10), (7, 30)):
    judge.add(number, truth + np.uint8(error), truth + np.uint8(number), None)
  # Errors 0, 9, 8; what lies between 2 and 7 is unknown.
  np.testing.assert_allclose(judge.columns()["flicker"], [np.nan, 9, 1, np.nan])
  assert judge.report()["flicker"] == 5


def test_what_is_known_of_a_made_up_person_is_checked(tmp_path):
  assert evaluate._Known.of(tmp_path) is None
  file = tmp_path / "truth" / "truth.npz"
  file.parent.mkdir()
  np.savez(file, lip_gap_px=np.zeros(5), au=np.zeros((4, 2)), au_names=["AU01", "AU12"])
  with pytest.raises(UserError, match="truth.npz.*do not fit"):
    evaluate._Known.of(tmp_path)
  for damaged in (b"", file.read_bytes()[:200]):
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="truth.npz is damaged"):
      evaluate._Known.of(tmp_path)
