"""The made-up person: sound and picture belong together, and the truth is the truth."""

import filecmp
import json
import wave

import numpy as np
import pytest

from uajax import consent, types
from uajax.data import folder, synthetic
from uajax.data.synthetic import AU_NAMES, Line, Person, language
from uajax.errors import UserError

SMALL = Person(size_px=64)


@pytest.fixture(scope="module")
def spoken():
  script = (Line("mama market", emotion="happy", seconds=1.4), Line("fast yellow", seconds=1.2))
  return synthetic.perform(SMALL, script, 3)


@pytest.fixture(scope="module")
def film(spoken):
  return synthetic.render_frames(Person(size_px=96), spoken)


def _hold(**gains) -> synthetic.Performance:
  """One motionless frame: action units and mouth controls at given strengths."""
  mouth, au = np.zeros((1, len(language.MOUTH_CONTROLS))), np.zeros((1, len(AU_NAMES)))
  for name, value in gains.items():
    table, names = (
      (mouth, language.MOUTH_CONTROLS) if name in language.MOUTH_CONTROLS else (au, AU_NAMES)
    )
    table[0, names.index(name)] = value
  zero = np.zeros(1)
  return synthetic.Performance(
    np.zeros(640, np.float32), (), np.zeros((1, 6)), mouth, au, zero.astype(int), zero, zero
  )


def test_the_same_arguments_give_the_same_bits(spoken):
  again = synthetic.perform(
    SMALL, (Line("mama market", emotion="happy", seconds=1.4), Line("fast yellow", seconds=1.2)), 3
  )
  for a, b in zip(spoken, again, strict=True):
    np.testing.assert_array_equal(a, b)
  short = spoken._replace(**{k: getattr(spoken, k)[:2] for k in ("pose", "mouth", "au")})
  first, second = (synthetic.render_frames(SMALL, short) for _ in range(2))
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a, b)
  other = synthetic.perform(SMALL, (Line("mama market", emotion="happy", seconds=1.4),), 4)
  assert not np.array_equal(other.wav, spoken.wav[: len(other.wav)])


def test_sound_is_heard_and_as_long_as_the_picture(spoken):
  assert spoken.wav.dtype == np.float32
  assert len(spoken.wav) == len(spoken.pose) * types.SAMPLE_RATE_HZ // types.FPS
  assert np.sqrt(np.mean(spoken.wav**2)) > 0.02 and np.abs(spoken.wav).max() < 1
  # speech has its weight below 4 kHz and a voice under it
  power = np.abs(np.fft.rfft(spoken.wav)) ** 2
  hz = np.fft.rfftfreq(len(spoken.wav), 1 / types.SAMPLE_RATE_HZ)
  assert power[hz < 4000].sum() > 0.7 * power.sum()


def test_vowels_are_told_apart_by_their_formants():
  # the first two formants of a held vowel stand out over what lies between them
  def weight(vowel, low, high):
    tract = synthetic.perform(Person(seed=0), (Line("mama", seconds=1.0),), 0)
    start, end = next((s, e) for name, s, e in tract.phones if name == vowel)
    piece = tract.wav[int(start * 16000) : int(end * 16000)]
    power = np.abs(np.fft.rfft(piece * np.hanning(len(piece)))) ** 2
    hz = np.fft.rfftfreq(len(piece), 1 / 16000)
    return power[(hz > low) & (hz < high)].mean()

  assert weight("a", 600, 1000) > 4 * weight("a", 2000, 3000)


def test_lips_close_for_m_and_open_for_a_where_the_voice_says_so(spoken, film):
  def frames_in(symbol):
    at = (np.arange(len(spoken.pose)) + 0.5) / types.FPS
    return [
      i for i, t in enumerate(at) for name, s, e in spoken.phones if name == symbol and s <= t < e
    ]

  assert film.lip_gap_mm[frames_in("a")].max() > 6
  assert film.lip_gap_mm[frames_in("m")].min() < 0.3
  # loudness, frame by frame, goes with opening, and best without delay
  energy = np.sqrt((spoken.wav.reshape(len(spoken.pose), -1) ** 2).mean(axis=1))
  lags = range(-5, 6)
  fit = [np.corrcoef(np.roll(energy, lag)[5:-5], film.lip_gap_mm[5:-5])[0, 1] for lag in lags]
  assert fit[5] > 0.4
  assert abs(lags[int(np.argmax(fit))]) <= 1


def test_classes_and_landmarks_agree_with_the_picture(film):
  opened = int(np.argmax(film.lip_gap_px))
  classes, marks = film.classes[opened], film.landmarks[opened]
  assert set(np.unique(classes)) == set(range(6))

  def at(point):
    x, y = point
    return classes[int(y), int(x)]

  assert at(marks[30]) == types.FACE  # nose
  assert at(marks[[62, 66]].mean(axis=0)) == types.MOUTH
  assert at(marks[8] + [0, 4]) == types.NECK  # below the chin
  assert classes[-1, 5] == types.TORSO and classes[2, 2] == types.BACKGROUND
  rows = np.flatnonzero((classes == types.HAIR).any(axis=1))
  assert rows.max() < marks[30, 1] + 20 and rows.min() < marks[19, 1]
  assert (classes[film.teeth[opened]] == types.MOUTH).all()
  # ordering of the 68: jaw from left to right, lids around eyes, inner within outer lips
  assert np.all(np.diff(marks[:17, 0]) > 0)
  assert marks[36, 0] < marks[39, 0] < marks[42, 0] < marks[45, 0]
  assert np.all(marks[37:39, 1] < marks[40:42, 1].max())
  assert marks[51, 1] < marks[62, 1] < marks[66, 1] < marks[57, 1]


def test_the_inside_of_the_mouth_shows_only_between_the_lips(film):
  for classes, marks in zip(film.classes, film.landmarks, strict=True):
    y, x = np.nonzero(classes == types.MOUTH)
    if len(x):
      assert x.min() >= marks[48, 0] - 1.5 and x.max() <= marks[54, 0] + 1.5
      assert y.min() >= marks[48:60, 1].min() - 1 and y.max() <= marks[48:60, 1].max() + 1


def test_layers_make_the_picture(film):
  alpha = film.torso[..., 3:] / 255.0
  behind = film.torso[..., :3] * alpha + film.plate[None] * (1 - alpha)
  assert np.abs(behind - film.background).max() <= 1.5
  away = ~np.isin(film.classes, (types.FACE, types.HAIR, types.MOUTH))
  far = (
    away & np.roll(away, 2, 1) & np.roll(away, -2, 1) & np.roll(away, 2, 2) & np.roll(away, -2, 2)
  )
  assert np.abs(film.image.astype(int) - film.background)[far].max() <= 2
  # behind the chin there is neck, not a hole
  chin = film.landmarks[0, 8].astype(int)
  assert film.torso[0, chin[1] - 2, chin[0], 3] == 255


def test_camera_sees_the_head_where_it_is_drawn(film):
  size = film.image.shape[1]
  for i in (0, len(film.image) // 2):
    inside = np.linalg.inv(film.c2w[i])
    assert abs(np.linalg.norm(film.c2w[i][:3, 3]) - 0.7) < 0.05
    x, y, z = (inside @ [0, 0, 0, 1])[:3]
    at = np.array([size / 2 + film.focal_px * x / -z, size / 2 - film.focal_px * y / -z])
    head = np.isin(film.classes[i], (types.FACE, types.HAIR, types.MOUTH))
    rows, columns = np.nonzero(head)
    assert abs(at[0] - columns.mean()) < 0.08 * size and abs(at[1] - rows.mean()) < 0.08 * size
    assert 0.55 < (np.ptp(rows) + 1) / size < 0.72


def test_a_blink_hides_the_iris():
  person = Person(size_px=128)
  wide = synthetic.render_frames(person, _hold())
  shut = synthetic.render_frames(person, _hold(AU45=2.0))

  def eye(film):
    x, y = film.landmarks[0, 36:42].mean(axis=0).astype(int)
    return film.image[0, y - 2 : y + 3, x - 3 : x + 4].astype(int)

  blue = [(e[..., 2] - e[..., 0]).max() for e in (eye(wide), eye(shut))]
  assert blue[0] > 20 and blue[1] < 0  # blue iris, then only skin and lashes
  lids = [f.landmarks[0, 41, 1] - f.landmarks[0, 37, 1] for f in (wide, shut)]
  assert lids[0] > 2 and lids[1] < 0.5


@pytest.mark.parametrize(
  ("emotion", "unit"),
  [("happy", "AU12"), ("sad", "AU15"), ("angry", "AU04"), ("surprised", "AU05")],
)
def test_stronger_feeling_shows_more(emotion, unit):
  levels = []
  for intensity in (0.0, 0.3, 0.6, 1.0):
    line = Line("mama", 0, emotion, intensity, 1.0)
    levels.append(synthetic.perform(SMALL, (line,), 1).au[:, AU_NAMES.index(unit)].mean())
  assert np.all(np.diff(levels) > 0.3)


def test_a_line_asks_for_units_beside_what_is_felt():
  units = (("AU04", 3.0), ("AU45", 2.0))
  lines = (Line("mama", 0, "happy", 1.0, 1.0, asked) for asked in ((), units))
  plain, asked = (synthetic.perform(SMALL, (line,), 1) for line in lines)
  more = (asked.au - plain.au)[8:17]  # the middle of a second
  brow, lids = AU_NAMES.index("AU04"), AU_NAMES.index("AU45")
  assert (more[:, brow] > 2).all() and (asked.blink[8:17] > 0.9).all()
  np.testing.assert_allclose(np.delete(more, [brow, lids], axis=1), 0, atol=1e-9)
  np.testing.assert_array_equal(asked.wav, plain.wav)


def test_a_smile_lifts_the_corners_and_sadness_drops_them():
  plain, happy, sad = (
    synthetic.render_frames(Person(size_px=128), _hold(**gains)).landmarks[0]
    for gains in ({}, {"AU12": 5.0}, {"AU15": 5.0})
  )
  assert happy[48, 1] < plain[48, 1] - 2 and happy[54, 1] < plain[54, 1] - 2
  assert sad[48, 1] > plain[48, 1] + 1
  assert happy[54, 0] - happy[48, 0] > plain[54, 0] - plain[48, 0] + 2


def test_mouth_opening_is_read_from_pixels():
  spoken = synthetic.perform(Person(), synthetic.held_out_script(), 1)
  every = spoken._replace(**{k: getattr(spoken, k)[::3] for k in ("pose", "mouth", "au")})
  film = synthetic.render_frames(Person(size_px=96), every)
  seen = [synthetic.mouth_opening(i, m) for i, m in zip(film.image, film.landmarks, strict=True)]
  assert np.corrcoef(seen, film.lip_gap_px)[0, 1] > 0.95
  squares = [
    synthetic.mouth_opening(i / 255.0, folder_square(m, 96))
    for i, m in zip(film.image, film.landmarks, strict=True)
  ]
  assert np.corrcoef(squares, film.lip_gap_px)[0, 1] > 0.95


def folder_square(landmarks, size):
  return folder.lip_square(landmarks, size, size)


def test_the_held_out_sentence_was_never_trained_on():
  held = synthetic.held_out_script()
  for seconds in (12.0, 60.0):
    script = synthetic.default_script(seconds)
    words = {word for line in script for word in line.text.split()}
    assert not words & {word for line in held for word in line.text.split()}
    settings = {(line.emotion, line.intensity) for line in script}
    assert all((line.emotion, line.intensity) not in settings for line in held)
    assert {line.emotion for line in script} == set(synthetic.EMOTIONS)
    assert sum(line.seconds for line in script) == pytest.approx(seconds)
  heard = {
    p
    for line in synthetic.default_script(12.0)
    for w in line.text.split()
    for p in language.TRAINING_WORDS[w]
  }
  assert heard == set(language.PHONES) - {language.SILENCE}
  assert not set(language.TRAINING_WORDS) & set(language.HELD_OUT_WORDS)


def test_a_corpus_is_long_varied_and_labelled():
  rows = list(synthetic.corpus(0, 12, 2.0))
  assert len({label for _, label, _, _ in rows}) >= 3
  for wav, _, intensity, expression in rows:
    assert wav.shape == (32000,) and expression.shape == (50, 64) and 0 <= intensity <= 1
  stacked = np.concatenate([expression for *_, expression in rows])
  used = len(synthetic.EXPRESSION_NAMES)
  assert np.all(stacked[:, used:] == 0)
  assert np.all((stacked[:, :used].std(axis=0) > 0.1) & (stacked[:, :used].std(axis=0) < 2))


def test_the_folder_is_whole_and_is_read(tmp_path):
  synthetic.make(tmp_path / "anna", SMALL, seconds=0.8, seed=2, progress=False)
  clip = folder.read(tmp_path / "anna", "train", allow_missing_priors=True)
  rest = folder.read(tmp_path / "anna", "val", allow_missing_priors=True)
  assert len(clip.ids) == 18 == synthetic.training_frames(20) and len(rest.ids) == 2
  assert clip.frames.image.shape == (18, 64, 64, 3)
  truth = np.load(tmp_path / "anna/truth/truth.npz")
  assert truth["lip_gap_px"].shape == (20,) and truth["phone"][0] == "sil"
  np.testing.assert_allclose(clip.guide.blink, truth["blink"][:18], atol=1e-3)
  assert np.load(tmp_path / "anna/expression.npy").shape == (20, 64)
  assert np.load(tmp_path / "anna/aud_mel.npy").shape == (20, 16, 80)
  with wave.open(str(tmp_path / "anna/aud.wav")) as file:
    assert file.getframerate() == 16000 and file.getnframes() == 20 * 640
  assert json.loads((tmp_path / "anna/truth/made.json").read_text())["person"]["size_px"] == 64
  assert (tmp_path / "anna/emotion.csv").read_text().startswith("frame,label,intensity")
  assert consent.summarize(tmp_path / "anna") == consent.NOBODY

  with pytest.raises(UserError, match="exists"):
    synthetic.make(tmp_path / "anna", SMALL, seconds=0.8, progress=False)
  synthetic.make(tmp_path / "bert", SMALL, seconds=0.8, seed=2, progress=False)
  for file in sorted(
    p.relative_to(tmp_path / "anna") for p in (tmp_path / "anna").rglob("*") if p.is_file()
  ):
    assert filecmp.cmp(tmp_path / "anna" / file, tmp_path / "bert" / file, shallow=False), file


@pytest.mark.parametrize(
  "script",
  [
    (),
    (Line("hello xylophone"),),
    (Line("hello", emotion="bored"),),
    (Line("hello", intensity=2.0),),
    (Line("people begin summer", seconds=0.4),),
    (Line("", seconds=None),),
    (Line(seconds=0.0),),
    (Line("hello", units=(("AU99", 1.0),)),),
    (Line("hello", units=(("AU25", 1.0),)),),
    (Line("hello", units=(("AU04", 6.0),)),),
  ],
)
def test_a_bad_script_is_refused_in_one_line(tmp_path, script):
  with pytest.raises(UserError) as error:
    synthetic.make(tmp_path / "x", SMALL, script=script, progress=False)
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())
