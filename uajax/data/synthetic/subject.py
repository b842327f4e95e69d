"""A made-up subject on disk: the TalkingGaussian/UA-3DTalk layout (method.md D.1) and its truth.

`folder` writes it; beside the layout lies truth/ with all that is known because it was made.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from uajax import consent
from uajax.data import folder
from uajax.data.synthetic import language, performance, portrait
from uajax.data.synthetic.performance import AU_NAMES, EMOTIONS, Line, Performance, Person
from uajax.errors import UserError

_OPENFACE = (
  "AU01", "AU02", "AU04", "AU05", "AU06", "AU07", "AU09", "AU10", "AU12", "AU14", "AU15", "AU17",
  "AU20", "AU23", "AU25", "AU26", "AU45",
)  # fmt: skip


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

  _write(target, person, script, seed, played, film)


def training_frames(frames: int) -> int:
  """How many frames come first in a split (method.md E.9)."""
  return 10 * frames // 11


def _write(target, person, script, seed, played: Performance, film: portrait.Film) -> None:
  from uajax.speech import features  # librosa takes a second to load

  windows = np.asarray(features.mel_windows(played.wav, len(film.image)), np.float32)
  units = dict(zip(AU_NAMES, played.au.T, strict=True))
  still = np.zeros(len(played.au))
  c2w = film.c2w.copy()
  c2w[:, :3, 1:3] *= -1  # OpenGL axes to OpenCV's
  with folder.writer(target) as w:
    for i in range(len(film.image)):
      w.frame(
        i,
        truth=film.image[i],
        torso_rgba=film.torso[i],
        parsing_classes=film.classes[i],
        landmarks=film.landmarks[i],
        teeth=film.teeth[i],
      )
    w.finish(
      speech=played.wav,
      viewmats=np.linalg.inv(c2w),
      focal_px=film.focal_px,
      action_units={name: units.get(name, still) for name in _OPENFACE},
      plate=film.plate,
      windows={"mel": windows},
      expression=performance.expression(played),
      emotions=[
        (EMOTIONS[e], float(x)) for e, x in zip(played.emotion, played.intensity, strict=True)
      ],
    )
    _write_truth(w.path / "truth", person, script, seed, played, film)
    consent.write(w.path, consent.NOBODY)


def _write_truth(path, person, script, seed, played: Performance, film: portrait.Film) -> None:
  path.mkdir()
  np.savez(
    path / "truth.npz",
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
  (path / "made.json").write_text(json.dumps(made, indent=1) + "\n")
