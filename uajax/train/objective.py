"""What each stage asks of the picture (method.md D.3 face, D.4 mouth, D.5 fuse).

Every objective is a pure function of avatar, frame and probe. A layer is rendered over a
backdrop that shows wherever the layer has a hole, and the target has the same one wherever the
layer should not be: holes cost, and so does what sticks out. Axes: h w pixels, n splats.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uajax import losses
from uajax.avatar import Avatar, Known, face_motion, mouth_motion
from uajax.config import Stage
from uajax.lpips import lpips
from uajax.render import render_layer
from uajax.types import FACE, HAIR, MOUTH, Frame, Motion

GREEN = (0.0, 1.0, 0.0)  # the official backdrop
PATCH_PX = {"face": 80, "mouth": 36, "fuse": 36}  # of LPIPS: the means of the official random sizes
ERROR = 0.01  # of a pixel, 0..1, that a latent's deviation of 1 stands for
LIPS_PX = 64  # side to which the lip crop is resampled for LPIPS

Phase = Literal["static", "sample", "ensemble"]


class Parts(NamedTuple):
  """What a step reports beside its loss."""

  l1: Float[Array, ""]
  psnr: Float[Array, ""]
  overflow: Int[Array, ""]
  radii: Int[Array, " n"]


class Setting(NamedTuple):
  """What holds for many steps. All of it is known when a step is compiled, but `perceptual`."""

  stage: Stage
  phase: Phase  # "static": no motion; "sample": one member a modality; "ensemble": all
  perceptual: Any  # LPIPS parameters where this part of the schedule uses them, else None
  capacity: int | None  # of the rasteriser's pair list


class Moment(NamedTuple):
  """What changes from step to step."""

  step: Int[Array, ""]  # within the stage
  members: Int[Array, " 4"]  # read in phase "sample" only
  silent: Bool[Array, " 4"] | None  # modalities that are not heard
  sh_degree: Int[Array, ""]  # bands above it are muted
  backdrop: Float[Array, " 3"]


def objective(setting: Setting, moment: Moment, avatar: Avatar, frame: Frame, probe,
              known: Known | None = None):
  """The loss of one frame, and its Parts.

  Args:
    frame: one Frame, uint8 image and background.
    probe: [n, 2] zeros added to the projected means (px) of the layer in training; its gradient
      drives densification.
    known: what `avatar.know` says, where frames that are apart share it.
  """
  image = frame.image.astype(jnp.float32) / 255
  if setting.phase != "sample":
    moment = moment._replace(members=None)
  judge = {"mouth": _mouth, "face": _face, "fuse": _fuse}[setting.stage.name]
  return judge(setting, moment, avatar, frame, image, probe, known or Known())


def _face(setting: Setting, moment: Moment, avatar: Avatar, frame: Frame, image, probe,
          known: Known):
  stage, phase, perceptual, capacity = setting
  step, members, silent, sh_degree, backdrop = moment
  w = stage.weights
  blank = jnp.broadcast_to(backdrop[None, None, :], image.shape)
  hair = frame.classes == HAIR
  mouth = frame.classes == MOUTH
  head = (frame.classes == FACE) | hair
  if perceptual is not None:
    mouth = losses.close(mouth)
  target = jnp.where(head[..., None], image, blank)

  face = avatar.face
  motion = None if phase == "static" else face_motion(
    avatar, frame.controls, members, known.face, silent=silent)
  out = render_layer(
    face.splats, face.alive, motion, frame.camera, *image.shape[1::-1],
    background=backdrop, active_sh=sh_degree, probe=probe, capacity=capacity,
    features=None if motion is None else motion.attention,
    detached=None if motion is None else True)
  picture, alpha = out.color, out.alpha[..., 0]

  # Most steps leave the hair out: it covers much and moves little.
  bald = jnp.asarray(phase != "static") & (step < stage.hair_until) & (
    step % stage.hair_every != 0)
  hide = (hair & bald)[..., None]
  picture, target = jnp.where(hide, blank, picture), jnp.where(hide, blank, target)
  target = jnp.where(mouth[..., None], blank, target)
  l1 = losses.l1(picture, target)
  loss = (1 - w.ssim) * l1 + w.ssim * (1 - losses.ssim(picture, target))
  if motion is not None:
    loss += w.motion * (
      losses.mean_magnitude(motion.d_mean, face.alive)
      + losses.mean_magnitude(motion.d_quat, face.alive)
      + losses.mean_magnitude(motion.d_scale, face.alive))
    loss += w.alpha * losses.alpha_penalty(alpha, head)
    lips = _inside(frame.lips, head.shape)
    wrong = jnp.abs(picture - target).mean(-1)
    loss += w.lips * losses.mean_inside(wrong, lips)
    loss += w.eyes * losses.mean_inside(wrong, _inside(frame.eyes, head.shape))
    audio, eye = out.features[..., 0], out.features[..., 1]
    # Heads start still, so that a gate's only gradient would be this, and Adam makes the least of
    # gradients count in full: in twenty steps the eyes' gate were shut everywhere (official: at
    # once, before heads that start with motion).
    if phase == "ensemble":
      loss += w.eye_attention_on_lips * losses.mean_inside(eye, lips)
      loss += jnp.where(bald, 0.0, w.attention_on_hair) * (
        losses.mean_inside(eye, hair) + losses.mean_inside(audio, hair))
  if perceptual is not None:
    crops = [_crop(x, frame.lips) for x in (picture, target)]
    loss += w.lpips_lips * lpips(perceptual, *crops)
    here = _inside(frame.lips, head.shape)[..., None]
    a, b = (losses.patches(jnp.where(here, blank, x), PATCH_PX["face"]) for x in (picture, target))
    loss += w.lpips * jnp.mean(lpips(perceptual, a, b))
  return loss, _parts(l1, picture, target, out)


def _mouth(setting: Setting, moment: Moment, avatar: Avatar, frame: Frame, image, probe,
           known: Known):
  stage, phase, perceptual, capacity = setting
  _, members, silent, sh_degree, backdrop = moment
  w = stage.weights
  mouth = frame.classes == MOUTH
  lips = _inside(frame.lips, mouth.shape)
  blank = jnp.broadcast_to(backdrop[None, None, :], image.shape)
  target = jnp.where(mouth[..., None], image, blank)

  layer = avatar.mouth
  motion = None if phase == "static" else mouth_motion(
    avatar, frame.controls, members, known.mouth, silent=silent)
  out = render_layer(
    layer.splats, layer.alive, motion, frame.camera, *image.shape[1::-1],
    background=backdrop, active_sh=sh_degree, probe=probe, capacity=capacity)
  # Behind the lips the mouth may be anything: the face covers it (Q27: lips, not mouth).
  picture = jnp.where((lips & ~mouth)[..., None], blank, out.color)
  l1 = losses.l1(picture, target)
  loss = (1 - w.ssim) * l1 + w.ssim * (1 - losses.ssim(picture, target))
  if motion is not None:
    loss += w.alpha * losses.alpha_penalty(out.alpha[..., 0], lips, outside=~mouth & ~lips)
  if perceptual is not None:
    a, b = (losses.patches(x, PATCH_PX["mouth"]) for x in (picture, target))
    loss += w.lpips * jnp.mean(lpips(perceptual, a, b))
  return loss, _parts(l1, picture, target, out)


def _fuse(setting: Setting, moment: Moment, avatar: Avatar, frame: Frame, image, probe,
          known: Known):
  del probe  # no splat is born in this stage
  stage, _, perceptual, capacity = setting
  _, members, _, sh_degree, _ = moment
  w = stage.weights
  background = frame.background.astype(jnp.float32) / 255
  black = jnp.zeros(3)
  motions = (face_motion(avatar, frame.controls, members, known.face),
             mouth_motion(avatar, frame.controls, members, known.mouth))
  doubt = _variance(avatar, motions[0])
  layers = []
  for layer, motion, features in zip(
      (avatar.face, avatar.mouth), motions, (doubt, None), strict=True):
    # Geometry rests in this stage: of the motion networks only what calibrates the uncertainty
    # needs a gradient, and it gives none to what is drawn.
    layers.append(render_layer(
      layer.splats, layer.alive, jax.lax.stop_gradient(motion), frame.camera,
      *image.shape[1::-1], background=black, active_sh=sh_degree, capacity=capacity,
      features=features, detached=None if features is None else True))
  face, mouth = layers
  behind = mouth.color + background * (1 - mouth.alpha)
  picture = face.color + behind * (1 - face.alpha)
  l1 = losses.l1(picture, image)
  loss = (1 - w.ssim) * l1 + w.ssim * (1 - losses.ssim(picture, image))
  if doubt is not None:
    head = (frame.classes == FACE) | (frame.classes == HAIR) | (frame.classes == MOUTH)
    wrong = jnp.abs(picture - image).mean(-1)
    loss += w.doubt * losses.unlikelihood(wrong, face.features[..., 0], head)
  if perceptual is not None:
    a, b = (losses.patches(x, PATCH_PX["fuse"]) for x in (picture, image))
    loss += w.lpips * jnp.mean(lpips(perceptual, a, b))
  overflow = face.overflow + mouth.overflow
  return loss, _parts(l1, picture, image, face)._replace(overflow=overflow)


def _variance(avatar: Avatar, motion: Motion) -> Float[Array, "n 1"] | None:
  """Of the error that each splat's uncertainty expects; None where it is not calibrated."""
  if not avatar.config.calibrates:
    return None
  return ERROR**2 / avatar.config.latent * (motion.aleatoric + motion.epistemic)[:, None]


def _parts(l1, picture, target, out) -> Parts:
  error = jnp.mean((jnp.clip(picture, 0, 1) - target) ** 2)
  return Parts(l1, -10 * jnp.log10(jnp.maximum(error, 1e-10)), out.overflow, out.radii)


def _inside(rect, shape):
  """bool[h w], True inside rows r0:r1 and columns c0:c1."""
  r0, r1, c0, c1 = rect
  rows, columns = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])[None, :]
  return (rows >= r0) & (rows < r1) & (columns >= c0) & (columns < c1)


def _crop(image, rect):
  """The square of `rect`, resampled to LIPS_PX so that its shape is static."""
  r0, r1, c0, c1 = rect.astype(jnp.float32)
  scale = jnp.stack([LIPS_PX / jnp.maximum(r1 - r0, 1), LIPS_PX / jnp.maximum(c1 - c0, 1)])
  return jax.image.scale_and_translate(
    image, (LIPS_PX, LIPS_PX, image.shape[-1]), (0, 1), scale, -jnp.stack([r0, c0]) * scale,
    method="linear", antialias=False)
