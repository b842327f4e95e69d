"""How every splat of a layer moves at one frame (method.md C.3 face, C.4 mouth).

The first keys of the parameter trees are the groups that an optimiser tells apart:
`planes`, `audio`, `audio_attention`, `fusion`, `mean_head` in both, and in the face
`audio_channels`, `eye_attention`, `expression`, `emotion`, `rotation_head`, `scale_head`,
`acts`, `doubt_head`, `familiar`. A modality that the config leaves out has no parameters.

Axes: n splats, c channels.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kernels.fusion import Implementation
from uajax import types
from uajax.config import Modality as ModalityName
from uajax.config import Motion as MotionConfig
from uajax.errors import UserError
from uajax.models.audio import AudioAttention, AudioNet, Linear
from uajax.models.codebook import EmotionEncoder
from uajax.models.familiar import Familiar
from uajax.models.fusion import Modality, UncertaintyFusion
from uajax.models.planes import Planes

# The order of `members`, whichever of them the config names.
FACE_MODALITIES: tuple[ModalityName, ...] = ("audio", "content", "style", "emotion")
MOUTH_MODALITIES = FACE_MODALITIES[:3]
_UNIT = 1e-2  # metres, of the heads' displacements
_REACH = 6.0  # log variances are moved by less than this when they are calibrated


class Places(NamedTuple):
  """What is known of splats whatever the frame. What nothing looks at has no columns."""

  where: Float[Array, "n p"]  # what the tri-planes say of the positions
  channels: Float[Array, "n c"]  # how much of each channel that is heard they heed
  eyes: Float[Array, "n 6"]  # and of each action unit
  felt: Float[Array, "n f"]  # what the emotion's tri-planes say


class Gate(nn.Module):
  """Two dense layers without biases."""

  hidden: int
  features: int
  positive: bool = False  # start with no output below zero
  ajar: float = 0.0  # slope of a hidden unit below zero, to 1 above

  @nn.compact
  def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    x = _ajar(Linear(self.hidden, use_bias=False, name="first")(x), self.ajar)
    return Linear(self.features, use_bias=False, positive=self.positive, name="second")(x)


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
  implementation: Implementation | None = None  # of the fusion

  def setup(self):
    take = self.config
    self.planes = Planes(take.planes)
    self.audio, self.audio_attention = AudioNet(take.audio_code), AudioAttention()
    # A ReLU follows the eye's gate: what began below zero everywhere would never learn, and the
    # avatar never blink.
    self.audio_channels = Gate(32, take.audio_code)
    self.eye_attention = Gate(16, 6, positive=True, ajar=take.ajar)
    self.expression = Gate(16, 5)
    if take.acts:
      self.acts = Linear(take.features, use_bias=False)
    if "emotion" in take.modalities:
      self.emotion = EmotionEncoder(take.emotion_planes)
    self.fusion = UncertaintyFusion(take, self.implementation)
    self.mean_head = Head(3, take.still_heads)
    self.rotation_head = Head(4, take.still_heads)
    self.scale_head = Head(3, take.still_heads)
    if take.calibrates:
      self.doubt_head, self.familiar = Head(1, still=True), Familiar()

  def __call__(
    self,
    points: Float[Array, "n 3"],
    controls: types.Controls,
    members: Int[Array, " 4"] | None = None,
    silent: Bool[Array, " 4"] | None = None,
  ) -> types.Motion:
    """Returns the motion of splats at `points` (metres).

    Args:
      members: the ensemble member to ask a modality (FACE_MODALITIES); None asks all.
      silent: modalities that are not heard; not all of them.

    Raises:
      UserError: where the audio windows are not those of the config, or its modalities none.
    """
    return self.move(self.places(points), controls, members, silent)

  def places(self, points: Float[Array, "n 3"]) -> Places:
    """All that depends on the positions alone: at inference it is computed once."""
    where = jnp.concatenate(self.planes(points), -1)
    eyes = _ajar(self.eye_attention(where), self.config.ajar)
    felt = self.emotion.features(points) if "emotion" in self.config.modalities else where[:, :0]
    return Places(where, self.audio_channels(where), eyes, felt)

  def move(
    self, places: Places, controls: types.Controls, members: Int[Array, " 4"] | None = None,
    silent: Bool[Array, " 4"] | None = None,
  ) -> types.Motion:
    """`__call__` for the splats at known places."""
    modalities = self.modalities(places, controls, heard := self.code(controls))
    code, fused = self.fusion(
      modalities, places.where, _of(modalities, members), _of(modalities, silent))
    if self.config.acts:
      code = code + self.acts(places.eyes * self.face(controls)[None])
    doubts = fused.aleatoric, fused.epistemic
    if self.config.calibrates:
      # The head alone learns from the errors: variances that learn, too, rise where something is
      # seldom seen, and the modality that could show it loses its say.
      head = self.doubt_head(jax.lax.stop_gradient(code))[:, 0]
      scale = self.strangeness(heard) * jnp.exp(_REACH * jnp.tanh(head / _REACH))
      doubts = tuple(scale * jax.lax.stop_gradient(trace) for trace in doubts)
    aleatoric, epistemic = doubts
    return types.Motion(
      d_mean=_UNIT * self.mean_head(code),
      d_quat=self.rotation_head(code),
      d_scale=self.scale_head(code),
      attention=jnp.stack([_norm(places.channels), _norm(places.eyes)], -1),
      aleatoric=aleatoric,
      epistemic=epistemic,
    )

  def code(self, controls: types.Controls) -> Float[Array, " c"]:
    """What is heard at this frame."""
    return _hear(self, controls)

  def face(self, controls: types.Controls) -> Float[Array, " 6"]:
    """What the action units ask for at this frame, by action unit."""
    expression = self.expression(controls.action_units[:5])
    return jnp.concatenate([expression, self.config.blink_gain * controls.action_units[5:]])

  def strangeness(self, heard: Float[Array, " c"]) -> Float[Array, ""]:
    """The factor on every modality's covariance, 1 for sound such as the avatar was taught by.

    One sound feeds them all. Where all the covariances grow alike, so does that of their product,
    and its mean stays: what moves is not touched.
    """
    return self.familiar(heard) if self.config.calibrates else jnp.ones(())

  def modalities(self, places: Places, controls: types.Controls, heard: Float[Array, " c"]
                 ) -> dict[str, Modality]:
    """What each of FACE_MODALITIES that the config names has to go by; `heard` is the `code`."""
    names = _named(self.config, FACE_MODALITIES)
    face = self.face(controls)
    where, channels, eyes, felt = places
    inputs = {
      "audio": Modality(jnp.concatenate([channels * heard[None], eyes * face[None], where], -1)),
      "content": Modality(where, constant=controls.f_exp),
      "style": Modality(where, constant=controls.f_tone),
    }
    if "emotion" in names:
      inputs["emotion"] = Modality(felt, self.emotion.code(controls.emotion))
    return {name: inputs[name] for name in names}


class MouthMotion(nn.Module):
  """Moves the splats inside the mouth; they neither turn nor scale."""

  config: MotionConfig
  implementation: Implementation | None = None  # of the fusion

  def setup(self):
    take = self.config
    self.planes = Planes(take.planes)
    self.audio, self.audio_attention = AudioNet(take.audio_code), AudioAttention()
    self.fusion = UncertaintyFusion(take, self.implementation)
    self.mean_head = Head(3, take.still_heads)

  def __call__(
    self,
    points: Float[Array, "n 3"],
    controls: types.Controls,
    members: Int[Array, " 4"] | None = None,
    silent: Bool[Array, " 4"] | None = None,
  ) -> types.Motion:
    """As `FaceMotion`, of three modalities (MOUTH_MODALITIES): the emotion's member is ignored."""
    return self.move(self.places(points), controls, members, silent)

  def places(self, points: Float[Array, "n 3"]) -> Places:
    """As of `FaceMotion`: the mouth looks at nothing but where it is."""
    where = jnp.concatenate(self.planes(points), -1)
    return Places(where, *(where[:, :0],) * 3)

  def move(
    self, places: Places, controls: types.Controls, members: Int[Array, " 4"] | None = None,
    silent: Bool[Array, " 4"] | None = None,
  ) -> types.Motion:
    """`__call__` for the splats at known places."""
    where = places.where
    constants = {"audio": _hear(self, controls), "content": controls.f_exp,
                 "style": controls.f_tone}
    modalities = {name: Modality(where, constant=constants[name])
                  for name in _named(self.config, MOUTH_MODALITIES)}
    code, fused = self.fusion(
      modalities, where, _of(modalities, members), _of(modalities, silent))
    d_mean = _UNIT * self.mean_head(code)
    splats = where.shape[0]
    return types.Motion(
      d_mean=d_mean * jnp.array([[0.2, 1, 0.2]], d_mean.dtype),  # a jaw moves up and down
      d_quat=jnp.zeros((splats, 4), d_mean.dtype),
      d_scale=jnp.zeros((splats, 3), d_mean.dtype),
      attention=jnp.zeros((splats, 2), d_mean.dtype),
      aleatoric=fused.aleatoric,
      epistemic=fused.epistemic,
    )


def _named(config: MotionConfig, known: tuple[ModalityName, ...]) -> tuple[ModalityName, ...]:
  """Those of `known` that the config names; UserError where it names audio not, or one twice."""
  named = config.modalities
  if "audio" not in named or len(set(named)) < len(named):
    raise UserError(f"model.motion.modalities is ({', '.join(named)}): give audio, and with it any "
                    "of content, style and emotion, each once")
  return tuple(name for name in known if name in named)


def _of(modalities: dict[str, Modality], values: Shaped[Array, " 4"] | None
        ) -> Shaped[Array, " m"] | None:
  """The values, one for each of FACE_MODALITIES, of these alone."""
  if values is None:
    return None
  return jnp.stack([values[FACE_MODALITIES.index(name)] for name in modalities])


def _hear(network: FaceMotion | MouthMotion, controls: types.Controls) -> Float[Array, " c"]:
  """What a network hears at this frame, the same for all its splats."""
  take = network.config
  want = (types.NEIGHBOURS, take.audio_channels, take.audio_width)
  if controls.audio.shape != want:
    raise UserError(f"audio windows are {controls.audio.shape}, this motion network hears {want}: "
                    "use the audio features it was trained with")
  return network.audio_attention(network.audio(controls.audio))


def _ajar(x: Float[Array, "*n c"], share: float) -> Float[Array, "*n c"]:
  """ReLU, below zero a share of its slope, not none: what shut can open again.

  With the ReLU (official) the attention's penalties shut one splat after the other for good, until
  next to none is left that an action unit could move; and of the hidden units, which rise and fall
  together where planes begin much alike, all but one in a bad case. A share of the gradient alone
  lets gates sink unseen, ever further below zero. Nor does a slope stop the penalties from drawing
  gates to zero where lids seldom move.
  """
  return nn.leaky_relu(x, share)


def _norm(x: Float[Array, "n c"]) -> Float[Array, " n"]:
  """Length of each row, with gradient zero (not NaN) where it is zero."""
  square = jnp.square(x).sum(-1)
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
