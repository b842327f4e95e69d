"""The avatar of a run in several emotions side by side, saying the same, as an animated GIF.

    python -m uajax.gallery demo/run --audio demo/held_out/aud.wav --out emotions.gif

A GIF shows where films do not play, and carries the manifest of the films (`uajax verify`).
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from uajax import contact, media, provenance, runs, saving, synthesize
from uajax.emotion import control
from uajax.errors import UserError
from uajax.priors import extract
from uajax.types import FPS

COLOURS = 255  # of the one palette: with one for each picture still parts would flicker


def make(
  run_path, audio, out, *, emotions: Sequence[str] = (), intensity: float = 1.0, every: int = 2,
  subject=None,
) -> tuple[str, ...]:
  """Writes the GIF; returns the emotions that it shows, from left to right.

  Args:
    run_path: a run folder.
    audio: what is said, any sound or video file.
    out: the .gif to write.
    emotions: by name; none: all that the avatar knows.
    intensity: of each, 0 to 1.
    every: shows every so manieth frame, in 1 / FPS s times as many.
    subject: the subject folder, if it was moved since training.

  Raises:
    UserError: the run, the recording or an emotion cannot be used, or `out` is no .gif.
  """
  out = pathlib.Path(out)
  if out.suffix.lower() != ".gif":
    raise UserError(f"--out {out} must end in .gif")
  if not 1 <= every <= FPS:
    raise UserError(f"--every {every} is out of reach: give 1 to {FPS}")
  run = runs.open_run(run_path)
  names = tuple(emotions) or control.names(extract.load(run.extractors))
  if not names:
    raise UserError(f"{run.path} knows no emotion by name: give --emotions, or another run")
  columns, said = {}, {}
  with tempfile.TemporaryDirectory() as folder:
    for name in dict.fromkeys(names):
      film = pathlib.Path(folder) / "film.mp4"
      synthesize.synthesize(
        run.path, audio, film, emotion=name, intensity=intensity, subject=subject)
      columns[name] = list(media.read_frames(film))[::every]
      said = provenance.verify(film).synthesis
  sheets = [contact.draw_sheet({name: [frame] for name, frame in zip(columns, row, strict=True)})
            for row in zip(*columns.values(), strict=True)]
  few = np.concatenate(sheets[:: -(-len(sheets) // 8)])
  palette = Image.fromarray(few).quantize(COLOURS)
  first, *rest = (Image.fromarray(sheet).quantize(palette=palette, dither=Image.Dither.NONE)
                  for sheet in sheets)
  with saving.aside(out) as partial:
    first.save(partial, save_all=True, append_images=rest, duration=1000 * every // FPS, loop=0)
  try:
    provenance.sign(out, said | {"emotion": ", ".join(columns)}, provenance.credentials())
  except BaseException:
    with contextlib.suppress(OSError):
      out.unlink()
    raise
  return tuple(columns)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="An avatar in several emotions, as a GIF.")
  parser.add_argument("run", help="run folder")
  parser.add_argument("--audio", required=True, help="what is said: any sound or video file")
  parser.add_argument("--out", required=True, type=pathlib.Path, help="the .gif to write")
  parser.add_argument("--emotions", nargs="+", default=(), help="by name (default: all it knows)")
  parser.add_argument("--intensity", type=float, default=1.0, help="of each, 0 to 1")
  parser.add_argument("--every", type=int, default=2, help="shows every so manieth frame")
  parser.add_argument("--subject", help="the subject folder's new place, if it was moved")
  args = parser.parse_args(argv)
  try:
    shown = make(args.run, args.audio, args.out, emotions=args.emotions,
                 intensity=args.intensity, every=args.every, subject=args.subject)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"{args.out}: {', '.join(shown)} ({args.out.stat().st_size / 1e6:.2f} MB)")
  return 0


if __name__ == "__main__":
  sys.exit(main())
