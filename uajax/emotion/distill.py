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
# Of the second cepstral coefficient to a dB of slope over all bands: sum of the half cosine times a
# line from -1/2 to 1/2, with the cosine transform's factor.
_BANDS = (np.arange(128) + 0.5) / 128
_SLOPE = float(np.sqrt(2 / 128) * (np.cos(np.pi * _BANDS) * (0.5 - _BANDS)).sum())


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  align_weight: float = 1.0  # of L_align beside L_cls
  # Cross entropy of the labels read off the tapped feature alone. The other branches may settle
  # the labels by themselves; this makes sure that what goes on to the avatar knows them too.
  tap_weight: float = 0.5
  pretrained_rate: float = 0.1  # of wav2vec2 beside all else, where it came with weights
  stride: int = 2  # frames between the windows trained on
  level_db: float = 4.0  # deviation of how much louder or softer the windows are made
  # What little data needs, and the paper does without:
  smoothing: float = 0.0  # of the targets, towards all labels alike
  mixup: float = 0.0  # share of the windows that are mixed with another one, targets alike
  tilt_db: float = 0.0  # deviation of a random slope of the spectra, dB from 0 to 4 kHz
  mask_steps: int = 0  # most steps of 10 ms that are hidden at one place, in the two spectral views
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
  low = np.min([np.min(r.whole.spectrogram, axis=1) for r in recordings], axis=0)
  high = np.max([np.max(r.whole.spectrogram, axis=1) for r in recordings], axis=0)
  cepstra = np.concatenate([r.whole.mfcc for r in recordings])
  return Ranges(low, high, cepstra.mean(axis=0), cepstra.std(axis=0) + 1e-3)


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
  align = AligningNet(visual or 1)
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
    return _Batch(views, np.concatenate(targets), np.concatenate(seen), spread)

  def draw(rng: np.random.Generator):
    return windows(learn[rng.choice(len(learn), settings.fit.batch, p=odds)])

  params: dict[str, Any] = {"trunk": initialise(config, labels, seed, listen)}
  if visual is not None:
    params["align"] = align.init(random_key(seed + 1), jnp.zeros((1, 3 * EMOTION)))["params"]
  if config.standardise:
    params["trunk"] = _standardise(params["trunk"], draw, labels, config, seed)
  loss, score = _losses(labels, config, settings, visual)
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


class _Batch(NamedTuple):
  views: Views
  target: Float[Array | np.ndarray, "b l"]
  seen: Float[Array | np.ndarray, "b v"]  # zeros where no face was seen
  spread: Ranges


@functools.lru_cache(maxsize=8)
def _losses(labels: int, config: EmotionConfig, settings: DistillConfig, visual: int | None):
  """Loss and score; the same functions for the same settings, so that they compile once."""
  net, align = EmotionNet(labels, config), AligningNet(visual or 1)

  def distance(heard, params, target, seen):
    entropy = -(target * jax.nn.log_softmax(heard.logits)).sum(-1)
    tapped = -(target * jax.nn.log_softmax(heard.tap_logits)).sum(-1)
    value = entropy.mean() + settings.tap_weight * tapped.mean()
    if visual is not None:
      aligned: Any = align.apply({"params": params["align"]}, heard.joint)
      mask = (jnp.abs(seen).sum(-1) > 0).astype(jnp.float32)
      said = _unit(aligned)
      told = _unit(seen)
      apart = (1 - (said * told).sum(-1)) + jnp.square(said - told).mean(-1)
      value += settings.align_weight * (apart * mask).sum() / jnp.maximum(mask.sum(), 1.0)
    return value

  def loss(params: Params, batch: _Batch, key):
    k_drop, k_change, k_mix = jax.random.split(key, 3)
    views, target = _changed(batch.views, settings, k_change), batch.target
    if settings.mixup:
      k_share, k_which = jax.random.split(k_mix)
      share = jax.random.uniform(k_share, (len(target),))
      share = jnp.where(jax.random.uniform(k_which, share.shape) < settings.mixup, share, 1.0)
      mix = lambda x: _times(share, x) + _times(1 - share, jnp.roll(x, 1, axis=0))
      views, target = jax.tree.map(mix, views), mix(target)
    target = (1 - settings.smoothing) * target + settings.smoothing / labels
    heard = net.apply(
      {"params": params["trunk"]}, views, batch.spread, train=True, rngs={"dropout": k_drop}
    )
    return distance(heard, params, target, batch.seen)

  def score(params: Params, batch: _Batch):
    heard = net.apply({"params": params["trunk"]}, batch.views, batch.spread)
    return distance(heard, params, batch.target, batch.seen)

  return loss, score


def _times(factor: Float[Array, " b"], x: Array) -> Array:
  return factor.reshape(-1, *(1,) * (x.ndim - 1)) * x


def _changed(views: Views, settings: DistillConfig, key: Array) -> Views:
  """Windows as another room or another distance would have made them, with parts hidden."""
  k_loud, k_noise, k_shift, k_mask, k_tilt, k_from, k_long = jax.random.split(key, 7)
  b, bins, steps = views.spectrogram.shape
  noise = jnp.exp(jax.random.uniform(k_loud, (b, 1), minval=-7.0, maxval=-2.0))
  # Evenly distributed: half the cost of normal noise, and no other sound.
  limit = np.sqrt(3.0)
  waveform = views.waveform + noise * jax.random.uniform(
    k_noise, views.waveform.shape, minval=-limit, maxval=limit
  )
  level = settings.level_db * jax.random.normal(k_shift, (b, 1, 1))
  # In the cepstra a level is an offset of the first coefficient, sqrt(128 bands) to a dB.
  cepstra = jnp.asarray(views.mfcc).at[..., :1].add(level * np.sqrt(128.0))
  spectrum_db = views.spectrogram + level
  at = jnp.arange(bins)[None, :, None]
  if settings.tilt_db:
    tilt = settings.tilt_db * jax.random.normal(k_tilt, (b, 1, 1))
    spectrum_db += tilt * (at / bins - 0.5)
    # The same slope over the mel bands, as the second coefficient has it (a half cosine).
    cepstra = cepstra.at[..., 1:2].add(-tilt * _SLOPE)
  begin = jax.random.randint(k_mask, (b, 1, 1), 0, bins)
  hidden = (at >= begin) & (at < begin + 20)
  if settings.mask_steps:
    t = jnp.arange(steps)[None, None, :]
    first = jax.random.randint(k_from, (b, 1, 1), 0, steps)
    last = first + jax.random.randint(k_long, (b, 1, 1), 0, settings.mask_steps + 1)
    gone = (t >= first) & (t < last)
    hidden |= gone
    mean = cepstra.mean(axis=1, keepdims=True)
    cepstra = jnp.where(gone[:, 0, :, None], mean, cepstra)
  hidden |= views.spectrogram <= features.SILENT_DB  # what is silent stays silent
  return Views(jnp.where(hidden, features.SILENT_DB, spectrum_db), cepstra, waveform)


def _standardise(trunk: Params, draw, labels: int, config: EmotionConfig, seed: int) -> Params:
  """The trunk with its `Standard` layers set from a few batches of training windows."""
  rng = np.random.default_rng(seed)
  raw: dict[str, list] = {}
  for _ in range(8):
    batch = draw(rng)
    for name, rows in _raw(trunk, batch.views, batch.spread, labels, config).items():
      raw.setdefault(name, []).append(np.asarray(rows))
  for name, parts in raw.items():
    rows = np.concatenate(parts)
    deviation = rows.std(axis=0)
    scale = 1 / np.maximum(deviation, 1e-3 + 0.01 * deviation.max())
    trunk = {**trunk, name: {"scale": scale, "offset": -rows.mean(axis=0) * scale}}
  return trunk


@functools.partial(jax.jit, static_argnames=("labels", "config"))
def _raw(trunk, views, spread, labels, config):
  """What goes into each `Standard` layer."""
  net = EmotionNet(labels, config)
  _, state = net.apply({"params": trunk}, views, spread, mutable=["intermediates"])
  found: Any = state["intermediates"]
  return {name: layer["raw"][0] for name, layer in found.items()}


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
