"""The values that pass between the modules: their shapes, units and axes, stated once.

Axes: n splats, f frames, h w pixels (rows, columns), w also audio window steps, c channels.
All are pytrees; a batch of frames is the same type with a leading axis on every leaf.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, UInt8

# Pixel classes of a frame (method.md D.1 "Masks", with teeth counted to the mouth and
# never to the face, Q16). Each pixel has exactly one.
BACKGROUND, FACE, HAIR, MOUTH, NECK, TORSO = range(6)

FPS = 25  # frames a second of every subject
SAMPLE_RATE_HZ = 16_000  # of all speech
ACTION_UNITS = ("AU01", "AU04", "AU05", "AU06", "AU07", "AU45")  # OpenFace `_r`, 0..5
NEIGHBOURS = 8  # audio windows a frame sees: [i - 4, i + 4)
EXPRESSION = 64  # f_exp and f_tone
EMOTION = 128


class Camera(NamedTuple):
  """A pinhole camera. Pixel (row r, column c) has its centre at (c + 0.5, r + 0.5)."""

  viewmat: Float[Array, "4 4"]  # world to camera, OpenCV axes (x right, y down, z forward), metres
  K: Float[Array, "3 3"]  # pixels


class Splats(NamedTuple):
  """Gaussians by their raw (unactivated) parameters, method.md D.2."""

  means: Float[Array, "n 3"]  # metres
  raw_scales: Float[Array, "n 3"]  # metres after softplus
  quats: Float[Array, "n 4"]  # wxyz, any length
  logit_opacities: Float[Array, " n"]
  sh_dc: Float[Array, "n 1 3"]
  sh_rest: Float[Array, "n 8 3"]  # degree 2


class Controls(NamedTuple):
  """What drives one frame of the avatar."""

  audio: Float[Array, "8 d w"]  # neighbouring windows of d channels, w steps
  action_units: Float[Array, " 6"]  # ACTION_UNITS, 0..5; AU45 clipped to 0..2
  f_exp: Float[Array, " 64"]  # content prior
  f_tone: Float[Array, " 64"]  # style prior
  emotion: Float[Array, " 128"]  # distilled emotion


class Motion(NamedTuple):
  """What the motion network says about every splat at one frame."""

  d_mean: Float[Array, "n 3"]  # metres, added to means
  d_quat: Float[Array, "n 4"]  # added to raw quats
  d_scale: Float[Array, "n 3"]  # added to raw scales
  attention: Float[Array, "n 2"]  # norms of the audio and the eye attention; zeros in the mouth
  aleatoric: Float[Array, " n"]  # trace of the fused covariance were all members agreed
  epistemic: Float[Array, " n"]  # what their disagreement adds to it


class Pictures(NamedTuple):
  """The pictures of a frame, which are nearly all of its bytes."""

  image: UInt8[Array, "h w 3"]
  background: UInt8[Array, "h w 3"] | None  # torso over clean plate; None where nobody looks at it
  classes: UInt8[Array, "h w"]  # BACKGROUND .. TORSO


class Frame(NamedTuple):
  """One frame of a subject, with all that training needs."""

  image: UInt8[Array, "h w 3"]
  background: UInt8[Array, "h w 3"]  # torso over clean plate
  classes: UInt8[Array, "h w"]  # BACKGROUND .. TORSO
  camera: Camera
  controls: Controls
  lips: Int[Array, " 4"]  # rows r0:r1, columns c0:c1 of the square lip crop, inside the image
  eyes: Int[Array, " 4"]  # likewise of the box about both eyes and brows


class Guide(NamedTuple):
  """What guided sampling looks at (method.md D.3, D.4; brows are ours), a value a frame."""

  lip_height_px: Float[Array, " f"]  # inner lips, landmarks 60..67
  blink: Float[Array, " f"]  # clip(AU45, 0, 2) / 2
  au25: Float[Array, " f"]  # clipped to its 95th percentile
  brow: Float[Array, " f"]  # AU01 - AU04: raised above zero, drawn down below


class Clip(NamedTuple):
  """A split of a subject in memory: frames with leading axis f (NumPy on the host)."""

  frames: Frame
  guide: Guide
  ids: Int[Array, " f"]  # frame numbers in the source video


class Speech(NamedTuple):
  """All that is heard, a row a video frame."""

  audio: Float[Array, "f w d"]  # one window a frame, as stored: w steps of d channels
  f_exp: Float[Array, "f 64"]
  f_tone: Float[Array, "f 64"]
  emotion: Float[Array, "f 128"]


class Image(NamedTuple):
  """A rendered frame."""

  composite: Float[Array, "h w 3"]  # face over mouth over background, 0..1
  face: Float[Array, "h w 3"]  # the face layer on black
  face_alpha: Float[Array, "h w 1"]
  mouth: Float[Array, "h w 3"]
  mouth_alpha: Float[Array, "h w 1"]
  uncertainty: Float[Array, "h w"]  # aleatoric + epistemic of the visible face splats
  attention: Float[Array, "h w 2"]
  overflow: Int[Array, ""]  # pairs of splat and tile beyond the capacity, hence not drawn


Alive = Bool[Array, " n"]
