import itertools

import numpy as np
import pytest
from PIL import Image

from uajax import media
from uajax.errors import UserError
from uajax.preprocess import landmarks


@pytest.fixture(scope="module")
def landmarker(shared):
  return landmarks.Landmarker(shared("models/face_landmarker.task"))


@pytest.fixture(scope="module")
def frames(shared):
  video = media.read_frames(shared("data/clips/obama_20s.mp4"))
  return list(itertools.islice(video, 285, 295))


def see(landmarker, image):
  (seen,) = landmarks.follow([(image, True)], landmarker)
  return seen.points


def test_tables_name_landmarks_that_exist():
  assert len(landmarks.BLENDSHAPES) == len(set(landmarks.BLENDSHAPES)) == 52
  assert len(np.unique(landmarks.BLENDSHAPE_INPUT)) == 146
  assert len(np.unique(landmarks.IBUG)) == 68
  assert max(*landmarks.BLENDSHAPE_INPUT, *landmarks.IBUG) < landmarks.LANDMARKS


def test_crop_turns_the_picture_about_the_square():
  image = np.zeros((60, 80, 3), np.uint8)
  image[20:24, 50:54] = 255  # centre (52, 22)
  # A square at (40, 30) turned by 90 degrees: its x axis points down, its y axis left.
  patch = landmarks.crop(image, landmarks.Roi(40.0, 30.0, 40.0, np.pi / 2), 40)
  r, c = np.argwhere(patch[..., 0] > 200).mean(0) + 0.5
  assert (c - 20, r - 20) == pytest.approx((22 - 30, 40 - 52), abs=0.6)


def test_average_face_is_a_symmetric_face_in_metres(landmarker):
  mesh = landmarker.mesh
  assert 0.14 < np.ptp(mesh.vertices[:, 0]) < 0.17
  assert (mesh.mirror[mesh.mirror] == np.arange(468)).all()
  assert mesh.vertices[1, 2] > mesh.vertices[234, 2] + 0.05  # the nose lies before the ears


def test_finds_the_face_and_its_mirror_image_alike(landmarker, frames):
  image = frames[0]
  (found,) = landmarker.detect(image)
  assert 150 < found.box[2] - found.box[0] < 260
  points = see(landmarker, image)
  flipped = see(landmarker, np.ascontiguousarray(image[:, ::-1]))
  back = flipped[:468][landmarker.mesh.mirror, :2] * [-1, 1] + [image.shape[1], 0]
  assert np.sqrt(((back - points[:468, :2]) ** 2).sum(1)).mean() < 3


def test_scores_tell_an_open_from_a_closed_mouth(landmarker, shared):
  video = media.read_frames(shared("data/clips/obama_20s.mp4"))
  closed, opened = list(itertools.islice(video, 199, 291))[:: 91]
  jaw = landmarks.BLENDSHAPES.index("jawOpen")
  values = []
  for image in (closed, opened):
    values.append(landmarker.score(see(landmarker, image))[jaw])
  assert values[1] > values[0] + 0.2


def test_a_lost_face_is_none_and_is_found_again(landmarker, frames):
  clip = [frames[0], np.zeros_like(frames[0]), frames[1]]
  found = list(landmarks.follow([(image, False) for image in clip], landmarker))
  assert [seen.points is None for seen in found] == [False, True, False]
  assert found[0].segment == found[2].segment  # in the same place
  points, scores = landmarks.steady(
    frames[0], landmarks.roi_of_points(found[0].points), landmarker, looks=2
  )
  assert np.abs(points - found[0].points)[:, :2].max() < 8
  assert scores.shape == (52,)


def test_nothing_is_carried_over_a_cut(landmarker, frames):
  """Two shots of two faces each, the larger on the other side: each shot's larger is followed."""
  big, small = frames[0][::2, ::2], frames[0][::3, ::3]
  shots = []
  for left, right in ((big, small), (small, big)):
    wide = np.full((240, 480, 3), 90, np.uint8)
    wide[: len(left), : len(left)] = left
    wide[: len(right), 480 - len(right) :] = right
    shots.append(wide)
  clip = [(shots[0], True), (shots[0], False), (shots[1], True), (shots[1], False)]
  seen = list(landmarks.follow(clip, landmarker))
  sides = [float(s.points[:, 0].mean()) > 240 for s in seen]
  assert sides == [False, False, True, True]
  assert [s.segment for s in seen] == [0, 0, 1, 1] and seen[0].others == 1


def test_a_face_far_away_is_found(landmarker, frames):
  far = np.full((1080, 1920, 3), 120, np.uint8)
  face = np.asarray(Image.fromarray(frames[0]).resize((200, 200)))  # the face: 90 px
  far[500:700, 1400:1600] = face
  found = landmarker.detect(far)
  assert len(found) == 1
  x, y = (found[0].box[:2] + found[0].box[2:]) / 2
  assert abs(x - 1500) < 30 and 500 < y < 700


def test_the_square_is_the_same_cut_from_any_frame_around_it(landmarker, frames):
  """`crop` reads only what it needs: the same pixels as from the whole picture."""
  image = np.asarray(Image.fromarray(frames[0]).resize((1800, 1800)))
  for x, y, side in ((900, 800, 700), (20, 1790, 900), (1750, 30, 400)):
    roi = landmarks.Roi(x, y, side, 0.3)
    framed = np.pad(image, ((120, 60), (180, 240), (0, 0)))
    moved = landmarks.crop(framed, roi._replace(x=x + 180, y=y + 120), 128)
    apart = np.abs(moved.astype(int) - landmarks.crop(image, roi, 128)).max(-1)
    assert (apart > 2).mean() < 0.02  # only along the picture's border, where it blends with black
  assert not landmarks.crop(image, landmarks.Roi(-5000, 0, 100, 0), 16).any()


def test_yaw_is_that_of_the_face(landmarker, frames):
  points = see(landmarker, frames[0])
  mirrored = see(landmarker, np.ascontiguousarray(frames[0][:, ::-1]))
  mesh = np.concatenate([landmarker.mesh.vertices * [1, -1, -1], np.zeros((10, 3))])
  a = np.radians(50)
  turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
  yaw = landmarks.rough_yaw(np.stack([points, mirrored, 900 * mesh @ turn.T]), landmarker.mesh)
  assert yaw[0] == pytest.approx(-yaw[1], abs=2)
  assert abs(yaw[2]) == pytest.approx(50, abs=0.1)


def test_a_file_that_is_no_bundle_is_refused(tmp_path):
  path = tmp_path / "face_landmarker.task"
  path.write_bytes(b"PK\x03\x04 not a bundle")
  with pytest.raises(UserError, match="not MediaPipe's"):
    landmarks.Landmarker(path)
  with pytest.raises(UserError, match="not a TensorFlow Lite model"):
    landmarks.load_network(path)
  with pytest.raises(ValueError):
    landmarks.read_mesh(b"\x0a\xff\xff\x01abc")
