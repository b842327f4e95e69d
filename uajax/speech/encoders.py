"""The ways to hear: what each encoder's windows are called, how they look and how they are made.

A window belongs to one video frame and is centred on its time, (i + 0.5) / 25 s, to 6 ms; where
it reaches out of the recording there is silence. The same function makes the windows of a
subject and of speech that drives its avatar, and what it was made with is kept beside them:

    SUBJECT/aud_*.npy                [T w d], a window a frame of the video
    SUBJECT/extractors/aud_*.json    which encoder, which weights; copied into the run

Axes: f frames, T frames of the video, s samples, w steps of a window, d channels of a step.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from uajax.config import Audio
from uajax.errors import UserError
from uajax.progress import Progress
from uajax.speech import features
from uajax.types import SAMPLE_RATE_HZ

Windows = Callable[[Float[np.ndarray, " s"], int], Float32[np.ndarray, "f w d"]]


class Kind(NamedTuple):
  """What is known of an encoder without making it."""

  name: str  # in words
  file: str  # in a subject's folder
  width: int  # steps of a window
  channels: int | None  # of a step; None: as many as the weights have
  rate_hz: int  # steps a second
  model: str = ""  # `model_type` of the Hugging Face weights that make it
  elsewhere: str = ""  # what makes it, where that is not done here


KINDS: dict[Audio, Kind] = {
  "mel": Kind("log-mel spectra", "aud_mel.npy", 16, 80, 80),
  "phones": Kind("phone posteriors", "aud_phones.npy", 16, 42, 50),
  "deepspeech": Kind(
    "DeepSpeech logits", "aud_ds.npy", 16, 29, 50,
    elsewhere="the TensorFlow graph deepspeech-0_1_0-b90017e8.pb",
  ),
  "esperanto": Kind(
    "Esperanto's wav2vec logits", "aud_eo.npy", 16, 44, 50,
    elsewhere="a wav2vec2-large-xlsr-53 that knows Esperanto",
  ),
  "hubert": Kind("HuBERT features", "aud_hu.npy", 2, None, 50, "hubert"),
  "wav2vec2": Kind("wav2vec2 features", "aud_w2v.npy", 2, None, 50, "wav2vec2"),
}  # fmt: skip
VERSION = 1  # of the records; another one where the same weights give other windows

_PIECE, _MARGIN = 900, 50  # steps of a recording heard at a time, and of them at ends not kept


class Encoder(NamedTuple):
  """A way to hear, ready to be used."""

  kind: Audio
  windows: Windows
  made_with: dict[str, str]  # "model": what must be the same again; "weights": where it lay


def make(kind: Audio, weights: str | os.PathLike | None = None) -> Encoder:
  """The encoder of that kind.

  Args:
    weights: folder of a Hugging Face model (`speech.wav2vec2.load`), for those that want one.

  Raises:
    UserError: it wants weights, was given some that it does not want or cannot use, needs a
      package that is not installed, or is not computed here.
  """
  known = KINDS[kind]
  if known.elsewhere:
    raise UserError(
      f"{known.name} are not computed here, only read: make them by the official preprocessing, "
      f"with {known.elsewhere}, as .npy [frames, {known.width}, {known.channels}]; for training "
      f"put them into the subject folder as {known.file}, for speech to be said give them with "
      "--audio-windows"
    )
  if known.model:
    if weights is None:
      raise UserError(
        f"{known.name} want weights: give the folder of a Hugging Face {known.model} model "
        "(config.json with model.safetensors or pytorch_model.bin) with --audio-weights"
      )
    return _transformer(kind, pathlib.Path(weights))
  if weights is not None:
    raise UserError(f"{known.name} want no weights: leave --audio-weights out")
  if kind == "phones":
    from uajax.speech import phones

    return Encoder(kind, phone_windows, {"model": phones.require()})
  return Encoder(kind, features.mel_windows, {"model": "log-mel"})


def phone_windows(wav: Float[np.ndarray, " s"], frames: int) -> Float32[np.ndarray, "f 16 42"]:
  """Phone posteriors, 320 ms of them in steps of 20 ms, centred on the frame's time to 2 ms."""
  from uajax.speech import phones

  likely = phones.posteriors(wav)
  silence = np.zeros((1, len(phones.PHONES)), np.float32)
  silence[0, phones.SILENCE] = 1
  # A score looks at 26 ms of sound, so that frame k lies at 10 k + 13 ms: the step from 20 r ms
  # on is the mean of frames 2 r - 1 and 2 r.
  pairs = np.concatenate([silence, likely, np.repeat(silence, 1 + len(likely) % 2, 0)])
  steps = pairs.reshape(-1, 2, pairs.shape[1]).mean(1)
  half = KINDS["phones"].width // 2
  at = 2 * np.arange(frames)[:, None] + 1 + np.arange(-half, half)[None, :]
  inside = (at >= 0) & (at < len(steps))
  return np.where(inside[..., None], steps[np.where(inside, at, 0)], silence[None])


def record(encoder: Encoder) -> dict[str, Any]:
  """What `recalled` needs to make the same encoder again, for JSON."""
  return {"version": VERSION, "kind": encoder.kind, **encoder.made_with}


def record_name(kind: Audio) -> str:
  """File name of the record among a subject's or a run's extractors."""
  return KINDS[kind].file.removesuffix(".npy") + ".json"


def recalled(
  folder: str | os.PathLike, kind: Audio, weights: str | os.PathLike | None = None
) -> Encoder:
  """The encoder that the windows of a subject were made with.

  Args:
    folder: the extractors of a subject or a run. Without a record in it (others made the
      windows) any weights of the kind are taken.
    weights: the folder of the weights, where it is no longer the recorded one.

  Raises:
    UserError: as `make`, or weights that are not the recorded ones.
  """
  file = pathlib.Path(folder) / record_name(kind)
  try:
    found = json.loads(file.read_text())
    model, version, place = found["model"], found["version"], found.get("weights")
  except FileNotFoundError:
    return make(kind, weights)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{file} is damaged ({error!r}): remove it and give the audio encoder's weights with"
      " --audio-weights"
    ) from error
  if version != VERSION:
    raise UserError(f"{file} was made by another version of uajax: extract and train again")
  if weights is None and place is not None and not pathlib.Path(place).is_dir():
    raise UserError(
      f"the {KINDS[kind].name} were made with weights in {place}, which is gone: give their new"
      " place with --audio-weights"
    )
  encoder = make(kind, place if weights is None else weights)
  if encoder.made_with["model"] != model:
    raise UserError(
      f"the subject was heard with {model}, this is {encoder.made_with['model']}: give the same"
      f"{' weights with --audio-weights' if KINDS[kind].model else ' version'}, or extract and"
      " train again"
    )
  return encoder


def check(
  windows: np.ndarray, kind: Audio, file: str | os.PathLike
) -> Float32[np.ndarray, "f w d"]:
  """`windows` as float32 if they can be of that kind.

  Raises:
    UserError: of another shape, empty, or not finite.
  """
  known = KINDS[kind]
  width, channels = known.width, known.channels
  fits = windows.ndim == 3 and windows.shape[1] == width and min(windows.shape) > 0
  if not fits or channels not in (None, windows.shape[2]):
    raise UserError(
      f"{file} has the shape {windows.shape}, not [frames, {width}, {channels or 'channels'}]: "
      "recompute the audio features"
    )
  if not np.isfinite(windows).all():
    raise UserError(f"{file} holds values that are not finite: make it anew")
  return windows.astype(np.float32)


def _transformer(kind: Audio, folder: pathlib.Path) -> Encoder:
  """The last hidden states of wav2vec2 or HuBERT, two steps of 20 ms a frame."""
  from uajax import pretrained
  from uajax.speech import wav2vec2

  known = KINDS[kind]
  config, params = wav2vec2.load(folder)
  model, raw = known.model, json.loads((folder / "config.json").read_text())
  if raw["model_type"] != model:
    raise UserError(f"{folder} holds a {raw['model_type']} model: --audio {kind} wants {model}")
  hop = int(np.prod(config.conv_strides))
  if hop * known.rate_hz != SAMPLE_RATE_HZ:
    raise UserError(f"{folder} takes a step every {hop} samples: one of 320 is wanted")
  normalized = _normalizes(folder)
  digest = pretrained.digest(wav2vec2.weights_file(folder))

  def windows(wav: Float[np.ndarray, " s"], frames: int) -> Float32[np.ndarray, "f 2 d"]:
    wav = features.checked(wav)
    if normalized:
      wav = (wav - wav.mean()) / np.sqrt(wav.var() + 1e-7)
    return _hidden(config, params, wav, known.width * frames).reshape(frames, known.width, -1)

  made_with = {"model": f"{model} {digest[:16]}", "weights": str(folder.resolve())}
  return Encoder(kind, windows, made_with)


def _normalizes(folder: pathlib.Path) -> bool:
  """Whether the model wants recordings of mean 0 and variance 1; Hugging Face's default is yes."""
  file = folder / "preprocessor_config.json"
  try:
    return bool(json.loads(file.read_text()).get("do_normalize", True)) if file.exists() else True
  except (OSError, ValueError, AttributeError) as error:
    raise UserError(f"{file} is damaged ({error}): download it anew") from error


def _hidden(config, params, wav: Float[np.ndarray, " s"], steps: int) -> Float32[np.ndarray, "t d"]:
  """The first `steps` hidden states, heard in overlapping pieces: attention is quadratic."""
  import jax

  from uajax.speech import wav2vec2

  hop, reach = 1, 1  # samples from step to step, and that one step looks at
  for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True):
    reach += (kernel - 1) * hop
    hop *= stride
  wav = wav[: steps * hop + reach - hop]
  wav = np.pad(wav, (0, steps * hop + reach - hop - len(wav))).astype(np.float32)
  piece = min(steps, _PIECE)
  begins = [*range(0, steps - piece, _PIECE - 2 * _MARGIN), steps - piece]
  params = jax.device_put(params)
  progress = Progress("listen", steps)
  parts: list[np.ndarray] = []
  done = 0
  for begin in begins:
    part = wav[None, begin * hop : (begin + piece - 1) * hop + reach]
    heard = np.asarray(wav2vec2.hidden(config, params, part))[0]
    # The middle of an overlap is where both pieces know equally much.
    end = steps if begin == begins[-1] else begin + piece - _MARGIN
    parts.append(heard[done - begin : end - begin])
    progress.advance(end - done)
    done = end
  progress.close()
  return np.concatenate(parts)


