import numpy as np
import pytest

from uajax.preprocess import landmarks, masks
from uajax.types import BACKGROUND, FACE, HAIR, MOUTH, NECK, TORSO


def draw_person(size=96, shift=0):
  """Classes of a head with hair on a neck and a torso."""
  r, c = np.mgrid[:size, :size] * 96 / size
  classes = np.full((size, size), BACKGROUND, np.uint8)
  c = c - shift
  classes[(r > 70) & (np.abs(c - 48) < 40)] = TORSO
  classes[(r > 55) & (r < 78) & (np.abs(c - 48) < 9)] = NECK
  classes[((r - 40) / 24) ** 2 + ((c - 48) / 17) ** 2 < 1] = FACE
  classes[(((r - 34) / 25) ** 2 + ((c - 48) / 20) ** 2 < 1) & (r < 28)] = HAIR
  return classes


def outline_mouth(gap):
  angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
  return np.stack([48 + 9 * np.cos(angle), 52 + gap / 2 * np.sin(angle)], 1)


def as_layers(classes):
  return 255 * (classes[..., None] == np.array(masks.LAYERS)).astype(np.uint8)


def test_polygon_covers_its_area():
  cover = masks.fill_polygon(np.array([[3.5, 2.0], [13.5, 2.0], [13.5, 8.0], [3.5, 8.0]]), 20, 20)
  assert cover.sum() == pytest.approx(60, rel=0.04)
  assert cover[4, 3] == pytest.approx(0.5, abs=0.26) and cover[4, 5] == 1
  outside = masks.fill_polygon(np.array([[-30.0, -9], [-20, -9], [-20, -4]]), 20, 20)
  assert outside.shape == (20, 20) and not outside.any()


def test_classes_lose_specks_and_holes_and_gain_the_mouth():
  clean = draw_person()
  dirty = clean.copy()
  dirty[3:6, 3:6] = HAIR  # a speck in the background
  dirty[40:42, 48:50] = BACKGROUND  # a hole in the face
  dirty[80:82, 40:42] = FACE  # a speck on the torso
  layers = as_layers(dirty)
  layers[40:42, 48:50, masks.LAYERS.index(FACE)] = 100
  found = masks.classify(layers)
  assert (found == clean).all()
  assert (masks.open_mouth(found, outline_mouth(gap=0.1)) == clean).all()
  opened = masks.open_mouth(found, outline_mouth(gap=8))
  assert 0.8 < (opened == MOUTH).sum() / (np.pi * 9 * 4) < 1.2
  assert (opened[clean != FACE] == clean[clean != FACE]).all()


def test_smoothing_keeps_time_and_gaps():
  one, two = as_layers(draw_person()), as_layers(draw_person(shift=4))
  assert list(masks.smooth([])) == []
  out = list(masks.smooth([one, None, two, two, one]))
  assert [o is None for o in out] == [False, True, False, False, False]
  first, fourth = out[0], out[3]
  assert first is not None and fourth is not None
  np.testing.assert_allclose(first, one, atol=1)
  np.testing.assert_allclose(fourth, 0.2 * two + 0.6 * two + 0.2 * one, atol=1)


def test_plate_is_what_lies_behind_the_moving_person():
  size = 96
  r, c = np.mgrid[:size, :size]
  truth = np.stack([r * 2, c * 2, 255 - r], -1).astype(np.uint8)
  plate = masks.Plate(9)
  for shift in range(-16, 17, 4):
    classes = draw_person(shift=shift)
    assert plate.wants()
    image = np.where((classes == BACKGROUND)[..., None], truth, 0).astype(np.uint8)
    plate.add(image, classes)
  found, known = plate.finish()
  ever = np.mean([draw_person(shift=s) == BACKGROUND for s in range(-16, 17, 4)], 0) > 0
  assert 0.3 < known < ever.mean()
  error = np.abs(found.astype(int) - truth)
  assert error[:30].max() < 12  # seen, but for the middle of the head
  assert error.mean() < 25 and not (found == 0).all(-1).any()


def test_fill_in_carries_what_is_known():
  image = np.zeros((40, 40, 3), np.float32)
  image[:, :20], image[:, 20:] = 50, 200
  known = np.ones((40, 40), bool)
  known[10:30, 2:12] = False
  broken = image.copy()
  broken[~known] = 0
  filled = masks.fill_in(broken, known)
  assert (filled[known] == image[known]).all()
  assert np.abs(filled[~known] - 50).max() < 25


def test_torso_goes_on_under_the_chin_and_not_elsewhere():
  classes = draw_person(192)
  image = np.zeros((192, 192, 3), np.uint8)
  image[classes == NECK] = (180, 120, 90)
  image[classes == TORSO] = (20, 20, 80)
  image[classes == FACE] = (0, 255, 0)
  torso = masks.cut_torso(image, classes)
  body = np.isin(classes, (NECK, TORSO))
  assert (torso[body, 3] == 255).all()
  inner = body & np.roll(body, 3, axis=0)  # but for the chin's own shadow
  assert (torso[inner, :3] == image[inner]).all()
  painted = (torso[..., 3] == 255) & ~body
  assert np.isin(classes[painted], (FACE, HAIR, MOUTH, BACKGROUND)).all()
  chin = int(np.flatnonzero(classes[:, 96] == NECK)[0])
  assert torso[chin - 10, 96, 3] == 255 and torso[chin - 10, 96, 1] < 130  # neck, not face
  assert torso[chin - 60, 96, 3] == 0
  assert not torso[torso[..., 3] == 0].any()
  # The chin's shadow at the neck's upper end is not carried on upwards.
  shaded = image.copy()
  shaded[chin - 4 : chin + 6][classes[chin - 4 : chin + 6] == NECK] = (60, 40, 30)
  above = masks.cut_torso(shaded, classes)[chin - 15, 96, :3].astype(int)
  assert np.abs(above - (180, 120, 90)).max() < 20


def test_teeth_are_pale_and_neither_tongue_nor_shade():
  classes = draw_person()
  image = np.full((96, 96, 3), (150, 100, 80), np.uint8)
  classes[48:60, 40:56] = MOUTH
  image[48:60, 40:56] = (70, 20, 20)
  image[48:52, 42:54] = (190, 185, 175)
  image[54:58, 42:54] = (230, 160, 150)  # a tongue in full light
  image[58:60, 42:54] = (60, 58, 55)  # pale, but in the dark
  known = np.array([0.02, 0.2, 90.0])
  teeth = masks.find_teeth(image, classes, known)
  assert teeth[48:52, 42:54].all() and teeth.sum() == 48
  classes[classes == MOUTH] = FACE
  assert not masks.find_teeth(image, classes, known).any()


def test_shoulders_that_the_parser_overlooks_are_torso():
  classes = draw_person(256)
  layers, torso = as_layers(classes), masks.LAYERS.index(TORSO)
  bare = layers.copy()
  bare[..., torso] = 0
  person = (classes != BACKGROUND).astype(np.float32)
  found = masks._claim_shoulders(bare, person, lips_row=140.0)
  missed = (found[..., torso] < 128) & (classes == TORSO)
  assert missed.sum() < 0.05 * (classes == TORSO).sum()
  assert (np.delete(found, torso, 2) == np.delete(layers, torso, 2)).all()
  assert (found[:140] == layers[:140]).all()


def test_layers_are_carried_with_the_head_and_the_torso_stays():
  def place_head(dx, dy):
    angle = np.linspace(0, 2 * np.pi, landmarks.LANDMARKS)
    x, y = 96 + 34 * np.cos(angle) + dx, 80 + 46 * np.sin(angle) + dy
    points = np.stack([x, y, np.zeros_like(x)], 1)
    points[10, :2], points[152, :2] = (96 + dx, 34 + dy), (96 + dx, 126 + dy)
    return points

  def draw(dx, dy):  # the head moves, the body stays
    still = draw_person(192)
    classes = np.where(np.isin(still, (NECK, TORSO)), still, BACKGROUND).astype(np.uint8)
    r, c = np.mgrid[:192, :192]
    classes[((r - 80 - dy) / 48) ** 2 + ((c - 96 - dx) / 34) ** 2 < 1] = FACE
    return classes

  before, after = as_layers(draw(-6, -3)), as_layers(draw(6, 3))
  ends = place_head(-6, -3), place_head(6, 3)
  found = masks.carry(before, after, *ends, place_head(2, 1), 2 / 3)
  classes, truth = masks.classify(found), draw(2, 1)
  for label in (FACE, TORSO):
    both = ((classes == label) & (truth == label)).sum()
    assert both / ((classes == label) | (truth == label)).sum() > 0.97
  np.testing.assert_allclose(found[-12:], before[-12:], atol=1)
  assert (masks.carry(before, after, *ends, ends[0], 0.0) == before).all()


def test_steadiness_tells_flicker_from_motion():
  def place(shift):
    angle = np.linspace(0, 2 * np.pi, landmarks.LANDMARKS)
    x, y = 96 + 34 * np.cos(angle) + shift, 80 + 46 * np.sin(angle)
    points = np.stack([x, y, np.zeros_like(x)], 1)
    points[10, :2], points[152, :2] = (96 + shift, 34), (96 + shift, 126)
    return points

  still, moved = draw_person(192), draw_person(192, shift=3)
  whole = masks.find_steadiness(still, place(0), still, place(0))
  assert (whole == 1).all()
  moving = dict(zip(masks.LAYERS, masks.find_steadiness(still, place(0), moved, place(6)),
                    strict=True))  # fmt: skip
  assert moving[HAIR] > 0.95 and moving[FACE] > 0.97
  bald = np.where(still == HAIR, BACKGROUND, still).astype(np.uint8)
  gone = masks.find_steadiness(still, place(0), bald, place(0))
  assert gone[masks.LAYERS.index(HAIR)] == 0 and gone[masks.LAYERS.index(FACE)] == 1
  never = masks.find_steadiness(bald, place(0), bald, place(0))
  assert np.isnan(never[masks.LAYERS.index(HAIR)])


def test_the_jaw_is_met_by_a_face_that_ends_there():
  points = np.zeros((landmarks.LANDMARKS, 3))
  angle = np.linspace(0, 2 * np.pi, len(landmarks.FACE_OVAL), endpoint=False)
  oval = np.stack([np.sin(angle), -np.cos(angle)], 1)
  points[landmarks.FACE_OVAL, :2] = 96 + oval * (34, 46)
  around = np.linspace(0.55 * np.pi, 1.45 * np.pi, 13)  # from the right cheek over the chin
  points[landmarks.IBUG[2:15], :2] = 96 + np.stack([np.sin(around), -np.cos(around)], 1) * (34, 46)
  r, c = np.mgrid[:192, :192] + 0.5

  def face(size):
    inside = ((r - 96) / 46) ** 2 + ((c - 96) / 34) ** 2 < size**2
    return np.where(inside, FACE, NECK).astype(np.uint8)

  assert masks.find_jaw_agreement(face(1.0), points) == 1
  assert masks.find_jaw_agreement(face(1.3), points) == 0
  assert masks.find_jaw_agreement(face(0.7), points) == 0
