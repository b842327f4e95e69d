"""How likely each phone of English is, hundred times a second: a view of speech without a voice.

The acoustic model is the one that pocketsphinx brings. It scores every phone's states in each
frame of sound; forward-backward over a loop of all phones turns the scores into posteriors that
know what came before and after. For speech in other languages they are still a description of
how the mouth moves, by its nearest English sounds.

Axes: t frames of sound (100 a second), p phones, s samples.
"""

import pathlib
import struct
import tempfile

import numpy as np
from jaxtyping import Float, Float32

from uajax.errors import UserError
from uajax.progress import Progress
from uajax.speech import features
from uajax.types import SAMPLE_RATE_HZ

RATE_HZ = 100
STATES = 3  # of a phone, from left to right
PHONES = (
  "+NSN+", "+SPN+", "AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY",
  "F", "G", "HH", "IH", "IY", "JH", "K", "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH",
  "SIL", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH",
)  # fmt: skip
SILENCE = PHONES.index("SIL")
_STAY = 0.6  # probability of another frame in the same state: phones last 75 ms on average
# Frames next to each other say the same thing again: as if independent, they would be too sure.
_TRUST = 0.2
_PIECE_S, _MARGIN_S = 30.0, 1.0  # scored at a time; what a piece knows of its neighbours
_NATS = 1024 * np.log(1.0001)  # of a unit of score
_MARK = b"endhdr\n"
_ORDER = 0x11223344  # written before the scores, to tell the order of bytes


def posteriors(wav: Float[np.ndarray, " s"]) -> Float32[np.ndarray, "t p"]:
  """P(phone | all that is heard), rows of sum 1; t = s // 160, frame k about (k + 0.5) / 100 s.

  Raises:
    UserError: no speech, or pocketsphinx is not installed or not the one this was made for.
  """
  wav = features.checked(wav)
  frames = len(wav) // (SAMPLE_RATE_HZ // RATE_HZ)
  piece, margin = round(_PIECE_S * RATE_HZ), round(_MARGIN_S * RATE_HZ)
  begins = [*range(0, max(frames - piece, 0), piece - 2 * margin), max(frames - piece, 0)]
  out = np.empty((frames, len(PHONES)), np.float32)
  progress = Progress("phones", len(begins))
  for begin in begins:
    part = wav[begin * 160 : (begin + piece) * 160]
    skip = margin if begin else 0
    out[begin + skip : begin + piece] = _smooth(_scores(part))[skip:]
    progress.advance()
  progress.close()
  return out


def require() -> str:
  """The version of pocketsphinx and its model's name. Raises UserError as `posteriors`."""
  import importlib.metadata

  model = _model() / "mdef"
  try:
    blob = model.read_bytes()
    # "BMDF", version, a text of so many bytes, ten counts, then the names of the phones.
    (length,) = struct.unpack_from("<i", blob, 8)
    at = 12 + length + 40
    names = blob[at : at + 1024].split(b"\0")[: len(PHONES)]
    (states,) = struct.unpack_from("<i", blob, 12 + length + 12)
  except (OSError, struct.error) as error:
    raise UserError(f"{model} cannot be read ({error}): {_REMEDY}") from error
  if tuple(name.decode("latin-1") for name in names) != PHONES or states != STATES * len(PHONES):
    raise UserError(f"{model} has other phones than those known here: {_REMEDY}")
  return f"pocketsphinx {importlib.metadata.version('pocketsphinx')}, en-us"


_REMEDY = "reinstall it with `pip install --force-reinstall 'pocketsphinx>=5.0.4,<6'`"


def _model() -> pathlib.Path:
  """The folder of the English acoustic model."""
  try:
    import pocketsphinx
  except ImportError as error:
    raise UserError(
      "phones are heard with pocketsphinx, which is not installed: run `pip install"
      " 'pocketsphinx>=5.0.4,<6'`, or choose mel"
    ) from error
  return pathlib.Path(pocketsphinx.get_model_path()) / "en-us" / "en-us"


def _scores(wav: Float[np.ndarray, " s"]) -> Float32[np.ndarray, "t q"]:
  """log p(sound | state) of the q states of all phones, up to a constant a frame."""
  import pocketsphinx

  samples = np.round(np.clip(wav, -1, 1) * 32767).astype("<i2")
  with tempfile.TemporaryDirectory(prefix="uajax-phones-") as folder:
    # The scores are to be had only as the log that a decoder keeps of them.
    decoder = pocketsphinx.Decoder(
      pocketsphinx.Config(
        hmm=str(_model()), allphone=str(_model().parent / "en-us-phone.lm.bin"), lm=None, dict=None,
        senlogdir=folder, compallsen=True, loglevel="FATAL",
      )
    )  # fmt: skip
    decoder.start_utt()
    decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
    decoder.end_utt()
    (log,) = pathlib.Path(folder).glob("*.sen")
    blob = log.read_bytes()
  return _read_scores(blob, len(samples) // 160)


def _read_scores(blob: bytes, frames: int) -> Float32[np.ndarray, "t q"]:
  """The scores of the phones alone out of a log of all of them; the last frame is repeated."""
  begin = blob.find(_MARK) + len(_MARK)
  header = dict(line.split(b" ", 1) for line in blob[:begin].splitlines() if b" " in line)
  (order,) = struct.unpack_from("<I", blob, begin)
  count = int(header.get(b"n_sen", 0))
  rows = np.frombuffer(blob, "<i2", offset=begin + 4)
  if order != _ORDER or count < STATES * len(PHONES) or rows.size % (count + 1) or not rows.size:
    raise UserError(f"pocketsphinx keeps its scores in another way than known here: {_REMEDY}")
  rows = rows.reshape(-1, count + 1)[:frames, 1 : 1 + STATES * len(PHONES)]
  rows = np.pad(rows, ((0, frames - len(rows)), (0, 0)), mode="edge")
  return (-_NATS * rows).astype(np.float32)


def _smooth(scores: Float[np.ndarray, "t q"]) -> Float32[np.ndarray, "t p"]:
  """Posteriors of the phones by forward-backward over a loop of them, each as likely as any."""
  heard = np.exp(_TRUST * (scores - scores.max(1, keepdims=True)).astype(np.float64))
  heard = heard.reshape(len(heard), -1, STATES)
  forward, backward = np.empty_like(heard), np.empty_like(heard)
  state = np.full(heard.shape[1:], 1 / heard[0].size)
  for t, likelihood in enumerate(heard):
    if t:
      moved = _STAY * state
      moved[:, 1:] += (1 - _STAY) * state[:, :-1]
      moved[:, 0] += (1 - _STAY) * state[:, -1].sum() / len(state)
      state = moved
    state = state * likelihood
    state /= state.sum()
    forward[t] = state
  state = np.ones(heard.shape[1:])
  for t in reversed(range(len(heard))):
    backward[t] = state
    after = state * heard[t]
    state = _STAY * after
    state[:, :-1] += (1 - _STAY) * after[:, 1:]
    state[:, -1] += (1 - _STAY) * after[:, 0].mean()
    state /= state.sum()
  both = (forward * backward).sum(2)
  return (both / both.sum(1, keepdims=True)).astype(np.float32)
