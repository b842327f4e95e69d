import numpy as np
import pytest

from uajax.preprocess import landmarks, lips

SIZE, HALF = 128, 40.0
FRAMES = 30


def draw(gap, behind, rng, lit=0.0):
  """A mouth `gap` pixels open, the pixels' true inner edges, and landmarks that miss these.

  Lips darken towards their edges; `behind` is the colour of what lies inside, and
  of the lower lip's upper `lit` pixels.
  """
  r, c = (np.mgrid[: 2 * SIZE, : 2 * SIZE] + 0.5) / 2
  t = (c - SIZE / 2) / HALF
  bow = np.sqrt(np.clip(1 - t**2, 0, 1))
  upper, lower = SIZE / 2 - gap / 2 * bow, SIZE / 2 + gap / 2 * bow
  rim_up, rim_low = upper - 12 * bow, lower + 14 * bow
  seen = lower + lit * bow
  depth = np.where(r < (upper + lower) / 2, upper - r, r - seen)  # into the lip
  image = np.zeros((2 * SIZE, 2 * SIZE, 3)) + (210, 150, 120)
  red = (np.abs(t) < 1) & (r > rim_up) & (r < rim_low)
  shade = 1 - 0.55 * np.exp(-np.clip(depth, 0, None) / 2.5)
  image[red] = (np.array([190, 95, 90]) * shade[..., None])[red]
  inside = (np.abs(t) < 1) & (r > upper) & (r < seen)
  image[inside] = behind
  image = image.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3)) + rng.normal(0, 2, (SIZE, SIZE, 3))

  points = np.zeros((landmarks.LANDMARKS, 3))
  off = rng.normal(0, 2.0, 2)

  def place(ids, edge, off):
    t = np.linspace(-1, 1, len(ids))
    points[ids, 0] = SIZE / 2 + HALF * t
    bow = np.sqrt(np.clip(1 - t**2, 0, 1))
    points[ids, 1] = SIZE / 2 + (edge + off) * bow

  # The landmarks' inner corners lie a little inside the outer ones.
  for ids, edge, wrong in ((lips._UPPER, -gap / 2, off[0]), (lips._LOWER, gap / 2, off[1])):
    place(ids, edge, wrong)
    points[ids, 0] = SIZE / 2 + 0.96 * (points[ids, 0] - SIZE / 2)
  for ids, edge in zip(lips._OUTER, (-gap / 2 - 12, gap / 2 + 14), strict=True):
    place(ids, edge, 0.0)
  return np.clip(np.round(image), 0, 255).astype(np.uint8), points, gap


@pytest.fixture(scope="module")
def film():
  rng = np.random.default_rng(0)
  colours = ((225, 215, 200), (35, 20, 20), (150, 70, 70))  # teeth, dark, tongue
  frames = [draw(max(12 * np.sin(f / 3), 0.0), colours[f // 3 % 3], rng) for f in range(FRAMES)]
  images, points, gaps = zip(*frames, strict=True)
  return np.stack(images), np.stack(points), np.array(gaps)


@pytest.fixture(scope="module")
def look(film):
  images, points, _ = film
  return lips.learn(lips.join([lips.chart(images[:15], points[:15]),
                               lips.chart(images[15:], points[15:])]))  # fmt: skip


def miss(edges, gaps, some):
  """Mean distance in pixels from the true edges in the middle of the mouth."""
  bow = np.sqrt(np.clip(1 - lips.ACROSS**2, 0, 1))
  truth = gaps[:, None] / 2 / HALF * bow
  off = np.abs(edges - np.stack([-truth, truth], 1))[some][..., np.abs(lips.ACROSS) < 0.8]
  return HALF * off.mean()


def test_edges_are_found_that_landmarks_miss(film, look):
  images, points, gaps = film
  charts = lips.chart(images, points)
  found = lips.find(charts, look)
  is_open = gaps > 3
  assert look is not None and miss(charts.inner, gaps, is_open) > 1.0
  assert miss(found, gaps, is_open) < 0.5
  shut = HALF * (found[:, 1] - found[:, 0])[gaps == 0]
  assert (shut >= 0).all() and shut.mean() < 0.7
  pale, red, _ = look.teeth
  assert pale < 0.05 and red > 0.15  # of the teeth and lips drawn
  # What one frame shows does not hang on which others are looked at with it.
  alone = lips.find(lips.chart(images[5:6], points[5:6]), look)
  np.testing.assert_allclose(alone[0], found[5], atol=1e-6)


def test_a_lip_lit_like_a_tongue_is_not_taken_for_the_inside(look):
  lit = [draw(gap, (150, 70, 70), np.random.default_rng(4), lit=6.0) for gap in (8, 10)]
  charts = lips.chart(*(np.stack(x) for x in list(zip(*lit, strict=True))[:2]))
  found = lips.find(charts, look)
  middle = np.abs(lips.ACROSS) < 0.5
  left = (charts.outer - found)[:, 1, middle].mean()
  assert left > 0.8 * (charts.outer - charts.inner)[:, 1, middle].mean()


def test_reds_and_outlines_are_in_pixels(film):
  images, points, gaps = film
  some = slice(2, 6)
  charts = lips.chart(images[some], points[some])
  truth = np.stack([charts.outer[:, 0] + 12 / HALF, charts.outer[:, 1] - 14 / HALF], 1)
  assert HALF * lips.measure_reds(charts, truth) == pytest.approx(13, abs=0.1)
  apart = np.stack([-gaps[some], gaps[some]], 1)[..., None] / 2 / HALF
  assert HALF * lips.measure_gaps(np.tile(apart, lips.COLUMNS)) == pytest.approx(gaps[some])
  polygons = lips.outline(charts, charts.inner)
  assert polygons[..., 0].min() > SIZE / 2 - HALF and polygons[..., 0].max() < SIZE / 2 + HALF
  for polygon, p in zip(polygons, points[some], strict=True):
    assert polygon[:, 1].min() == pytest.approx(p[13, 1], abs=0.3)
    assert polygon[:, 1].max() == pytest.approx(p[14, 1], abs=0.3)


def test_a_mouth_that_never_opens_keeps_the_landmarks_edges(film):
  images, points, gaps = film
  shut = lips.chart(images[gaps == 0], points[gaps == 0])
  tight = shut._replace(inner=np.repeat(shut.inner[:, :1], 2, 1))
  assert lips.learn(tight) is None
  assert (lips.find(tight, None) == tight.inner).all()
