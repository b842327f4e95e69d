"""The avatar: two layers of splats that move, and the pictures they give.

Pure functions over one pytree. Axes: n splats, h w pixels.
"""

import functools
from typing import NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from uajax import config as config_
from uajax import types
from uajax.models.motion import FaceMotion, MouthMotion
from uajax.render import render_layer
from uajax.types import Controls, Splats

__all__ = ["Avatar", "Controls", "Deformation", "Layer", "Splats", "deform", "face_motion",
           "init_motion", "mouth_motion", "render"]


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


def init_motion(key: PRNGKeyArray, config: config_.Motion) -> tuple[dict, dict]:
  """Draws the parameters of the face's and of the mouth's motion."""
  points = jnp.zeros((1, 3))
  controls = Controls(
    jnp.zeros((types.NEIGHBOURS, config.audio_channels, config.audio_width)),
    jnp.zeros(len(types.ACTION_UNITS)), jnp.zeros(types.EXPRESSION), jnp.zeros(types.EXPRESSION),
    jnp.zeros(types.EMOTION))
  face, mouth = jax.random.split(key)
  # Compiled, because only then what the networks would answer is never computed.
  return (jax.jit(FaceMotion(config).init)(face, points, controls)["params"],
          jax.jit(MouthMotion(config).init)(mouth, points, controls)["params"])


def face_motion(
  avatar: Avatar, controls: Controls, members: Int[Array, " 4"] | None = None
) -> types.Motion:
  """How the face's splats move; see `deform`."""
  return _move(FaceMotion(avatar.config), avatar.face, controls, members)


def mouth_motion(
  avatar: Avatar, controls: Controls, members: Int[Array, " 4"] | None = None
) -> types.Motion:
  """How the mouth's splats move; see `deform`."""
  return _move(MouthMotion(avatar.config), avatar.mouth, controls, members)


@functools.partial(jax.jit, static_argnums=0)
def _move(network: FaceMotion | MouthMotion, layer: Layer, controls, members) -> types.Motion:
  answer = network.apply({"params": layer.motion}, layer.splats.means, controls, members)
  return cast(types.Motion, answer)


def deform(
  avatar: Avatar, controls: Controls, members: Int[Array, " 4"] | None = None
) -> Deformation:
  """How both layers' splats move at one frame.

  Args:
    members: the ensemble member to ask a modality (audio, content, style, emotion; the mouth
      has no emotion): stage 1 of training. None asks and fuses all (stage 2).

  Raises:
    UserError: where the audio windows are not those the avatar was trained with.
  """
  return Deformation(face_motion(avatar, controls, members),
                     mouth_motion(avatar, controls, members))


def render(
  avatar: Avatar,
  controls: Controls,
  camera: types.Camera,
  background: Float[Array, "h w 3"],
  *,
  members: Int[Array, " 4"] | None = None,
  implementation: str | None = None,
  capacity: int | None = None,
  extent: str = "exact",
) -> types.Image:
  """One frame: face over mouth over background (method.md D.6), with the face's uncertainty.

  Args:
    background: what is behind the head, 0..1; its size is the picture's.
    members: as in `deform`.
    implementation, capacity, extent: as in `kernels.splat.rasterize`.

  Raises:
    UserError: where the audio windows are not those the avatar was trained with.
  """
  height, width, _ = background.shape
  motion = deform(avatar, controls, members)
  black = jnp.zeros(3, background.dtype)
  draw = functools.partial(
    render_layer, camera=camera, width=width, height=height, background=black,
    implementation=implementation, capacity=capacity, extent=extent)
  seen = jnp.concatenate(
    [(motion.face.aleatoric + motion.face.epistemic)[:, None], motion.face.attention], -1)
  face = draw(avatar.face.splats, avatar.face.alive, motion.face, features=seen, detached=True)
  mouth = draw(avatar.mouth.splats, avatar.mouth.alive, motion.mouth)
  return types.Image(
    composite=composite(face.color, face.alpha, mouth.color, mouth.alpha, background),
    face=face.color, face_alpha=face.alpha, mouth=mouth.color, mouth_alpha=mouth.alpha,
    uncertainty=face.features[..., 0], attention=face.features[..., 1:],
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
