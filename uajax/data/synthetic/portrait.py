"""A performance filmed: head over neck and torso over a room, with classes and landmarks.

Head and torso are drawn as layers, so that what lies behind the head is known. The camera
stands still and the head moves; the layout wants it the other way round, and `c2w` is the
camera seen from the head. Axes: f frames, h w pixels, s covered samples, v vertices.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from uajax import types
from uajax.data.synthetic import head as heads
from uajax.data.synthetic import paint
from uajax.data.synthetic.performance import AU_NAMES, Performance, Person
from uajax.progress import Progress

DISTANCE_M = 0.70
FOCAL = 1.97  # of the picture's width
_CAMERA = np.array([0.0, -0.016, DISTANCE_M])  # a little below mid-head, so that shoulders show
_KEY, _FILL = (np.array(d) / np.linalg.norm(d) for d in ((-0.42, 0.50, 0.76), (0.75, 0.12, 0.65)))


class Film(NamedTuple):
  """What the camera saw, and the truth behind it."""

  image: UInt8[np.ndarray, "f h w 3"]  # person over room
  background: UInt8[np.ndarray, "f h w 3"]  # torso over room
  torso: UInt8[np.ndarray, "f h w 4"]  # neck and torso, straight alpha, whole behind the head
  plate: UInt8[np.ndarray, "h w 3"]  # the room
  classes: UInt8[np.ndarray, "f h w"]  # types.BACKGROUND .. TORSO
  teeth: Bool[np.ndarray, "f h w"]
  landmarks: Float[np.ndarray, "f 68 2"]  # x, y in pixels, the usual 68
  c2w: Float[np.ndarray, "f 4 4"]  # camera in the head's frame, OpenGL axes
  focal_px: float
  lip_gap_px: Float[np.ndarray, " f"]  # between the inner lips, landmarks 61..63 to 65..67
  lip_gap_mm: Float[np.ndarray, " f"]  # the same in space


def render_frames(
  person: Person, performance: Performance, size_px: int | None = None, *, progress: bool = False
) -> Film:
  """Films every frame of `performance` in a square of `size_px` (None: the person's)."""
  size = size_px or person.size_px
  stage = _Stage(person, size)
  plate = _bytes(stage.plate)
  images, backgrounds, torsos, classes, teeth, landmarks, poses, gaps = ([] for _ in range(8))
  bar = Progress("film", len(performance.pose)) if progress else None
  sway = _follow(performance.pose)
  for pose, trunk, mouth, au in zip(
    performance.pose, sway, performance.mouth, performance.au, strict=True
  ):
    shot = stage.shoot(pose, trunk, mouth, au)
    behind = shot.torso_color + (1 - shot.torso_alpha) * stage.plate  # premultiplied
    images.append(_bytes(shot.head_color + (1 - shot.head_alpha) * behind))
    backgrounds.append(_bytes(behind))
    straight = shot.torso_color / np.maximum(shot.torso_alpha, 1e-6)
    torsos.append(_bytes(np.concatenate([straight, shot.torso_alpha], axis=-1)))
    classes.append(shot.classes)
    teeth.append(shot.teeth)
    landmarks.append(shot.landmarks)
    poses.append(shot.c2w)
    gaps.append(shot.gap_m)
    if bar:
      bar.advance()
  if bar:
    bar.close()
  points = np.stack(landmarks)
  return Film(
    np.stack(images), np.stack(backgrounds), np.stack(torsos), plate, np.stack(classes),
    np.stack(teeth), points, np.stack(poses), FOCAL * size,
    (points[:, 65:68, 1] - points[:, 63:60:-1, 1]).mean(axis=1), 1000 * np.array(gaps),
  )  # fmt: skip


def mouth_opening(image, lips) -> float:
  """Height in pixels of the open mouth as the picture shows it.

  In each column of the middle third of the lips' square, looks for the red of the upper and of
  the lower lip and adds up what between them is not lip: pale (teeth) or dark (the inside).
  Reds are taken relative to the picture's own lips and skin. A pixel half lip counts half, so
  that small pictures and blur are measured fairly. Works on any picture whose mouth lies
  there: a rendering and its truth are measured with the same square.

  Args:
    image: uint8 0..255 or float 0..1, [h w 3].
    lips: rows r0:r1 and columns c0:c1 of the square about the lips of the true frame
      (types.Frame.lips), or its 68 landmarks, [68 2].
  """
  picture = np.asarray(image)
  picture = picture / 255.0 if picture.dtype == np.uint8 else picture.astype(float)
  r0, r1, c0, c1 = lip_square(lips) if np.ndim(lips) == 2 else np.asarray(lips)
  height, width = picture.shape[:2]
  middle, reach, across = 0.5 * (r0 + r1), 0.5 * (r1 - r0), c1 - c0
  square = picture[max(r0, 0) : min(r1, height), max(c0, 0) : min(c1, width)]
  # nostrils above and the chin's shadow below stay outside
  top, bottom = round(middle - 0.60 * reach), round(middle + 0.75 * reach)
  left, right = round(c0 + across / 3), round(c1 - across / 3)
  box = picture[max(top, 0) : min(bottom, height), max(left, 0) : min(max(right, left + 1), width)]
  if not box.size or not square.size:
    return 0.0

  def redness(pixels):
    value = pixels.max(axis=-1)
    return (pixels[..., 0] - pixels[..., 1]) / np.maximum(value, 0.05), value

  red, value = redness(square)
  bright = value > 0.35
  if not bright.any():
    return 0.0
  skin, lip = np.median(red[bright]), np.percentile(red[bright], 95)
  light = np.percentile(value, 80)
  red, value = redness(box)
  pale = np.clip((lip - red) / max(lip - 0.05, 0.1), 0, 1)
  dark = np.clip((0.45 * light - value) / (0.25 * light), 0, 1)
  is_lip = (red > skin + 0.35 * (lip - skin)) & (value > 0.30 * light)
  below_upper = np.cumsum(is_lip, axis=0) > 0
  above_lower = np.cumsum(is_lip[::-1], axis=0)[::-1] > 0
  between = below_upper & above_lower
  return float((np.maximum(pale, dark) * between).sum(axis=0).mean())


def lip_square(landmarks: Float[np.ndarray, "68 2"]) -> np.ndarray:
  """Rows r0:r1 and columns c0:c1 about landmarks 48..59, method.md D.1 "Lips"."""
  low, high = landmarks[48:60].min(axis=0).astype(int), landmarks[48:60].max(axis=0).astype(int)
  half = max(high - low) // 2
  x, y = (low + high) // 2
  return np.array([y - half, y + half, x - half, x + half])


# --- the stage --------------------------------------------------------------------------------


class _Shot(NamedTuple):
  head_color: np.ndarray  # [h w 3] premultiplied
  head_alpha: np.ndarray  # [h w 1]
  torso_color: np.ndarray
  torso_alpha: np.ndarray
  classes: np.ndarray
  teeth: np.ndarray
  landmarks: np.ndarray
  c2w: np.ndarray
  gap_m: float


class _Stage:
  """Everything about a person that does not change from frame to frame."""

  def __init__(self, person: Person, size: int):
    from uajax.data.synthetic import raster  # numba takes a second to load

    self.raster = raster
    self.size, self.super = size, person.supersampling
    self.look = paint.Palette.of(person)
    self.head = heads.build(person)
    shape, slit = self.head.shape, self.head.slit
    self.half = float(abs(self.head.canonical[slit[0, 0], 0]))
    self.texture = paint.skin_texture(person, self.head.grid, shape, self.half)
    ears = self.head.color[:, :1] < 0
    color = np.where(ears, self.look.skin * np.array([0.96, 0.84, 0.82]), self.head.color)
    self.columns = np.concatenate(
      [self.head.texcoord, self.head.canonical, color, self.head.inner[:, None]], axis=1
    )
    self.torso = _torso(self.look)
    self.torso_normals = raster.normals(self.torso[0], self.torso[3])
    self.plate = paint.wall(person, size)
    self.marks = _marks(self.head, self.half)

  def shoot(self, pose, trunk, mouth, au) -> _Shot:
    raster = self.raster
    unit = dict(zip(AU_NAMES, au, strict=True))
    blink = float(np.clip(unit["AU45"] / 2, 0, 1))
    points = heads.deform(self.head, mouth, au)
    motion = _matrix(pose)
    world = points @ motion[:3, :3].T + motion[:3, 3]
    gap = np.linalg.norm(points[self.head.slit[0]] - points[self.head.slit[1]], axis=1)
    gap_m = float(np.sort(gap)[-len(gap) // 3 :].mean())

    fine = self.size * self.super
    tone = lambda ids, weights: self._paint_head(ids, weights, unit, blink, gap_m)  # noqa: E731
    normal = raster.normals(world, self.head.triangles)
    color, alpha, labels, bright = self._layer(world, normal, self.head.triangles, tone, fine)
    body, tint, neck_triangles, triangles = self.torso
    lean = _matrix(trunk)
    neck = (
      np.clip((body[:, 1] + 0.160) / 0.075, 0, 1)[:, None] * (body[:, 1] > -0.166)[:, None] * 0.8
    )
    still = body @ lean[:3, :3].T + lean[:3, 3]
    turned = body @ motion[:3, :3].T + motion[:3, 3]
    still = still + neck * (turned - still)
    paint_torso = lambda ids, weights: (  # noqa: E731
      raster.blend(ids, weights, triangles, tint),
      np.where(ids < neck_triangles, types.NECK, types.TORSO),
      np.where(ids < neck_triangles, 0.0, -1.0),
      np.ones(len(ids)),
    )
    normal = self.torso_normals @ lean[:3, :3].T
    t_color, t_alpha, t_labels, _ = self._layer(still, normal, triangles, paint_torso, fine)

    labels = np.where(labels == types.BACKGROUND, t_labels, labels)
    classes = _vote(labels, self.super)
    teeth = (_pool(bright, self.super) > 0.5) & (classes == types.MOUTH)
    c2w = np.linalg.inv(motion) @ _translation(_CAMERA)
    return _Shot(
      _pool(color, self.super), _pool(alpha, self.super), _pool(t_color, self.super),
      _pool(t_alpha, self.super), classes, teeth,
      self._landmarks(points, world, unit, blink), c2w, gap_m,
    )  # fmt: skip

  def _project(self, world, size):
    """World points to x, y in pixels and depth, [v 3]."""
    seen = world - _CAMERA
    depth = -seen[:, 2]
    scale = FOCAL * size / depth
    return np.stack([size / 2 + scale * seen[:, 0], size / 2 - scale * seen[:, 1], depth], axis=1)

  def _layer(self, world, normal, triangles, tone_of, fine):
    """One mesh alone: premultiplied colour, alpha, classes and teeth, all at samples."""
    raster = self.raster
    ids, weights = raster.visible(self._project(world, fine), triangles, fine, fine)
    hit = ids >= 0
    ids, weights = ids[hit], weights[hit]
    frame = np.concatenate([world, normal], axis=1)
    at = raster.blend(ids, weights, triangles, frame)
    tone, label, gloss, dim = tone_of(ids, weights)
    color = np.zeros((fine, fine, 3))
    color[hit] = _light(tone, at[:, :3], at[:, 3:], gloss) * dim[:, None]
    labels = np.full((fine, fine), types.BACKGROUND)
    labels[hit] = np.abs(label)
    bright = np.zeros((fine, fine))
    bright[hit] = label < 0
    return color, hit[..., None].astype(float), labels, bright

  def _paint_head(self, ids, weights, unit, blink, gap_m):
    """Tone, class (negative for teeth), gloss (negative for cloth and hair) and shade."""
    head, raster = self.head, self.raster
    at = raster.blend(ids, weights, head.triangles, self.columns)
    skin = head.paint[ids] == heads.SKIN
    inner = at[:, 7]
    texels = raster.sample(self.texture, at[:, :2])
    tone = np.where(skin[:, None], texels[:, :3], at[:, 4:7])
    label = head.classes[ids].copy()
    hair = skin & (texels[:, 3] > 0.5)
    label[hair] = types.HAIR
    teeth = ~skin & (inner < -1.5)
    label[teeth] *= -1
    gloss = np.zeros(len(tone))
    face = np.flatnonzero(skin & (inner <= 0) & (texels[:, 3] < 0.9))
    bare = tone[face]
    paint.draw_folds(bare, at[face, 2:4], self.look, unit, self.half)
    gloss[face] = paint.draw_eyes(bare, at[face, 2:4], self.look, unit, blink)
    tone[face] = bare
    gloss[hair] = -1.0
    # lips glisten, the mouth's inside lies in shadow
    deep = np.clip(inner, 0, 1)[:, None]
    tone = tone * (1 - deep) + np.array([0.22, 0.06, 0.07]) * deep
    dim = np.ones(len(tone))
    light = 0.62 + 0.38 * np.clip(gap_m / 0.010, 0, 1)
    dim[~skin & (inner <= -0.5)] = light
    gloss[~skin & (inner <= -0.5)] = 0.15
    return tone, label, gloss, dim

  def _landmarks(self, points, world, unit, blink):
    ids, weights, eyes = self.marks
    upper, lower = paint.lid_lines(eyes[:, 0], blink, unit["AU05"], unit["AU07"], unit["AU06"])
    height = np.where(eyes[:, 1] > 0, upper, np.where(eyes[:, 1] < 0, lower, 0.0))
    x = eyes[:, 2] * (heads.EYE_X + eyes[:, 0] * paint.EYE_HALF)
    lids = np.stack([x, heads.EYE_Y + height + 0.0010 * eyes[:, 0]], axis=1)
    eye_ids, eye_weights = heads.place(self.head, lids)
    ids, weights = ids.copy(), weights.copy()
    ids[36:48], weights[36:48] = eye_ids, eye_weights
    at = (world[ids] * weights[..., None]).sum(axis=1)
    return self._project(at, self.size)[:, :2]


def _light(tone, at, normal, gloss):
  """Key, fill and sky on display colours; gloss < 0 is matt, 0 skin, up to 1 wet."""
  normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
  view = _CAMERA - at
  view = view / np.linalg.norm(view, axis=1, keepdims=True)
  facing = (normal * view).sum(axis=1, keepdims=True)
  normal = np.where(facing < 0, -normal, normal)
  wrap = np.where((gloss < 0)[:, None], 0.15, np.array([0.38, 0.24, 0.20]))
  key = np.clip((normal @ _KEY)[:, None] + wrap, 0, None) / (1 + wrap)
  fill = np.clip((normal @ _FILL)[:, None] + wrap, 0, None) / (1 + wrap)
  sky = 0.30 + 0.10 * normal[:, 1:2]
  half = _KEY + view
  half = half / np.linalg.norm(half, axis=1, keepdims=True)
  shine = np.clip((normal * half).sum(axis=1), 0, 1)
  spec = np.where(gloss < 0, 0.0, 0.055 * shine**14 + 0.25 * np.clip(gloss, 0, 1) * shine**60)
  lit = tone**2 * (sky + 0.78 * key + 0.17 * fill) + spec[:, None]
  return np.sqrt(np.clip(lit, 0, 1))


def _torso(look):
  """Neck and shirt as stacks of rings: points, colours, how many triangles are neck, triangles."""
  side = np.linspace(-1.9, 1.9, 141)

  def stack(y, width, depth, back):
    y, a = np.meshgrid(y, side, indexing="ij")
    w, d, z = (np.interp(-y, -np.array(k[0]), k[1]) for k in (width, depth, back))
    return np.stack([w * np.sin(a), y, z + d * np.cos(a)], -1)

  heights = (-0.05, -0.09, -0.125, -0.145, -0.17, -0.20)
  neck = stack(
    np.linspace(-0.05, -0.20, 60), (heights, (0.046, 0.044, 0.045, 0.053, 0.072, 0.110)),
    (heights, (0.050, 0.048, 0.047, 0.049, 0.056, 0.062)),
    (heights, (-0.022, -0.022, -0.020, -0.018, -0.016, -0.016)),
  )  # fmt: skip
  heights = (-0.138, -0.146, -0.156, -0.172, -0.192, -0.22, -0.34)
  shirt = stack(
    np.linspace(-0.138, -0.34, 90), (heights, (0.046, 0.072, 0.106, 0.148, 0.180, 0.200, 0.215)),
    (heights, (0.056, 0.060, 0.066, 0.074, 0.084, 0.098, 0.125)), (heights, (-0.018,) * 7),
  )  # fmt: skip
  # the collar dips in front
  dip = 0.034 * np.exp(-0.5 * (shirt[..., 0] / 0.040) ** 2) * (shirt[..., 2] > -0.018)
  shirt[..., 1] -= dip * np.exp(-np.clip(-0.138 - shirt[..., 1], 0, 1) / 0.05)
  shade = 0.56 + 0.44 * heads._step(-0.098, -0.148, neck[..., 1])
  cords = 1 - 0.10 * np.exp(-0.5 * ((np.abs(neck[..., 0]) - 0.017) / 0.005) ** 2) * heads._step(
    -0.10, -0.15, neck[..., 1]
  )
  skin = (
    look.skin
    * np.array([0.97, 0.93, 0.91])
    * (shade * cords)[..., None] ** np.array([0.9, 1.1, 1.15])
  )
  row = np.arange(90)[:, None] + 0 * shirt[..., 0]
  band = heads._step(7.5, 5.5, row)
  weave = 1 + 0.05 * np.sin(shirt[..., 0] * 260) * np.sin(shirt[..., 1] * 90)
  folds = 1 - 0.10 * np.exp(
    -0.5 * ((np.abs(shirt[..., 0]) - 0.085 + 0.3 * (shirt[..., 1] + 0.16)) / 0.007) ** 2
  )
  cloth = look.shirt * (weave * folds * (1 - 0.22 * band))[..., None]

  def quads(offset, rows, columns):
    ids = offset + np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = ids[:-1, :-1], ids[:-1, 1:], ids[1:, :-1], ids[1:, 1:]
    return np.concatenate(
      [np.stack([a, c, b], -1).reshape(-1, 3), np.stack([b, c, d], -1).reshape(-1, 3)]
    )

  upper = quads(0, 60, 141)
  lower = quads(60 * 141, 90, 141)
  points = np.concatenate([neck.reshape(-1, 3), shirt.reshape(-1, 3)])
  colors = np.clip(np.concatenate([skin.reshape(-1, 3), cloth.reshape(-1, 3)]), 0, 1)
  return points, colors, len(upper), np.concatenate([upper, lower]).astype(np.int32)


def _marks(head, half):
  """Vertices and weights of the 68 landmarks, and where on an eye's outline 36..47 sit."""
  azimuth = np.array([1.45, 1.42, 1.38, 1.32, 1.22, 1.05, 0.80, 0.45, 0.0])
  y = np.array([0.010, -0.012, -0.034, -0.054, -0.071, -0.084, -0.094, -0.100, -0.102])
  x = heads.half_width(y, head.shape) * np.sin(azimuth)
  jaw = np.concatenate([np.stack([-x, y], 1), np.stack([x, y], 1)[-2::-1]])
  t = np.linspace(0.98, 0.03, 5)
  brow = np.stack(
    [0.0125 + 0.036 * t, heads.BROW_Y + 0.0045 * np.sin(np.pi * (0.15 + 0.75 * t)) - 0.0015], 1
  )
  brows = np.concatenate([brow * [-1, 1], brow[::-1]])
  nose = np.stack([np.zeros(4), np.linspace(0.013, heads.NOSE_Y + 0.0100, 4)], 1)
  base = np.stack(
    [np.linspace(-1, 1, 5) * 0.0125, heads.NOSE_Y - 0.0015 * np.array([0, 0.7, 1, 0.7, 0])], 1
  )
  eyes = np.zeros((12, 2))
  at = np.array([-1, -0.62, -0.2, 0.2, 0.62, 1]) * 1.0
  lips = []
  for k in range(12):
    s = at[1:][k - 1] if 1 <= k <= 5 else 0.0
    s = np.linspace(-1, 1, 7)[k] if k <= 6 else np.linspace(1, -1, 7)[k - 6]
    up, down = heads.lip_heights(np.array([s * half]), half, head.shape)
    height = 0.0 if k in (0, 6) else float(up[0]) if k < 6 else -float(down[0])
    lips.append([s * half, heads.MOUTH_Y + height])
  plain = np.concatenate([jaw, brows, nose, base, eyes, np.array(lips)])
  ids, weights = heads.place(head, plain)
  slit = head.slit
  n = slit.shape[1] - 1
  quarter = [round(n * f) for f in (0.26, 0.5, 0.74)]
  corners = (slit[0, 0], slit[0, -1])
  ids[48], ids[54] = corners
  inner = [corners[0], *slit[0, quarter], corners[1], *slit[1, quarter[::-1]]]
  ids = np.concatenate([ids, np.stack([inner] * 4, axis=1)])
  weights = np.concatenate([weights, np.tile([1.0, 0, 0, 0], (8, 1))])
  weights[[48, 54]] = (1.0, 0, 0, 0)
  # u across the eye (1 is the outer corner), lid (1 upper, -1 lower, 0 corner), side
  left = [(1, 0), (0.38, 1), (-0.38, 1), (-1, 0), (-0.38, -1), (0.38, -1)]
  right = [(-1, 0), (-0.38, 1), (0.38, 1), (1, 0), (0.38, -1), (-0.38, -1)]
  outline = np.array([(u, lid, -1.0) for u, lid in left] + [(u, lid, 1.0) for u, lid in right])
  return ids, weights, outline


def _follow(pose):
  """The trunk sways a little, late and slowly, with the head: [f 6]."""
  lag = np.empty_like(pose)
  state = pose[0] * 0.25
  for k, now in enumerate(pose):
    state = state + 0.06 * (now * 0.25 - state)
    lag[k] = state
  lag[:, :3] *= (0.2, 0.6, 0.3)
  return lag


def _matrix(pose):
  """Head to world: pitch down, then yaw, then the rest, [4 4]."""
  pitch, yaw, roll = pose[:3]
  cx, sx, cy, sy, cz, sz = (
    np.cos(pitch),
    np.sin(pitch),
    np.cos(yaw),
    np.sin(yaw),
    np.cos(roll),
    np.sin(roll),
  )
  rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
  ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
  rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
  out = np.eye(4)
  out[:3, :3] = ry @ rx @ rz
  pivot = np.array([0, -0.07, -0.02])  # the neck, about which a head turns
  out[:3, 3] = pivot - out[:3, :3] @ pivot + pose[3:]
  return out


def _translation(by):
  out = np.eye(4)
  out[:3, 3] = by
  return out


def _pool(samples, factor):
  """Mean over squares of factor x factor samples."""
  total = np.zeros_like(samples[::factor, ::factor])
  for i in range(factor):
    for j in range(factor):
      total += samples[i::factor, j::factor]
  return total / factor**2


def _vote(labels, factor):
  """The commonest class of each pixel's samples."""
  counts = [_pool((labels == k).astype(np.float32), factor) for k in range(6)]
  return np.argmax(counts, axis=0).astype(np.uint8)


def _bytes(image):
  return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
