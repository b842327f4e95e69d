"""Stage 1 of Emotion Distillation: the network learns which emotion speech carries (method.md B.3).

Teachers are labels with intensities and, where given, features that a visual emotion network saw in
the frames. A label at intensity x counts as x of the label and 1 - x of neutral, so the distilled
feature grows with intensity.

Axes: m windows, f video frames, l labels (neutral first), v visual feature.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from uajax.emotion import network
from uajax.emotion.network import AligningNet, EmotionConfig, EmotionNet, Ranges
from uajax.priors.fit import FitConfig, Fitted, Params, fit, in_batches, random_key
from uajax.speech import features
from uajax.speech.features import Views
from uajax.types import EMOTION, FPS

NEUTRAL = "neutral"


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  align_weight: float = 1.0  # of L_align beside L_cls
  # Cross entropy of the labels read off the tapped feature alone. The other branches may settle
  # the labels by themselves; this makes sure that what goes on to the avatar knows them too.
  tap_weight: float = 0.5
  pretrained_rate: float = 0.1  # of wav2vec2 beside all else, where it came with weights
  stride: int = 2  # frames between the windows trained on
  fit: FitConfig = FitConfig(rate=1e-4, weight_decay=0.01)


class Recording(NamedTuple):
  """Speech with what its teachers say of every video frame."""

  whole: Views
  teaching: Float[np.ndarray, "f l"]  # share of each label; a row of zeros where nothing is known
  learn: Bool[np.ndarray, " f"]
  judge: Bool[np.ndarray, " f"]
  visual: Float[np.ndarray, "f v"] | None = None


def shares(
  labels: Sequence[str], intensities: Float[np.ndarray, " f"], names: Sequence[str]
) -> Float[np.ndarray, "f l"]:
  """Each frame's emotion as shares of `names`, the first of which is neutral."""
  rows = np.zeros((len(labels), len(names)), np.float32)
  strength = np.clip(np.asarray(intensities, np.float32), 0.0, 1.0)
  for f, label in enumerate(labels):
    rows[f, 0] += 1.0 - strength[f]
    rows[f, names.index(label)] += strength[f]
  return rows


def window_means(
  rows: Float[np.ndarray, "f l"], at: Int[np.ndarray, " m"], window_s: float
) -> Float[np.ndarray, "m l"]:
  """Means of per-frame values over windows centred on frames `at`, cut at the ends."""
  half = max(0, round(window_s * FPS / 2) - 1)
  sums = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0, dtype=np.float64)])
  begin, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(rows))
  return ((sums[end] - sums[begin]) / (end - begin)[:, None]).astype(np.float32)


def ranges(recordings: Sequence[Recording]) -> Ranges:
  """How the recordings spread, in each frequency bin and each cepstral coefficient."""
  spectra = np.concatenate([r.whole.spectrogram for r in recordings], axis=1)
  cepstra = np.concatenate([r.whole.mfcc for r in recordings])
  return Ranges(
    spectra.min(axis=1), spectra.max(axis=1), cepstra.mean(axis=0), cepstra.std(axis=0) + 1e-3
  )


def train(
  recordings: Sequence[Recording],
  spread: Ranges,
  labels: int,
  config: EmotionConfig,
  settings: DistillConfig,
  *,
  seed: int,
  listen: Params | None = None,
) -> Fitted:
  """Fits the network (under "trunk") and, with visual targets, the aligning net (under "align").

  Windows are drawn evenly over the labels. The score is the cross entropy on windows to judge by.

  Args:
    listen: pretrained wav2vec2 parameters of `config.wav`; without them it starts from scratch.
  """
  visual = next((r.visual.shape[1] for r in recordings if r.visual is not None), None)
  net, align = EmotionNet(labels, config), AligningNet(visual or 1)
  learn, judged = [], []
  for i, r in enumerate(recordings):
    labelled = r.teaching.sum(axis=1) > 0
    learn += [(i, f) for f in np.flatnonzero(r.learn & labelled)[:: settings.stride]]
    judged += [(i, f) for f in np.flatnonzero(r.judge & labelled)[::5]]
  learn, judged = np.array(learn), np.array(judged).reshape(-1, 2)

  def taught(r: Recording, at):
    mean = window_means(r.teaching, at, config.window_s)
    return mean / mean.sum(axis=1, keepdims=True)  # frames of which nothing is known do not count

  known = [taught(r, learn[learn[:, 0] == i, 1]) for i, r in enumerate(recordings)]
  share = np.concatenate(known)
  odds = (share / np.maximum(share.sum(axis=0), 1e-6)[None, :]).sum(axis=1)
  odds /= odds.sum()

  def windows(rows):
    cuts, targets, seen = [], [], []
    for i in np.unique(rows[:, 0]):
      r, at = recordings[i], rows[rows[:, 0] == i, 1]
      cuts.append(features.centred(r.whole, at, config.window_s))
      targets.append(taught(r, at))
      seen.append(
        np.zeros((len(at), visual or 1), np.float32)
        if r.visual is None
        else window_means(r.visual, at, config.window_s)
      )
    views = Views(*(np.concatenate(x) for x in zip(*cuts, strict=True)))
    return views, np.concatenate(targets), np.concatenate(seen)

  def draw(rng: np.random.Generator):
    return windows(learn[rng.choice(len(learn), settings.fit.batch, p=odds)])

  def distance(heard, params, target, seen, mask):
    entropy = -(target * jax.nn.log_softmax(heard.logits)).sum(-1)
    tapped = -(target * jax.nn.log_softmax(heard.tap_logits)).sum(-1)
    value = entropy.mean() + settings.tap_weight * tapped.mean()
    if visual is not None:
      aligned: Any = align.apply({"params": params["align"]}, heard.joint)
      said = _unit(aligned)
      told = _unit(seen)
      apart = (1 - (said * told).sum(-1)) + jnp.square(said - told).mean(-1)
      value += settings.align_weight * (apart * mask).sum() / jnp.maximum(mask.sum(), 1.0)
    return value

  def loss(params: Params, batch, key):
    views, target, seen = batch
    k_drop, k_loud, k_noise, k_shift, k_mask = jax.random.split(key, 5)
    noise = jnp.exp(jax.random.uniform(k_loud, (len(target), 1), minval=-7.0, maxval=-2.0))
    waveform = views.waveform + noise * jax.random.normal(k_noise, views.waveform.shape)
    level = 4.0 * jax.random.normal(k_shift, (len(target), 1, 1))
    # In the cepstra a level is an offset of the first coefficient, sqrt(128 bands) to a dB.
    cepstra = views.mfcc.at[..., :1].add(level * np.sqrt(128.0))
    bins = jnp.arange(views.spectrogram.shape[1])[None, :, None]
    begin = jax.random.randint(k_mask, (len(target), 1, 1), 0, views.spectrogram.shape[1])
    masked = (bins >= begin) & (bins < begin + 20)
    spectrum_db = jnp.where(masked, features.SILENT_DB, views.spectrogram + level)
    heard = net.apply(
      {"params": params["trunk"]},
      Views(spectrum_db, cepstra, waveform),
      spread,
      train=True,
      rngs={"dropout": k_drop},
    )
    return distance(heard, params, target, seen, (jnp.abs(seen).sum(-1) > 0).astype(jnp.float32))

  def score(params: Params, batch):
    views, target, seen = batch
    heard = net.apply({"params": params["trunk"]}, views, spread)
    return distance(heard, params, target, seen, (jnp.abs(seen).sum(-1) > 0).astype(jnp.float32))

  params: dict[str, Any] = {"trunk": initialise(config, labels, seed, listen)}
  if visual is not None:
    params["align"] = align.init(random_key(seed + 1), jnp.zeros((1, 3 * EMOTION)))["params"]
  rates = None
  if listen is not None:
    rates = jax.tree.map(lambda _: 1.0, params)
    rates["trunk"]["listen"] = jax.tree.map(lambda _: settings.pretrained_rate, listen)
  return fit(
    loss,
    params,
    draw,
    settings.fit,
    seed=seed,
    rates=rates,
    label="emotion network",
    score=score if len(judged) else None,
    held_out=windows(judged) if len(judged) else None,
  )


def _unit(x: Float[Array, "b v"]) -> Float[Array, "b v"]:
  return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def initialise(config: EmotionConfig, labels: int, seed: int, listen: Params | None = None) -> dict:
  """The trunk as drawn, with pretrained wav2vec2 parameters in their place if there are any."""
  params = network.initialise(config, labels, seed)
  return params if listen is None else {**params, "listen": listen}


def feel(
  trunk: Params,
  whole: Views,
  at: Int[np.ndarray, " m"],
  spread: Ranges,
  labels: int,
  config: EmotionConfig,
) -> tuple[Float[np.ndarray, "m 128"], Float[np.ndarray, "m l"]]:
  """The emotion feature of windows centred on the frames `at`, and the labels' probabilities."""

  size = 16
  parts = [
    in_batches(
      lambda *v: _hear(trunk, Views(*v), spread, labels, config),
      *features.centred(whole, at[i : i + size], config.window_s),
      size=size,
    )
    for i in range(0, len(at), size)
  ]
  tapped, probabilities = zip(*parts, strict=True)
  return np.concatenate(tapped), np.concatenate(probabilities)


@functools.partial(jax.jit, static_argnames=("labels", "config"))
def _hear(trunk, views, spread, labels, config):
  heard: Any = EmotionNet(labels, config).apply({"params": trunk}, views, spread)
  return getattr(heard, config.tap), jax.nn.softmax(heard.logits)


def between(
  at: Int[np.ndarray, " m"], rows: Float[np.ndarray, "m d"], frames: int
) -> Float[np.ndarray, "f d"]:
  """Values at some frames, carried to every frame by linear interpolation."""
  right = np.clip(np.searchsorted(at, np.arange(frames), side="left"), 1, max(1, len(at) - 1))
  if len(at) == 1:
    return np.repeat(rows, frames, axis=0)
  left = right - 1
  weight = (np.arange(frames) - at[left]) / (at[right] - at[left])
  weight = np.clip(weight, 0.0, 1.0)[:, None].astype(rows.dtype)
  return (1 - weight) * rows[left] + weight * rows[right]
