"""Preprocessing against the procedural person, whose truth is known.

The tracker is tested by itself, on the true places of points of the person's skin with the noise
of a landmark network, and end to end, on a video of the person. What no tracker can know
is taken out before poses are compared: where the head's own axes lie and how they are turned (one
rigid motion for the whole clip), and how many metres a unit is (one scale).
Axes: f frames, p landmarks.
"""

import json

import numpy as np
import pytest
import scipy.spatial
from PIL import Image

from uajax import media
from uajax.data import folder, synthetic
from uajax.data.synthetic import head as heads
from uajax.data.synthetic import portrait
from uajax.preprocess import landmarks, pipeline, track
from uajax.types import FACE, HAIR, MOUTH, NECK, TORSO

# Blendshapes by which a network would see what the person does.
SEEN = {
  "AU01": "browInnerUp", "AU02": "browOuterUp", "AU04": "browDown", "AU05": "eyeWide",
  "AU06": "cheekSquint", "AU07": "eyeSquint", "AU12": "mouthSmile", "AU15": "mouthFrown",
  "AU26": "jawOpen", "AU45": "eyeBlink",
}  # fmt: skip


def true_viewmats(c2w):
  opencv = c2w.copy()
  opencv[:, :3, 1:3] *= -1
  return np.linalg.inv(opencv)


def compare_poses(found, truth):
  """Degrees and share of the distance by which poses are wrong after the one alignment."""
  turns = np.einsum("fba,fbc->ac", found[:, :3, :3], truth[:, :3, :3])
  rotations = found[:, :3, :3] @ track._nearest_rotation(turns)
  # scale * place + rotation @ origin = true place: linear in scale and origin
  columns = np.concatenate([found[:, :3, 3:], found[:, :3, :3]], 2).reshape(-1, 4)
  place = truth[:, :3, 3]
  fitted = columns @ np.linalg.lstsq(columns, place.reshape(-1), rcond=None)[0]
  each = np.einsum("fba,fbc->fac", rotations, truth[:, :3, :3])
  degrees = np.degrees([np.linalg.norm(track._logm(r)) for r in each])
  away = np.linalg.norm(fitted.reshape(-1, 3) - place, axis=1) / np.linalg.norm(place, axis=1)
  return degrees, away


def follow_skin(person, played, landmarker):
  """Pixels of those points of the skin that the network takes for its landmarks in frame 0.

  Also the true viewmats.
  """
  stage, size = portrait._Stage(person, person.size_px), person.size_px

  def place(frame):
    skin = heads.deform(stage.head, played.mouth[frame], played.au[frame])
    motion = portrait._matrix(played.pose[frame])
    return skin @ motion[:3, :3].T + motion[:3, 3]

  fine = 2 * size
  head = stage.head
  seen, weights = stage.raster.visible(
    stage._project(place(0), fine), head.triangles, fine, fine
  )
  shot = synthetic.render_frames(person, cut(played, 1)).image[0]
  box = landmarker.detect(shot)[0]
  marks, _ = landmarker.read(shot, landmarks.roi_of_detection(box))
  marks, _ = landmarker.read(shot, landmarks.roi_of_points(marks))
  rows, columns = np.nonzero((seen >= 0) & (head.paint[seen] == heads.SKIN))
  at = np.stack([columns, rows], 1) / 2 + 0.25
  _, nearest = scipy.spatial.KDTree(at).query(marks[:, :2])
  r, c = rows[nearest], columns[nearest]
  corners, shares = head.triangles[seen[r, c]], weights[r, c]
  points, viewmats = [], []
  for frame in range(len(played.pose)):
    points.append(stage._project((place(frame)[corners] * shares[..., None]).sum(1), size))
    c2w = np.linalg.inv(portrait._matrix(played.pose[frame])) @ portrait._translation(
      portrait._CAMERA
    )
    viewmats.append(true_viewmats(c2w[None])[0])
  found = np.stack(points)
  depth = found[..., 2] - found[..., 2].mean(1, keepdims=True)  # to pixels, as the network has it
  found[..., 2] = portrait.FOCAL * size * depth / portrait.DISTANCE_M
  return found, np.stack(viewmats)


def cut(played, frames):
  """The performance's beginning."""
  return played._replace(
    **{k: getattr(played, k)[:frames] for k in ("pose", "mouth", "au", "blink", "emotion")},
    wav=played.wav[: frames * 640],
  )


def see(played):
  """Scores of a network that sees most of what the person does, not all alike well."""
  scores = np.random.default_rng(2).normal(0.1, 0.02, (len(played.au), 52)).clip(0, 1)
  for name, blendshape in SEEN.items():
    for side in ("", "Left", "Right"):
      if blendshape + side in landmarks.BLENDSHAPES:
        unit = played.au[:, synthetic.AU_NAMES.index(name)] / 5
        scores[:, landmarks.BLENDSHAPES.index(blendshape + side)] += 0.8 * unit
  return scores


@pytest.mark.slow  # track_test holds the tracker against simpler truths
@pytest.mark.parametrize("noise_px", [0.3, 1.0])
def test_tracker_finds_pose_and_focal_length_from_true_landmarks(shared, noise_px):
  landmarker = landmarks.Landmarker(shared("models/face_landmarker.task"), threads=1)
  person = synthetic.Person(size_px=512)
  played = synthetic.perform(person, synthetic.default_script(12.0))
  points, truth = follow_skin(person, played, landmarker)
  points[..., :2] += np.random.default_rng(0).normal(0, noise_px, points[..., :2].shape)
  present = np.ones(len(points), bool)
  found = track.fit(points, see(played), present, landmarker.mesh, 512, 512)
  degrees, away = compare_poses(found.viewmats, truth)
  print(f"{noise_px} px: {degrees.mean():.2f} deg, {away.mean():.2%}, {found.focal_px:.0f} px")
  assert degrees.mean() < 0.5
  assert away.mean() < 0.01
  # Landmarks alone; the pictures then say it to 0.05 (refine.find_focal).
  assert found.focal_px == pytest.approx(portrait.FOCAL * 512, rel=0.12)


LAYERS = (FACE, HAIR, NECK, TORSO, MOUTH)


@pytest.mark.slow
def test_preprocessing_a_film_of_the_person_finds_the_truth(shared, tmp_path):
  shared("models/face_landmarker.task")
  person = synthetic.Person(size_px=512)
  played = synthetic.perform(person, synthetic.default_script(12.0))
  film = synthetic.render_frames(person, played)
  media.write_video(tmp_path / "film.mp4", film.image, audio=played.wav)
  out = tmp_path / "subject"
  pipeline.run(tmp_path / "film.mp4", out)

  truth = true_viewmats(film.c2w)
  entries = [
    entry
    for split in folder.SPLITS
    for entry in json.loads((out / f"transforms_{split}.json").read_text())["frames"]
  ]
  ids = [entry["img_id"] for entry in entries]
  assert sorted(ids) == list(range(len(truth)))
  found = true_viewmats(np.array([entry["transform_matrix"] for entry in entries]))
  degrees, away = compare_poses(found, truth[ids])
  document = json.loads((out / "transforms_train.json").read_text())
  focal = document["focal_len"]
  print(f"{degrees.mean():.2f} deg, {away.mean():.2%}, focal {focal / film.focal_px - 1:+.1%}")

  overlap = {}
  # Pixels of all frames count alike: what a pixel or two in an all but shut mouth weigh is what
  # they weigh in training, and a shut mouth is wrong by what is found in it.
  for label in LAYERS:
    shared_px = either = 0
    for frame in range(0, len(truth), 5):
      with Image.open(out / "parsing" / f"{frame}.png") as picture:
        classes = folder._classes(np.asarray(picture.convert("RGB")))
      mine, theirs = classes == label, film.classes[frame] == label
      if label == FACE:  # the layout has one colour for the face and its inner mouth
        mine, theirs = np.isin(classes, (FACE, MOUTH)), np.isin(film.classes[frame], (FACE, MOUTH))
      shared_px += (mine & theirs).sum()
      either += (mine | theirs).sum()
    overlap[label] = shared_px / max(either, 1)
  print({k: round(float(v), 3) for k, v in overlap.items()})

  rows = folder._csv(out / "au.csv")
  correlation = {
    name: np.corrcoef([float(row[f"{name}_r"]) for row in rows], played.au[:, k])[0, 1]
    for k, name in enumerate(synthetic.AU_NAMES)
  }
  print({k: round(float(v), 2) for k, v in correlation.items()})
  assert away.mean() < 0.01
  assert degrees.mean() < 0.5
  assert focal == pytest.approx(film.focal_px, rel=0.05)
  for label in LAYERS:
    assert overlap[label] >= 0.9, label
  for name, value in correlation.items():
    assert value >= 0.8, name
