import numpy as np
import pytest

from uajax import types
from uajax.preprocess import action_units, landmarks

FRAMES = 200


def make_measures(gap=None, lids=None, **more):
  still = np.full(FRAMES, 0.003)
  return action_units.Measures(
    gap=still if gap is None else gap,
    height=still + 0.015 if gap is None else gap + 0.015,
    width=still + 0.045,
    lids=np.full(FRAMES, 0.3) if lids is None else lids,
    **{name: more.get(name, still) for name in ("brow_inner", "brow_outer", "corners", "red")},
  )


def make_scores(**ramps):
  scores = np.full((FRAMES, 52), 0.05)
  for name, values in ramps.items():
    for side in ("", "Left", "Right"):
      if name + side in landmarks.BLENDSHAPES:
        scores[:, landmarks.BLENDSHAPES.index(name + side)] = values
  return scores


@pytest.mark.parametrize(
  ("unit", "score"),
  [("AU01", "browInnerUp"), ("AU04", "browDown"), ("AU05", "eyeWide"), ("AU06", "mouthSmile"),
   ("AU07", "eyeSquint"), ("AU12", "mouthSmile"), ("AU17", "mouthShrugLower"),
   ("AU26", "jawOpen"), ("AU45", "eyeBlink")],
)  # fmt: skip
def test_units_rise_with_their_scores_and_stay_in_range(unit, score):
  ramp = np.linspace(0, 1, FRAMES)
  present = np.ones(FRAMES, bool)
  units = action_units.estimate(make_scores(**{score: ramp}), make_measures(), present)
  assert set(units) == set(action_units.NAMES) >= {*types.ACTION_UNITS, "AU25"}
  assert (np.diff(units[unit]) >= 0).all() and np.ptp(units[unit]) > 1
  assert all((u >= 0).all() and (u <= 5).all() for u in units.values())
  # A face that always looks so is at rest.
  always = action_units.estimate(make_scores(**{score: 0.6}), make_measures(), present)
  assert always[unit].max() < 0.5


def test_brows_and_corners_are_counted_from_rest_both_ways():
  height = np.full(FRAMES, 0.025)
  height[:40], height[-40:] = 0.031, 0.020  # raised, then frowning
  measures = make_measures(brow_inner=height, brow_outer=height, corners=height)
  scores = make_scores(browInnerUp=np.where(height > 0.03, 0.9, np.where(height < 0.021, 0.3, 0.6)))
  units = action_units.estimate(scores, measures, np.ones(FRAMES, bool))
  rest = slice(60, 140)
  for unit in ("AU01", "AU02"):
    assert units[unit][:40].min() > 2 and units[unit][rest].max() == units[unit][-40:].max() == 0
  assert units["AU04"][-40:].min() > 2 and units["AU04"][:140].max() == 0
  assert units["AU15"][-40:].min() > 1 and units["AU15"][:140].max() == 0


def test_lips_are_tight_that_stay_narrow():
  red = np.full(FRAMES, 0.008)
  red[20:23] = 0.004  # pressed for a sound
  red[100:150] = 0.007
  units = action_units.estimate(make_scores(), make_measures(red=red), np.ones(FRAMES, bool))
  assert units["AU23"][115:135].min() > 2.5
  assert max(units["AU23"][:80].max(), units["AU23"][170:].max()) < 0.1


def test_eyes_that_turn_are_seen_to():
  points = np.zeros((5, landmarks.LANDMARKS, 3))
  points[:, [33, 133, 362, 263], 0] = (-0.045, -0.017, 0.017, 0.045)
  points[:, [468, 473], 0] = (-0.031, 0.031)
  turned = np.radians([0, 20, -20, 0, 0])
  lifted = np.radians([0, 0, 0, 12, 0])
  points[:, [468, 473], 0] += 0.012 * np.sin(turned)[:, None]
  points[:, [468, 473], 1] += 0.012 * np.sin(lifted)[:, None]
  present, open_eyes = np.ones(5, bool), np.zeros(5)
  found = action_units.look(points, open_eyes, present)
  np.testing.assert_allclose(found, np.degrees([turned, lifted]).T, atol=0.01)


def test_gaze_goes_on_over_blinks_and_frames_without_a_face():
  points = np.zeros((40, landmarks.LANDMARKS, 3))
  points[:, [33, 133, 362, 263], 0] = (-0.045, -0.017, 0.017, 0.045)
  points[:, [468, 473], 0] = (-0.031, 0.031)
  points[19:22, [468, 473], 1] -= 0.006  # lids that shut push the irises down
  points[30:33, [468, 473], 0] += 0.012
  closed, present = np.zeros(40), np.ones(40, bool)
  closed[20], present[30:33] = 3, False
  np.testing.assert_allclose(action_units.look(points, closed, present), 0, atol=1e-9)
  assert (action_units.look(points, np.full(40, 3.0), present) == 0).all()


def test_a_blink_and_an_open_mouth_are_measured():
  lids, gap = np.full(FRAMES, 0.3), np.full(FRAMES, 0.002)
  lids[50:53], gap[100:110] = (0.15, 0.05, 0.2), 0.02
  scores = make_scores(eyeBlink=np.where(lids < 0.12, 0.8, 0.1))
  units = action_units.estimate(scores, make_measures(gap, lids), np.ones(FRAMES, bool))
  assert units["AU45"][51] > 2 and units["AU45"][:49].max() < 0.2
  assert units["AU25"][105] == pytest.approx(5 * 0.02 / 0.025) and units["AU25"][0] < 1


def test_frames_without_a_face_take_their_neighbours_values():
  ramp = np.linspace(0, 1, FRAMES)
  present = np.ones(FRAMES, bool)
  present[80:90] = False
  scores = make_scores(browInnerUp=ramp)
  scores[~present] = 0
  units = action_units.estimate(scores, make_measures(), present)
  assert (np.diff(units["AU01"]) >= -1e-9).all()


def test_expression_is_finite_centred_and_follows_the_mouth():
  rng = np.random.default_rng(0)
  open_m = np.abs(np.sin(np.arange(FRAMES) / 3)) * 0.015
  points = np.tile(rng.normal(size=(1, 478, 3)) * 0.03, (FRAMES, 1, 1))
  points[:, [14, 87, 317, 17, 84, 314, 152], 1] -= open_m[:, None]
  measures = make_measures(gap=open_m)
  scores = make_scores(jawOpen=open_m / 0.02)
  table = action_units.express(scores, points, measures, np.ones(FRAMES, bool))
  assert table.shape == (FRAMES, types.EXPRESSION) and np.isfinite(table).all()
  np.testing.assert_allclose(table.mean(0), 0, atol=1e-6)
  assert np.corrcoef(table[:, 51], open_m)[0, 1] > 0.999
  assert abs(np.corrcoef(table[:, 54], open_m)[0, 1]) > 0.999
  quiet = action_units.express(scores * 0, points[:1].repeat(FRAMES, 0), make_measures(),
                               np.ones(FRAMES, bool))
  np.testing.assert_allclose(quiet, 0, atol=1e-9)


def speak(frames, seed):
  """Noise whose loudness and colour follow a slow random opening; the opening itself."""
  rng = np.random.default_rng(seed)
  kernel = np.hanning(9)
  opening = np.convolve(rng.normal(size=frames + 8), kernel / kernel.sum(), "valid")
  opening = (opening - opening.min()) / np.ptp(opening)
  t = np.arange(frames * 640)
  loud = np.interp(t / 640 - 0.5, np.arange(frames), opening) ** 2
  return opening, (0.3 * loud * rng.normal(size=len(t))).astype(np.float32)


def test_late_sound_is_noticed_and_moved():
  opening, speech = speak(400, 1)
  measures = action_units.Measures(*[0.01 * opening] * 8)
  present = np.ones(400, bool)
  base = action_units.find_offset(measures, speech, present)
  late = action_units.find_offset(measures, action_units.shift_sound(speech, -4), present)
  assert base.clear and late.clear
  assert base.frames == pytest.approx(-action_units.LEAD_FRAMES, abs=0.4)
  assert late.frames - base.frames == pytest.approx(4, abs=0.4)
  back = action_units.shift_sound(action_units.shift_sound(speech, -4), 4)
  assert len(back) == len(speech) and (back[: -4 * 640] == speech[: -4 * 640]).all()


def test_unrelated_or_no_sound_is_no_evidence():
  opening, _ = speak(300, 2)
  _, other = speak(300, 3)
  measures = action_units.Measures(*[0.01 * opening] * 8)
  present = np.ones(300, bool)
  assert not action_units.find_offset(measures, other, present).clear
  assert not action_units.find_offset(measures, np.zeros(300 * 640, np.float32), present).clear
  assert not action_units.find_offset(measures, other, np.arange(300) < 40).clear


def test_real_clip_lags_by_four_frames(shared):
  from uajax import media
  from uajax.preprocess import landmarks as marks

  clip = shared("data/clips/obama_20s.mp4")
  landmarker = marks.Landmarker(shared("models/face_landmarker.task"))
  pairs = ((image, False) for image in media.read_frames(clip))
  points = [seen.points for seen in marks.follow(pairs, landmarker)]
  pixels = np.stack(points)
  # Distances between the eyes' outer corners make them metres; head motion hardly matters.
  size = np.linalg.norm(pixels[:, 33, :2] - pixels[:, 263, :2], axis=1) / 0.09
  measures = action_units.measure(pixels / size[:, None, None])
  speech = media.read_audio(clip)[: len(points) * 640]
  found = action_units.find_offset(measures, speech, np.ones(len(points), bool))
  assert found.clear and found.frames == pytest.approx(4, abs=1)
