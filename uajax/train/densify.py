"""Growing and pruning splats inside fixed slots (method.md D.2).

The picture asks for more splats where the screen-space gradient of one is large: a small one is
cloned, a large one split in two. Faint and oversized ones go. Arrays keep their size: a dead slot
is one that may be filled. What could not be placed is counted, and the loop then makes more slots;
where most are dead it halves them.
Axes: n slots.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels.splat.project import rotation, shade
from uajax.config import Densify
from uajax.types import Alive, Camera, Splats

SPLIT_SHRINK = 1.6
FAINTEST = 1e-10


class Stats(NamedTuple):
  """Sums since the last densification."""

  grad: Float[Array, " n"]  # norms of the screen-space gradient, NDC units
  seen: Float[Array, " n"]  # steps in which the splat was in the picture


class Change(NamedTuple):
  cloned: Int[Array, ""]
  split: Int[Array, ""]
  pruned: Int[Array, ""]
  missed: Int[Array, ""]  # wanted, but no slot was free


def no_stats(slots: int) -> Stats:
  return Stats(jnp.zeros(slots), jnp.zeros(slots))


def densify(settings: Densify, splats: Splats, alive: Alive, stats: Stats, *, scene_m: float,
            step, size_limit, key) -> tuple[Splats, Alive, Alive, Change]:
  """One round of growth and pruning.

  Args:
    size_limit: bool scalar, whether oversized splats are pruned as well.

  Returns:
    splats, alive, born (slots whose Adam moments must start at zero) and what changed.
  """
  slots = alive.shape[0]
  chex.assert_shape([stats.grad, stats.seen], (slots,))
  k_clone, k_split = jax.random.split(key)
  grad = jnp.where(alive & (stats.seen > 0), stats.grad / jnp.maximum(stats.seen, 1), 0.0)
  scales = jax.nn.softplus(splats.raw_scales)
  widest = scales.max(1)
  wanted = alive & (grad >= settings.grad_threshold)
  splitting = wanted & (widest > settings.split_size * scene_m)

  # The largest gradients are served first; each request takes one free slot. A split keeps its
  # parent's slot for one child and takes a free one for the other.
  rank = jnp.argsort(jnp.argsort(jnp.where(wanted, -grad, jnp.inf)))
  free = jnp.argsort(alive, stable=True)
  granted = wanted & (rank < (~alive).sum())
  target = jnp.where(granted, free[jnp.clip(rank, 0, slots - 1)], slots)

  turn = rotation(splats.quats)
  offset = lambda k: jnp.einsum("nij,nj->ni", turn, scales * jax.random.normal(k, (slots, 3)))
  halves = splitting & granted
  shrunk = _inverse_softplus(scales / SPLIT_SHRINK)
  child = splats._replace(
    means=jnp.where(halves[:, None], splats.means + offset(k_clone), splats.means),
    raw_scales=jnp.where(halves[:, None], shrunk, splats.raw_scales))
  parent = splats._replace(
    means=jnp.where(halves[:, None], splats.means + offset(k_split), splats.means),
    raw_scales=child.raw_scales)
  grown = jax.tree.map(lambda kept, new: kept.at[target].set(new, mode="drop"), parent, child)
  born = jnp.zeros_like(alive).at[target].set(True, mode="drop")
  alive_now = alive | born

  done = jnp.clip(step / max(settings.until, 1), 0, 1)
  faint = jax.nn.sigmoid(grown.logit_opacities) < (
    settings.min_opacity + settings.min_opacity_rise * done)
  large = jax.nn.softplus(grown.raw_scales).max(1) > settings.prune_size * scene_m
  pruned = alive_now & (faint | (large & size_limit))
  change = Change((granted & ~splitting).sum(), halves.sum(), pruned.sum(),
                  (wanted & ~granted).sum())
  return grown, alive_now & ~pruned, born | halves, change


def is_backdrop(splats: Splats, camera: Camera, sh_mask) -> Alive:
  """Splats that have taken the colour of the green backdrop, seen from `camera`."""
  colors = jnp.concatenate([splats.sh_dc, splats.sh_rest], 1) * sh_mask[None, :, None]
  red, green, blue = shade(splats.means, colors, camera.viewmat, 2).T
  return (red < 30 / 255) & (green > 225 / 255) & (blue < 30 / 255)


def demote(splats: Splats, which: Alive) -> Splats:
  """Makes splats faint and small: opacity 0.1 and a tenth of the size.

  The official code divides the raw scale, which enlarges them (Q28); here the activated one.
  """
  small = _inverse_softplus(jax.nn.softplus(splats.raw_scales) / 10)
  return splats._replace(
    logit_opacities=jnp.where(which, float(np.log(0.1 / 0.9)), splats.logit_opacities),
    raw_scales=jnp.where(which[:, None], small, splats.raw_scales))


def clear_moments(opt_state, born: Alive):
  """Zero Adam moments in the slots of `born`; every leaf of the state with n rows is a moment."""
  slots = born.shape[0]

  def clear(leaf):
    if leaf.ndim and leaf.shape[0] == slots:
      return jnp.where(born.reshape(-1, *[1] * (leaf.ndim - 1)), 0.0, leaf)
    return leaf

  return jax.tree.map(clear, opt_state)


def extend(tree, slots: int, more: int):
  """The same with `more` slots: every leaf of `slots` rows gets dead ones after it."""

  def pad(leaf):
    if leaf.ndim and leaf.shape[0] == slots:
      return jnp.concatenate([leaf, jnp.zeros((more - slots, *leaf.shape[1:]), leaf.dtype)])
    return leaf

  return jax.tree.map(pad, tree)


def compact(tree, alive: Alive, fewer: int):
  """The same in the first `fewer` slots alone, which is to be no less than what lives.

  Every leaf with as many rows as `alive` is reordered: what lives comes first, as it stood.
  """
  order = jnp.argsort(~alive, stable=True)[:fewer]

  def take(leaf):
    return leaf[order] if leaf.ndim and leaf.shape[0] == alive.shape[0] else leaf

  return jax.tree.map(take, tree)


def _inverse_softplus(x):
  x = jnp.maximum(x, FAINTEST)
  return x + jnp.log(-jnp.expm1(-x))
