import itertools

import numpy as np
import pytest

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
  (points, _), = landmarks.follow([image], landmarker)
  (flipped, _), = landmarks.follow([np.ascontiguousarray(image[:, ::-1])], landmarker)
  back = flipped[:468][landmarker.mesh.mirror, :2] * [-1, 1] + [image.shape[1], 0]
  assert np.sqrt(((back - points[:468, :2]) ** 2).sum(1)).mean() < 3


def test_scores_tell_an_open_from_a_closed_mouth(landmarker, shared):
  video = media.read_frames(shared("data/clips/obama_20s.mp4"))
  closed, opened = list(itertools.islice(video, 199, 291))[:: 91]
  jaw = landmarks.BLENDSHAPES.index("jawOpen")
  values = []
  for image in (closed, opened):
    (points, _), = landmarks.follow([image], landmarker)
    values.append(landmarker.score(points)[jaw])
  assert values[1] > values[0] + 0.2


def test_a_lost_face_is_none_and_is_found_again(landmarker, frames):
  clip = [frames[0], np.zeros_like(frames[0]), frames[1]]
  found = [points for points, _ in landmarks.follow(clip, landmarker)]
  assert [p is None for p in found] == [False, True, False]
  steady = list(landmarks.refine(clip, landmarker, found, looks=2))
  assert steady[1] is None
  assert np.abs(steady[0][0] - found[0])[:, :2].max() < 8


def test_a_file_that_is_no_bundle_is_refused(tmp_path):
  path = tmp_path / "face_landmarker.task"
  path.write_bytes(b"PK\x03\x04 not a bundle")
  with pytest.raises(UserError, match="not MediaPipe's"):
    landmarks.Landmarker(path)
  with pytest.raises(UserError, match="not a TensorFlow Lite model"):
    landmarks.load_network(path)
  with pytest.raises(ValueError):
    landmarks.read_mesh(b"\x0a\xff\xff\x01abc")
