"""What the face does, in numbers: action units, tracked expression, and how late the sound is.

Action units bear OpenFace's names and scale, 0 (absent) to 5 (strongest). They come from the 52
blendshape scores and from lengths measured on the landmarks in the head's axes.

A score s that rises only when something happens is lifted: with the rest r that the person's face
reads (the 10th percentile of the clip: the network takes some faces for frowning ones) it becomes
clip((s - r) / (1 - r)). Brows and corners of the mouth go both ways from rest, so theirs is the
median, and raised and lowered are counted from it. Left and right are averaged; + is a mean of
what is named, "or" the larger:

  AU01 browInnerUp raised + height of the inner brows raised
  AU02 browOuterUp raised + height of the outer brows raised
  AU04 browDown, or (browInnerUp lowered + height of the outer brows lowered)
  AU05 eyeWide                AU06 cheekSquint, or 0.6 mouthSmile
  AU07 eyeSquint              AU09 noseSneer              AU10 mouthUpperUp
  AU12 mouthSmile             AU14 mouthDimple            AU17 mouthShrugLower
  AU15 mouthFrown, and half of how far the corners of the mouth are lowered
  AU20 mouthStretch           AU23 height of the lips' red lowered
  AU25 gap of the inner lips  AU26 jawOpen + gap          AU45 eyelid closure + eyeBlink

AU05 and AU07 are bridged over blinks, which are not theirs. AU25 is measured: 5 is a gap of 25 mm.
AU45 is the mean of two closures, each 0 (the clip's open eye) to 1 (shut), times 3: of the lids as
measured, and of the score.

AU23, the lip tightener, makes the red of the lips narrow and holds it so; the network hardly sees
it, and mouthPress and mouthRoll are other units (AU24, AU28). So it is measured: how much lower
than usual (the clip's median) the red of both lips is, a fifth counting 5, as a mean over about a
fifth of a second, without what lasts less than that: lips that speak press and round too.

On the procedural person, whose units are known, all of its units correlate by more than 0.8 with
the truth (tests/uajax/preprocess/truth_test.py).

Axes: f frames, b blendshapes, p landmarks.
"""

from typing import NamedTuple

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Bool, Float

from uajax.preprocess import landmarks as marks
from uajax.types import EXPRESSION, FPS, SAMPLE_RATE_HZ

_PAIRS = {
  "AU05": "eyeWide", "AU07": "eyeSquint", "AU09": "noseSneer", "AU10": "mouthUpperUp",
  "AU12": "mouthSmile", "AU14": "mouthDimple", "AU15": "mouthFrown", "AU20": "mouthStretch",
}  # fmt: skip
BROW_M = 0.006  # motion of a brow from rest, up or down, that counts 5
CORNER_M = 0.006  # the same of the corners of the mouth
TIGHT = 0.2  # share by which the red of the tightest lips is lower
# Narrow lips for less than half of these frames are speech; over these (standard deviation) it is
# smoothed.
PRESSED_FRAMES, TIGHT_FRAMES = 9, 5
EYEBALL_M = 0.012  # radius
# A closure beyond which, and the frames about it in which, the eyes' other scores tell of a blink.
BLINK, BLINK_FRAMES = 0.3, 3
SHUT = 3.0  # AU45 of shut eyes
WIDE_GAP_M = 0.025  # AU25 = 5
NAMES = tuple(f"AU{n:02d}" for n in (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 25, 26, 45))
MAX_OFFSET = 12  # frames
# Lips move before they are heard: where picture and sound are together, the sound follows what the
# lips do by so much (75 ms; measured on clips whose offset is known).
LEAD_FRAMES = 1.9


class Measures(NamedTuple):
  """Lengths on the face in the head's axes, metres; a row a frame."""

  gap: Float[np.ndarray, " f"]  # of the inner lips
  height: Float[np.ndarray, " f"]  # of the lips, outer edge to outer edge
  width: Float[np.ndarray, " f"]  # of the mouth
  lids: Float[np.ndarray, " f"]  # opening of the eyes over their width
  brow_inner: Float[np.ndarray, " f"]  # of the brows' inner ends over the eyes' inner corners
  brow_outer: Float[np.ndarray, " f"]  # of their outer ends over the eyes' outer corners
  corners: Float[np.ndarray, " f"]  # of the mouth's corners over its middle
  red: Float[np.ndarray, " f"]  # mean height of the red of both lips


class Offset(NamedTuple):
  """How many frames the sound comes after the picture."""

  frames: float  # best guess, positive where the sound is late
  clear: bool  # whether the evidence is
  correlation: float  # between lips and sound at that offset
  margin: float  # how much it exceeds offsets that are more than two frames away


def measure(points: Float[np.ndarray, "f p 3"]) -> Measures:
  """Measures landmarks given in the head's axes (track.unproject)."""

  def apart(a: int, b: int) -> np.ndarray:
    return np.linalg.norm(points[:, a] - points[:, b], axis=-1)

  gap = (apart(13, 14) + apart(81, 178) + apart(311, 402)) / 3
  right = (apart(159, 145) + apart(158, 153) + apart(160, 144)) / 3 / apart(33, 133)
  left = (apart(386, 374) + apart(385, 380) + apart(387, 373)) / 3 / apart(263, 362)

  def height(*some: int) -> np.ndarray:
    return points[:, list(some), 1].mean(1)

  return Measures(
    gap, apart(0, 17), apart(61, 291), (right + left) / 2,
    height(55, 107, 285, 336) - height(133, 362),
    height(46, 53, 63, 70, 276, 283, 293, 300) - height(33, 263),
    height(61, 291) - height(13, 14),
    (apart(0, 13) + apart(37, 82) + apart(267, 312)
     + apart(17, 14) + apart(84, 87) + apart(314, 317)) / 6,
  )  # fmt: skip


def look(
  points: Float[np.ndarray, "f p 3"],
  closed: Float[np.ndarray, " f"],
  present: Bool[np.ndarray, " f"],
) -> Float[np.ndarray, "f 2"]:
  """Where the eyes look in the head's axes: degrees to the picture's right, and degrees up.

  From how far the irises lie off the middle of their eyes' corners, on an eyeball of EYEBALL_M;
  the mean of both eyes. Straight ahead is the clip's median, since the corners' middle is not
  before the pupil in every face. Over blinks (`closed` is AU45) and frames without a face it
  goes on evenly; it is 0 throughout where the eyes are never seen open.
  """
  away = []
  for iris, corners in ((468, (33, 133)), (473, (362, 263))):
    middle = points[:, list(corners), :2].mean(1)
    away.append(points[:, iris, :2] - middle)
  both = np.mean(away, axis=0)
  shut = present & (closed > SHUT * BLINK)
  near = np.asarray(ndi.binary_dilation(shut, iterations=BLINK_FRAMES), bool)
  seeing = np.flatnonzero(present & ~near)
  if not len(seeing):
    return np.zeros((len(points), 2))
  both = both - np.median(both[seeing], axis=0)
  found = np.degrees(np.arcsin(np.clip(both / EYEBALL_M, -1, 1)))
  frames = np.arange(len(points))
  return np.stack([np.interp(frames, seeing, row) for row in found[seeing].T], 1)


def estimate(
  scores: Float[np.ndarray, "f b"], measures: Measures, present: Bool[np.ndarray, " f"]
) -> dict[str, Float[np.ndarray, " f"]]:
  """Action units of every frame by name, 0..5; frames without a face get their neighbours'."""
  found = np.flatnonzero(present)
  scores = scores[found]

  def score(name: str) -> np.ndarray:
    return scores[:, marks.BLENDSHAPES.index(name)]

  def pair(stem: str) -> np.ndarray:
    return (score(stem + "Left") + score(stem + "Right")) / 2

  def lifted(value: np.ndarray) -> np.ndarray:
    rest = min(float(np.percentile(value, 10)), 0.9)
    return np.clip((value - rest) / (1 - rest), 0, 1)

  def raised(value: np.ndarray, full: float) -> np.ndarray:
    return np.clip((value - np.median(value)) / full, 0, 1)

  lids = measures.lids[found]
  wide = max(float(np.percentile(lids, 75)), 1e-6)
  # Shut lids still lie about a seventh of the open distance apart, by the landmarks.
  closed = np.clip((1 - lids / wide - 0.15) / 0.6, 0, 1)
  blink = pair("eyeBlink")
  rest = float(np.percentile(blink, 25))
  read = np.clip((blink - rest - 0.05) / max(0.75 - rest, 0.2), 0, 1)
  shut = (closed + read) / 2
  near = np.asarray(ndi.binary_dilation(shut > BLINK, iterations=BLINK_FRAMES), bool)
  seeing = np.flatnonzero(~near)

  def bridged(value: np.ndarray) -> np.ndarray:
    if not len(seeing):
      return value
    return np.interp(np.arange(len(value)), seeing, value[seeing])

  units = {name: lifted(pair(stem)) for name, stem in _PAIRS.items()}
  units["AU05"] = lifted(bridged(pair("eyeWide")))
  units["AU07"] = lifted(bridged(pair("eyeSquint")))
  inner, outer = measures.brow_inner[found], measures.brow_outer[found]
  up = bridged(score("browInnerUp"))
  units["AU01"] = (raised(up, 0.3) + raised(bridged(inner), BROW_M)) / 2
  units["AU02"] = (
    raised(bridged(pair("browOuterUp")), 0.4) + raised(bridged(outer), BROW_M)
  ) / 2
  lowered = (raised(-up, 0.5) + raised(-bridged(outer), BROW_M)) / 2
  units["AU04"] = np.maximum(lifted(pair("browDown")), lowered)
  # The network hardly ever reads cheekSquint; cheeks rise when the mouth smiles.
  units["AU06"] = np.maximum(lifted(pair("cheekSquint")), 0.6 * lifted(pair("mouthSmile")))
  sunk = raised(-measures.corners[found], CORNER_M)
  units["AU15"] = np.clip(units["AU15"] + 0.5 * sunk, 0, 1)
  units["AU17"] = lifted(score("mouthShrugLower"))
  red = ndi.median_filter(measures.red[found], PRESSED_FRAMES, mode="nearest")
  red = ndi.gaussian_filter1d(red, TIGHT_FRAMES, mode="nearest")
  units["AU23"] = raised(-red / max(float(np.median(red)), 1e-6), TIGHT)
  gap = np.clip(measures.gap[found] / WIDE_GAP_M, 0, 1)
  units["AU25"] = gap
  units["AU26"] = np.clip((lifted(score("jawOpen")) + gap) / 2, 0, 1)
  units["AU45"] = SHUT / 5 * shut
  everywhere = np.arange(len(present))
  return {name: 5 * np.interp(everywhere, found, units[name]) for name in NAMES}


def express(
  scores: Float[np.ndarray, "f b"],
  points: Float[np.ndarray, "f p 3"],
  measures: Measures,
  present: Bool[np.ndarray, " f"],
) -> Float[np.ndarray, "f 64"]:
  """The tracked expression that the priors learn to hear.

  Columns: 0..50 the blendshape scores but `_neutral`, 51 gap of the inner lips, 52 height of the
  lips, 53 width of the mouth, 54..63 principal parts of the motion of lips and chin in the head's
  axes. All have mean 0; scores and measures have variance 1 (scores that hardly move less: their
  divisor is at least 0.02), principal parts are divided by the first's spread, so that later ones
  stay as small as they are. Frames without a face get their neighbours' mean.
  """
  found = np.flatnonzero(present)
  plain = scores[found, 1:]
  lengths = np.stack([measures.gap, measures.height, measures.width], 1)[found]
  lower = sorted({*marks.OUTER_LIPS, *marks.INNER_LIPS, 152, 148, 377, 175, 199})
  moved = points[found][:, lower, :2].reshape(len(found), -1)
  moved = moved - moved.mean(0)
  _, _, axes = np.linalg.svd(moved, full_matrices=False)
  room = EXPRESSION - plain.shape[1] - lengths.shape[1]
  axes = axes[:room]
  # The sign of a principal part is arbitrary: let each open or lower the mouth, where it can.
  axes = axes * np.where(axes.sum(1, keepdims=True) < 0, -1.0, 1.0)
  parts = moved @ axes.T
  parts = parts / max(float(parts[:, :1].std()), 1e-6)
  table = np.concatenate(
    [
      (plain - plain.mean(0)) / np.maximum(plain.std(0), 0.02),
      (lengths - lengths.mean(0)) / np.maximum(lengths.std(0), 1e-4),
      parts,
    ],
    axis=1,
  )
  out = np.zeros((len(present), EXPRESSION))
  everywhere = np.arange(len(present))
  for column in range(table.shape[1]):
    out[:, column] = np.interp(everywhere, found, np.clip(table[:, column], -8, 8))
  return out


def find_offset(
  measures: Measures,
  speech: Float[np.ndarray, " s"],
  present: Bool[np.ndarray, " f"],
) -> Offset:
  """Compares how the lips move with how the sound does, at offsets of up to half a second.

  At each offset the lips' opening is predicted from the sound's spectrum by ridge regression,
  fitted and judged on different parts of the clip. Evidence is clear where the best offset
  explains enough and every third of the clip, taken alone, names about the same.
  """
  frames = len(present)
  found = np.flatnonzero(present)
  if len(found) < 75:
    return Offset(0.0, False, 0.0, 0.0)
  everywhere = np.arange(frames)
  lips = np.stack(
    [_band(np.interp(everywhere, found, m[found])) for m in (measures.gap, measures.height)], 1
  )
  lips = lips / np.maximum(lips.std(0), 1e-9)
  sound = _spectrum(speech, frames)
  lags = np.arange(-MAX_OFFSET, MAX_OFFSET + 1)
  skill = np.stack([_skill(lips, sound, int(lag), present) for lag in lags])  # lags, parts
  total = skill.mean(1)
  best = int(np.argmax(total))
  far = np.abs(lags - lags[best]) > 2
  margin = float(total[best] - total[far].max())
  inner = int(np.clip(best, 1, len(lags) - 2))
  a, b, c = total[inner - 1 : inner + 2]
  bend = a - 2 * b + c
  fine = lags[best] + (0.5 * (a - c) / bend if bend < 0 and inner == best else 0.0)
  votes = lags[np.argmax(skill, axis=0)]
  agreed = np.abs(votes - lags[best]).max() <= 2
  clear = bool(total[best] > 0.2 and margin > 0.03 and agreed and inner == best)
  return Offset(float(fine) - LEAD_FRAMES, clear, float(total[best]), margin)


def shift_sound(speech: Float[np.ndarray, " s"], frames: int) -> Float[np.ndarray, " s"]:
  """Moves the sound `frames` earlier (later if negative), at equal length, filled with silence."""
  move = frames * SAMPLE_RATE_HZ // FPS
  out = np.zeros_like(speech)
  if move >= 0:
    out[: max(len(speech) - move, 0)] = speech[move:]
  else:
    out[-move:] = speech[:move]
  return out


def _skill(lips, sound, lag: int, present, parts: int = 3) -> np.ndarray:
  """Correlation of predicted and true lips in each part of the clip, fitted on the others."""
  frames = np.arange(len(lips))
  heard = frames + lag
  usable = (heard >= 0) & (heard < len(sound)) & present
  frames, heard = frames[usable], heard[usable]
  part = np.minimum(frames * parts // len(lips), parts - 1)
  out = np.zeros(parts)
  for held in range(parts):
    fit, test = part != held, part == held
    if fit.sum() < 30 or test.sum() < 15:
      continue
    x, y = sound[heard[fit]], lips[frames[fit]]
    mean = x.mean(0)
    lhs = (x - mean).T @ (x - mean) + 0.1 * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(lhs, (x - mean).T @ (y - y.mean(0)))
    guess = (sound[heard[test]] - mean) @ weights
    truth = lips[frames[test]]
    guess, truth = guess - guess.mean(0), truth - truth.mean(0)
    spread = np.sqrt((guess**2).sum(0) * (truth**2).sum(0))
    out[held] = float(((guess * truth).sum(0) / np.maximum(spread, 1e-9)).mean())
  return out


def _spectrum(speech, frames: int) -> Float[np.ndarray, "f d"]:
  """Log energies in 16 bands about each frame's time, over 60 ms, unit variance."""
  hop, size = SAMPLE_RATE_HZ // FPS, 960
  padded = np.pad(np.asarray(speech, np.float64), (size, size + hop * frames))
  starts = (np.arange(frames) + 0.5) * hop + size - size / 2
  rows = padded[starts.astype(int)[:, None] + np.arange(size)[None]] * np.hanning(size)[None]
  power = np.abs(np.fft.rfft(rows, axis=1)) ** 2
  edges = np.geomspace(100, 6000, 17) / SAMPLE_RATE_HZ * size
  bins = np.arange(power.shape[1])
  bands = np.stack(
    [power[:, (bins >= a) & (bins <= b)].mean(1) for a, b in zip(edges, edges[1:], strict=False)], 1
  )
  level = max(float(bands.mean()), 1e-12)
  logs = np.log(bands + 1e-4 * level)
  logs = np.stack([_band(column) for column in logs.T], 1)
  return logs / np.maximum(logs.std(0), 1e-9)


def _band(values: Float[np.ndarray, " f"]) -> Float[np.ndarray, " f"]:
  """Takes away what changes slower than speech does (about 0.7 s)."""
  size = 19
  window = np.hanning(size + 2)[1:-1]
  window /= window.sum()
  return values - np.convolve(np.pad(values, size // 2, mode="edge"), window, mode="valid")
