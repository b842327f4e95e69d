"""The Lip Expert: what the mouth of this person does to these sounds (method.md A.1.4).

It hears 200 ms of mel and knows the person's resting expression and how far the eyes are shut; it
answers with 64 expression coefficients, f_exp. Trained per person against tracked expression, in
units where every coefficient of the person has mean 0 and variance 1. Where speech is scarce, half
of the answer is a kernel machine's (uajax.priors.kernel).

Axes: f frames, r runs of consecutive frames, k frames of a run.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from uajax.priors import kernel
from uajax.priors.fit import FitConfig, Fitted, Params, fit, in_batches, random_key
from uajax.types import EXPRESSION

POWER = 12.5 * np.log(10) / 10  # log power to a unit of normalised mel, which is 12.5 dB
RUN = 4  # consecutive frames of a training sample: the loss sees how they change


@dataclasses.dataclass(frozen=True)
class LipConfig:
  """The encoder's size and training; the defaults are Wav2Lip's audio encoder (A.1.1)."""

  width: int = 32  # channels of the first convolution; the last has 16 times as many
  residuals: tuple[int, ...] = (2, 2, 2, 1)  # residual blocks behind each strided convolution
  # "folded": no norm layers, the inference form of batch norm once it is folded into the weights.
  norm: Literal["group", "folded"] = "group"
  lead: int = 2  # frames that a window begins before its frame (speech.features.lip_indices)
  dropout: float = 0.1
  change_weight: float = 0.5  # of the L1 of first differences
  # Of the squared error beside the L1. L1 alone answers with the median, and so never closes the
  # lips: they are closed in few frames (procedural person, mean correlation of the mouth's eight
  # controls on new sentences, 300 steps: 0.78 at 0.5, 0.88 at 2, 0.89 at 5).
  square_weight: float = 4.0
  # Windows that a kernel machine remembers, whose answer is averaged with the network's; 0: none.
  # One minute of a real speaker, two blocks of 14 s of it left out, mean correlation of mouth and
  # jaw: network 0.56, kernel machine 0.56, their mean 0.59; ridge regression 0.53.
  centres: int = 0
  fit: FitConfig = FitConfig()


class MelEncoder(nn.Module):
  """Wav2Lip's audio encoder: a mel window becomes 16 x width features."""

  config: LipConfig

  @nn.compact
  def __call__(self, mel: Float[Array, "b 80 16"]) -> Float[Array, "b e"]:
    w = self.config.width
    x = self.block(mel[..., None], w, (1, 1))
    # 80x16 -> 27x16 -> 9x6 -> 3x3 -> 1x1
    strides = ((1, 1), (3, 1), (3, 3), (3, 2))
    widths = (w, 2 * w, 4 * w, 8 * w)
    for i, (stride, channels, count) in enumerate(
      zip(strides, widths, self.config.residuals, strict=True)
    ):
      if i:
        x = self.block(x, channels, stride)
      for _ in range(count):
        x = self.block(x, channels, (1, 1), residual=True)
    x = self.block(x, 16 * w, (1, 1), padding=0)
    return self.block(x, 16 * w, (1, 1), kernel=1, padding=0)[:, 0, 0]

  def block(self, x, channels, stride, *, kernel=3, padding=1, residual=False):
    y = nn.Conv(channels, (kernel, kernel), stride, padding=padding)(x)
    if self.config.norm == "group":
      y = nn.GroupNorm(num_groups=min(8, channels), use_fast_variance=False)(y)
    return nn.relu(x + y if residual else y)


class LipExpert(nn.Module):
  config: LipConfig = LipConfig()

  @nn.compact
  def __call__(
    self,
    mel: Float[Array, "f 80 16"],
    ref: Float[Array, " 64"],
    ratio: Float[Array, " f"],
    *,
    train: bool = False,
  ) -> Float[Array, "f 64"]:
    """f_exp from mel in [-4, 4], resting expression `ref` and eye closure `ratio` in [0, 1]."""
    heard = MelEncoder(self.config)(mel / 4.0)
    heard = nn.Dropout(self.config.dropout, deterministic=not train)(heard)
    still = jnp.broadcast_to(ref[None, :], (mel.shape[0], ref.shape[0]))
    return nn.Dense(EXPRESSION)(jnp.concatenate([heard, still, ratio[:, None]], axis=1))


class Lessons(NamedTuple):
  """Recordings end to end, with the expression of every frame."""

  mel: Float[np.ndarray, "80 n"]  # of all recordings, one after the other
  starts: Int[np.ndarray, " f"]  # column where each frame's window begins, before clamping
  low: Int[np.ndarray, " f"]  # first and last column of the frame's recording
  high: Int[np.ndarray, " f"]
  expression: Float[np.ndarray, "f 64"]  # standardised
  ratio: Float[np.ndarray, " f"]
  clip: Int[np.ndarray, " f"]  # which recording; 0 is the person's own
  learn: Bool[np.ndarray, " f"]  # may be trained on
  judge: Bool[np.ndarray, " f"]  # tells when to stop

  def windows(
    self, frames: Int[np.ndarray, " b"], shift: Int[np.ndarray, " b"] | int = 0
  ) -> Float[np.ndarray, "b 80 16"]:
    """Mel windows of frames, moved by `shift` steps, clamped to their recordings."""
    shift = np.broadcast_to(shift, frames.shape)
    at = (self.starts[frames] + shift)[:, None] + np.arange(16)[None, :]
    at = np.clip(at, self.low[frames][:, None], self.high[frames][:, None])
    return self.mel[:, at].transpose(1, 0, 2)

  def runs(self, length: int, which: Bool[np.ndarray, " f"]) -> Int[np.ndarray, " r"]:
    """First frames of all runs of `length` consecutive frames of one recording in `which`."""
    last = len(which) - length + 1
    ok = np.ones(max(last, 0), bool)
    for k in range(length):
      ok &= which[k : k + last] & (self.clip[k : k + last] == self.clip[:last])
    return np.flatnonzero(ok)

  def odds(self, frames: Int[np.ndarray, " r"]) -> Float[np.ndarray, " r"]:
    """Chances to be drawn: a third at least for the person's own recording."""
    own = self.clip[frames] == 0
    weight = np.where(own, max(1.0, (~own).sum() / max(1, 2 * own.sum())), 1.0)
    return weight / weight.sum()


def augment(mel: Float[Array, "b 80 w"], key: Array) -> Float[Array, "b 80 w"]:
  """The same speech from another microphone: gain, tilt, background noise; mel in [-4, 4].

  Every window of the batch by itself. Gain and tilt stay within 6 dB each, which is 0.48 of the
  normalised scale; half of the windows get a noise floor, in the lowest third of the range.
  """
  k_gain, k_tilt, k_noisy, k_floor, k_noise = jax.random.split(key, 5)
  each = (mel.shape[0], 1, 1)
  gain = 0.48 * jax.random.uniform(k_gain, each, minval=-1.0)
  tilt = 0.48 * jax.random.uniform(k_tilt, each, minval=-1.0)
  louder = mel + gain + tilt * jnp.linspace(-1.0, 1.0, mel.shape[1])[None, :, None]
  floor = jax.random.uniform(k_floor, each, minval=-4.0, maxval=-1.5)
  noisy = jnp.logaddexp(POWER * louder, POWER * floor) / POWER
  heard = jnp.where(jax.random.bernoulli(k_noisy, 0.5, each), noisy, louder)
  return (heard + 0.1 * jax.random.normal(k_noise, mel.shape)).clip(-4.0, 4.0)


def train(
  lessons: Lessons, ref: Float[np.ndarray, " 64"], config: LipConfig, *, seed: int
) -> Fitted:
  """Fits the Lip Expert: L1 of the coefficients and of their change from frame to frame.

  The score is the network's mean absolute error over the frames to judge by.
  """
  net = LipExpert(config)
  learn = lessons.runs(RUN, lessons.learn)
  odds = lessons.odds(learn)
  count = max(1, config.fit.batch // RUN)

  def draw(rng: np.random.Generator):
    frames = rng.choice(learn, count, p=odds)[:, None] + np.arange(RUN)[None, :]
    shift = np.repeat(rng.integers(-1, 2, count), RUN)
    flat = frames.ravel()
    return lessons.windows(flat, shift), lessons.ratio[flat], lessons.expression[flat]

  def loss(params: Params, batch, key):
    mel, ratio, target = batch
    k_augment, k_drop = jax.random.split(key)
    said = net.apply(
      {"params": params}, augment(mel, k_augment), ref, ratio, train=True, rngs={"dropout": k_drop}
    )
    error = (said - target).reshape(count, RUN, EXPRESSION)
    change = jnp.diff(error, axis=1)
    return (
      jnp.abs(error).mean()
      + config.change_weight * jnp.abs(change).mean()
      + config.square_weight * jnp.square(error).mean()
    )

  def score(params: Params, batch):
    mel, ratio, target = batch
    return jnp.abs(net.apply({"params": params}, mel, ref, ratio) - target).mean()

  judged = np.flatnonzero(lessons.judge)
  held_out = (lessons.windows(judged), lessons.ratio[judged], lessons.expression[judged])
  params = initialise(config, seed)
  params.pop("kernel", None)
  fitted = fit(
    loss, params, draw, config.fit, seed=seed, label="Lip Expert", score=score, held_out=held_out
  )
  if not config.centres:
    return fitted
  frames = np.flatnonzero(lessons.learn | lessons.judge)
  known = kernel.solve(
    lessons.windows, lessons.expression, frames, lessons.odds(frames), config.centres, augment,
    random_key(seed),
  )  # fmt: skip
  return fitted._replace(params={**fitted.params, "kernel": known})


def initialise(config: LipConfig, seed: int) -> Params:
  """Parameters as drawn, before any training."""
  init = jax.jit(LipExpert(config).init)
  mel = jnp.zeros((1, 80, 16))
  params = init(random_key(seed), mel, jnp.zeros(EXPRESSION), jnp.zeros(1))["params"]
  if config.centres:
    machine = kernel.KernelMachine(config.centres)
    params = {**params, "kernel": machine.init(random_key(seed), mel)["params"]}
  return params


def express(
  params: Params,
  windows: Float[np.ndarray, "f 80 16"],
  ref: Float[np.ndarray, " 64"],
  config: LipConfig,
  ratio: Float[np.ndarray, " f"] | None = None,
) -> Float[np.ndarray, "f 64"]:
  """f_exp of every window, eyes open unless `ratio` says otherwise."""
  if ratio is None:
    ratio = np.zeros(len(windows), np.float32)
  return in_batches(lambda m, r: _express(params, m, ref, r, config), windows, ratio)


@functools.partial(jax.jit, static_argnames="config")
def _express(params, mel, ref, ratio, config):
  net = {k: v for k, v in params.items() if k != "kernel"}
  said: Any = LipExpert(config).apply({"params": net}, mel, ref, ratio)
  if config.centres:
    liked: Any = kernel.KernelMachine(config.centres).apply({"params": params["kernel"]}, mel)
    said = (said + liked) / 2
  return said
