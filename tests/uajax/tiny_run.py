"""A tiny avatar and a tiny run of it: sixteen splats a layer, the smallest networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from uajax import config, runs
from uajax.avatar import Avatar, Layer, init_motion
from uajax.emotion import network
from uajax.emotion.control import Prototype
from uajax.priors import extract, fuse, lip, style
from uajax.types import Splats

MOTION = config.Motion(
  planes=config.Planes(features=2, resolution=8, multiples=(1,)),
  emotion_planes=config.Planes(features=2, resolution=8, multiples=(1,)),
  members=2,
  hidden=8,
  latent=4,
  features=8,
  still_heads=False,
)
EXPERIMENT = config.Experiment(model=config.Model(motion=MOTION))


def avatar(seed: int = 0, splats: int = 16, motion: config.Motion = MOTION) -> Avatar:
  """Coloured blobs within 5 cm of the origin; the last two slots of each layer are dead.

  Drawn by NumPy into the shapes that `init_motion` gives, which would take longer to run.
  """
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  shapes = jax.eval_shape(lambda key: init_motion(key, motion), jax.random.key(0))
  layers = []
  for shape in shapes:
    motions = jax.tree_util.tree_map_with_path(
      lambda path, spec: _draw({part.key for part in path}, spec.shape, normal), shape)
    values = Splats(
      means=0.02 * normal(splats, 3),
      raw_scales=-4 + 0.3 * normal(splats, 3),
      quats=normal(splats, 4),
      logit_opacities=normal(splats),
      sh_dc=normal(splats, 1, 3),
      sh_rest=0.1 * normal(splats, 8, 3),
    )
    layers.append(Layer(values, jnp.arange(splats) < splats - 2, motions))
  return Avatar(face=layers[0], mouth=layers[1], config=motion)


def _draw(names: set[str], shape: tuple[int, ...], normal):
  if "familiar" in names:
    return jnp.zeros(shape)  # no sound is strange
  # Scales by which all that drives the avatar reaches its pixels.
  return (3.0 if {"planes", "codebook_0"} & names else 0.33) * normal(*shape)


def make(
  path, subject, *, seed: int = 0, motion: config.Motion = MOTION, audio: config.Audio = "mel"
) -> runs.Run:
  """A run folder with extractors and one checkpoint of a finished training."""
  experiment = dataclasses.replace(EXPERIMENT, model=config.Model(motion=motion, audio=audio))
  run = runs.create(path, subject, experiment)
  extract.save(run.extractors, extractors())
  made, training = avatar(seed, motion=motion), {"step": np.zeros((), np.int32)}
  run.save(made, training, runs.Progress(stage=3, step=0, total=7))
  return run


def extractors() -> extract.Extractors:
  """Untrained extractors of the smallest kind that know two emotions by name."""
  rng = np.random.default_rng(0)
  c = extract.ExtractConfig(
    lip=lip.LipConfig(width=2, residuals=(0, 0, 0, 0)),
    style=style.StyleConfig(hidden=4, layers=1, chunk=16),
    emotion=dataclasses.replace(
      extract.SMALL.emotion, image=(64, 64), convolutions=(2, 2, 2, 2, 2), lstm=2,
      wav=dataclasses.replace(
        extract.SMALL.emotion.wav, conv_channels=4, hidden=8, heads=2, feed_forward=8,
        position_kernel=4, position_groups=2)),
  )  # fmt: skip
  labels = ("neutral", "happy")
  shapes = {
    "lip": jax.eval_shape(lambda: lip.initialise(c.lip, 0)),
    **jax.eval_shape(lambda: fuse.initialise(c.style, 0)),
    "emotion": jax.eval_shape(lambda: network.initialise(c.emotion, len(labels), 0)),
  }
  draw = lambda spec: rng.normal(0, 0.3, spec.shape).astype(np.float32)
  scale = lambda n: extract.Scale(np.zeros(n, np.float32), np.ones(n, np.float32))
  sizes = dict(expression=64, f_exp=64, f_tone=64, emotion=128)
  levels = np.array([0.0, 1.0], np.float32)
  return extract.Extractors(
    config=c,
    params=jax.tree.map(draw, shapes),
    scales={name: scale(size) for name, size in sizes.items()},
    ref=np.zeros(64, np.float32),
    spread=network.Ranges(
      np.full(200, -80, np.float32), np.zeros(200, np.float32), np.zeros(40, np.float32),
      np.ones(40, np.float32)),
    level_db=-20.0,
    labels=labels,
    prototypes={
      "happy": Prototype(levels, np.stack([np.zeros(128), np.full(128, 3.0)]).astype(np.float32)),
      "neutral": Prototype(np.zeros(1, np.float32), np.zeros((1, 128), np.float32)),
    },
    provenance={},
  )


def with_splats(made: Avatar, **changes) -> Avatar:
  """The avatar with other values for fields of its face splats."""
  face = dataclasses.replace(made.face, splats=made.face.splats._replace(**changes))
  return made.replace(face=face)
