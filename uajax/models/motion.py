"""How every splat of a layer moves at one frame (method.md C.3 face, C.4 mouth).

The first keys of the parameter trees are the groups that an optimiser tells apart:
`planes`, `audio`, `audio_attention`, `fusion`, `mean_head` in both, and in the face
`audio_channels`, `eye_attention`, `expression`, `emotion`, `rotation_head`, `scale_head`.

Axes: n splats, c channels.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uajax import types
from uajax.config import Motion as MotionConfig
from uajax.errors import UserError
from uajax.models.audio import AudioAttention, AudioNet, Linear
from uajax.models.codebook import EmotionEncoder
from uajax.models.fusion import Modality, UncertaintyFusion
from uajax.models.planes import Planes

FACE_MODALITIES = ("audio", "content", "style", "emotion")  # the order of `members`
MOUTH_MODALITIES = FACE_MODALITIES[:3]
_UNIT = 1e-2  # metres, of the heads' displacements


class Gate(nn.Module):
  """Two dense layers without biases."""

  hidden: int
  features: int

  @nn.compact
  def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    x = nn.relu(Linear(self.hidden, use_bias=False, name="first")(x))
    return Linear(self.features, use_bias=False, name="second")(x)


class Head(nn.Module):
  """Reads one kind of motion from the fused code."""

  features: int
  still: bool  # start at zero motion

  @nn.compact
  def __call__(self, code: Float[Array, "n g"]) -> Float[Array, "n o"]:
    x = nn.relu(Linear(code.shape[-1], name="first")(nn.relu(code)))
    return Linear(self.features, still=self.still, name="second")(x)


class FaceMotion(nn.Module):
  """Moves, turns and scales the face's splats."""

  config: MotionConfig

  @nn.compact
  def __call__(
    self,
    points: Float[Array, "n 3"],
    controls: types.Controls,
    members: Int[Array, " 4"] | None = None,
  ) -> types.Motion:
    """Returns the motion of splats at `points` (metres).

    Args:
      members: the ensemble member to ask a modality (FACE_MODALITIES); None asks all.

    Raises:
      UserError: where the audio windows are not those of the config.
    """
    take = self.config
    where, heard = _encode(take, points, controls)
    channels = Gate(32, take.audio_code, name="audio_channels")(where)
    eyes = nn.relu(Gate(16, 6, name="eye_attention")(where))
    face = Gate(16, 5, name="expression")(controls.action_units[:5])
    face = jnp.concatenate([face, controls.action_units[5:]])
    felt = EmotionEncoder(take.emotion_planes, name="emotion")(controls.emotion, points)

    heeded = jnp.concatenate([channels * heard[None], eyes * face[None], where], -1)
    modalities = {
      "audio": Modality(heeded),
      "content": Modality(where, constant=controls.f_exp),
      "style": Modality(where, constant=controls.f_tone),
      "emotion": Modality(felt.features, felt.code),
    }
    code, fused = UncertaintyFusion(take, name="fusion")(modalities, where, members)
    still = take.still_heads
    return types.Motion(
      d_mean=_UNIT * Head(3, still, name="mean_head")(code),
      d_quat=Head(4, still, name="rotation_head")(code),
      d_scale=Head(3, still, name="scale_head")(code),
      attention=jnp.stack([_norm(channels), _norm(eyes)], -1),
      aleatoric=fused.aleatoric,
      epistemic=fused.epistemic,
    )


class MouthMotion(nn.Module):
  """Moves the splats inside the mouth; they neither turn nor scale."""

  config: MotionConfig

  @nn.compact
  def __call__(
    self,
    points: Float[Array, "n 3"],
    controls: types.Controls,
    members: Int[Array, " m"] | None = None,
  ) -> types.Motion:
    """As `FaceMotion`, of three modalities (MOUTH_MODALITIES): a fourth of `members` is ignored."""
    take = self.config
    where, heard = _encode(take, points, controls)
    modalities = {
      "audio": Modality(where, constant=heard),
      "content": Modality(where, constant=controls.f_exp),
      "style": Modality(where, constant=controls.f_tone),
    }
    members = None if members is None else members[: len(modalities)]
    code, fused = UncertaintyFusion(take, name="fusion")(modalities, where, members)
    d_mean = _UNIT * Head(3, take.still_heads, name="mean_head")(code)
    splats = points.shape[0]
    return types.Motion(
      d_mean=d_mean * jnp.array([[0.2, 1, 0.2]], d_mean.dtype),  # a jaw moves up and down
      d_quat=jnp.zeros((splats, 4), d_mean.dtype),
      d_scale=jnp.zeros((splats, 3), d_mean.dtype),
      attention=jnp.zeros((splats, 2), d_mean.dtype),
      aleatoric=fused.aleatoric,
      epistemic=fused.epistemic,
    )


def _encode(
  config: MotionConfig, points: Float[Array, "n 3"], controls: types.Controls
) -> tuple[Float[Array, "n p"], Float[Array, " c"]]:
  """What is known of the positions, and what is heard; submodules of the calling module."""
  want = (types.NEIGHBOURS, config.audio_channels, config.audio_width)
  if controls.audio.shape != want:
    raise UserError(f"audio windows are {controls.audio.shape}, this motion network hears {want}: "
                    "use the audio features it was trained with")
  where = jnp.concatenate(Planes(config.planes, name="planes")(points), -1)
  codes = AudioNet(config.audio_code, name="audio")(controls.audio)
  return where, AudioAttention(name="audio_attention")(codes)


def _norm(x: Float[Array, "n c"]) -> Float[Array, " n"]:
  """Length of each row, with gradient zero (not NaN) where it is zero."""
  square = jnp.square(x).sum(-1)
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
