"""Adam for splats and AdamW for motion, each parameter at its own rate (method.md C.7, D.2).

What a stage trains is said by `trainable`; everything else is frozen and has no moments.
"""

from typing import cast

import jax
import jax.numpy as jnp
import optax

from uajax.avatar import Avatar
from uajax.config import Rates, Stage
from uajax.models.motion import FACE_MODALITIES

GEOMETRY = ("means", "raw_scales", "quats")
SPLAT_FIELDS = (*GEOMETRY, "logit_opacities", "sh_dc", "sh_rest")
TRAINED = {  # stage -> layer -> fields of its splats; motion trains with all fields only
  "mouth": {"mouth": SPLAT_FIELDS},
  "face": {"face": SPLAT_FIELDS},
  "fuse": {"face": ("sh_dc", "sh_rest", "logit_opacities"), "mouth": ("sh_dc", "sh_rest")},
}

_splats = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-15)
_motion = optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-8)


def trainable(avatar: Avatar, stage: Stage) -> dict:
  """`{"splats": {layer: {field: array}}, "motion": {layer: params}}` of what `stage` trains."""
  layers = TRAINED[stage.name]
  motion = {layer: getattr(avatar, layer).motion
            for layer, fields in layers.items() if fields == SPLAT_FIELDS}
  if stage.name == "fuse" and avatar.config.calibrates:
    motion = {"face": {"doubt_head": avatar.face.motion["doubt_head"]}}
  return {
    "splats": {layer: {field: getattr(getattr(avatar, layer).splats, field) for field in fields}
               for layer, fields in layers.items()},
    "motion": motion,
  }


def join(avatar: Avatar, params: dict) -> Avatar:
  """The avatar with the trained values in their places."""
  for name, fields in params["splats"].items():
    layer = getattr(avatar, name)
    avatar = avatar.replace(**{name: layer.replace(splats=layer.splats._replace(**fields))})
  for name, motion in params["motion"].items():
    layer = getattr(avatar, name)
    avatar = avatar.replace(**{name: layer.replace(motion=layer.motion | motion)})
  return avatar


def init(params: dict) -> dict:
  return {"splats": _splats.init(params["splats"]), "motion": _motion.init(params["motion"])}


def update(stage: Stage, scene_m: float, params, grads, state, step, heard):
  """One step of every rate.

  Args:
    scene_m: the scene's size in metres; positions move in proportion.
    step: int32 scalar within the stage, from 0.
    heard: bool[4 k], which ensemble members (of FACE_MODALITIES) are in use, or None for all. The
      others rest: neither decay nor momentum moves what had no gradient (Q8).

  Returns:
    new params and new state.
  """
  frozen = step >= stage.freeze_from
  splat_steps, splat_state = _splats.update(grads["splats"], state["splats"])
  splat_steps = jax.tree_util.tree_map_with_path(
    lambda path, u: -_splat_rate(path[-1].key, stage.rates, scene_m, step)
    * jnp.where(frozen & (path[-1].key in GEOMETRY + ("logit_opacities",)), 0.0, 1.0) * u,
    splat_steps)
  motion_steps, motion_state = _motion.update(grads["motion"], state["motion"])
  factor = jnp.where(frozen | (step < stage.warm_steps), 0.0, decay(stage.rates, step))

  def motion_step(path, u, p):
    rate, weight_decay = _motion_rate(path, stage.rates)
    return -factor * rate * (u + weight_decay * p)

  motion_steps = jax.tree_util.tree_map_with_path(motion_step, motion_steps, params["motion"])
  if heard is not None:
    motion_steps = _rest(motion_steps, jax.tree.map(jnp.zeros_like, motion_steps), heard)
    new, old = cast(optax.ScaleByAdamState, motion_state), state["motion"]  # as `init` made it
    motion_state = new._replace(
      mu=_rest(new.mu, old.mu, heard), nu=_rest(new.nu, old.nu, heard))
  steps = {"splats": splat_steps, "motion": motion_steps}
  return optax.apply_updates(params, steps), {"splats": splat_state, "motion": motion_state}


def decay(rates: Rates, step):
  """The factor on motion rates: 1 to 1/2 at `halve_by`, then on to 1/10 at `end` (Q10 mended)."""
  first = 0.5 ** (step / max(rates.halve_by, 1))
  late = jnp.clip((step - rates.halve_by) / max(rates.end - rates.halve_by, 1), 0, 1)
  return jnp.where(step < rates.halve_by, first, 0.5 * 0.2**late)


def _splat_rate(field: str, rates: Rates, scene_m: float, step):
  if field == "means":
    done = jnp.clip(step / rates.means_steps, 0, 1)
    return scene_m * rates.means ** (1 - done) * rates.means_end**done
  return {"raw_scales": rates.scale, "quats": rates.rotation, "logit_opacities": rates.opacity,
          "sh_dc": rates.sh_dc, "sh_rest": rates.sh_rest}[field]


def _motion_rate(path, rates: Rates) -> tuple[float, float]:
  """Rate and decay of a motion parameter by the names on its path."""
  names = [str(getattr(p, "key", p)) for p in path]
  if "audio_attention" in names:
    return rates.attention, rates.attention_decay
  if "doubt_head" in names:
    return rates.doubt, 0.0
  if "planes" in names and "emotion" not in names:  # the code-books' own planes go slowly (Q15)
    return rates.planes, rates.planes_decay
  return rates.network, 0.0


def _rest(new, old, heard):
  """`new` where a member is in use, `old` elsewhere; leaves outside the ensembles are `new`."""

  def pick(path, n, o):
    names = [str(getattr(p, "key", p)) for p in path]
    for used, modality in zip(heard, FACE_MODALITIES, strict=True):
      if "ensembles" in names and modality in names:
        return jnp.where(used.reshape(-1, *[1] * (n.ndim - 1)), n, o)
    return n

  return jax.tree_util.tree_map_with_path(pick, new, old)
