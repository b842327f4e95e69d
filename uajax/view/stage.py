"""A run made ready to be looked at: hears recordings, moves the avatar, draws what is asked for.

Axes: n splats, f frames, h w pixels, s samples.
"""

import functools
import math
import os
import pathlib
import re
import tempfile
import threading
import time
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from kernels.splat.project import BLUR, rotation, shade
from uajax import direction, synthesize
from uajax.avatar import Avatar, Deformation, Known, Layer, deform, know, render
from uajax.emotion import control
from uajax.errors import UserError
from uajax.poses import steady, walk
from uajax.types import SAMPLE_RATE_HZ, Camera, Controls, Image, Motion, Speech

MOST_S = 600.0  # of a recording: longer ones are cut there
MOST_BYTES = 200 << 20  # of an uploaded file
MOST_PAIRS = 1 << 22  # of splat and tile: a camera inside the head asks for any number
CENTIMETRE = 0.01  # viser packs covariances as float16, to which those in metres are nearly zero
WIDEST = 6e4  # cm^2: float16 ends there, and no head is five metres wide
WHITE = 255  # behind a head that no film surrounds

Show = Literal["picture", "uncertainty", "attention to the voice", "attention to the eyes"]
Layers = Literal["face and mouth", "face", "mouth"]


class Talk(NamedTuple):
  """A recording, heard."""

  name: str
  sound: Float32[np.ndarray, " s"]
  speech: Speech
  poses: Int[np.ndarray, " f"]  # the training frame whose camera and background each frame has
  units: Float[np.ndarray, "f 6"]

  @property
  def frames(self) -> int:
    return len(self.poses)


class Acting(NamedTuple):
  """What the visitor asks of the face."""

  emotion: str | None  # None: as heard
  intensity: float
  units: tuple[tuple[str, float], ...]  # those set by hand


class Look(NamedTuple):
  """How the visitor looks at it."""

  show: Show
  layers: Layers
  filmed: bool  # the camera and what is behind the head are the film's
  splats: bool  # the browser draws
  eye: "Eye"


class Eye(NamedTuple):
  """The visitor's camera, as the page tells it."""

  wxyz: tuple[float, ...]
  position: tuple[float, ...]
  fov: float  # vertical, radians
  aspect: float  # of the canvas, width over height


class Cloud(NamedTuple):
  """Splats as viser draws them; lengths in centimetres."""

  centers: Float32[np.ndarray, "n 3"]
  covariances: Float32[np.ndarray, "n 3 3"]
  rgbs: Float32[np.ndarray, "n 3"]
  opacities: Float32[np.ndarray, "n 1"]


class Stage:
  """A run made ready, shared by all visitors: hears recordings, moves and draws the avatar."""

  def __init__(self, run_path, *, subject=None, audio_weights=None, size: int | None = None):
    """Raises UserError where the run, its subject or its audio encoder cannot be used."""
    from uajax import runs
    from uajax.priors import extract

    if size is not None and not 16 <= size <= 2048:
      raise UserError(f"--size {size} is out of reach: choose 16 to 2048 pixels")
    run = runs.open_run(run_path)
    self.name = run.path.resolve().name
    self.source = synthesize.open_source(run, "train", subject, priors=False)
    self.avatar: Avatar = run.avatar()
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(self.avatar)):
      raise UserError("the avatar holds NaN or infinity: its training diverged, train it anew")
    self.alive = [np.asarray(layer.alive) for layer in (self.avatar.face, self.avatar.mouth)]
    if not self.alive[0].any():
      raise UserError(f"{run.path}: the face has no splats yet, train it first")
    self.extractors = extract.load(run.extractors)
    self.emotions = control.names(self.extractors)
    self.height = size or self.source.height
    self.width = round(self.height * self.source.width / self.source.height)
    numbers = [self.source.numbers(i) for i in range(len(self.source))]
    grown = np.diag([self.width / self.source.width, self.height / self.source.height, 1])
    self.cameras = [camera._replace(K=(grown @ camera.K).astype(np.float32))
                    for camera, *_ in numbers]
    self._blur = self._blurred()
    self._mien, self._units = synthesize.bearing(
      self.avatar, self.extractors, [controls for _, controls, *_ in numbers])
    self._listen = synthesize.listener(run, audio_weights, None)
    self._known: Known = know(self.avatar)
    self._capacity: int | None = None
    self._sizes: set[tuple[int, ...]] = set()
    self._full: dict[str, float] = {}  # what the maps' brightest colour stands for
    self._drawing, self._hearing = threading.Lock(), threading.Lock()
    self._rate: float | None = None  # seconds of hearing a second of speech

  def hear(self, sound: Float32[np.ndarray, " s"], name: str) -> Talk:
    """Raises UserError as `synthesize` does."""
    from uajax.priors import extract
    from uajax.speech import features

    with self._hearing:
      began_s = time.monotonic()
      frames = features.frame_count(len(sound))
      speech = extract.hear(self.extractors, sound, frames, listen=self._listen)
      self._rate = (time.monotonic() - began_s) * SAMPLE_RATE_HZ / len(sound)
    poses = walk(frames, self.source.ids)
    units = synthesize.eyes(
      self._units, self.source.ids, steady(poses), True, np.random.default_rng(0))
    speech = Speech(*(cast(Array, np.asarray(rows)) for rows in speech))
    return Talk(name, sound, speech, poses, units)

  def expected_s(self, sound: Float32[np.ndarray, " s"]) -> float | None:
    """How long hearing it will take, by the recording before."""
    return None if self._rate is None else self._rate * len(sound) / SAMPLE_RATE_HZ

  def controls(self, talk: Talk, frame: int, acting: Acting) -> Controls:
    """Raises UserError: no such emotion, intensity or action unit, or out of range."""
    from uajax.speech import features

    emotion = np.asarray(talk.speech.emotion[frame])
    if acting.emotion is not None:
      emotion = control.resolve(self.extractors, acting.emotion, acting.intensity)
    held = direction.whole_film(
      direction.units_of(f"{name}={value}" for name, value in acting.units))
    units = direction.act([held], self._mien.put_on(talk.units[frame][None], emotion))[0]
    heard: Any = (features.neighbouring(np.asarray(talk.speech.audio), frame), units,
                  talk.speech.f_exp[frame], talk.speech.f_tone[frame], emotion)
    return Controls(*heard)

  def move(self, controls: Controls) -> Deformation:
    with self._drawing:
      return jax.block_until_ready(deform(self.avatar, controls, known=self._known))

  def picture(self, motion: Deformation, look: Look, pose: int) -> UInt8[np.ndarray, "h w 3"]:
    """What `look` shows. As filmed it is as large as the film, else as wide as the canvas."""
    if look.filmed:
      camera, behind = self.cameras[pose], self.behind(pose)
    else:
      camera, width = free_camera(look.eye, self.height)
      behind = np.full((self.height, width, 3), WHITE, np.uint8)
    image = self._draw(motion, camera, behind)
    self._sizes.add(behind.shape)
    if look.show == "picture":
      return _pixels(layered(image, look.layers, behind))
    if look.show == "uncertainty":
      values = np.asarray(image.uncertainty)
    else:
      values = np.asarray(image.attention)[..., _which(look.show)]
    return synthesize.colour(values, self._brightest(look.show, values))

  def is_new(self, look: Look) -> bool:
    """Whether nothing was drawn so yet: compiling comes first then, some seconds."""
    width = self.width if look.filmed else free_camera(look.eye, self.height)[1]
    return not look.splats and (self.height, width, 3) not in self._sizes

  def cloud(self, motion: Deformation, look: Look) -> Cloud:
    """The living splats of the layers asked for, in the colours that the visitor's eye sees."""
    camera, _ = free_camera(look.eye, self.height)
    with self._drawing:
      layers = [_cloud(layer, moved, camera.viewmat, self._blur) for layer, moved in
                zip((self.avatar.face, self.avatar.mouth), motion, strict=True)]
    maps = look.show != "picture"
    found = []
    for name, cloud, alive, moved in zip(("face", "mouth"), layers, self.alive, motion,
                                         strict=True):
      if name in look.layers and not (maps and name == "mouth"):
        cloud = Cloud(*(np.asarray(column)[alive] for column in cloud))
        if maps:
          cloud = cloud._replace(rgbs=self._painted(look.show, moved, alive))
        found.append(cloud)
    if not found:
      return Cloud(*(column[:0] for column in map(np.asarray, layers[0])))
    return Cloud(*(np.concatenate(columns) for columns in zip(*found, strict=True)))

  def behind(self, pose: int) -> UInt8[np.ndarray, "h w 3"]:
    """The film without the head, in the size that is drawn."""
    picture = np.asarray(self.source.pictures(pose).background)
    if picture.shape[:2] == (self.height, self.width):
      return picture
    from PIL import Image as Pictures

    return np.asarray(Pictures.fromarray(picture).resize((self.width, self.height)))

  def _blurred(self) -> float:
    """The variance, in m^2, by which the rasteriser blurred splats in training.

    A canvas has finer pixels than the film, and what was fitted with the film's would fall to
    shards on it (Mip-Splatting's 3D filter, arXiv 2311.16493, is for the same).
    """
    middle = np.asarray(self.avatar.face.splats.means)[self.alive[0]].mean(0)
    pixels = [float((c.viewmat[2, :3] @ middle + c.viewmat[2, 3]) / c.K[1, 1])
              for c in self.cameras]
    return BLUR * (float(np.median(pixels)) * self.height / self.source.height) ** 2

  def _draw(self, motion: Deformation, camera: Camera, behind: np.ndarray) -> Image:
    with self._drawing:
      while True:
        image = _render(self.avatar, motion, camera, behind, self._capacity)
        slots = sum(map(len, self.alive))
        grown = 64 * slots if self._capacity is None else 4 * self._capacity
        if not int(image.overflow) or (self._capacity or 0) >= MOST_PAIRS:
          return image
        self._capacity = min(grown, MOST_PAIRS)

  def _painted(self, show: Show, motion: Motion, alive: np.ndarray
               ) -> Float32[np.ndarray, "n 3"]:
    if show == "uncertainty":
      values = np.asarray(motion.aleatoric + motion.epistemic)[alive]
    else:
      values = np.asarray(motion.attention)[alive, _which(show)]
    painted = synthesize.colour(values[None], self._brightest(show, values))[0]
    return painted.astype(np.float32) / 255

  def _brightest(self, show: Show, values: np.ndarray) -> float:
    """One scale for all visitors and frames, so that colours can be compared: the first's."""
    return self._full.setdefault(show, 1.25 * float(np.percentile(values, 99.5)) or 1.0)


def free_camera(eye: Eye, height: int) -> tuple[Camera, int]:
  """The camera of the visitor's eye, and how wide its picture is: in a few steps of width only,
  since each compiles anew; the canvas shows the middle.

  Raises:
    UserError: no camera at all.
  """
  turn, place = np.asarray(eye.wxyz, np.float64), np.asarray(eye.position, np.float64)
  length = float(np.linalg.norm(turn))
  if not (np.isfinite(place).all() and 1e-6 < length < 1e6 and 0 < eye.fov < math.pi
          and 0 < eye.aspect < math.inf):
    raise UserError("the page tells of no camera: load it again")
  w, x, y, z = turn / length
  away = np.array([  # camera to world, OpenCV axes on both sides
    [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
    [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
    [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])
  viewmat = np.eye(4)
  viewmat[:3, :3], viewmat[:3, 3] = away.T, -away.T @ place
  width = math.ceil(4 * min(max(eye.aspect, 0.5), 2.5)) * height // 4
  focal_px = height / 2 / math.tan(min(max(eye.fov, 0.05), 2.5) / 2)
  K = np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]])
  made: Any = (viewmat.astype(np.float32), K.astype(np.float32))
  return Camera(*made), width


def layered(image: Image, layers: Layers, behind: UInt8[np.ndarray, "h w 3"]
            ) -> Float[np.ndarray, "h w 3"]:
  """One layer alone, or both, over the background."""
  if layers == "face and mouth":
    return np.asarray(image.composite)
  color, alpha = ((image.face, image.face_alpha) if layers == "face" else
                  (image.mouth, image.mouth_alpha))
  return np.asarray(color) + behind.astype(np.float32) / 255 * (1 - np.asarray(alpha))


@functools.partial(jax.jit, static_argnames="capacity")
def _render(avatar: Avatar, motion: Deformation, camera: Camera, behind, capacity: int | None):
  return render(avatar, None, camera, jnp.asarray(behind, jnp.float32) / 255, motion=motion,
                capacity=capacity)


@jax.jit
def _cloud(layer: Layer, motion: Motion, viewmat: Float[Array, "4 4"], blur: float) -> Cloud:
  splats = layer.splats
  means = splats.means + motion.d_mean
  scales = jax.nn.softplus(splats.raw_scales + motion.d_scale) / CENTIMETRE
  axes = rotation(splats.quats + motion.d_quat) * scales[:, None, :]
  colors = shade(means, jnp.concatenate([splats.sh_dc, splats.sh_rest], 1), viewmat, 2)
  covariances = jnp.einsum("nij,nkj->nik", axes, axes) + blur / CENTIMETRE**2 * jnp.eye(3)[None]
  wide = jnp.trace(covariances, axis1=1, axis2=2)
  covariances *= jnp.minimum(1, WIDEST / wide)[:, None, None]
  made: Any = (means / CENTIMETRE, covariances, jnp.clip(colors, 0, 1),
               jax.nn.sigmoid(splats.logit_opacities)[:, None])
  return Cloud(*made)


def _which(show: Show) -> int:
  return get_args(Show).index(show) - 2


def _pixels(picture: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
  return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def read_upload(name: str, content: bytes) -> tuple[str, Float32[np.ndarray, " s"]]:
  """What a visitor uploads, as a name fit to show and speech; checked as any file is.

  Raises:
    UserError: too large, no sound file, silent.
  """
  shown = re.sub(r"[^\w .-]", "_", pathlib.PureWindowsPath(name).name)[-60:].strip(" .") or "upload"
  if len(content) > MOST_BYTES:
    raise UserError(f"{shown} is larger than {MOST_BYTES >> 20} MiB: give less of it")
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / shown
    path.write_bytes(content)
    try:
      return shown, read_speech(path)
    except UserError as error:
      raise UserError(str(error).replace(f"{folder}{os.sep}", "")) from None


def read_speech(path: str | os.PathLike) -> Float32[np.ndarray, " s"]:
  """The speech of a file, at most `MOST_S` of it. Raises UserError as `synthesize` does."""
  from uajax import media

  sound = media.read_audio(path, limit_s=MOST_S)
  media.check_speech(sound, path)
  return sound
