"""A subject's folder as the official scripts leave it (method.md D.1, E), of two seconds at 48 px.

Written with nothing of ours but the torch files. A head nods before a wall; the sound ends a
window early; OpenFace's table, priors and masks have the shapes, names and quirks of the originals.
"""

import json
import math
import wave

import numpy as np
import PIL.Image

from uajax import torchfile

FRAMES, SIZE, FOCAL_PX = 50, 48, 110.0
WINDOWS = 49  # of DeepSpeech: ceil((round(50 * 1.96 s) - 1) / 2)
TRAIN = 10 * FRAMES // 11
# What the face parser calls the 19 classes, as cv2 writes their colours: blue, green, red.
_BGR = {0: (255, 255, 255), 11: (100, 100, 100), 14: (0, 255, 0), 15: (0, 255, 0), 16: (0, 0, 255),
        17: (0, 0, 0), 18: (255, 0, 0)}  # fmt: skip
_UNITS = (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 25, 26, 45)


def opening(i: int) -> float:
  """Of the inner lips of frame i, in pixels."""
  return 1.5 + 1.5 * math.sin(0.9 * i)


def labels(i: int) -> np.ndarray:
  """The parser's classes of a frame: head about the middle, lips below it, neck, cloth."""
  rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
  x, y = columns - 24, rows - 22 - math.sin(0.3 * i)
  out = np.zeros((SIZE, SIZE), np.uint8)
  out[(np.abs(x) < 16) & (rows > 40)] = 16
  out[(np.abs(x) < 6) & (rows > 34)] = 14
  head = (x / 13) ** 2 + (y / 16) ** 2 < 1
  out[head] = 1
  out[head & (y < -10)] = 17
  out[(np.abs(x) > 12) & (np.abs(y) < 3) & head] = 8  # ears
  out[(np.abs(x) < 4) & (np.abs(y - 8) < 2)] = 12  # lips are skin's colour
  out[(np.abs(x) < 3) & (np.abs(y - 8) < opening(i) / 2)] = 11
  return out


def picture(i: int) -> np.ndarray:
  palette = np.full((19, 3), (200, 150, 120))
  palette[0], palette[11], palette[12] = (90, 120, 160), (60, 10, 10), (180, 70, 70)
  palette[16], palette[17] = (40, 60, 130), (50, 30, 20)
  return palette[labels(i)].astype(np.uint8)


def teeth(i: int) -> np.ndarray:
  """Upper teeth: the first open row, and the row of lip above it (Q16)."""
  mouth = labels(i) == 11
  top = mouth & ~np.roll(mouth, 1, 0)
  return top | np.roll(top, -1, 0)


def landmarks(i: int) -> np.ndarray:
  points = np.random.default_rng(i).uniform(12, 36, (68, 2))
  y = 30 + math.sin(0.3 * i)
  angles = np.arange(12) * math.pi / 6
  points[48:60] = np.stack([24 - 4 * np.cos(angles), y - 2 * np.sin(angles)], 1)
  angles = np.arange(8) * math.pi / 4
  points[60:68] = np.stack([24 - 3 * np.cos(angles), y - opening(i) / 2 * np.sin(angles)], 1)
  if i == 7:  # lips that leave the picture (Q18)
    points[48:68] += (0, 20)
  return points


def make(path, *, priors: bool = True, left_out=()) -> None:
  """Writes the folder; `left_out` are frames that the transforms do not name."""
  rng = np.random.default_rng(3)
  for name in ("ori_imgs", "gt_imgs", "torso_imgs", "parsing", "teeth_mask"):
    (path / name).mkdir(parents=True)
  with wave.open(str(path / "aud.wav"), "wb") as file:  # channels are kept
    file.setparams((2, 2, 16_000, 0, "NONE", "NONE"))
    loud = np.abs(np.sin(0.45 * np.arange(31_360) / 640))
    file.writeframes(np.repeat(3000 * loud * rng.normal(size=31_360), 2).astype("<i2").tobytes())
  # process.py calls it aud.npy; the loader wants aud_ds.npy.
  np.save(path / "aud.npy", rng.normal(size=(WINDOWS, 16, 29)))  # float64, as NumPy interpolates
  wall = np.full((SIZE, SIZE, 3), (90, 120, 160), np.uint8)
  PIL.Image.fromarray(wall).save(path / "bc.jpg", quality=95)

  euler = np.stack([0.03 * np.sin(0.3 * np.arange(FRAMES))] + [np.zeros(FRAMES)] * 2, 1)
  trans = np.tile([0.0, 0.0, -7.0], (FRAMES, 1))
  exp = rng.normal(size=(FRAMES, 79))
  exp[:, 0] = [opening(i) - 1.5 for i in range(FRAMES)]
  tracked = {"id": rng.normal(size=(1, 100)), "exp": exp, "euler": euler, "trans": trans,
             "focal": np.array([FOCAL_PX])}  # fmt: skip
  torchfile.save(path / "track_params.pt", {k: v.astype(np.float32) for k, v in tracked.items()})

  frames = []
  for i in range(FRAMES):
    image = picture(i)
    PIL.Image.fromarray(image).save(path / "ori_imgs" / f"{i}.jpg", quality=98)
    PIL.Image.fromarray(image).save(path / "gt_imgs" / f"{i}.jpg", quality=98)
    np.savetxt(path / "ori_imgs" / f"{i}.lms", landmarks(i), "%f")
    bgr = np.array([_BGR.get(c, (255, 0, 0)) for c in range(19)], np.uint8)[labels(i)]
    PIL.Image.fromarray(bgr[..., ::-1]).save(path / "parsing" / f"{i}.png")
    torso = np.dstack([image, np.where((labels(i) == 16) | (labels(i) == 14), 255, 0)])
    PIL.Image.fromarray(torso.astype(np.uint8)).save(path / "torso_imgs" / f"{i}.png")
    np.save(path / "teeth_mask" / f"{i}.npy", teeth(i))
    turn = np.array([[1, 0, 0],
                     [0, math.cos(euler[i, 0]), -math.sin(euler[i, 0])],
                     [0, math.sin(euler[i, 0]), math.cos(euler[i, 0])]])  # fmt: skip
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn.T, -turn.T @ trans[i] / 10
    frames.append({"img_id": i, "aud_id": i, "transform_matrix": pose.tolist()})
  for split, rows in (("train", frames[:TRAIN]), ("val", frames[TRAIN:])):
    rows = [row for row in rows if row["img_id"] not in left_out]
    document = {"focal_len": FOCAL_PX, "cx": SIZE / 2.0, "cy": SIZE / 2.0, "frames": rows}
    (path / f"transforms_{split}.json").write_text(json.dumps(document, indent=2))
    if priors:
      torchfile.save(path / f"{split}_auds_exp.pth", numbered(rows, 64)[:, None])
      torchfile.save(path / f"{split}_audiostyle.pth", list(numbered(rows, 64)))
      more = np.pad(numbered(rows, 128)[:, None], ((0, 2), (0, 0), (0, 0)))  # two rows too many
      torchfile.save(path / f"mser_emotion_{split}.pth", more)
  _openface(path / "au.csv")
  (path / "points3d.ply").write_bytes(b"ply\nformat binary_little_endian 1.0\n")


def numbered(rows, width: int) -> np.ndarray:
  """A prior that tells which frame it belongs to."""
  ids = np.array([row["img_id"] for row in rows], np.float32)
  return np.sin(ids[:, None] + np.arange(width)).astype(np.float32)


def unit(number: int, i: int) -> float:
  """Of a frame, to OpenFace's two digits."""
  return round(abs(2.5 * math.sin(0.2 * i * number)), 2)


def _openface(file) -> None:
  """A header whose names begin with a space, rows of numbers that do, one row a frame."""
  gaze = [f"gaze_{eye}_{axis}" for eye in (0, 1) for axis in "xyz"]
  units = [f"AU{n:02d}_r" for n in _UNITS] + [f"AU{n:02d}_c" for n in (*_UNITS[:-1], 28, 45)]
  lines = [", ".join(["frame", "face_id", "timestamp", "confidence", "success", *gaze, *units])]
  for i in range(FRAMES):
    lost = i == 20  # a frame that OpenFace did not find a face in: zeros
    values = [0.0 if lost else unit(n, i) for n in _UNITS] + [0.0] * 18
    row = [str(i + 1), "0", f"{i / 25:.3f}", "0.00" if lost else "0.98", "0" if lost else "1"]
    lines.append(", ".join([*row, *["0.1"] * 6, *(f"{value:.2f}" for value in values)]))
  file.write_text("\n".join(lines) + "\n")
