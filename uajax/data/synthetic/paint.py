"""Colours: skin, lips, brows and hair on a texture, eyes drawn anew each frame, cloth, room.

Colours are display values 0..1; light is applied to their squares (a display's rough gamma).
Axes: r c texels (rows down the head, columns around it), s samples, h w pixels.
"""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter, zoom

from uajax.data.synthetic import head as heads
from uajax.data.synthetic.head import EYE_X, EYE_Y, Grid, Shape
from uajax.data.synthetic.performance import Person

_SKINS = ((0.90, 0.73, 0.63), (0.84, 0.63, 0.50), (0.74, 0.53, 0.41), (0.55, 0.37, 0.28))
_HAIRS = ((0.22, 0.14, 0.09), (0.10, 0.08, 0.07), (0.43, 0.28, 0.15), (0.33, 0.15, 0.08))
_IRISES = ((0.30, 0.42, 0.52), (0.33, 0.22, 0.13), (0.32, 0.40, 0.27), (0.24, 0.16, 0.10))
_SHIRTS = ((0.19, 0.29, 0.42), (0.40, 0.20, 0.22), (0.22, 0.35, 0.30), (0.30, 0.30, 0.34))
_WALLS = ((0.66, 0.70, 0.72), (0.74, 0.69, 0.62), (0.58, 0.65, 0.66), (0.70, 0.66, 0.71))


@dataclasses.dataclass(frozen=True)
class Palette:
  skin: np.ndarray
  hair: np.ndarray
  iris: np.ndarray
  shirt: np.ndarray
  wall: np.ndarray
  brow: float  # thickness, around 1

  @classmethod
  def of(cls, person: Person) -> "Palette":
    rng = np.random.default_rng([19, person.seed])

    def pick(table):
      k = 0 if person.seed == 0 else int(rng.integers(len(table)))
      return np.clip(np.array(table[k]) * rng.uniform(0.97, 1.03, 3), 0, 1)

    return cls(
      *(pick(t) for t in (_SKINS, _HAIRS, _IRISES, _SHIRTS, _WALLS)), brow=rng.uniform(0.85, 1.15)
    )

  @property
  def lip(self) -> np.ndarray:
    return self.skin * (0.84, 0.56, 0.58)


def _noise(rng, shape, cells, order=3) -> np.ndarray:
  """Smooth noise of about unit variance with `cells` = (rows, columns) of detail."""
  coarse = rng.standard_normal((cells[0] + 3, cells[1] + 3))
  factors = (shape[0] / cells[0], shape[1] / cells[1])
  return np.asarray(zoom(coarse, factors, order=order))[: shape[0], : shape[1]]


def skin_texture(
  person: Person, grid: Grid, shape: Shape, half: float
) -> Float[np.ndarray, "r c 4"]:
  """Colour and, last, how much of the texel is hair."""
  look = Palette.of(person)
  rng = np.random.default_rng([23, person.seed])
  rows = int(np.clip(3 * person.size_px, 240, 900))  # a little finer than the samples
  texels = rows, columns = rows, rows * 7 // 9
  at_row = np.linspace(0, len(grid.y) - 1, rows)
  at_column = np.linspace(0, len(grid.azimuth) - 1, columns)
  y = np.interp(at_row, np.arange(len(grid.y)), grid.y)[:, None] + np.zeros((1, columns))
  azimuth = np.interp(at_column, np.arange(len(grid.azimuth)), grid.azimuth)[None, :] + np.zeros(
    (rows, 1)
  )
  x = heads.half_width(y, shape) * np.sin(azimuth)
  side = np.abs(x)
  front = np.cos(azimuth) > 0

  tone = np.ones((rows, columns, 3)) * look.skin
  mottle = 0.016 * _noise(rng, texels, (26, 20)) + 0.010 * _noise(rng, texels, (130, 100))
  tone *= (1 + mottle)[..., None]

  def tint(mask, color, amount):
    weight = (np.clip(mask, 0, 1) * amount)[..., None]
    tone[:] = tone * (1 - weight) + np.asarray(color) * weight

  bump = lambda *a: heads._bump(side, y, *a)  # noqa: E731
  nose = heads.NOSE_Y
  rosy = look.skin * np.array([1.0, 0.80, 0.78])
  tint(bump(0.044, -0.024, 0.015, 0.014), rosy, 0.40)
  tint(bump(0.0, nose + 0.0085, 0.010, 0.009), rosy, 0.35)
  tint(bump(0.0, -0.092, 0.014, 0.009), rosy, 0.25)
  shade = look.skin * np.array([0.72, 0.62, 0.60])
  tint(bump(EYE_X - 0.002, EYE_Y + 0.009, 0.018, 0.0065), shade, 0.42)  # sockets
  tint(bump(EYE_X, EYE_Y - 0.011, 0.015, 0.004), shade, 0.22)
  tint(bump(0.0115, 0.010, 0.0045, 0.013), shade, 0.40)  # sides of the nose's root
  tint(bump(0.0145 * shape.nose_width, nose + 0.020, 0.004, 0.010), shade, 0.16)
  tint(bump(0.0, nose - 0.0030, 0.013, 0.0024), shade, 0.50)  # under the nose
  tint(bump(0.0, nose - 0.0090, 0.0026, 0.0045), shade, 0.22)
  tint(bump(0.0, heads.MOUTH_Y - 0.0155, 0.015, 0.0036), shade, 0.42)  # under the lower lip
  tint(bump(0.0180 * shape.nose_width, nose + 0.005, 0.0014, 0.005), shade, 0.35)  # wings
  nostril = bump(0.0068 * shape.nose_width, nose - 0.0008, 0.0030, 0.0015)
  tint(heads._step(0.35, 0.75, nostril), look.skin * np.array([0.45, 0.30, 0.28]), 0.80)
  tint(heads._step(-0.092, -0.104, y) * front, shade, 0.55)  # beneath the chin
  tint(heads._step(0.9, 1.3, np.abs(azimuth)), shade, 0.30)  # towards the ears

  up, down = heads.lip_heights(x, half, shape)
  line = y - heads.MOUTH_Y
  soft = 0.0007
  red = np.where(
    line >= 0, heads._step(soft, -soft, line - up), heads._step(soft, -soft, -line - down)
  )
  red *= heads._step(1.02 * half, 0.97 * half, side) * front
  lip = look.lip * (1 + 0.05 * _noise(rng, texels, (30, 300)))[..., None]
  lip = lip * np.where(line >= 0, 0.90, 1.03)[..., None]
  tone[:] = tone * (1 - red[..., None]) + lip * red[..., None]
  tint(np.exp(-0.5 * (line / 0.0010) ** 2) * (side < half) * front, look.lip * 0.45, 0.70)

  # brows: hairs along an arch that thins outward
  t = np.clip((side - 0.0125) / 0.036, -0.2, 1.2)
  arch = heads.BROW_Y + 0.0045 * np.sin(np.pi * np.clip(0.15 + 0.75 * t, 0, 1)) - 0.0030
  thick = 0.0037 * look.brow * np.interp(t, (0, 0.12, 0.55, 1.0), (0.75, 1.0, 0.85, 0.25))
  brow = heads._step(1.25, 0.65, np.abs(y - arch) / np.maximum(thick, 1e-5))
  brow *= heads._step(-0.03, 0.05, t) * heads._step(1.04, 0.92, t) * front
  strands = 0.86 + 0.14 * np.clip(_noise(rng, texels, (60, 260)), -1.5, 1.5)
  tint(brow * strands, np.minimum(look.hair, 0.5 * look.skin) * 0.95 + 0.02, 0.90)

  hair = heads.hair_mask(y, azimuth, shape)
  flow = _noise(rng, texels, (14, 210)) + 0.6 * _noise(rng, texels, (30, 420))
  sheen = np.exp(-0.5 * ((y - 0.078 - 0.006 * np.sin(3 * azimuth)) / 0.010) ** 2)
  strand = (
    look.hair
    * (1 + 0.16 * np.clip(flow, -2, 2) + 0.55 * sheen * np.clip(0.7 + 0.4 * flow, 0, 2))[..., None]
  )
  rough = 0.14 * heads._step(1.1, 0.8, np.abs(azimuth))  # a hairline seen end on would look sawn
  edge = np.clip(hair + rough * flow * (hair > 0.02) * (hair < 0.98), 0, 1)
  tone[:] = tone * (1 - edge[..., None]) + strand * edge[..., None]
  return np.concatenate([np.clip(tone, 0, 1), hair[..., None]], axis=-1)


# --- eyes -------------------------------------------------------------------------------------

EYE_HALF = 0.0158


def lid_lines(u, blink, au05, au07, au06):
  """Heights above EYE_Y of the upper and the lower lid's edge at u in -1..1 across the eye."""
  u = np.clip(u, -1, 1)
  lower = -0.0046 * (1 - u**2) * (1 - 0.38 * au07 / 5 - 0.30 * au06 / 5)
  full = 0.0066 * (1 - np.abs(u) ** 2.3) * (1 + 0.50 * au05 / 5 - 0.30 * au07 / 5)
  shut = lower * 0.8  # the upper lid comes down to the lower
  return shut + (full - shut) * (1 - blink), lower


def draw_eyes(
  tone: Float[np.ndarray, "s 3"],
  xy: Float[np.ndarray, "s 2"],
  look: Palette,
  au: dict[str, float],
  blink: float,
) -> np.ndarray:
  """Paints eyes and lids over skin tones at canonical places. Returns the gloss of each sample.

  `tone` is changed in place.
  """
  gloss = np.zeros(len(tone))
  side = np.abs(xy[:, 0])
  near = np.flatnonzero((np.abs(side - EYE_X) < 0.024) & (np.abs(xy[:, 1] - EYE_Y) < 0.02))
  if not len(near):
    return gloss
  t = tone[near]
  x, y = side[near] - EYE_X, xy[near, 1] - EYE_Y - 0.0010 * (side[near] - EYE_X) / EYE_HALF
  u = x / EYE_HALF
  upper, lower = lid_lines(u, blink, au["AU05"], au["AU07"], au["AU06"])

  def lay(mask, color):
    m = np.clip(mask, 0, 1)[:, None]
    t[:] = t * (1 - m) + np.asarray(color) * m

  within = heads._step(1.10, 0.98, np.abs(u))
  # the crease above the lid sinks as the eye opens
  crease = 0.0095 * (1 - 0.75 * u**2) + 0.0008 * au["AU05"] / 5 - 0.0012 * blink
  lid_skin = look.skin * np.array([0.86, 0.74, 0.70])
  lay(
    within
    * heads._step(0.0012, -0.0012, y - crease)
    * heads._step(-0.0006, 0.0006, y - upper)
    * 0.55,
    lid_skin,
  )
  lay(
    within * np.exp(-0.5 * ((y - crease) / 0.0009) ** 2) * (0.55 - 0.30 * blink),
    look.skin * np.array([0.55, 0.42, 0.40]),
  )
  bag = -0.0085 + 0.0016 * au["AU06"] / 5
  lay(
    within
    * np.exp(-0.5 * ((y - bag * (1 - 0.5 * u**2)) / 0.0012) ** 2)
    * (0.16 + 0.34 * au["AU06"] / 5),
    look.skin * np.array([0.66, 0.52, 0.50]),
  )
  # the ball: white, iris with a dark rim, pupil, shadow of the lid, a spark of light
  soft = 0.0004
  opening = heads._step(soft, -soft, y - upper) * heads._step(-soft, soft, y - lower)
  opening = opening * heads._step(1.0, 0.95, np.abs(u))
  ball = (
    np.ones((len(near), 3)) * np.array([0.93, 0.92, 0.91]) * (1 - 0.22 * np.abs(u[:, None]) ** 2.5)
  )
  radius = np.hypot(x, y - 0.0008)
  iris = look.iris * (0.75 + 0.55 * np.clip(radius / 0.0062, 0, 1))[:, None]
  rim = heads._step(0.0050, 0.0064, radius)[:, None]
  iris = iris * (1 - 0.65 * rim)
  m = heads._step(0.0068, 0.0061, radius)[:, None]
  ball = ball * (1 - m) + iris * m
  m = heads._step(0.0031, 0.0025, radius)[:, None]
  ball = ball * (1 - m) + 0.03 * m
  shadow = 0.45 * np.exp(-np.clip(upper - y, 0, 1) / 0.0016)
  ball *= (1 - shadow)[:, None]
  spark = np.exp(
    -0.5
    * (
      ((xy[near, 0] - np.sign(xy[near, 0]) * EYE_X + 0.0020) / 0.0010) ** 2
      + ((y - 0.0032) / 0.0010) ** 2
    )
  )
  ball = ball + 0.85 * spark[:, None]
  lay(opening, ball)
  # lashes along the upper edge, thicker outward, and a thin lower rim
  lash = (0.0011 + 0.0005 * np.clip(u, -1, 1)) * (1 + 0.25 * blink)
  lay(within * np.exp(-0.5 * ((y - upper - 0.0003) / lash) ** 2) * 0.92, (0.10, 0.07, 0.06))
  lay(
    within * np.exp(-0.5 * ((y - lower + 0.0003) / 0.0006) ** 2) * 0.42,
    look.skin * np.array([0.55, 0.36, 0.34]),
  )
  tone[near] = t
  gloss[near] = -opening  # the spark is painted: none besides
  return gloss


def draw_folds(tone, xy, look: Palette, au: dict[str, float], half: float) -> None:
  """Wrinkles that feeling carves: forehead, frown, laughter. Changes `tone` in place."""
  side, y = np.abs(xy[:, 0]), xy[:, 1]
  dark = look.skin * np.array([0.60, 0.48, 0.45])

  def carve(mask, amount):
    m = np.clip(mask * amount, 0, 1)[:, None]
    tone[:] = tone * (1 - m) + dark * m

  raised = max(au["AU01"], 0.8 * au["AU02"]) / 5
  if raised > 0.02:
    for level in (0.046, 0.053):
      arch = level + 0.0015 * np.cos(side / 0.012)
      carve(
        np.exp(-0.5 * ((y - arch) / 0.0010) ** 2) * heads._step(0.040, 0.022, side), 0.45 * raised
      )
  frown = au["AU04"] / 5
  if frown > 0.02:
    carve(
      np.exp(-0.5 * ((side - 0.0052) / 0.0011) ** 2) * np.exp(-0.5 * ((y - 0.031) / 0.006) ** 2),
      0.75 * frown,
    )
  laugh = max(au["AU12"], 0.5 * au["AU06"]) / 5
  if laugh > 0.02:
    along = np.clip((heads.NOSE_Y + 0.004 - y) / 0.030, -0.2, 1.2)
    course = 0.0205 + (half + 0.0085 - 0.0205) * np.clip(along, 0, 1) ** 0.8
    ends = heads._step(-0.10, 0.15, along) * heads._step(1.1, 0.75, along)
    carve(np.exp(-0.5 * ((side - course) / 0.0024) ** 2) * ends, 0.48 * laugh)


# --- the room ---------------------------------------------------------------------------------


def wall(person: Person, size_px: int) -> Float[np.ndarray, "h w 3"]:
  """A quiet room out of focus: a lit wall, a window's glow, a plant, a shelf."""
  look = Palette.of(person)
  rng = np.random.default_rng([29, person.seed])
  v, u = np.meshgrid(np.linspace(0, 1, 256), np.linspace(0, 1, 256), indexing="ij")
  room = np.ones((256, 256, 3)) * look.wall * (1.04 - 0.22 * v - 0.10 * u)[..., None]

  def lay(mask, color, amount):
    m = (np.clip(mask, 0, 1) * amount)[..., None]
    room[:] = room * (1 - m) + np.asarray(color) * m

  lay(((u < 0.20) & (v < 0.62)).astype(float), (0.97, 0.95, 0.88), 0.75)
  lay(((u > 0.78) & (np.abs(v - 0.36) < 0.02)).astype(float), look.wall * 0.55, 0.9)
  for k in range(5):
    left = 0.80 + 0.036 * k
    tall = 0.10 + 0.07 * rng.random()
    book = (u > left) & (u < left + 0.032) & (v < 0.34) & (v > 0.34 - tall)
    lay(book.astype(float), rng.uniform(0.25, 0.75, 3), 0.8)
  lay((v > 0.74).astype(float), look.wall * 0.70, 0.6)
  lay(
    np.exp(-0.5 * (((u - 0.90) / 0.07) ** 2 + ((v - 0.68) / 0.10) ** 2)) * 1.2,
    (0.28, 0.40, 0.27),
    0.75,
  )
  room = gaussian_filter(room, (7, 7, 0))
  room *= (1 - 0.16 * ((u - 0.5) ** 2 + (v - 0.45) ** 2) / 0.35)[..., None]
  at = (np.arange(size_px) + 0.5) / size_px * 256 - 0.5
  rows = np.clip(at, 0, 254.999)
  i, f = rows.astype(int), rows - rows.astype(int)
  down = room[i] * (1 - f)[:, None, None] + room[i + 1] * f[:, None, None]
  across = down[:, i] * (1 - f)[None, :, None] + down[:, i + 1] * f[None, :, None]
  return np.clip(across, 0, 1)
