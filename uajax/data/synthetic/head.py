"""The head as a mesh: a stack of rings sculpted into a face, with a mouth that truly opens.

Every skin vertex keeps the canonical place (x, y) it had on the smooth head before sculpting;
displacements, paint and landmarks are all functions of that place. The row of the mouth line is
doubled between the corners, so that lips part; behind it stand teeth, tongue and a dark bag.
Head frame: metres, x to the image's right, y up, z to the camera, origin in mid-head.
Axes: v vertices, t triangles, k displacement fields.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator

from uajax import types
from uajax.data.synthetic.language import MOUTH_CONTROLS
from uajax.data.synthetic.performance import AU_NAMES, Person

SEMI_AXES = (0.075, 0.105, 0.090)
MOUTH_Y = -0.0595
NOSE_Y = -0.035  # its base
EYE_X, EYE_Y = 0.0315, 0.008
BROW_Y = 0.0335
JAW_AXIS = (-0.008, -0.005)  # y, z of the hinge
JAW_RAD = 0.165  # at full opening
SKIN, EYEBALL, PLAIN = range(3)  # how a triangle is painted: by texture, or by vertex colour
_ROWS, _COLUMNS = 168, 150
_SIDE_RAD = 2.2  # the rings are open at the back, which no camera sees


@dataclasses.dataclass(frozen=True)
class Shape:
  """What tells one head from another; factors around 1."""

  width: float
  jaw: float
  nose: float
  nose_width: float
  lips: float
  mouth_half: float  # metres
  hair_m: float  # thickness
  hairline_y: float

  @classmethod
  def of(cls, person: Person) -> "Shape":
    rng = np.random.default_rng([17, person.seed])
    u = rng.uniform(-1, 1, 8)
    return cls(
      1 + 0.035 * u[0], 1 + 0.06 * u[1], 1 + 0.12 * u[2], 1 + 0.12 * u[3], 1 + 0.15 * u[4],
      0.0255 + 0.0015 * u[5], 0.0125 + 0.003 * u[6], 0.066 + 0.004 * u[7],
    )  # fmt: skip


class Grid(NamedTuple):
  """Where rows and columns of the skin lie: y of each row, azimuth of each column."""

  y: Float[np.ndarray, " r"]
  azimuth: Float[np.ndarray, " c"]


class Head(NamedTuple):
  """A head at rest and all the ways it moves."""

  shape: Shape
  grid: Grid
  rest: Float[np.ndarray, "v 3"]
  canonical: Float[np.ndarray, "v 2"]
  texcoord: Float[np.ndarray, "v 2"]  # row, column in 0..1
  color: Float[np.ndarray, "v 3"]  # of PLAIN triangles
  inner: Float[np.ndarray, " v"]  # 0 outside .. 1 deep in the mouth: darker, redder
  jaw: Float[np.ndarray, " v"]  # share of the jaw's rotation
  soft: Int[np.ndarray, " m"]  # vertices that any displacement field moves
  fields: Float[np.ndarray, "k m 3"]
  triangles: Int[np.ndarray, "t 3"]
  paint: Int[np.ndarray, " t"]
  classes: Int[np.ndarray, " t"]  # of types; skin under hair is told by the texture
  slit: Int[np.ndarray, "2 s"]  # vertices of the upper and lower lip along the mouth line
  upper: Bool[np.ndarray, " v"]  # vertices that follow the upper lip, where lips close
  lower: Bool[np.ndarray, " v"]


def half_width(y, shape: Shape) -> np.ndarray:
  """Half the head's width at height y, before hair."""
  return (
    SEMI_AXES[0]
    * _round(y)
    * _profile(y, _WIDTH_Y, _WIDTH)
    * (shape.width + (shape.jaw - 1) * _step(-0.02, -0.08, y))
  )


_WIDTH_Y = (-0.105, -0.095, -0.08, -0.06, -0.03, 0.0, 0.05, 0.105)
_WIDTH = (0.86, 0.90, 0.955, 0.97, 0.965, 0.98, 1.02, 1.03)
_FRONT = (1.75, 1.62, 1.36, 1.12, 1.00, 0.985, 1.0, 0.95)


def surface(x, y, shape: Shape) -> np.ndarray:
  """The smooth front of the head at canonical (x, y): [..., 3]."""
  w = half_width(y, shape)
  azimuth = np.arcsin(np.clip(x / w, -1, 1))
  return _ring(y, azimuth, shape)


def place(
  head: Head, xy: Float[np.ndarray, "p 2"]
) -> tuple[Int[np.ndarray, "p 4"], Float[np.ndarray, "p 4"]]:
  """Vertices and weights whose mean lies at canonical (x, y), off the mouth line."""
  azimuth = np.arcsin(np.clip(xy[:, 0] / half_width(xy[:, 1], head.shape), -1, 1))
  row = np.interp(-xy[:, 1], -head.grid.y, np.arange(len(head.grid.y)))
  column = np.interp(azimuth, head.grid.azimuth, np.arange(len(head.grid.azimuth)))
  r = np.clip(row.astype(int), 0, len(head.grid.y) - 2)
  c = np.clip(column.astype(int), 0, len(head.grid.azimuth) - 2)
  fr, fc = row - r, column - c
  n = len(head.grid.azimuth)
  ids = np.stack([r * n + c, r * n + c + 1, (r + 1) * n + c, (r + 1) * n + c + 1], axis=1)
  weights = np.stack([(1 - fr) * (1 - fc), (1 - fr) * fc, fr * (1 - fc), fr * fc], axis=1)
  return ids, weights


def build(person: Person) -> Head:
  """The head of `person`, the same every time."""
  shape = Shape.of(person)
  grid = _grid(shape)
  y, azimuth = (g.reshape(-1) for g in np.meshgrid(grid.y, grid.azimuth, indexing="ij"))
  rows, columns = len(grid.y), len(grid.azimuth)
  base = _ring(y, azimuth, shape)
  x = base[:, 0]
  line = int(np.argmin(np.abs(grid.y - MOUTH_Y)))
  on_line = x[line * columns : (line + 1) * columns]
  inside = np.flatnonzero((np.abs(on_line) < shape.mouth_half) & (np.abs(grid.azimuth) < 1.2))
  span = np.arange(inside[0] - 1, inside[-1] + 2)  # with the corners
  half = float(abs(on_line[span[0]]))

  canonical = np.stack([x, y], axis=1)
  skin = base + _sculpt(x, y, azimuth, half, shape)
  texcoord = np.stack(
    [
      np.repeat(np.arange(rows) / (rows - 1), columns),
      np.tile(np.arange(columns) / (columns - 1), rows),
    ],
    axis=1,
  )
  parts = _Parts()
  parts.add(skin, canonical, texcoord, lower=(y < MOUTH_Y + 1e-9) & (np.abs(y - MOUTH_Y) > 1e-6))
  twin = parts.add(  # the lower lip's copy of the mouth line, without its corners
    skin[line * columns + inside], canonical[line * columns + inside],
    texcoord[line * columns + inside], lower=True,
  )  # fmt: skip
  ids = np.arange(rows * columns).reshape(rows, columns)
  below = ids[line].copy()
  below[inside] = twin
  sheets = [ids[: line + 1], np.concatenate([below[None, :], ids[line + 1 :]], axis=0)]
  for sheet in sheets:
    parts.quads(sheet, SKIN, types.FACE)

  upper, lower = ids[line, span], below[span]
  for lip, sign in ((upper, 1.0), (lower, -1.0)):
    _line_lip(parts, lip, half, sign)
  _furnish_mouth(parts)
  _attach_ears(parts, shape)

  head = parts.finish(shape, grid, np.stack([upper, lower]))
  return head._replace(**_motions(head, half))


def deform(
  head: Head, mouth: Float[np.ndarray, " m"], au: Float[np.ndarray, " u"]
) -> Float[np.ndarray, "v 3"]:
  """The head in its own frame with mouth controls 0..1 and action units 0..5."""
  control = dict(zip(MOUTH_CONTROLS, mouth, strict=True))
  unit = dict(zip(AU_NAMES, au, strict=True))
  gains = np.array([control[name] if name in control else unit[name] / 5 for name in FIELDS])
  points = head.rest.copy()
  points[head.soft] += np.tensordot(gains.astype(head.fields.dtype), head.fields, axes=1)

  angle = JAW_RAD * control["jaw"] * head.jaw
  sine, cosine = np.sin(angle), np.cos(angle)
  dy, dz = points[:, 1] - JAW_AXIS[0], points[:, 2] - JAW_AXIS[1]
  points[:, 1] = JAW_AXIS[0] + cosine * dy - sine * dz
  points[:, 2] = JAW_AXIS[1] + sine * dy + cosine * dz
  return _close(head, points, min(control["close"], 1.0))


# --- shape ------------------------------------------------------------------------------------


def _round(y) -> np.ndarray:
  return np.sqrt(np.clip(1 - (np.asarray(y) / SEMI_AXES[1]) ** 2, 1e-6, 1))


def _profile(y, at, values) -> np.ndarray:
  return PchipInterpolator(at, values)(np.clip(y, at[0], at[-1]))


def _step(a, b, x) -> np.ndarray:
  """Smooth 0 at a, 1 at b (b may be the smaller)."""
  t = np.clip((np.asarray(x) - a) / (b - a), 0, 1)
  return t * t * (3 - 2 * t)


def _bump(x, y, x0, y0, sx, sy) -> np.ndarray:
  return np.exp(-0.5 * (((x - x0) / sx) ** 2 + ((y - y0) / sy) ** 2))


def _ring(y, azimuth, shape) -> np.ndarray:
  y = np.asarray(y, float)
  front = SEMI_AXES[2] * _round(y) * _profile(y, _WIDTH_Y, _FRONT)
  depth = np.where(np.cos(azimuth) > 0, front, SEMI_AXES[2] * _round(y))
  # a squarer front than an ellipse: a face is flatter than an egg
  flat = np.sign(np.cos(azimuth)) * np.abs(np.cos(azimuth)) ** 0.86
  return np.stack([half_width(y, shape) * np.sin(azimuth), y, depth * flat], axis=-1)


def _grid(shape: Shape) -> Grid:
  knots = (0.1049, 0.085, 0.050, -0.030, -0.045, -0.073, -0.090, -0.1049)
  counts = (14, 18, 52, 14, 40, 14, 15)
  pieces = [
    np.linspace(a, b, n, endpoint=False) for a, b, n in zip(knots, knots[1:], counts, strict=False)
  ]
  y = np.concatenate([*pieces, knots[-1:]])
  y[np.argmin(np.abs(y - MOUTH_Y))] = MOUTH_Y
  s = np.linspace(-1, 1, _COLUMNS + 1)
  return Grid(y, _SIDE_RAD * (0.52 * s + 0.48 * s**3))


def mouth_curve(x, half: float) -> np.ndarray:
  """How far the resting mouth line lies above MOUTH_Y: a shallow bow."""
  t = np.clip(np.abs(x) / half, 0, 1.6)
  return 0.0016 * np.where(t < 1, t**2, 1) - 0.0004


def lip_heights(x, half: float, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
  """Height of the red of the upper and of the lower lip at canonical x."""
  t = np.clip(np.abs(x) / half, 0, 1)
  bow = 1 - 0.22 * np.exp(-0.5 * (t / 0.11) ** 2) + 0.06 * np.exp(-0.5 * ((t - 0.24) / 0.12) ** 2)
  upper = 0.0078 * shape.lips * bow * np.sqrt(np.clip(1 - t**1.7, 0, 1))
  lower = 0.0098 * shape.lips * np.sqrt(np.clip(1 - t**2.0, 0, 1))
  return upper, lower


def _sculpt(x, y, azimuth, half, shape) -> np.ndarray:
  side = np.abs(x)
  dz = np.zeros_like(x)
  # nose: a ridge whose height and width change along it, and its wings
  n = y - NOSE_Y - 0.0385
  ridge = PchipInterpolator(
    (-0.047, -0.041, -0.0365, -0.031, -0.026, -0.015, 0.0, 0.016, 0.032),
    np.array((0.0, 0.004, 0.0165, 0.0215, 0.0205, 0.0155, 0.010, 0.0045, 0.0012)) * shape.nose,
  )
  width = (
    np.interp(n, (-0.04, -0.028, -0.012, 0.016), (0.0086, 0.0082, 0.0062, 0.0056))
    * shape.nose_width
  )
  dz += np.where((n > -0.047) & (n < 0.032), ridge(np.clip(n, -0.047, 0.032)), 0) * np.exp(
    -0.5 * (x / width) ** 2
  )
  dz += 0.0075 * _bump(side, n, 0.0125 * shape.nose_width, -0.0335, 0.0042, 0.0050)
  # sockets, eyeballs under the lids, brows, temples, cheekbones, cheeks
  dz -= 0.0090 * _bump(side, y, EYE_X - 0.004, EYE_Y + 0.003, 0.0165, 0.0105)
  dz += 0.0062 * _bump(side, y, EYE_X, EYE_Y - 0.0005, 0.0105, 0.0082)
  dz += 0.0042 * _bump(side, y, 0.028, BROW_Y + 0.001, 0.020, 0.0075)
  dz -= 0.0030 * _bump(side, y, 0.064, 0.022, 0.012, 0.02)
  dz += 0.0035 * _bump(side, y, 0.046, -0.016, 0.014, 0.011)
  dz -= 0.0025 * _bump(side, y, 0.047, -0.052, 0.012, 0.016)
  # the mouth's barrel, the furrow from nose to lip, lips, the hollow below them, the chin
  dz += 0.0055 * _bump(x, y, 0, MOUTH_Y, 0.026, 0.017)
  dz -= 0.0014 * _bump(x, y, 0, 0.5 * (MOUTH_Y + NOSE_Y) + 0.001, 0.0030, 0.0050)
  up, down = lip_heights(x, half, shape)
  above = (y - MOUTH_Y) / np.maximum(up, 1e-4)
  under = (MOUTH_Y - y) / np.maximum(down, 1e-4)
  fullness = np.sqrt(np.clip(1 - (x / (1.06 * half)) ** 2, 0, 1))
  swell_up = np.where(above >= 0, np.exp(-0.5 * ((above - 0.55) / 0.42) ** 2), 0)
  swell_down = np.where(under > 0, np.exp(-0.5 * ((under - 0.5) / 0.40) ** 2), 0)
  dz += fullness * (0.0030 * swell_up + 0.0040 * swell_down)
  dz -= fullness * 0.0016 * np.exp(-0.5 * ((y - MOUTH_Y) / 0.0018) ** 2)
  dz -= 0.0035 * _bump(x, y, 0, MOUTH_Y - 0.0165, 0.020, 0.0045)
  dz += 0.0050 * _bump(x, y, 0, -0.0915, 0.016, 0.0095)
  front = _step(0.0, 0.35, np.cos(azimuth))
  move = np.zeros((len(x), 3))
  move[:, 2] = dz * front
  near = np.exp(-0.5 * ((y - MOUTH_Y) / 0.010) ** 2) * front
  move[:, 1] = mouth_curve(x, half) * near * np.exp(-np.clip(side / half - 1, 0, None) * 4)
  outward = np.stack([np.sin(azimuth), 0.9 * y / SEMI_AXES[1], np.cos(azimuth)], axis=1)
  return move + outward * _hair_bulk(y, azimuth, shape)[:, None]


def _above_hairline(azimuth, y, shape: Shape) -> np.ndarray:
  """Metres above the hairline: swept from a parting, short before the ears."""
  turn = np.abs(azimuth)
  sweep = 0.010 * np.exp(-0.5 * ((azimuth + 0.45) / 0.20) ** 2) - 0.006 * np.sin(
    1.6 * (azimuth - 0.1)
  )
  tufts = 0.0016 * np.sin(21 * azimuth) + 0.0011 * np.sin(47 * azimuth + 1.0)
  line = shape.hairline_y + (sweep + tufts) * _step(1.15, 0.75, turn)
  line = line - 0.020 * _step(0.45, 1.05, turn) - 0.052 * _step(1.06, 1.36, turn)
  return y - (line - 0.018 * _step(1.48, 1.75, turn))


def hair_mask(y, azimuth, shape: Shape) -> np.ndarray:
  """1 under hair, 0 on bare skin, soft between."""
  return _step(-0.002, 0.006, _above_hairline(azimuth, y, shape))


def _hair_bulk(y, azimuth, shape: Shape) -> np.ndarray:
  """How far hair stands off, in metres. It swells slowly from the hairline, since the mesh
  is too coarse at the sides for a step."""
  turn = np.abs(azimuth)
  strands = 0.07 * np.sin(17 * azimuth + 60 * y) + 0.05 * np.sin(31 * azimuth - 95 * y)
  strands = 1 + strands * _step(0.103, 0.085, y)
  crown = 0.80 + 0.50 * _step(0.045, 0.095, y) - 0.35 * _step(0.8, 1.3, turn) * _step(0.06, 0.0, y)
  parting = 1 - 0.22 * np.exp(-0.5 * ((azimuth + 0.50) / 0.09) ** 2) * _step(0.05, 0.07, y) * _step(
    0.103, 0.09, y
  )
  sides = _step(0.8, 1.1, turn)
  swell = _step(-0.002, 0.010 + 0.050 * sides, _above_hairline(azimuth, y, shape))
  return shape.hair_m * strands * crown * parting * swell


# --- parts ------------------------------------------------------------------------------------


class _Parts:
  """Gathers vertices and triangles while the head is put together."""

  def __init__(self):
    self.count = 0
    self.columns: dict[str, list[np.ndarray]] = {
      name: [] for name in ("rest", "canonical", "texcoord", "color", "inner", "group", "rigid")
    }
    self.triangles: list[np.ndarray] = []
    self.paint: list[np.ndarray] = []
    self.classes: list[np.ndarray] = []

  def add(
    self,
    rest,
    canonical=None,
    texcoord=None,
    *,
    color: ArrayLike = (0.5, 0.5, 0.5),
    inner: ArrayLike = 0.0,
    lower: ArrayLike = False,
    rigid: float = np.nan,
  ):
    """`rigid` is the share of the jaw's rotation; NaN lets the skin's own law decide."""
    n = len(rest)
    column = self.columns
    column["rest"].append(np.asarray(rest, float))
    column["canonical"].append(np.full((n, 2), 9.0) if canonical is None else canonical)
    column["texcoord"].append(np.zeros((n, 2)) if texcoord is None else texcoord)
    column["color"].append(np.broadcast_to(np.asarray(color, float), (n, 3)))
    column["inner"].append(np.broadcast_to(np.asarray(inner, float), (n,)))
    column["group"].append(np.broadcast_to(np.asarray(lower), (n,)))
    column["rigid"].append(np.broadcast_to(np.asarray(rigid, float), (n,)))
    ids = np.arange(self.count, self.count + n)
    self.count += n
    return ids

  def quads(self, ids, paint, label):
    """Triangulates a sheet of vertices, [r c]."""
    a, b, c, d = ids[:-1, :-1], ids[:-1, 1:], ids[1:, :-1], ids[1:, 1:]
    both = np.concatenate(
      [np.stack([a, c, b], -1).reshape(-1, 3), np.stack([b, c, d], -1).reshape(-1, 3)]
    )
    self.triangles.append(both)
    self.paint.append(np.full(len(both), paint))
    self.classes.append(np.full(len(both), label))

  def get(self, name):
    return np.concatenate(self.columns[name])

  def finish(self, shape, grid, slit) -> Head:
    empty = np.zeros(0)
    lower = self.get("group").astype(bool)
    return Head(
      shape=shape, grid=grid, rest=self.get("rest"), canonical=self.get("canonical"),
      texcoord=self.get("texcoord"), color=self.get("color"), inner=self.get("inner"),
      jaw=self.get("rigid"), soft=empty, fields=empty, slit=slit, upper=~lower, lower=lower,
      triangles=np.concatenate(self.triangles).astype(np.int32),
      paint=np.concatenate(self.paint).astype(np.int32),
      classes=np.concatenate(self.classes).astype(np.int32),
    )  # fmt: skip


def _line_lip(parts: _Parts, lip, half, sign):
  """The inside of a lip: the skin rolls in from the mouth line and darkens."""
  rest, canonical, texcoord = (parts.get(k)[lip] for k in ("rest", "canonical", "texcoord"))
  full = np.sqrt(np.clip(1 - (canonical[:, 0] / half) ** 2, 0, 1))
  sheet = [lip]
  for back, turn, inner in (
    (0.0025, 0.0004, 0.15),
    (0.0055, 0.0022, 0.45),
    (0.0095, 0.0060, 0.9),
    (0.016, 0.012, 1.0),
  ):
    moved = rest + np.stack([0 * full, sign * turn * full, -back * np.ones_like(full)], axis=1)
    sheet.append(parts.add(moved, canonical, texcoord, inner=inner, lower=sign < 0))
  for k in range(len(sheet) - 1):
    parts.quads(np.stack(sheet[k : k + 2]), SKIN, types.FACE if k < 2 else types.MOUTH)


def _furnish_mouth(parts: _Parts):
  # a dark bag behind everything
  u, v = np.meshgrid(np.linspace(-1, 1, 9), np.linspace(-1, 1, 9), indexing="ij")
  low = np.clip(-v, 0, 1)  # narrower and deeper below, so as to stay within the chin
  bag = np.stack([
    0.033 * u * (1 - 0.4 * low), MOUTH_Y - 0.001 + 0.021 * v, 0.040 + 0.016 * u**4 * (1 - low),
  ], -1)  # fmt: skip
  ids = parts.add(bag.reshape(-1, 3), color=(0.13, 0.035, 0.04), rigid=0.4)
  parts.quads(ids.reshape(9, 9), PLAIN, types.MOUTH)
  _set_teeth(parts, top=MOUTH_Y + 0.0100, bottom=MOUTH_Y - 0.0027, width=0.0255, rigid=0.0, edge=-1)
  _set_teeth(parts, top=MOUTH_Y - 0.0025, bottom=MOUTH_Y - 0.0135, width=0.0200, rigid=1.0, edge=1)
  # tongue: half an ellipsoid lying on the jaw
  u, v = np.meshgrid(np.linspace(-1, 1, 17), np.linspace(0, 1, 11), indexing="ij")
  angle = np.pi / 2 * u
  tongue = np.stack([
    0.0185 * np.sin(angle), MOUTH_Y - 0.0095 + 0.0065 * np.sin(np.pi * v) - 0.001 * u**2,
    0.055 + 0.0215 * np.cos(angle) * np.sin(np.pi / 2 * (1 - v)) ** 0.7,
  ], -1)  # fmt: skip
  tint = np.array([0.60, 0.23, 0.23]) * (0.75 + 0.25 * np.cos(np.pi * u)[..., None] ** 2)
  ids = parts.add(tongue.reshape(-1, 3), color=tint.reshape(-1, 3), inner=-1.0, rigid=0.9)
  parts.quads(ids.reshape(17, 11), PLAIN, types.MOUTH)


TEETH = -2.0  # `inner` of teeth vertices, which tells them from gums and tongue


def _set_teeth(parts: _Parts, top, bottom, width, rigid, edge):
  """A row of teeth along an arch; `edge` is the side (-1 below, 1 above) where they bite."""
  s, h = np.meshgrid(np.linspace(-1, 1, 73), np.linspace(0, 1, 9), indexing="ij")
  x = width * s
  phase = np.abs(np.mod(x / 0.0049 + 0.5, 1) - 0.5) * 2  # 0 at the middle of a tooth, 1 between two
  bite = h if edge < 0 else 1 - h  # 1 at the biting edge
  y = top + (bottom - top) * h - edge * 0.0009 * (phase**4) * bite
  z = 0.0815 - 16.0 * x**2 - 0.0006 * phase**4 - (0.0022 if edge > 0 else 0)
  white = (
    np.array([0.93, 0.90, 0.83])
    * (1 - 0.16 * phase[..., None] ** 6)
    * (1 - 0.30 * s[..., None] ** 4)
  )
  gum = np.array([0.66, 0.32, 0.32])
  blend = _step(0.30, 0.42, bite + 0.10 * (1 - phase))[..., None]
  color = gum + (white - gum) * blend
  # sheets run in rows: height first
  order = lambda g: np.moveaxis(g, 1, 0)  # noqa: E731
  points = order(np.stack([x, y, z], -1))
  inner = np.where(order(blend)[..., 0] > 0.5, TEETH, -1.0)
  ids = parts.add(
    points.reshape(-1, 3), color=order(color).reshape(-1, 3), inner=inner.reshape(-1), rigid=rigid
  )
  parts.quads(ids.reshape(9, 73), PLAIN, types.MOUTH)


def _attach_ears(parts: _Parts, shape):
  u, v = np.meshgrid(np.linspace(0, np.pi, 13), np.linspace(0, 2 * np.pi, 25), indexing="ij")
  for side in (-1.0, 1.0):
    x = 0.0075 * np.sin(u) * np.cos(v)
    y = 0.027 * np.cos(u)
    z = 0.014 * np.sin(u) * np.sin(v)
    y, z = y - 0.25 * z, z + 0.1 * y
    x = side * (half_width(0.0, shape) + 0.0015 + x + 0.25 * np.clip(-z, 0, 1))
    points = np.stack([x, -0.008 + y, -0.010 + z], -1)
    ids = parts.add(points.reshape(-1, 3), color=(-1, -1, -1), inner=0.0, rigid=0.0)
    parts.quads(ids.reshape(13, 25), PLAIN, types.FACE)


# --- motion -----------------------------------------------------------------------------------

FIELDS = (
  "width", "round", "part", "tuck", "press", "tongue",
  "AU01", "AU02", "AU04", "AU06", "AU07", "AU12", "AU15", "AU23",
)  # fmt: skip


def _motions(head: Head, half: float) -> dict:
  """Jaw weights and displacement fields as functions of the canonical place."""
  x, y = head.canonical.T
  skin = x < 5  # teeth, tongue, bag and ears have no place on the skin
  lower, side = head.lower, np.abs(x)
  front = np.where(skin, _step(-0.03, 0.02, head.rest[:, 2]), 0)
  reach = np.exp(-0.5 * ((y - MOUTH_Y) / 0.016) ** 2) * front  # how near the mouth line
  open_ = np.clip(1 - (x / half) ** 2, 0, 1) ** 0.75
  hang = _step(-0.030, -0.086, y)
  jaw = np.where(lower, hang + (1 - hang) * open_, hang * (1 - open_))
  jaw *= _step(-0.035, 0.03, head.rest[:, 2])
  jaw = np.where(np.isnan(head.jaw), jaw, head.jaw)

  zero = np.zeros_like(x)
  lip = np.clip(1 - (x / (1.15 * half)) ** 2, 0, 1)
  near = np.exp(-0.5 * ((y - MOUTH_Y) / 0.0085) ** 2) * front
  corner = _bump(side, y, half, MOUTH_Y, 0.014, 0.015) * front
  smile = _bump(np.hypot(x, 0.009), y, half, MOUTH_Y, 0.0165, 0.016) * front  # no kink amid
  sign = np.sign(x) * np.clip(side / 0.006, 0, 1)
  lift = np.where(lower, -1.0, 1.0)
  brow_in = _bump(side, y, 0.017, BROW_Y + 0.004, 0.011, 0.014) * front
  brow_out = _bump(side, y, 0.044, BROW_Y + 0.002, 0.012, 0.014) * front
  brow = _bump(side, y, 0.028, BROW_Y, 0.021, 0.010) * front
  cheek = _bump(side, y, 0.040, -0.024, 0.014, 0.013) * front
  taper = np.exp(-np.clip(side / half - 1, 0, None) * 2.2)
  pull = np.clip(side / half, 0, 1) * taper * reach  # along the lips, fading in the cheeks

  def field(dx=zero, dy=zero, dz=zero):
    return np.stack([dx + zero, dy + zero, dz + zero], axis=1)

  tongue = ~skin & (head.inner == -1.0) & (head.color[:, 0] < 0.62) & (head.jaw == 0.9)
  tip = np.where(tongue, _step(0.055, 0.076, head.rest[:, 2]), 0)
  fields = {
    "width": field(sign * 0.0045 * pull, 0.0006 * corner, -0.0022 * corner),
    "round": field(
      -0.40 * x * np.exp(-0.5 * (side / (1.1 * half)) ** 4) * reach,
      lift * 0.0018 * lip * near,
      0.0075 * np.exp(-0.5 * (x / (0.8 * half)) ** 2) * near,
    ),
    "part": field(dy=np.where(lower, -0.0030, 0.0026) * lip * near),
    "tuck": field(
      dy=np.where(lower, 0.0030, 0.0014) * lip * near, dz=np.where(lower, -0.0062, 0) * lip * near
    ),
    "press": field(dy=-0.35 * (y - MOUTH_Y) * lip * near, dz=-0.0022 * lip * near),
    "tongue": field(dy=0.0105 * tip, dz=0.0035 * tip),
    "AU01": field(dy=0.0068 * brow_in),
    "AU02": field(dy=0.0068 * brow_out),
    "AU04": field(
      -sign * 0.0030 * brow_in, -0.0058 * brow_in - 0.0030 * brow_out, 0.0016 * brow_in
    ),
    "AU06": field(dy=0.0042 * cheek, dz=0.0050 * cheek),
    "AU07": field(dy=-0.0008 * brow),
    "AU12": field(
      sign * 0.0080 * pull,
      0.0108 * smile + 0.0030 * cheek + np.where(lower, -0.0006, 0.0008) * lip * near,
      -0.0050 * corner + 0.0035 * cheek - 0.0014 * lip * near,
    ),
    "AU15": field(sign * 0.0010 * corner, -0.0080 * corner, -0.0010 * corner),
    "AU23": field(-sign * 0.0022 * pull, -0.30 * (y - MOUTH_Y) * lip * near, -0.0012 * lip * near),
  }
  stacked = np.stack([fields[name] for name in FIELDS]).astype(np.float32)
  soft = np.flatnonzero(np.abs(stacked).max(axis=(0, 2)) > 1e-6)  # a micrometre
  return {"jaw": jaw, "soft": soft, "fields": stacked[:, soft]}


def _close(head: Head, points, amount: float):
  """Brings the lips together by `amount` of the gap between them, the lower lip doing most."""
  if amount <= 0:
    return points
  upper, lower = points[head.slit[0]], points[head.slit[1]]
  at = head.canonical[head.slit[0], 0]
  gap = (upper - lower) * amount
  x, y = head.canonical.T
  lips = np.flatnonzero((x > at[0]) & (x < at[-1]) & (np.abs(y - MOUTH_Y) < 0.05))
  fade = np.exp(-0.5 * ((y[lips] - MOUTH_Y) / np.where(head.lower[lips], 0.016, 0.010)) ** 2)
  share = np.where(head.lower[lips], 0.72, -0.28) * fade
  for c in range(3):
    points[lips, c] += share * np.interp(x[lips], at, gap[:, c])
  return points
