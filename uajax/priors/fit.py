"""Fits a small network to data that the host draws: the one loop of all speech networks.

Adam with clipped gradients under a cosine schedule; the parameters scored and returned are a
running average of those stepped. Each step is a call of its own: inside a `lax.scan` XLA's
convolutions for CPUs run about eight times slower (measured, jax 0.10).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from uajax.errors import UserError
from uajax.progress import Progress

Params = Any  # a pytree of arrays
Batch = Any  # a pytree of arrays, of the same shapes at every draw


@dataclasses.dataclass(frozen=True)
class FitConfig:
  steps: int = 20_000
  batch: int = 64
  rate: float = 1e-4  # of Adam at its peak
  block: int = 100  # steps between two scores
  patience: int = 20  # blocks without a better score before it stops
  averaging: float = 0.99  # how much of the running average a step keeps
  weight_decay: float = 1e-4


class Fitted(NamedTuple):
  params: Params  # of the best score
  score: float
  history: tuple[float, ...]  # the score after each block


def fit(
  loss: Callable[[Params, Batch, Array], Float[Array, ""]],
  params: Params,
  draw: Callable[[np.random.Generator], Batch],
  config: FitConfig,
  *,
  seed: int,
  label: str,
  score: Callable[[Params, Batch], Float[Array, ""]] | None = None,
  held_out: Batch | None = None,
  rates: Params | None = None,
) -> Fitted:
  """Minimises `loss(params, batch, key)` over batches from `draw`.

  Args:
    loss: scalar loss; `key` drives its dropout and augmentation.
    score: scalar on `held_out`, less is better; without it the last average is the best.
    label: what progress calls this.
    rates: factor of each parameter's rate, a pytree of floats like `params`; None is 1 throughout.

  Raises:
    UserError: the loss is no longer finite.
  """
  steps = max(config.block, config.steps)
  optimizer, step = _stepper(loss, config)
  judge = None if score is None else _jitted(score)
  params = jax.tree.map(jnp.array, params)  # copies: a step gives its state's buffers away
  average = jax.tree.map(jnp.array, params)
  state = (params, average, optimizer.init(params), random_key(seed), jnp.zeros(()))
  rng = np.random.default_rng(seed)
  best, best_score, waited, history = jax.device_get(params), np.inf, 0, []
  progress = Progress(label, steps)
  for _ in range(-(-steps // config.block)):
    values = []
    for _ in range(config.block):
      state, value = step(state, draw(rng), rates)
      values.append(value)
    mean = float(np.mean([float(v) for v in values]))
    if not np.isfinite(mean):
      raise UserError(
        f"{label}: the loss is no longer finite after {len(history) * config.block} steps:"
        f" lower its rate (now {config.rate:g})"
      )
    history.append(mean if judge is None else float(judge(state[1], held_out)))
    if judge is None or history[-1] < best_score:
      best, best_score, waited = jax.device_get(state[1]), history[-1], 0
    else:
      waited += 1
    progress.advance(config.block, f"loss {mean:.4f}")
    if waited >= config.patience:
      break
  progress.close(f"best score {best_score:.4f}")
  return Fitted(best, float(best_score), tuple(history))


@functools.lru_cache(maxsize=1)  # what a loss closes over stays until another is fitted
def _stepper(loss, config: FitConfig):
  """The optimizer and a step of `fit`, compiled once for a loss that is fitted more than once."""
  steps = max(config.block, config.steps)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, config.rate, max(1, min(500, steps // 10)), steps, 0.02 * config.rate
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay)
  )

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, batch, rates):
    params, average, moments, key, count = state
    key, used = jax.random.split(key)
    value, grads = jax.value_and_grad(loss)(params, batch, used)
    updates, moments = optimizer.update(grads, moments, params)
    if rates is not None:
      updates = jax.tree.map(lambda u, r: r * u, updates, rates)
    params = optax.apply_updates(params, updates)
    keep = jnp.minimum(config.averaging, (1.0 + count) / (10.0 + count))
    average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average, params)
    return (params, average, moments, key, count + 1), value

  return optimizer, step


@functools.lru_cache(maxsize=1)
def _jitted(score):
  return jax.jit(score)


def random_key(seed: int) -> Array:
  """A key whose numbers compile in a fraction of the default generator's time.

  The same seed gives the same numbers on one kind of device, not across kinds.
  """
  return jax.random.key(seed, impl="unsafe_rbg")


def in_batches(apply: Callable[..., Any], *arrays: Any, size: int = 256) -> Any:
  """`apply` over rows in batches of one shape, so that any length costs one compilation."""
  rows = len(arrays[0])
  out = []
  for start in range(0, rows, size):
    taken = [a[start : start + size] for a in arrays]
    short = size - len(taken[0])
    padded = [np.concatenate([a, np.repeat(a[-1:], short, 0)]) if short else a for a in taken]
    result = apply(*padded)
    out.append(jax.tree.map(lambda x, n=size - short: np.asarray(x)[:n], result))
  return jax.tree.map(lambda *x: np.concatenate(x), *out)
