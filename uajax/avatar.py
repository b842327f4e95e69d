"""The avatar: two layers of splats that move, and the pictures they give.

Pure functions over one pytree. Axes: n splats, h w pixels.
"""

import functools
from typing import NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from kernels.fusion import Implementation
from uajax import config as config_
from uajax import types
from uajax.models import familiar
from uajax.models.motion import FaceMotion, MouthMotion, Places
from uajax.render import render_layer
from uajax.types import Controls, Splats

__all__ = ["Avatar", "Controls", "Deformation", "Known", "Layer", "Splats", "acquaint", "deform",
           "face_motion", "init_motion", "know", "mouth_motion", "render"]


class Layer(flax.struct.PyTreeNode):
  """Splats, which of their slots are in use, and the parameters that move them."""

  splats: Splats
  alive: Bool[Array, " n"]
  motion: dict  # parameters of FaceMotion or MouthMotion


class Avatar(flax.struct.PyTreeNode):
  face: Layer
  mouth: Layer
  config: config_.Motion = flax.struct.field(pytree_node=False)
  sh_degree: int = flax.struct.field(pytree_node=False, default=2)


class Deformation(NamedTuple):
  face: types.Motion
  mouth: types.Motion


# Compiled, because only then what the networks would answer is never computed.
@functools.partial(jax.jit, static_argnames="config")
def init_motion(key: PRNGKeyArray, config: config_.Motion) -> tuple[dict, dict]:
  """Draws the parameters of the face's and of the mouth's motion."""
  points = jnp.zeros((1, 3))
  controls = Controls(
    jnp.zeros((types.NEIGHBOURS, config.audio_channels, config.audio_width)),
    jnp.zeros(len(types.ACTION_UNITS)), jnp.zeros(types.EXPRESSION), jnp.zeros(types.EXPRESSION),
    jnp.zeros(types.EMOTION))
  face, mouth = jax.random.split(key)
  # The implementation that takes least to trace: none of it is run.
  return (cast(dict, FaceMotion(config, "xla").init(face, points, controls)["params"]),
          cast(dict, MouthMotion(config, "xla").init(mouth, points, controls)["params"]))


class Known(NamedTuple):
  """What is known of both layers' splats whatever the frame; see `know`."""

  face: Places | None = None
  mouth: Places | None = None


@jax.jit
def know(avatar: Avatar) -> Known:
  """All of the motion networks that depends on the splats alone, to be had once for many frames."""
  return Known(*(
    cast(Places, network.apply({"params": layer.motion}, layer.splats.means, method="places"))
    for network, layer in ((FaceMotion(avatar.config), avatar.face),
                           (MouthMotion(avatar.config), avatar.mouth))))


@jax.jit
def acquaint(avatar: Avatar, controls: Controls) -> Avatar:
  """The avatar that knows what training sounds like (`models.familiar`), once its ears are learnt.

  Args:
    controls: of all training frames, with a leading axis on every leaf.
  """
  network = FaceMotion(avatar.config)
  params = {"params": avatar.face.motion}
  codes = jax.lax.map(
    lambda frame: cast(Array, network.apply(params, frame, method="code")), controls)
  motion = avatar.face.motion | {"familiar": familiar.learn(codes)}
  return avatar.replace(face=avatar.face.replace(motion=motion))


def face_motion(
  avatar: Avatar, controls: Controls, members: Int[Array, " 4"] | None = None,
  places: Places | None = None, implementation: Implementation | None = None,
  silent: Bool[Array, " 4"] | None = None,
) -> types.Motion:
  """How the face's splats move; see `deform`. Modalities can be `silent`, one or more."""
  network = FaceMotion(avatar.config, implementation)
  return _move(network, avatar.face, controls, members, places, silent)


def mouth_motion(
  avatar: Avatar, controls: Controls, members: Int[Array, " 4"] | None = None,
  places: Places | None = None, implementation: Implementation | None = None,
  silent: Bool[Array, " 4"] | None = None,
) -> types.Motion:
  """How the mouth's splats move; see `face_motion`."""
  network = MouthMotion(avatar.config, implementation)
  return _move(network, avatar.mouth, controls, members, places, silent)


@functools.partial(jax.jit, static_argnums=0)
def _move(network: FaceMotion | MouthMotion, layer: Layer, controls, members, places, silent
          ) -> types.Motion:
  method, about = ("__call__", layer.splats.means) if places is None else ("move", places)
  answer = network.apply(
    {"params": layer.motion}, about, controls, members, silent, method=method)
  return cast(types.Motion, answer)


def deform(
  avatar: Avatar, controls: Controls, members: Int[Array, " 4"] | None = None,
  known: Known | None = None, implementation: Implementation | None = None,
) -> Deformation:
  """How both layers' splats move at one frame.

  Args:
    members: the ensemble member to ask a modality (audio, content, style, emotion; the mouth
      has no emotion): stage 1 of training. None asks and fuses all (stage 2).
    known: what `know` says of the avatar, where many frames share it.
    implementation: as in `kernels.fusion.fuse`.

  Raises:
    UserError: where the audio windows are not those the avatar was trained with.
  """
  face, mouth = (None, None) if known is None else known
  return Deformation(face_motion(avatar, controls, members, face, implementation),
                     mouth_motion(avatar, controls, members, mouth, implementation))


def render(
  avatar: Avatar,
  controls: Controls | None,
  camera: types.Camera,
  background: Float[Array, "h w 3"],
  *,
  members: Int[Array, " 4"] | None = None,
  known: Known | None = None,
  motion: Deformation | None = None,
  doubt: bool = True,
  implementation: str | None = None,
  capacity: int | None = None,
  extent: str = "exact",
) -> types.Image:
  """One frame: face over mouth over background (method.md D.6), with the face's uncertainty.

  Args:
    controls: what drives it; None where `motion` says how it moves (what `deform` gave).
    background: what is behind the head, 0..1; its size is the picture's.
    members, known: as in `deform`.
    doubt: whether uncertainty and attention are drawn too; without they are zero and cost nothing.
    implementation, capacity, extent: as in `kernels.splat.rasterize`; "xla" and "reference" say
      what fuses, too.

  Raises:
    UserError: where the audio windows are not those the avatar was trained with.
  """
  height, width, _ = background.shape
  fuse_by: Implementation | None = None
  if implementation == "xla" or implementation == "reference":
    fuse_by = implementation
  if motion is None:
    motion = deform(avatar, cast(Controls, controls), members, known, fuse_by)
  black = jnp.zeros(3, background.dtype)
  draw = functools.partial(
    render_layer, camera=camera, width=width, height=height, background=black,
    implementation=implementation, capacity=capacity, extent=extent)
  seen = jnp.concatenate(
    [(motion.face.aleatoric + motion.face.epistemic)[:, None], motion.face.attention], -1)
  face = draw(avatar.face.splats, avatar.face.alive, motion.face,
              features=seen if doubt else None, detached=True)
  features = face.features if doubt else jnp.zeros((height, width, 3), background.dtype)
  mouth = draw(avatar.mouth.splats, avatar.mouth.alive, motion.mouth)
  return types.Image(
    composite=composite(face.color, face.alpha, mouth.color, mouth.alpha, background),
    face=face.color, face_alpha=face.alpha, mouth=mouth.color, mouth_alpha=mouth.alpha,
    uncertainty=features[..., 0], attention=features[..., 1:],
    overflow=face.overflow + mouth.overflow)


def composite(
  face: Float[Array, "h w 3"],
  face_alpha: Float[Array, "h w 1"],
  mouth: Float[Array, "h w 3"],
  mouth_alpha: Float[Array, "h w 1"],
  background: Float[Array, "h w 3"],
) -> Float[Array, "h w 3"]:
  """Layers rendered on black, one over the other, clipped to 0..1."""
  behind = mouth + background * (1 - mouth_alpha)
  return jnp.clip(face + behind * (1 - face_alpha), 0, 1)
