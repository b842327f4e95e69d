"""FuseNet: teaches the Style Net what the Lip Expert leaves out (method.md A.3).

From f_tone and f_exp together it must give the expression that was really tracked (L_recon), so
f_tone has to carry what the single sounds do not tell. It serves training only.

Axes: b chunks, t frames of a chunk.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uajax.priors.fit import Fitted, Params, fit, random_key
from uajax.priors.lip import Lessons, augment
from uajax.priors.style import StyleConfig, StyleNet
from uajax.types import EXPRESSION


class FuseNet(nn.Module):
  dropout: float = 0.5  # of the hidden layer; the output is linear (Q41)

  @nn.compact
  def __call__(self, priors: Float[Array, "*b 128"], *, train: bool = False):
    """f_prior [*b 64] from f_tone and f_exp, concatenated in this order."""
    x = nn.leaky_relu(nn.Dense(EXPRESSION)(priors), 0.2)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(EXPRESSION)(x)


def initialise(config: StyleConfig, seed: int) -> Params:
  """Parameters of Style Net and FuseNet as drawn, under "style" and "fuse"."""
  k_style, k_fuse = jax.random.split(random_key(seed))
  mel, priors = jnp.zeros((1, 2, 80, 16)), jnp.zeros((1, 2 * EXPRESSION))
  return {
    "style": jax.jit(StyleNet(config).init)(k_style, mel)["params"],
    "fuse": jax.jit(FuseNet(config.fuse_dropout).init)(k_fuse, priors)["params"],
  }


def train(
  lessons: Lessons, f_exp: Float[np.ndarray, "f 64"], config: StyleConfig, *, seed: int
) -> Fitted:
  """Fits Style Net and FuseNet jointly by L_recon, f_exp given and constant.

  Both are in the standardised units of `lessons.expression`.
  """
  style, fuse = StyleNet(config), FuseNet(config.fuse_dropout)

  def chunks(which, starts):
    rows = starts[:, None] + np.arange(config.chunk)[None, :]
    inside = rows < len(which)
    rows = np.minimum(rows, len(which) - 1)
    same = inside & which[rows] & (lessons.clip[rows] == lessons.clip[starts][:, None])
    valid = np.cumprod(same, axis=1).astype(bool)
    flat = rows.ravel()
    mel = lessons.windows(flat).reshape(*rows.shape, 80, 16)
    return mel, valid, f_exp[rows], lessons.expression[rows]

  # A chunk may begin anywhere that leaves it at least half full.
  begin = lessons.runs(max(1, config.chunk // 2), lessons.learn)
  if not len(begin):
    begin = np.flatnonzero(lessons.learn)
  odds = lessons.odds(begin)

  def draw(rng: np.random.Generator):
    return chunks(lessons.learn, rng.choice(begin, config.fit.batch, p=odds))

  def recon(params, batch, mel, *, train: bool, rngs=None):
    _, valid, exp, target = batch
    k: Any = rngs or (None, None)
    tone: Any = style.apply(
      {"params": params["style"]},
      mel,
      valid,
      train=train,
      rngs={"dropout": k[0]} if train else None,
    )
    prior: Any = fuse.apply(
      {"params": params["fuse"]},
      jnp.concatenate([tone, exp], axis=-1),
      train=train,
      rngs={"dropout": k[1]} if train else None,
    )
    error = jnp.abs(prior - target).mean(-1)
    return jnp.where(valid, error, 0.0).sum() / jnp.maximum(valid.sum(), 1)

  def loss(params: Params, batch, key):
    k_augment, k_style, k_fuse = jax.random.split(key, 3)
    # One microphone a chunk: its frames' windows side by side are augmented as one.
    b, t = batch[0].shape[:2]
    wide = batch[0].transpose(0, 2, 1, 3).reshape(b, 80, t * 16)
    mel = augment(wide, k_augment).reshape(b, 80, t, 16).transpose(0, 2, 1, 3)
    return recon(params, batch, mel, train=True, rngs=(k_style, k_fuse))

  def score(params: Params, batch):
    return recon(params, batch, batch[0], train=False)

  first = lessons.judge & ~np.append(False, lessons.judge[:-1] & (np.diff(lessons.clip) == 0))
  return fit(
    loss,
    initialise(config, seed),
    draw,
    config.fit,
    seed=seed,
    label="Style Net",
    score=score,
    held_out=chunks(lessons.judge, np.flatnonzero(first)),
  )
