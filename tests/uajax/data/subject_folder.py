"""A tiny subject for the tests of this folder: twelve frames of coloured blocks."""

import numpy as np

from uajax import types
from uajax.data import folder

FRAMES, HEIGHT, WIDTH, FOCAL_PX = 12, 32, 40, 60.0


def contents(rng: np.random.Generator):
  """Frame i: face at rows 8:24, hair above, mouth and one row of teeth, torso below."""
  smooth = np.linspace(0, 255, WIDTH)[None, :, None] * np.ones((HEIGHT, 1, 3))
  for i in range(FRAMES):
    classes = np.full((HEIGHT, WIDTH), types.BACKGROUND, np.uint8)
    classes[4:8, 10:30] = types.HAIR
    classes[8:24, 10:30] = types.FACE
    classes[18:21, 16:24] = types.MOUTH
    classes[24:26, 16:24] = types.NECK
    classes[26:, 6:34] = types.TORSO
    teeth = np.zeros((HEIGHT, WIDTH), bool)
    teeth[17:19, 18:22] = True  # one row of it in the face, one in the mouth
    torso = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    torso[24:, 6:34] = (200, 10 * i, 30, 255)
    torso[24, 6:34, 3] = 128
    truth = np.clip(smooth + 3 * i, 0, 255).astype(np.uint8)
    points = rng.uniform(8, 24, (68, 2))
    points[48:60] = [[16, 18], [24, 21]] * 6
    points[60:68] = [[18, 18], [22, 18.5 + 0.25 * i]] * 4
    yield folder.Content(truth, torso, classes, points, teeth)


def tables(rng: np.random.Generator) -> dict:
  viewmats = np.tile(np.eye(4), (FRAMES, 1, 1))
  viewmats[:, 2, 3] = 0.5 + 0.01 * np.arange(FRAMES)
  angle = 0.02 * np.arange(FRAMES)
  viewmats[:, 0, 0] = viewmats[:, 2, 2] = np.cos(angle)
  viewmats[:, 0, 2], viewmats[:, 2, 0] = np.sin(angle), -np.sin(angle)
  plate = np.full((HEIGHT, WIDTH, 3), (10, 200, 90), np.uint8)
  units = {u: rng.uniform(0, 3, FRAMES) for u in (*types.ACTION_UNITS, "AU25")}
  return {
    "speech": rng.uniform(-0.5, 0.5, FRAMES * 640).astype(np.float32),
    "viewmats": viewmats,
    "focal_px": FOCAL_PX,
    "action_units": units,
    "plate": plate,
    "windows": {"mel": rng.normal(size=(FRAMES, 16, 80)).astype(np.float32)},
    "expression": rng.normal(size=(FRAMES, 64)).astype(np.float32),
    "emotions": [("happy" if i < 6 else "sad", 0.5) for i in range(FRAMES)],
  }


def make(path, *, priors: bool = True) -> dict:
  """Writes the folder; returns its tables and, by split, the priors."""
  rng = np.random.default_rng(7)
  values = tables(rng)
  folder.write(path, contents(rng), **values)
  values["priors"] = {}
  for split in folder.SPLITS if priors else ():
    count = len(folder.frame_ids(path, split))
    widths = {"f_exp": 64, "f_tone": 64, "emotion": 128}
    rows = {k: rng.normal(size=(count, w)).astype(np.float32) for k, w in widths.items()}
    folder.write_features(path, split, **rows)
    values["priors"][split] = rows
  return values
