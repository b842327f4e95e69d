"""Random scenes, half of them spoilt: plain XLA draws and differentiates them as the reference.

The op has cut-offs: alpha 1/255 and 0.99, transmittance 1e-4, the edge of the official square,
the order of depths. Where a pixel is so near to one that rounding decides, both answers are
right. `doubtful` finds those pixels from a projection in float64, before anything is compared;
they must be few, and take no part in the gradients. All other pixels must agree, to 1e-4 and
what rounding of a needle's shape may do.
"""

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.splat import bins, project, rasterize, tuning

SHOWN = ("color", "alpha", "depth", "features")
OWN = ("means", "quats", "scales", "opacities", "colors", "features")  # of every splat
ROUNDING = 1e-6  # relative, of a few float32 operations


class Setting(NamedTuple):
  """What programs are compiled for; all else are values."""

  splats: int
  width: int
  height: int
  cameras: int
  sh_degree: int | None
  features: int
  detached: tuple[int, ...]
  extent: str


SETTINGS = (
    Setting(60, 33, 21, 2, None, 3, (0, 2), "exact"),
    Setting(150, 46, 31, 1, 3, 1, (), "official"),
    Setting(300, 70, 45, 1, None, 4, (1,), "exact"),
    Setting(100, 9, 64, 3, 1, 2, (0, 1), "official"),
    Setting(7, 1, 1, 2, 0, 0, (), "exact"),
    Setting(1, 17, 5, 1, 2, 1, (0,), "official"),
    Setting(0, 13, 8, 3, None, 2, (), "exact"),
    Setting(220, 53, 70, 2, 2, 0, (), "exact"),
)


@functools.partial(jax.jit, static_argnames=("setting", "implementation"))
def draw(learnt, backgrounds, weights, setting, implementation):
  """Gradients of the weighed images, and the images."""
  config = tuning.pick("cpu", implementation)
  tiles = bins.grid(setting.width, setting.height, config.tile)
  room = max(setting.cameras * setting.splats * tiles.columns * tiles.rows, 1)

  def loss(learnt):
    out = rasterize(**learnt, backgrounds=backgrounds, width=setting.width,
                    height=setting.height, sh_degree=setting.sh_degree, extent=setting.extent,
                    detached=setting.detached, capacity=room, implementation=implementation)
    return sum(jnp.sum(weights[name] * getattr(out, name)) for name in SHOWN), out

  return jax.grad(loss, has_aux=True)(learnt)


def look_at(rng, centre, target):
  """A world-to-camera matrix that looks from `centre` at `target`, rolled at random."""
  forward = (target - centre) / np.linalg.norm(target - centre)
  right = np.cross(rng.normal(size=3), forward)
  right /= np.linalg.norm(right)
  rotate = np.stack([right, np.cross(forward, right), forward])
  view = np.eye(4)
  view[:3, :3], view[:3, 3] = rotate, -rotate @ centre
  return view


def make(setting, seed):
  """A scene: learnt arrays, backgrounds, and which splats are broken."""
  rng = np.random.default_rng([seed, setting.splats])
  n, cameras, width, height = setting.splats, setting.cameras, setting.width, setting.height
  bands = 3 if setting.sh_degree is None else (setting.sh_degree + 1)**2
  views = [look_at(rng, rng.normal(size=3) * [2, 2, 1] - [0, 0, rng.uniform(2, 5)],
                   rng.normal(size=3) * 0.3) for _ in range(cameras)]
  Ks = np.zeros((cameras, 3, 3))
  Ks[:, 0, 0], Ks[:, 1, 1] = rng.uniform(0.5, 2.5, (2, cameras)) * max(width, height)
  Ks[:, 0, 2], Ks[:, 1, 2] = (size * rng.uniform(-0.2, 1.2, cameras) for size in (width, height))
  Ks[:, 2, 2] = 1
  size = np.exp(rng.uniform(np.log(0.005), np.log(0.6)))
  colors = (rng.random((n, 3)) if setting.sh_degree is None
            else rng.normal(size=(n, bands, 3)) * rng.uniform(0.1, 0.5))
  scene = dict(
      means=rng.normal(size=(n, 3)) * rng.uniform(0.2, 1.5),
      quats=rng.normal(size=(n, 4)) * 10**rng.uniform(-3, 3),
      scales=size * np.exp(rng.normal(0, 0.7, (n, 3))),
      opacities=rng.beta(*rng.choice([0.3, 1, 3], 2), n), colors=colors,
      features=rng.normal(size=(n, setting.features)) * 10**rng.uniform(-1, 1),
      viewmats=np.stack(views), Ks=Ks, probe=np.zeros((cameras, n, 2)))
  broken = spoil(scene, rng, rng.choice([0, 0.1, 0.5]))
  return ({k: x.astype(np.float32) for k, x in scene.items()},
          rng.random((cameras, 3)).astype(np.float32), broken)


def spoil(scene, rng, share):
  """Makes a share of the splats odd, in place; returns which have become NaN or infinite."""
  view = scene["viewmats"][0]
  broken = np.zeros(len(scene["means"]), bool)

  def place(x, y, z):
    """Of the first camera, in the world."""
    return view[:3, :3].T @ (np.array([x, y, z]) - view[:3, 3])

  for i in np.nonzero(rng.random(len(broken)) < share)[0]:
    x, y = rng.normal(size=2)
    axis = rng.choice([slice(None), 0, 1, 2], p=[0.4, 0.2, 0.2, 0.2])
    match rng.integers(14):
      case 0:
        scene["scales"][i, axis] = 0
      case 1:
        scene["scales"][i, axis] = 1e3
      case 2:
        scene["scales"][i, axis] = 1e-42
      case 3:
        scene["quats"][i] *= rng.choice([0, 1e-30, 1e-20, 1e-10, 1e10])
      case 4:
        scene["opacities"][i] = rng.integers(2)
      case 5:
        scene["means"][i] = place(x, y, -rng.uniform(0, 5))  # behind
      case 6:
        scene["means"][i] = place(*rng.choice([0, 1], 1) * [x, y], 0)  # on the camera's plane
      case 7:  # at the near plane, by more than rounding
        z = project.NEAR * (1 + rng.choice([-1, 1]) * 10**rng.uniform(-4, -1))
        scene["means"][i] = place(0.1 * x, 0.1 * y, z)
      case 8:
        scene["means"][i], scene["scales"][i] = place(x, y, rng.uniform(1, 6)), 50
      case 9:
        name = rng.choice([name for name in OWN if scene[name].shape[1:] != (0,)])
        row = scene[name][i:i + 1].reshape(-1)
        row[rng.integers(len(row))] = rng.choice([np.nan, np.inf, -np.inf])
        scene[name][i] = row.reshape(scene[name].shape[1:])
        broken[i] = True
      case 10:
        scene["means"][i] = scene["means"][i - 1]  # where another one is, which may be broken
        broken[i] = not np.isfinite(scene["means"][i]).all()
      case 11:
        scene["means"][i] = place(x, y, 1) * 10**rng.uniform(1, 3)  # far away
      case 12:
        scene["means"][i] *= rng.choice([0, 1e-42, 1e-20])
      case 13:
        scene["scales"][i] *= rng.choice([0.01, 30], 3)  # a disc or a needle
  return broken


@functools.partial(jax.jit, static_argnames="setting")
def see(learnt, setting):
  """The projection alone, in the precision of the arguments."""
  def look(view, K):
    return project.project(
        learnt["means"], learnt["quats"], learnt["scales"], learnt["opacities"], view, K, None,
        width=setting.width, height=setting.height, extent=setting.extent)

  return jax.vmap(look)(learnt["viewmats"], learnt["Ks"])


def doubtful(learnt, broken, setting):
  """Pixels [c h w] that rounding decides, those where it decides on a splat's whole share, and
  how far it moves all others, in shares.
  """
  learnt = learnt | {k: np.where(broken.reshape((-1,) + (1,) * (learnt[k].ndim - 1)),
                                 np.float32(0), learnt[k]) for k in OWN}
  rough = see(learnt, setting)
  with jax.enable_x64(True):
    fine = see({k: jnp.asarray(x, jnp.float64) for k, x in learnt.items()}, setting)
  rough, fine = jax.tree.map(lambda x: np.asarray(x, np.float64), (rough, fine))
  return tuple(np.stack(z) for z in zip(*(
      _doubtful(*(jax.tree.map(lambda x, c=c: x[c], s) for s in (rough, fine)), setting)
      for c in range(setting.cameras)), strict=True))


def _doubtful(rough, fine, setting):
  x = np.arange(setting.width)[None, :] + 0.5
  y = np.arange(setting.height)[:, None] + 0.5
  shape = setting.height, setting.width
  light, moved, drift = np.ones(shape), np.zeros(shape), np.zeros(shape)
  open_, doubt, hole = np.ones(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
  previous = None
  for i in np.argsort(fine.depth, kind="stable"):
    if max(fine.opacity[i], rough.opacity[i]) < 0.99 / 255:
      continue
    # What rounding does to the shape is what float64 shows, times a few.
    opacity = max(fine.opacity[i], rough.opacity[i])
    (u, v), (a, b, c) = fine.xy[i], fine.conic[i]
    if fine.opacity[i] == 0:
      (u, v), (a, b, c) = rough.xy[i], rough.conic[i]
    eu, ev = 4 * np.abs(rough.xy[i] - fine.xy[i]) + ROUNDING * np.abs((u, v))
    ea, eb, ec = 4 * np.abs(rough.conic[i] - fine.conic[i]) + ROUNDING * np.abs((a, b, c))
    dx, dy = x - u, y - v
    power = -0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy
    error = (0.5 * (ea * dx * dx + ec * dy * dy) + eb * np.abs(dx * dy)
             + eu * np.abs(a * dx + b * dy) + ev * np.abs(b * dx + c * dy)
             + 0.5 * (a * eu * eu + c * ev * ev) + abs(b) * eu * ev)
    log = np.log(opacity) + power
    error += ROUNDING
    sure, maybe = _inside(rough, fine, i, x, y, setting.extent)
    near = np.abs(log - np.log(project.ALPHA_MIN)) < error  # to be skipped
    near |= np.abs(log - np.log(0.99)) < error  # to be capped
    # Where the exponent of a needle comes out positive it is skipped, as by the official one.
    whole = (power > -error + ROUNDING) & (error > 10 * ROUNDING)
    drawn = maybe & (log >= np.log(project.ALPHA_MIN) - error)
    near |= maybe & ~sure
    whole |= (fine.opacity[i] > 0) != (rough.opacity[i] > 0)
    alpha = np.where(drawn, np.minimum(np.exp(np.minimum(log, 0)), 0.99), 0)
    left = light * (1 - alpha)
    drift += np.where(drawn, alpha / (1 - alpha) * error + ROUNDING, 0)
    near |= np.abs(np.log(left / 1e-4)) < drift  # to finish the pixel
    if previous is not None and 0 < fine.depth[i] - previous[0] < 4 * ROUNDING * fine.depth[i]:
      whole |= previous[1]  # to be drawn in the other order
    previous = fine.depth[i], drawn
    doubt |= open_ & drawn & (near | whole)
    hole |= open_ & drawn & whole
    moved += np.where(open_, light * alpha * np.minimum(error, 1), 0)
    open_ &= left >= 1e-4
    light = np.where(open_, left, light)
  return doubt, hole, moved


def _inside(rough, fine, i, x, y, extent):
  """Pixels surely and maybe in a splat's rectangle."""
  if extent == "exact":  # has a margin
    return np.True_, np.True_
  a, b, c = fine.conic[i] if fine.opacity[i] else rough.conic[i]
  u, v = fine.xy[i] if fine.opacity[i] else rough.xy[i]
  det = 1 / (a * c - b * b)  # of the covariance
  middle = 0.5 * (a + c) * det
  reach = 3 * np.sqrt(middle + np.sqrt(np.maximum(0.1, middle**2 - det)))
  error = 1e-4 * (1 + reach + abs(u) + abs(v))
  sure = maybe = np.True_
  for at, pixel in (u, x), (v, y):
    for tight, wide in [(np.ceil(reach - error), np.ceil(reach + error))]:
      low, high = ((np.floor((at - 0.5 - r + s * error) / 16) * 16) for r, s in (
          (wide, -1), (tight, 1)))
      maybe, sure = maybe & (pixel > low), sure & (pixel > high)
      low, high = ((np.floor((at - 0.5 + r + 15 + s * error) / 16) * 16) for r, s in (
          (tight, -1), (wide, 1)))
      maybe, sure = maybe & (pixel < high), sure & (pixel < low)
  return sure, maybe


def exact(*arguments):
  """Gradients by the reference in float64."""
  *arrays, setting = arguments
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
    return jax.tree.map(np.asarray, draw(*wide, setting, "reference")[0])


class Gaps(NamedTuple):
  """How far the two implementations are from each other; 1 is the bound of each."""

  value: float  # of pixels without doubt
  doubtful_value: float
  gradient: float
  row: float  # of the gradient: of one splat
  doubtful: float  # share of the pixels
  name: str  # of the worst gradient


def compare(setting, seed, implementation="xla"):
  learnt, backgrounds, broken = make(setting, seed)
  doubt, hole, moved = doubtful(learnt, broken, setting)
  channels = dict(zip(SHOWN, (3, 1, 1, setting.features), strict=True))
  rng = np.random.default_rng(seed)
  weights = {name: np.where(doubt[..., None], 0, rng.normal(size=(*doubt.shape, m))).astype(
      np.float32) for name, m in channels.items()}
  (grads, out), (expected, shown) = jax.tree.map(np.asarray, [
      draw(learnt, backgrounds, weights, setting, name) for name in (implementation, "reference")])
  assert out.overflow == 0 and out.dropped == shown.dropped == broken.sum()
  chex.assert_tree_all_finite((grads, out, expected, shown))
  np.testing.assert_array_equal(out.radii == 0, shown.radii == 0)
  assert np.all(np.abs(out.radii - shown.radii) <= 1 + 1e-5 * shown.radii)
  value = doubtful_value = 0.0
  for name in SHOWN:
    if not channels[name]:
      continue
    x, y = getattr(out, name), getattr(shown, name)
    unit = max(1, float(np.abs(y).max()))
    gap = np.abs(x - y).max(-1) / unit
    value = max(value, float((gap / (1e-4 + moved))[~doubt].max(initial=0)))
    # One crossing: a splat of 1/255, or 1% of light that the last one lets through.
    doubtful_value = max(doubtful_value, float(gap[doubt & ~hole].max(initial=0)) / 0.05)
  worst, row = (0.0, ""), 0.0
  for name, want in expected.items():
    flat = len(want), math.prod(want.shape[1:])
    gap = (grads[name] - want.astype(np.float64)).reshape(flat)
    want = want.astype(np.float64).reshape(flat)
    bound = 1e-3 * np.linalg.norm(want) + 1e-5
    if np.linalg.norm(gap) > bound:
      # A needle's gradient may be worse than that in either: then float64 is the judge, and a
      # needle, 10,000 times as long as wide, keeps to 1%, which `row` holds it to as well.
      truth = exact(learnt, backgrounds, weights, setting)[name].reshape(flat)
      bound += 2 * np.linalg.norm(want - truth)
      if name in OWN:
        width, length = np.sort(learnt["scales"], 1)[:, 1:].T
        bound += 1e-2 * np.linalg.norm(want[length > 1e4 * width])
      gap = want + gap - truth
    worst = max(worst, (float(np.linalg.norm(gap) / bound), name))
    if name in OWN and want.any():
      # Nor may one splat's huge gradient hide what is wrong with the others. A needle's own is
      # the difference of large numbers, hence the wider bound.
      assert not gap[broken].any() and not want[broken].any()
      length = np.linalg.norm(want, axis=1)
      floor = 1e-5 * (1 + np.linalg.norm(length))
      bound = 1e-2 * (length + np.median(length[length > 0])) + floor
      row = max(row, float((np.linalg.norm(gap, axis=1) / bound).max()))
  return Gaps(value, doubtful_value, worst[0], row, float(doubt.mean()), worst[1])


def check(settings, seeds, implementation="xla"):
  gaps = {(i, seed): compare(SETTINGS[i], seed, implementation)
          for seed in seeds for i in settings}
  for field in Gaps._fields[:5]:
    where = max(gaps, key=lambda at: getattr(gaps[at], field))
    print(f"worst {field}: {gaps[where]} in setting, seed {where}")
  for at, gap in gaps.items():
    assert max(gap[:4]) <= 1, (at, gap)
  # Two splats of alpha 0.99 let through 1e-4 of the light: a few scenes are in doubt all over.
  assert np.mean([gap.doubtful for gap in gaps.values()]) < 0.05


def test_random_scenes_are_drawn_as_by_the_reference():
  check((1,), range(20))


@pytest.mark.slow
@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_many_random_scenes_are_drawn_as_by_the_reference(setting):
  check((setting,), range(10, 73))


@pytest.mark.slow
def test_what_other_devices_run_draws_them_too(monkeypatch):
  # Sorts, searches and sums have a branch for a CPU and one for all else.
  monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, default, **other: default(*x))
  jax.clear_caches()
  try:
    check((1, 2, 3), range(20))
  finally:
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("setting", (0, 3, pytest.param(1, marks=pytest.mark.xfail(
    reason="what lies behind a splat is a difference there: coarse gradients in deep shade"))))
def test_interpreted_kernels_draw_them_too(setting):
  check((setting,), range(10), "pallas")
