"""A made-up subject on disk: the TalkingGaussian/UA-3DTalk layout (method.md D.1) and its truth.

Besides the layout's files: aud_mel.npy, expression.npy (what a tracker would find),
emotion.csv, and truth/ with all that is known because it was made.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import wave
from collections.abc import Sequence

import numpy as np
from PIL import Image

from uajax import types
from uajax.data.synthetic import language, performance, portrait
from uajax.data.synthetic.performance import AU_NAMES, EMOTIONS, Line, Performance, Person
from uajax.errors import UserError
from uajax.types import FPS, SAMPLE_RATE_HZ

_OPENFACE = (
  "AU01", "AU02", "AU04", "AU05", "AU06", "AU07", "AU09", "AU10", "AU12", "AU14", "AU15", "AU17",
  "AU20", "AU23", "AU25", "AU26", "AU45",
)  # fmt: skip
# What a reader sees in parsing/*.png as RGB, by class (method.md D.1 "Masks").
_COLORS = {
  types.BACKGROUND: (255, 255, 255),
  types.FACE: (0, 0, 255),
  types.HAIR: (0, 0, 0),
  types.MOUTH: (100, 100, 100),
  types.NECK: (0, 255, 0),
  types.TORSO: (255, 0, 0),
}


def make(
  path: str | os.PathLike,
  person: Person = Person(),  # noqa: B008 (frozen)
  *,
  seconds: float = 12.0,
  seed: int = 0,
  script: Sequence[Line] | None = None,
  progress: bool = True,
) -> None:
  """Writes a subject folder: the first ten elevenths for training, the rest for validation.

  Args:
    path: must not exist, or be an empty folder.
    person: looks, voice and picture size.
    seconds: of the default script; ignored when `script` is given.
    seed: of words, movement and voice noise. The same arguments write the same bytes.
    script: what is said and felt; None is `performance.default_script`.
    progress: says how far the filming is.

  Raises:
    UserError: the folder is taken, too little time is asked for, or the disk is full.
  """
  target = pathlib.Path(path)
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise UserError(f"{target} exists already: name a new folder or remove it first")
  if script is None:
    if not 0.5 <= seconds <= 3600:
      raise UserError(f"a subject of {seconds} s cannot be made: ask for 0.5 s to an hour")
    script = performance.default_script(seconds, seed)
  if not 16 <= person.size_px <= 1024:
    raise UserError(f"a picture of {person.size_px} px cannot be made: ask for 16 to 1024")
  played = performance.perform(person, script, seed)
  film = portrait.render_frames(person, played, progress=progress)

  partial = target.with_name(target.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)  # of an earlier run that was stopped
  try:
    partial.mkdir(parents=True)
    _write(partial, played, film)
    _write_truth(partial / "truth", person, script, seed, played, film)
    if target.exists():
      target.rmdir()
    partial.rename(target)
  except OSError as error:
    raise UserError(f"cannot write the subject to {target}: {error.strerror or error}") from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def training_frames(frames: int) -> int:
  """How many frames come first in a split (method.md E.9)."""
  return 10 * frames // 11


def _write(folder: pathlib.Path, played: Performance, film: portrait.Film) -> None:
  from uajax.speech import features  # librosa takes a second to load

  frames = len(film.image)
  _write_wav(folder / "aud.wav", played.wav)
  heard = _read_back(played.wav)
  np.save(folder / "aud_mel.npy", np.asarray(features.mel_windows(heard, frames), np.float32))
  np.save(folder / "expression.npy", performance.expression(played))
  _jpeg(folder / "bc.jpg", film.plate)
  for name in ("ori_imgs", "gt_imgs", "torso_imgs", "parsing", "teeth_mask"):
    (folder / name).mkdir()
  palette = np.array([_COLORS[k] for k in range(len(_COLORS))], np.uint8)
  for i in range(frames):
    _jpeg(folder / f"ori_imgs/{i}.jpg", film.image[i])
    shutil.copyfile(folder / f"ori_imgs/{i}.jpg", folder / f"gt_imgs/{i}.jpg")
    lines = (f"{x:f} {y:f}\n" for x, y in film.landmarks[i])
    (folder / f"ori_imgs/{i}.lms").write_text("".join(lines))
    Image.fromarray(film.torso[i]).save(folder / f"torso_imgs/{i}.png", compress_level=3)
    Image.fromarray(palette[film.classes[i]]).save(folder / f"parsing/{i}.png", compress_level=3)
    np.save(folder / f"teeth_mask/{i}.npy", film.teeth[i])

  split = training_frames(frames)
  size = film.image.shape[1]
  for name, ids in (("train", range(split)), ("val", range(split, frames))):
    listed = [
      {"img_id": i, "aud_id": i, "transform_matrix": film.c2w[i].tolist()} for i in ids
    ]
    content = {"focal_len": film.focal_px, "cx": size / 2, "cy": size / 2, "frames": listed}
    (folder / f"transforms_{name}.json").write_text(json.dumps(content))

  rows = [", ".join(["frame", "face_id", "timestamp", "confidence", "success", *(f"{u}_r" for u in _OPENFACE)])]
  for i in range(frames):
    units = dict(zip(AU_NAMES, played.au[i], strict=True))
    values = ", ".join(f"{units.get(name, 0.0):.4f}" for name in _OPENFACE)
    rows.append(f"{i + 1}, 0, {i / FPS:.3f}, 1.00, 1, {values}")
  (folder / "au.csv").write_text("\n".join(rows) + "\n")
  felt = [f"{i},{EMOTIONS[played.emotion[i]]},{played.intensity[i]:.4f}" for i in range(frames)]
  (folder / "emotion.csv").write_text("\n".join(["frame,label,intensity", *felt]) + "\n")


def _write_truth(folder, person, script, seed, played: Performance, film: portrait.Film) -> None:
  folder.mkdir()
  np.savez(
    folder / "truth.npz",
    phone=np.array([symbol for symbol, _, _ in played.phones]),
    phone_start_s=np.array([start for _, start, _ in played.phones]),
    phone_end_s=np.array([end for _, _, end in played.phones]),
    pose=played.pose,
    mouth=played.mouth,
    mouth_names=np.array(language.MOUTH_CONTROLS),
    au=played.au,
    au_names=np.array(AU_NAMES),
    emotion=played.emotion,
    emotion_names=np.array(EMOTIONS),
    intensity=played.intensity,
    blink=played.blink,
    lip_gap_px=film.lip_gap_px,
    lip_gap_mm=film.lip_gap_mm,
    training_frames=training_frames(len(film.image)),
  )
  made = {
    "person": dataclasses.asdict(person),
    "seed": seed,
    "script": [dataclasses.asdict(line) for line in script],
  }
  (folder / "made.json").write_text(json.dumps(made, indent=1) + "\n")


def _write_wav(path: pathlib.Path, samples: np.ndarray) -> None:
  with wave.open(str(path), "wb") as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(SAMPLE_RATE_HZ)
    file.writeframes(_pcm(samples).tobytes())


def _pcm(samples: np.ndarray) -> np.ndarray:
  return np.round(np.clip(samples, -1, 1) * 32767).astype("<i2")


def _read_back(samples: np.ndarray) -> np.ndarray:
  """The samples as aud.wav holds them, so that features match those of the file."""
  return _pcm(samples).astype(np.float32) / 32768


def _jpeg(path: pathlib.Path, image: np.ndarray) -> None:
  Image.fromarray(image).save(path, quality=97, subsampling=0)
