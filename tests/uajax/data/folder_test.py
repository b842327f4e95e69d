import json
import shutil

import numpy as np
import PIL.Image
import pytest

from tests.uajax.data import subject_folder as tiny
from tests.uajax.speech import tiny_model
from uajax import media, types
from uajax.data import folder
from uajax.errors import UserError


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "subject"
  return path, tiny.make(path)


@pytest.fixture
def copy(subject, tmp_path):
  """A folder a test may spoil."""
  return shutil.copytree(subject[0], tmp_path / "copy")


def test_what_was_written_is_read_back(subject):
  path, values = subject
  folder.check(path)
  train, val = folder.read(path, "train"), folder.read(path, "val")
  assert train.ids.tolist() == list(range(10)) and val.ids.tolist() == [10, 11]
  frames = val.frames
  assert frames.image.shape == (2, 32, 40, 3) and frames.image.dtype == np.uint8
  smooth = np.clip(np.linspace(0, 255, 40)[None, :, None] + 33, 0, 255)
  assert np.abs(frames.image[1].astype(float) - smooth).mean() < 2  # JPEG
  np.testing.assert_allclose(frames.camera.viewmat, values["viewmats"][10:], atol=1e-6)
  np.testing.assert_allclose(frames.camera.K[0], [[60, 0, 20], [0, 60, 16], [0, 0, 1]])
  units = np.stack([values["action_units"][u][10:] for u in types.ACTION_UNITS], -1)
  units[:, 5] = np.minimum(units[:, 5], 2)
  np.testing.assert_allclose(frames.controls.action_units, units, atol=1e-6)
  for name, rows in values["priors"]["val"].items():
    np.testing.assert_array_equal(getattr(frames.controls, name), rows)
  np.testing.assert_array_equal(folder.read_expression(path), values["expression"])
  assert folder.read_emotions(path)[6] == ("sad", 0.5)
  assert all(np.asarray(leaf).dtype != np.float64 for leaf in (*frames.controls, *val.guide))


def test_teeth_belong_to_the_mouth_never_to_the_face(subject):
  classes = folder.read(subject[0], "val").frames.classes[0]
  assert (classes[17, 18:22] == types.MOUTH).all()  # face in the parsing
  assert (classes[18, 18:22] == types.MOUTH).all()  # mouth in the parsing too: official XOR: face
  assert classes[17, 17] == types.FACE and classes[5, 12] == types.HAIR
  assert classes[25, 18] == types.NECK and classes[30, 8] == types.TORSO
  assert classes[0, 0] == types.BACKGROUND


def test_background_is_the_torso_by_its_alpha_over_the_plate(subject):
  background = folder.read(subject[0], "val").frames.background[0].astype(int)
  assert np.abs(background[28, 20] - [200, 100, 30]).max() == 0
  half = np.asarray([200, 100, 30]) * 128 / 255 + np.asarray([10, 200, 90]) * 127 / 255
  assert np.abs(background[24, 10] - half).max() <= 3
  assert np.abs(background[2, 2] - [10, 200, 90]).max() <= 2


def test_audio_is_eight_neighbours_with_silence_beyond_the_ends(subject):
  path, values = subject
  mel = values["windows"]["mel"]
  first = folder.read(path, "train").frames.controls.audio[0]
  last = folder.read(path, "val").frames.controls.audio[1]
  assert first.shape == (8, 80, 16)
  assert (first[:4] == 0).all()
  np.testing.assert_array_equal(first[4], mel[0].T)  # slot 4 is the frame itself
  np.testing.assert_array_equal(last[:5], mel[7:12].swapaxes(1, 2))
  assert (last[5:] == 0).all()


def test_guide_and_lips(subject):
  path, values = subject
  clip = folder.read(path, "train")
  np.testing.assert_allclose(clip.guide.lip_height_px, 0.5 + 0.25 * np.arange(10), atol=1e-5)
  blink = np.minimum(values["action_units"]["AU45"], 2)[:10] / 2
  np.testing.assert_allclose(clip.guide.blink, blink, atol=1e-6)
  au25 = values["action_units"]["AU25"]
  np.testing.assert_allclose(clip.guide.au25, np.minimum(au25, np.percentile(au25, 95))[:10],
                             atol=1e-5)
  brow = values["action_units"]["AU01"] - values["action_units"]["AU04"]
  np.testing.assert_allclose(clip.guide.brow, brow[:10], atol=1e-5)
  # columns 16..24, rows 18..21: side 8 about (19, 20)
  assert clip.frames.lips[0].tolist() == [15, 23, 16, 24]


def test_lips_stay_inside_the_picture_and_are_never_empty():
  points = np.zeros((68, 2))
  points[48:60] = [[38, -3], [46, 1]] * 6
  assert folder.lip_square(points, 32, 40).tolist() == [0, 3, 38, 40]
  points[48:60] = 900
  r0, r1, c0, c1 = folder.lip_square(points, 32, 40)
  assert 0 <= r0 < r1 <= 32 and 0 <= c0 < c1 <= 40


def test_the_eyes_box_holds_brows_and_lids_inside_the_picture():
  points = np.zeros((68, 2))
  points[17:27], points[36:48] = [[8, 10], [24, 11]] * 5, [[10, 16], [20, 18]] * 6
  assert folder._eyes(points, 32, 40).tolist() == [8, 20, 6, 26]  # a quarter of 8 px about them
  points[17:27] -= 12
  assert folder._eyes(points, 32, 40).tolist() == [0, 23, 0, 25]
  points[17:48] = -900
  r0, r1, c0, c1 = folder._eyes(points, 32, 40)
  assert 0 <= r0 < r1 <= 32 and 0 <= c0 < c1 <= 40


def test_optional_parts_may_lack(copy):
  shutil.rmtree(copy / "teeth_mask")
  shutil.rmtree(copy / "torso_imgs")
  frames = folder.read(copy, "val").frames
  assert frames.classes[0, 17, 19] == types.FACE
  assert np.abs(frames.background[0].astype(int) - [10, 200, 90]).max() <= 2


def test_missing_priors_want_a_word(copy):
  (copy / "train_audiostyle.npz").unlink()
  with pytest.raises(UserError, match=r"train_audiostyle .*uajax extract"):
    folder.read(copy, "train")
  controls = folder.read(copy, "train", allow_missing_priors=True).frames.controls
  assert (controls.f_tone == 0).all() and controls.f_exp.any()


def test_priors_are_indexed_by_position_and_may_be_longer(copy):
  rows = np.arange(5)[:, None, None] * np.ones((5, 1, 64), np.float32)
  np.savez(copy / "val_auds_exp.npz", features=rows)
  assert folder.read(copy, "val").frames.controls.f_exp[:, 0].tolist() == [0, 1]


def test_frames_after_the_end_of_sound_are_left_out(copy):
  windows = np.load(copy / "aud_mel.npy")
  np.save(copy / "aud_mel.npy", windows[:11])
  assert folder.read(copy, "val").ids.tolist() == [10]
  np.save(copy / "aud_mel.npy", windows[:5])
  with pytest.raises(UserError, match="5 audio windows"):
    folder.read(copy, "val")


def test_deepspeech_where_the_official_preprocessing_puts_it(copy):
  np.save(copy / "aud.npy", np.ones((12, 16, 29), np.float32))
  assert folder.read(copy, "val", audio="deepspeech").frames.controls.audio.shape == (2, 8, 29, 16)


def _edit_json(path, **changes):
  file = path / "transforms_val.json"
  document = json.loads(file.read_text())
  document["frames"][1].update(changes)
  file.write_text(json.dumps(document))


SPOILT = {
  "no folder": (lambda p: shutil.rmtree(p), "is not a folder"),
  "no transforms": (lambda p: (p / "transforms_val.json").unlink(), "val.json is missing"),
  "torn json": (lambda p: (p / "transforms_val.json").write_text('{"fo'), "damaged"),
  "bad id": (lambda p: _edit_json(p, img_id=-1), "img_id"),
  "pose": (lambda p: _edit_json(p, transform_matrix=[[0.0] * 4] * 4), "pose"),
  "nan pose": (lambda p: _edit_json(p, transform_matrix=[[float("nan")] * 4] * 4), "pose"),
  "no picture": (lambda p: (p / "gt_imgs" / "11.jpg").unlink(), "gt_imgs lacks 1 of 2.*11.jpg"),
  "no parsing": (lambda p: shutil.rmtree(p / "parsing"), "parsing lacks 2 of 2"),
  "cut picture": (
    lambda p: (p / "gt_imgs" / "11.jpg").write_bytes((p / "gt_imgs" / "11.jpg").read_bytes()[:300]),
    r"gt_imgs/11.jpg is a damaged picture",
  ),
  "size": (
    lambda p: PIL.Image.new("RGB", (8, 8)).save(p / "parsing" / "10.png"),
    r"parsing/10.png is 8x8, bc.jpg is 40x32",
  ),
  "teeth": (lambda p: np.save(p / "teeth_mask" / "10.npy", np.ones((3, 3), bool)), "teeth_mask/10"),
  "landmarks": (lambda p: (p / "ori_imgs" / "10.lms").write_text("1 2\n"), "10.lms"),
  "au rows": (
    lambda p: (p / "au.csv").write_text("\n".join((p / "au.csv").read_text().splitlines()[:9])),
    "au.csv has 8 rows, none for frame 11",
  ),
  "au column": (
    lambda p: (p / "au.csv").write_text((p / "au.csv").read_text().replace("AU45_r", "AU46_r")),
    "AU45_r",
  ),
  "windows": (lambda p: np.save(p / "aud_mel.npy", np.ones((12, 80, 16))), "shape"),
  "nan": (lambda p: np.save(p / "aud_mel.npy", np.full((12, 16, 80), np.nan)), "not finite"),
  "pickled windows": (
    lambda p: np.save(p / "aud_mel.npy", np.asarray([{}] * 12), allow_pickle=True), "damaged"
  ),
  "torn prior": (lambda p: (p / "mser_emotion_val.npz").write_bytes(b"PK"), "mser_emotion_val.npz"),
  "short prior": (
    lambda p: np.savez(p / "val_auds_exp.npz", features=np.ones((1, 1, 64))), "1 rows for the 2"
  ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_folder_is_refused_in_one_line(copy, case):
  spoil, words = SPOILT[case]
  spoil(copy)
  with pytest.raises(UserError, match=words) as caught:
    folder.read(copy, "val")
  assert "\n" not in str(caught.value) and ": " in str(caught.value)


def test_check_finds_a_wrong_size_without_decoding(copy):
  PIL.Image.new("RGB", (8, 8)).save(copy / "gt_imgs" / "3.jpg")
  with pytest.raises(UserError, match="gt_imgs/3.jpg is 8x8"):
    folder.check(copy)


def test_an_earlier_folder_is_never_touched(subject):
  path, _ = subject
  before = sorted(p.name for p in path.rglob("*"))
  with pytest.raises(UserError, match="already holds something"):
    tiny.make(path)
  assert sorted(p.name for p in path.rglob("*")) == before


def test_nothing_is_left_of_a_failed_writing(tmp_path):
  path = tmp_path / "subject"
  rng = np.random.default_rng(0)
  with pytest.raises(KeyboardInterrupt), folder.writer(path) as w:
    content = next(tiny.contents(rng))._asdict()
    w.frame(0, parsing_classes=content.pop("classes"), **content)
    raise KeyboardInterrupt
  with pytest.raises(RuntimeError, match="finish"), folder.writer(path):
    pass
  with pytest.raises(ValueError, match="AU25"):
    tables = tiny.tables(rng)
    tables["action_units"].pop("AU25")
    folder.write(path, tiny.contents(rng), **tables)
  assert not list(tmp_path.iterdir())


def test_windows_are_made_once_noted_and_made_again_when_the_sound_changes(copy, tmp_path):
  weights = tmp_path / "hubert"
  tiny_model.write(weights)
  with pytest.raises(UserError, match="uajax extract .* --audio hubert --audio-weights .*mel"):
    folder.read(copy, "val", audio="hubert")
  with pytest.raises(UserError, match="want weights"):
    folder.make_windows(copy, "hubert")
  folder.make_windows(copy, "hubert", weights)
  file, note = copy / "aud_hu.npy", copy / "extractors" / "aud_hu.json"
  assert folder.read(copy, "val", audio="hubert").frames.controls.audio.shape == (2, 8, 16, 2)
  first, changed = np.load(file), file.stat().st_mtime_ns
  folder.make_windows(copy, "hubert")
  assert file.stat().st_mtime_ns == changed
  media.write_wav(copy / "aud.wav", np.random.default_rng(1).normal(0, 0.1, 7680))
  folder.make_windows(copy, "hubert")
  assert np.load(file).shape == (12, 2, 16) and (np.load(file) != first).any()
  assert json.loads(note.read_text())["weights"] == str(weights)


def test_windows_that_others_made_are_left_alone(copy):
  np.save(copy / "aud_ds.npy", np.ones((12, 16, 29), np.float32))
  folder.make_windows(copy, "deepspeech")
  assert not (copy / "extractors").exists()
  np.save(copy / "aud_hu.npy", np.ones((12, 3, 29), np.float32))
  with pytest.raises(UserError, match="recompute"):
    folder.make_windows(copy, "hubert")
