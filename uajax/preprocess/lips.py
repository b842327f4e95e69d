"""Finds the inner edges of the lips in the picture itself, to a fraction of a pixel.

Landmarks follow the lips well and miss their inner edges by a pixel or more, where an open mouth
is often ten pixels high. A lip looks much the same in all frames of a clip: from its middle it
darkens to the line where it turns inwards, while what lies behind it (teeth, tongue, gums, dark)
changes. So a clip's lips are learnt from some of its frames: how light and how red they are at
each distance from the edge, against all that is seen inside. The edges then run where both
pictures fit best, as smooth as the landmarks' own, and at last to where teeth begin, if these show
right behind the lip. No network, no weights.

A chart is the mouth straightened: columns run from one corner to the other, rows down across the
lips; its unit is half the mouth's width. Lip 0 is the upper one, lip 1 the lower; an edge is a
height in each column, growing downwards.
Axes: f frames, r rows, c columns, t tones (light, red), s places of an edge, k distances, b bins.
"""

from typing import NamedTuple

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from uajax.preprocess import landmarks as marks

ROWS, COLUMNS = 160, 64
ACROSS = (np.arange(COLUMNS) + 0.5) / COLUMNS * 2.12 - 1.06  # of each column; corners at -1, 1
FINEST = 0.01  # rows are no lower than this
REACH = 20  # rows that an edge may lie off the landmarks' line
# How a lip looks is known at so many distances from its edge, so far apart, the first so far away:
# nearer, a pixel shows both sides. They shrink and grow as the lip does.
DISTANCES, APART, FIRST = 10, 0.02, 0.02
PARTS = 8  # from the mouth's middle to its corners, each with a look of its own
LEAST_SPREAD = (0.06, 0.02)  # of tones: noise and compression
LIGHT, RED = (-2.6, 1.1), (-0.28, 0.12)  # range of tones against the lip's own, in
BINS = (40, 24)
ANYTHING = 0.1  # share of what may be seen inside, whatever its tone
CLEAR = 4.0  # the most that one pixel can say, as a log of odds
FAR = 0.6  # what pixels beyond the farthest distance weigh
STIFF, NEAR = 1.1, 2.0  # what an edge's bends, and its distance from the landmarks, cost
# Share of the landmarks' height of a lip's red that is left at least: a lip that is lit unusually
# may look like a tongue. Landmarks miss by less, but for small faces.
THINNEST = 0.85
STEEPEST = 1.5  # opening against the distance from the corner
OPEN = 0.06  # opening from which on a mouth shows its inside
THIN = 0.08  # width of the dark line between a lip and teeth
TEETH = 0.15  # share of the open mouths' columns that show teeth right behind the lip
SAMPLES = 64  # frames to learn from,
LEAST_OPEN = 4  # of which so many must show an open mouth
ROUNDS = 3  # by tone alone, and as many by distance from the edge
_SIDES = (1, -1)  # an upper lip lies above its edge
_MIDDLE = np.abs(ACROSS) < 0.7
_PART = np.clip((np.abs(ACROSS) * PARTS).astype(int), 0, PARTS - 1)
_UPPER, _LOWER = marks.INNER_LIPS[:11], marks.INNER_LIPS[:1] + marks.INNER_LIPS[:9:-1]
_INNER = ([61, *_UPPER, 291], [61, *_LOWER, 291])
_OUTER = (marks.OUTER_LIPS[:11], marks.OUTER_LIPS[:1] + marks.OUTER_LIPS[:9:-1])


class Charts(NamedTuple):
  """Straightened mouths of frames."""

  middle: Float[np.ndarray, "f 2"]  # pixels
  along: Float[np.ndarray, "f 2"]  # unit vector from the person's right corner to the left
  half: Float[np.ndarray, " f"]  # half the mouth's width, pixels
  top: Float[np.ndarray, " f"]  # of the first row
  step: Float[np.ndarray, " f"]  # height of a row
  tones: Float32[np.ndarray, "f t r c"]  # log of the lightness; share of red over green
  green: Float32[np.ndarray, "f r c"]  # 0..255: lips are dark in it, teeth are not
  inner: Float[np.ndarray, "f 2 c"]  # the landmarks' edges
  outer: Float[np.ndarray, "f 2 c"]


class Look(NamedTuple):
  """What a clip's lips look like; tones against those of the same lip's red in the same frame."""

  # Its tone at distances from the edge, in parts of the mouth; None where only densities count.
  tone: Float[np.ndarray, "2 t p k"] | None
  spread: Float[np.ndarray, "2 t p k"] | None
  inside: Float[np.ndarray, "2 b"]  # log density of what is seen behind
  beyond: Float[np.ndarray, "2 b"]  # of all that lies outside
  height: Float[np.ndarray, "2"]  # usual height of each lip's red
  # What tells teeth from tongue and gums: the reds (as in tones) of teeth and of lips, and the
  # lips' green.
  teeth: Float[np.ndarray, "3"]


def chart(
  images: list[UInt8[np.ndarray, "h w 3"]] | UInt8[np.ndarray, "f h w 3"],
  points: Float[np.ndarray, "f p 3"],
) -> Charts:
  """Straightens the mouths in pictures with their landmarks."""
  right, left = points[:, 61, :2].astype(float), points[:, 291, :2].astype(float)
  middle, half = (right + left) / 2, np.maximum(np.linalg.norm(left - right, axis=1) / 2, 1.0)
  along = (left - right) / (2 * half[:, None])
  down = np.stack([-along[:, 1], along[:, 0]], 1)
  place = np.einsum(
    "fpd,afd->fpa", points[..., :2] - middle[:, None], np.stack([along, down])
  ) / half[:, None, None]  # fmt: skip
  inner, outer = (
    np.stack([[_line(p[ids]) for ids in lips] for p in place]) for lips in (_INNER, _OUTER)
  )
  top, bottom = outer[:, 0].min(1) - 0.12, outer[:, 1].max(1) + 0.12
  step = np.maximum((bottom - top) / ROWS, FINEST)
  width = 2.12 / COLUMNS
  straight = []
  for f, image in enumerate(images):
    x, y = along[f] * half[f] * width, down[f] * half[f] * step[f]
    corner = middle[f] - 1.06 * half[f] * along[f] + top[f] * half[f] * down[f]
    data = (x[0], y[0], corner[0], x[1], y[1], corner[1])
    straight.append(np.asarray(Image.fromarray(np.asarray(image)).transform(
      (COLUMNS, ROWS), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR
    )))  # fmt: skip
  colour = np.stack(straight).astype(np.float32)
  light = np.log(colour @ np.array([0.4, 0.5, 0.1], np.float32) + 6)
  red = (colour[..., 0] - colour[..., 1]) / (colour.sum(-1) + 30)
  return Charts(
    middle, along, half, top, step, np.stack([light, red], 1), colour[..., 1], inner, outer
  )


def join(charts: list[Charts]) -> Charts:
  """Charts one after the other."""
  return Charts(*(np.concatenate(field) for field in zip(*charts, strict=True)))


def learn(charts: Charts) -> Look | None:
  """What the lips look like, from frames spread over a clip; None where hardly one is open."""
  at, look = charts.inner, None
  for n in range(2 * ROUNDS):
    look = _fit(charts, at, by_tone=n < ROUNDS)
    if look is None:
      return None
    at = _search(charts, look, at)
  look = _fit(charts, at)
  return look and look._replace(teeth=_judge_teeth(charts, at))


def find(charts: Charts, look: Look | None) -> Float[np.ndarray, "f 2 c"]:
  """The lips' inner edges; the landmarks' where nothing was learnt."""
  at = np.stack([charts.inner[:, 0], np.maximum(charts.inner[:, 0], charts.inner[:, 1])], 1)
  if look is None:
    return at
  for _ in range(2):  # the second time by the lips' own tones and heights
    at = _search(charts, look, at)
  return _snap(charts, at)


def measure_reds(charts: Charts, edges: Float[np.ndarray, "f 2 c"]) -> Float[np.ndarray, " f"]:
  """How high the red of the lips is, the mean of both, in half the mouth's width."""
  middle = np.abs(ACROSS) < 0.5
  heights = [side * (edges[:, lip] - charts.outer[:, lip]) for lip, side in enumerate(_SIDES)]
  return np.mean(heights, axis=0)[:, middle].mean(1)


def measure_gaps(edges: Float[np.ndarray, "f 2 c"]) -> Float[np.ndarray, " f"]:
  """How far the inner edges are apart on average, in half the mouth's width."""
  return (edges[:, 1] - edges[:, 0])[:, np.abs(ACROSS) < 0.5].mean(1)


def outline(
  charts: Charts, edges: Float[np.ndarray, "f 2 c"]
) -> Float[np.ndarray, "f n 2"]:
  """The inner mouths as closed polygons in pixels."""
  some = np.abs(ACROSS) <= 1
  down = np.stack([-charts.along[:, 1], charts.along[:, 0]], 1)
  around = np.concatenate([edges[:, 0, some], edges[:, 1, some][:, ::-1]], 1)
  across = np.concatenate([ACROSS[some], ACROSS[some][::-1]])
  place = across[:, None] * charts.along[:, None] + around[..., None] * down[:, None]
  return charts.middle[:, None] + charts.half[:, None, None] * place


def _line(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " c"]:
  """Heights of a polyline in every column; where it turns back, of its farthest reach."""
  x = np.maximum.accumulate(points[:, 0]) + 1e-6 * np.arange(len(points))
  return np.interp(ACROSS, x, points[:, 1])


def _heights(charts: Charts) -> Float[np.ndarray, "f r 1"]:
  """Of the rows' middles."""
  return (charts.top[:, None] + (np.arange(ROWS) + 0.5) * charts.step[:, None])[..., None]


def _reds(charts: Charts, at: np.ndarray, lip: int) -> Float[np.ndarray, "f t c"]:
  """A lip's own tones: the mean of its red, along which they change slowly."""
  v, side = _heights(charts), _SIDES[lip]
  edge, rim = at[:, lip, None], charts.outer[:, lip, None]
  within = side * (v - rim) > 0.04
  weight = (within & (side * (edge - v) > 0.05)) + 1e-4 * (side * (v - rim) > 0) + 1e-9
  weight = weight[:, None].astype(np.float32)
  sums, total = (charts.tones * weight).sum(2), weight.sum(2)
  return ndi.gaussian_filter1d(sums, 4, axis=-1, mode="nearest") / ndi.gaussian_filter1d(
    total, 4, axis=-1, mode="nearest"
  )


def _red_heights(charts: Charts, at: np.ndarray, lip: int) -> Float[np.ndarray, " f"]:
  height = _SIDES[lip] * (at[:, lip] - charts.outer[:, lip])
  return np.maximum(height, 0.02)[:, _MIDDLE].mean(1)


def _sample(charts: Charts, layer: np.ndarray, at: np.ndarray) -> np.ndarray:
  """Values of a layer [f r c] at heights [f c n]."""
  row = (at - charts.top[:, None, None]) / charts.step[:, None, None] - 0.5
  row = np.clip(row, 0, ROWS - 1.001)
  low = row.astype(np.int32)
  f, c = np.arange(len(at))[:, None, None], np.arange(COLUMNS)[None, :, None]
  return layer[f, low, c] * (1 - (row - low)) + layer[f, low + 1, c] * (row - low)


def _bin(tones: np.ndarray) -> np.ndarray:
  """Number of the bin of each pair of tones, [t ...]."""
  pairs = zip(tones, (LIGHT, RED), BINS, strict=True)
  first, second = (
    np.clip((v - low) * (n / (high - low)), 0, n - 1).astype(np.int32)
    for v, (low, high), n in pairs
  )
  return first * BINS[1] + second


def _density(bins: np.ndarray) -> Float[np.ndarray, " b"]:
  """Log density of tones that fell into these bins."""
  count = np.bincount(bins, minlength=BINS[0] * BINS[1]).astype(float)
  soft = ndi.gaussian_filter(count.reshape(BINS), 1.0, mode="nearest").ravel()
  share = (1 - ANYTHING) * soft / max(soft.sum(), 1e-9) + ANYTHING / soft.size
  area = (LIGHT[1] - LIGHT[0]) * (RED[1] - RED[0]) / soft.size
  return np.log(share / area)


def _fit(charts: Charts, at: Float[np.ndarray, "f 2 c"], by_tone: bool = False) -> Look | None:
  """What lips look like whose edges are about `at`; `by_tone`: whatever the distance."""
  is_open = (at[:, 1] - at[:, 0])[:, np.abs(ACROSS) < 0.5].mean(1) > OPEN
  if is_open.sum() < LEAST_OPEN:
    return None
  v = _heights(charts)
  deep, off = (0.06, 0.0) if by_tone else (0.05, 0.06)
  inside = (v > at[:, None, 0] + deep) & (v < at[:, None, 1] - deep) & is_open[:, None, None]
  distance = FIRST + np.arange(DISTANCES) * APART
  tones, spreads, densities, beyonds, heights = [], [], [], [], []
  for lip, side in enumerate(_SIDES):
    reds = _reds(charts, at, lip)
    bins = _bin((charts.tones - reds[:, :, None]).swapaxes(0, 1))
    densities.append(_density(bins[inside]))
    beyonds.append(_density(bins[side * (at[:, None, lip] - v) > off]))
    height = _red_heights(charts, at, lip)
    heights.append(float(np.median(height[is_open])))
    if by_tone:
      continue
    edge = at[:, lip] + side * _find_end(charts, at[:, lip], side, is_open)
    away = distance * _scale(height, heights[-1])[:, None, None]
    seen = np.stack([
      _sample(charts, charts.tones[:, t], edge[..., None] - side * away) - reds[:, t, :, None]
      for t in (0, 1)
    ])[:, is_open]  # fmt: skip
    parts = [seen[:, :, p == _PART].reshape(2, -1, DISTANCES) for p in range(PARTS)]
    tone = np.stack([np.median(part, 1) for part in parts], 1)
    spread = np.stack(
      [1.5 * np.median(np.abs(s - m[:, None]), 1)
       for s, m in zip(parts, tone.swapaxes(0, 1), strict=True)], 1
    )  # fmt: skip
    tones.append(ndi.gaussian_filter1d(tone, 0.7, axis=1, mode="nearest"))
    spread = ndi.gaussian_filter1d(spread, 1.0, axis=1, mode="nearest")
    spreads.append(np.maximum(spread, np.array(LEAST_SPREAD)[:, None, None]))
  look = Look(
    None, None, np.stack(densities), np.stack(beyonds), np.array(heights), np.zeros(3)
  )  # fmt: skip
  return look if by_tone else look._replace(tone=np.stack(tones), spread=np.stack(spreads))


def _judge_teeth(charts: Charts, at: Float[np.ndarray, "f 2 c"]) -> Float[np.ndarray, "3"]:
  """Look.teeth; teeth are the least red of what is lighter than lips inside open mouths."""
  v = _heights(charts)
  red = charts.tones[:, 1]
  lip = np.zeros(red.shape, bool)
  for n, side in enumerate(_SIDES):
    lip |= (side * (at[:, None, n] - v) > 0.06) & (side * (v - charts.outer[:, None, n]) > 0.06)
  lip &= _MIDDLE
  lip_red, lip_green = (float(np.median(x[lip])) if lip.any() else 0 for x in (red, charts.green))
  inside = (v > at[:, None, 0] + 0.02) & (v < at[:, None, 1] - 0.02) & (charts.green > lip_green)
  pale = float(np.percentile(red[inside], 10)) if inside.sum() > 20 else 0.0
  return np.array([pale, lip_red, lip_green])


def _scale(height: Float[np.ndarray, " f"], usual: float) -> Float[np.ndarray, " f"]:
  """How much a lip is stretched across: a smile makes it narrow."""
  return np.clip(height / usual, 0.4, 1.7)


def _rise(
  charts: Charts, edge: np.ndarray, side: int, back: float, on: float, ahead: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Where it gets bright behind the darkest line about an edge, [f c].

  The line is looked for from `back` before the edge to `on` behind it, the rise no farther than
  `ahead` behind the line. Returns offsets from the edge (half-way up, inwards), the greens below
  and above, and the line's offset.
  """
  fine = 0.005
  offsets = np.arange(-back, on + ahead + fine / 2, fine)
  green = _sample(charts, charts.green, edge[..., None] + side * offsets)
  line = np.where(offsets <= on + 1e-9, green, np.inf).argmin(-1)
  low = np.take_along_axis(green, line[..., None], -1)
  after = (offsets > offsets[line][..., None]) & (offsets < (offsets[line] + ahead)[..., None])
  after = np.where(after, green, -1)
  high = after.max(-1, keepdims=True)
  half = (low + high) / 2
  first = (after > half).argmax(-1)[..., None]
  above = np.take_along_axis(green, first, -1)
  below = np.take_along_axis(green, np.maximum(first - 1, 0), -1)
  at = offsets[first] - fine * (above - half) / np.maximum(above - below, 1e-3)
  return at[..., 0], low[..., 0], high[..., 0], offsets[line]


def _find_end(charts: Charts, edge: np.ndarray, side: int, is_open: np.ndarray) -> float:
  """How much farther inwards the lips end than `edge` says, in all frames alike.

  They end where teeth begin right behind them, in most columns where that is so; 0 in clips that
  hardly show such teeth.
  """
  some = is_open[:, None] & _MIDDLE
  at, low, high, line = (x[some] for x in _rise(charts, edge, side, 0.06, 0.06, 0.07))
  # The dark line is thin; behind a wide dark gap teeth say nothing about the lip.
  offsets = np.arange(-0.14, 0.06, 0.005)
  green = _sample(charts, charts.green, edge[..., None] + side * offsets)[some]
  level = low + 0.3 * (green[:, :6].mean(-1) - low)
  dark = (green < level[:, None]) & (offsets <= line[:, None])
  width = at - (line - 0.005 * dark.sum(-1))
  teeth = (high > 2 * low + 20) & (width < THIN)
  if teeth.mean() < TEETH:
    return 0.0
  cells = np.arange(-0.1, 0.16, 0.0025)
  count = ndi.gaussian_filter1d(np.histogram(at[teeth], cells)[0].astype(float), 3)
  return float(cells[count.argmax()] + 0.00125)


def _snap(charts: Charts, at: Float[np.ndarray, "f 2 c"]) -> Float[np.ndarray, "f 2 c"]:
  """Edges moved to where teeth begin, if these show within a pixel or so."""
  out = at.copy()
  for lip, (side, reach, ahead) in enumerate(zip(_SIDES, (0.045, 0.02), (0.06, 0.03), strict=True)):
    move, low, high, _ = _rise(charts, at[:, lip], side, reach, reach, ahead)
    seen = (high > 1.7 * low + 15) & (np.abs(move) < reach)
    weight = ndi.gaussian_filter1d(seen.astype(float), 1, axis=1)
    moved = ndi.gaussian_filter1d(np.where(seen, move, 0), 1, axis=1) / np.maximum(weight, 0.35)
    out[:, lip] += np.where(at[:, 1] > at[:, 0] + 0.01, side * moved, 0)
  out[:, 1] = np.maximum(out[:, 0], out[:, 1])
  return out


def _search(
  charts: Charts, look: Look, at: Float[np.ndarray, "f 2 c"]
) -> Float[np.ndarray, "f 2 c"]:
  """The likeliest edges near the landmarks'; `at` says about where the lips' reds end."""
  states = np.arange(-REACH, REACH + 1)
  steps = charts.step[:, None, None]
  places, gains = [], []
  for lip in (0, 1):
    line = np.round((charts.inner[:, lip] - charts.top[:, None]) / charts.step[:, None])
    index = np.clip(line.astype(int)[..., None] + states, 0, ROWS)
    value = _score(charts, look, at, lip)
    f, c = np.arange(len(value))[:, None, None], np.arange(COLUMNS)[None, :, None]
    places.append(charts.top[:, None, None] + index * steps)
    off = np.abs(places[-1] - charts.inner[:, lip, :, None])
    rim, side = charts.outer[:, lip, :, None], _SIDES[lip]
    least = THINNEST * side * (charts.inner[:, lip, :, None] - rim)
    lacks = np.maximum(least - side * (places[-1] - rim), 0)
    gains.append(value[f, index, c] - NEAR / 0.05 * off - 1e3 * lacks)
  room = STEEPEST * np.maximum(1.02 - np.abs(ACROSS), 0)[None, :, None]
  upper, lower = charts.inner[:, 0], charts.inner[:, 1]
  for _ in range(2):  # each lip in turn stays on its side of the other
    lower = _follow(places[1], gains[1], places[1] - upper[..., None], room)
    upper = _follow(places[0], gains[0], lower[..., None] - places[0], room)
  return np.stack([upper, np.maximum(upper, lower)], 1)


def _score(charts: Charts, look: Look, at: np.ndarray, lip: int) -> Float[np.ndarray, "f r+1 c"]:
  """How much speaks for a lip's edge between two rows, but for a constant in each column."""
  side = _SIDES[lip]
  reds = _reds(charts, at, lip).astype(np.float32)
  scale = _scale(_red_heights(charts, at, lip), float(look.height[lip]))
  odds = (look.beyond[lip] - look.inside[lip]).astype(np.float32)
  edges = np.arange(ROWS + 1)
  out = np.zeros((len(at), ROWS + 1, COLUMNS), np.float32)
  for f, (tones, step) in enumerate(zip(charts.tones, charts.step, strict=True)):
    own = tones - reds[f, :, None]
    bins = _bin(own)
    beyond, weight = 0, 1.0
    if look.tone is not None and look.spread is not None:
      fit = _compare(own, look.tone[lip], look.spread[lip])
      fit = np.clip(fit - look.inside[lip].astype(np.float32)[bins], -CLEAR, CLEAR)
      for k in range(DISTANCES):
        rows = round((FIRST + k * APART) * scale[f] / step - 0.5)
        seen = edges - 1 - rows if side > 0 else edges + rows
        out[f] += 100 * APART * scale[f] * fit[k, np.clip(seen, 0, ROWS - 1)]
      beyond = round((FIRST + (DISTANCES - 0.5) * APART) * scale[f] / step)
      weight = FAR
    far = np.clip(odds[bins], -CLEAR, CLEAR)
    sums = np.concatenate([np.zeros((1, COLUMNS), np.float32), np.cumsum(far, 0)])
    out[f] += 100 * weight * side * step * sums[np.clip(edges - side * beyond, 0, ROWS)]
  return out


def _compare(
  own: Float32[np.ndarray, "t r c"], tone: np.ndarray, spread: np.ndarray
) -> Float32[np.ndarray, "k r c"]:
  """Log density of each pixel's tones at each distance from the edge of a lip."""
  mean, width = (x[:, _PART].swapaxes(1, 2)[:, :, None].astype(np.float32) for x in (tone, spread))
  off = np.minimum(((own[:, None] - mean) / width) ** 2, 16)
  return -0.5 * (off[0] + off[1]) - np.log(2 * np.pi * width[0] * width[1])


def _follow(
  places: Float[np.ndarray, "f c s"],
  gains: Float[np.ndarray, "f c s"],
  opening: Float[np.ndarray, "f c s"],
  room: Float[np.ndarray, "1 c 1"],
) -> Float[np.ndarray, "f c"]:
  """The smooth edge that gains most, by dynamic programming along the columns.

  `opening` is how far the mouth would be open at each place, which is to lie in 0..room.
  """
  cost = np.where(opening < -1e-6, 1e3 * (1 - opening), 0) - gains
  cost += 1e3 * np.maximum(opening - room, 0)
  jump = np.arange(-4, 5)
  price = STIFF * jump.astype(float) ** 2
  frames, columns, states = cost.shape
  best = cost[:, 0]
  came = np.zeros((columns, frames, states), np.int32)
  for c in range(1, columns):
    padded = np.pad(best, ((0, 0), (4, 4)), constant_values=1e9)
    options = np.stack([padded[:, 4 + j : 4 + j + states] + p
                        for j, p in zip(jump, price, strict=True)])  # fmt: skip
    came[c] = options.argmin(0) - 4
    best = options.min(0) + cost[:, c]
  state = best.argmin(1)
  path, every = np.zeros((frames, columns), np.int32), np.arange(frames)
  for c in range(columns - 1, -1, -1):
    path[:, c] = state
    state = state + came[c, every, state]
  return np.take_along_axis(places, path[..., None], 2)[..., 0]
