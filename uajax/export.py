"""An avatar for other programs: its parameters (npz, safetensors), its splats (ply), its motion.

npz and safetensors hold every array under its path in the avatar, such as `face/splats/means`
or `mouth/motion/params/...`, and `meta`, a JSON text with what the arrays do not say.
`load_npz` and `load_safetensors` give the avatar back bit for bit. PLY is the layout of 3D
Gaussian splatting viewers (method.md D.8): the head at rest, or as it is in every frame of a
recording. stablehlo is a program with all that it needs inside, from what drives a
frame to its picture: JAX alone runs it.

Axes: n splats, f frames, h w pixels.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from uajax import config, saving
from uajax.avatar import Avatar, Known, Layer, init_motion, know, render
from uajax.errors import UserError
from uajax.progress import Progress
from uajax.types import (
  ACTION_UNITS,
  EMOTION,
  EXPRESSION,
  NEIGHBOURS,
  Camera,
  Controls,
  Motion,
  Splats,
)

VERSION = 1
MAX_BYTES = 8 << 30  # of an archive read back: no avatar comes near it
LAYERS = ("face", "mouth")
PLATFORMS = ("cpu", "cuda", "tpu")  # that a stablehlo program runs on
Which = Literal["both", "face", "mouth"]


def export(
  run_path: str | os.PathLike,
  format: Literal["npz", "ply", "safetensors", "stablehlo"],
  out: str | os.PathLike,
  *,
  layer: Which = "both",
  size: int = 512,
  audio: str | os.PathLike | None = None,
  emotion: str | None = None,
  intensity: float = 1.0,
) -> list[pathlib.Path]:
  """Writes the newest avatar of a run.

  Args:
    run_path: a run folder.
    format: "npz" or "safetensors" (everything), "ply" (splats at rest), "stablehlo" (a program).
    out: the file. A ply of both layers becomes NAME_face.ply and NAME_mouth.ply; of a recording
      it is a folder (`write_plys`).
    layer: of a ply.
    size: side of the pictures that a stablehlo program draws, px.
    audio: speech that the splats of a ply say, frame by frame; None: they rest.
    emotion, intensity: as in `synthesize.synthesize`.

  Returns:
    the files written.

  Raises:
    UserError: no such run, a size out of reach, disk full.
  """
  from uajax import runs

  out = pathlib.Path(out)
  if audio is not None:
    if format != "ply":
      raise UserError("a recording is exported as splats alone: give --format ply")
    names = LAYERS if layer == "both" else (layer,)
    return [write_plys(out, run_path, audio, names, emotion, intensity)]
  avatar = runs.open_run(run_path).avatar()
  if format == "npz":
    return [write_npz(out, avatar)]
  if format == "safetensors":
    return [write_safetensors(out, avatar)]
  if format == "stablehlo":
    return [write_stablehlo(out, avatar, size)]
  if layer != "both":
    return [write_ply(out, getattr(avatar, layer))]
  suffix = out.suffix or ".ply"
  names = [out.with_name(f"{out.stem}_{name}{suffix}") for name in LAYERS]
  return [write_ply(p, getattr(avatar, n)) for p, n in zip(names, LAYERS, strict=True)]


def write_npz(path: str | os.PathLike, avatar: Avatar) -> pathlib.Path:
  """All parameters of the avatar as a compressed NumPy archive."""
  path = pathlib.Path(path)
  # Through a file object: given a name, NumPy would append ".npz" to it.
  with saving.aside(path) as partial, open(partial, "wb") as file:
    arrays: dict[str, Any] = {"meta": np.array(_meta(avatar)), **flatten(avatar)}
    np.savez_compressed(file, **arrays)
  return path


def load_npz(path: str | os.PathLike) -> Avatar:
  """The avatar that `write_npz` wrote.

  Raises:
    UserError: no such file, damaged, of another version, or arrays that do not make an avatar.
  """
  path = _require_file(path)
  try:
    with zipfile.ZipFile(path) as archive:
      if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
        raise UserError(f"{path} unpacks to more than {MAX_BYTES >> 30} GiB: it is no avatar")
    with np.load(path, allow_pickle=False) as archive:
      arrays = {name: archive[name] for name in archive.files}
    meta = str(arrays.pop("meta"))
  except (zipfile.BadZipFile, ValueError, EOFError, KeyError, OSError) as error:
    raise UserError(f"{path} is no avatar archive ({_line(error)}): export it again") from error
  return unflatten(arrays, meta, path)


def write_safetensors(path: str | os.PathLike, avatar: Avatar) -> pathlib.Path:
  """All parameters of the avatar in the safetensors format; `meta` in its header."""
  from safetensors.numpy import save_file

  path = pathlib.Path(path)
  arrays = {name: np.ascontiguousarray(array) for name, array in flatten(avatar).items()}
  with saving.aside(path) as partial:
    save_file(arrays, str(partial), metadata={"meta": _meta(avatar)})
  return path


def load_safetensors(path: str | os.PathLike) -> Avatar:
  """The avatar that `write_safetensors` wrote. Raises UserError as `load_npz` does."""
  from safetensors import SafetensorError, safe_open

  path = _require_file(path)
  try:
    with safe_open(str(path), framework="numpy") as file:
      meta = (file.metadata() or {})["meta"]
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (SafetensorError, KeyError, ValueError, OSError) as error:
    raise UserError(f"{path} is no avatar archive ({_line(error)}): export it again") from error
  return unflatten(arrays, meta, path)


def flatten(avatar: Avatar) -> dict[str, np.ndarray]:
  """Every array of the avatar by its path, names joined by "/"."""
  flat: dict[str, np.ndarray] = {}
  for name in LAYERS:
    layer = getattr(avatar, name)
    tree = {"splats": layer.splats._asdict(), "alive": layer.alive, "motion": layer.motion}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
      flat["/".join([name, *(str(key.key) for key in path)])] = np.asarray(leaf)
  return flat


def unflatten(arrays: Mapping[str, np.ndarray], meta: str, source: os.PathLike) -> Avatar:
  """The avatar of `flatten`ed arrays, each checked against what its configuration asks for.

  Args:
    meta: the JSON text written with them.
    source: where they come from, for messages.

  Raises:
    UserError: another version; arrays lack, are too many, of wrong shape or type, not finite.
  """
  from uajax import runs

  try:
    said = json.loads(meta)
    version, sh_degree = said["version"], said["sh_degree"]
    motion_config = said["config"]
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{source}: its meta is damaged ({_line(error)}): export it again") from None
  if version != VERSION:
    raise UserError(f"{source} has format {version}, this version reads {VERSION}: export it again")
  motion: Any = runs.decode(config.Motion, motion_config, f"{source}: config")
  if sh_degree not in (0, 1, 2):
    raise UserError(f"{source}: SH degree {sh_degree} is not 0, 1 or 2: export it again")
  layers, seen = {}, set()
  motions = jax.eval_shape(lambda key: init_motion(key, motion), jax.random.key(0))
  for name, shapes in zip(LAYERS, motions, strict=True):
    means = arrays.get(f"{name}/splats/means")
    if means is None or means.ndim != 2:
      raise UserError(f"{source} lacks {name}/splats/means [n, 3]: export it again")
    count = len(means)
    wanted = {"splats": _splat_shapes(count), "motion": shapes}
    wanted["alive"] = jax.ShapeDtypeStruct((count,), np.bool_)
    paths, tree = jax.tree_util.tree_flatten_with_path(wanted)
    leaves = []
    for path, spec in paths:
      key = "/".join([name, *(str(part.key) for part in path)])
      seen.add(key)
      leaves.append(jnp.asarray(_checked(arrays, key, spec, source)))
    made = jax.tree_util.tree_unflatten(tree, leaves)
    layers[name] = Layer(Splats(**made["splats"]), made["alive"], made["motion"])
  unknown = sorted(arrays.keys() - seen)
  if unknown:
    raise UserError(f"{source} holds arrays that no avatar has ({unknown[0]}): export it again")
  return Avatar(face=layers["face"], mouth=layers["mouth"], config=motion, sh_degree=sh_degree)


def write_ply(path: str | os.PathLike, layer: Layer, motion: Motion | None = None) -> pathlib.Path:
  """The living splats of a layer, at rest or moved, as splat viewers read them (method.md D.8).

  Binary little endian; SH channel-major; scales as the logarithm of metres; opacities as
  logits; rotations wxyz.

  Raises:
    UserError: no splat is alive, or the disk is full.
  """
  path = pathlib.Path(path)
  alive = np.asarray(layer.alive)
  if not alive.any():
    raise UserError(f"{path} was not written: the layer has no splats yet, train it first")
  splats = {k: np.asarray(v, np.float64)[alive] for k, v in layer.splats._asdict().items()}
  if motion is not None:
    moves = {"means": motion.d_mean, "quats": motion.d_quat, "raw_scales": motion.d_scale}
    splats |= {k: splats[k] + np.asarray(v, np.float64)[alive] for k, v in moves.items()}
  means, count = splats["means"], int(alive.sum())
  columns = {axis: means[:, i] for i, axis in enumerate("xyz")}
  columns |= {name: np.zeros(count) for name in ("nx", "ny", "nz")}
  columns |= {f"f_dc_{i}": splats["sh_dc"][:, 0, i] for i in range(3)}
  rest = splats["sh_rest"].transpose(0, 2, 1).reshape(count, -1)
  columns |= {f"f_rest_{i}": rest[:, i] for i in range(rest.shape[1])}
  columns["opacity"] = splats["logit_opacities"]
  scales = log_softplus(splats["raw_scales"])
  columns |= {f"scale_{i}": scales[:, i] for i in range(3)}
  quats = splats["quats"]
  quats = quats / np.maximum(np.linalg.norm(quats, axis=-1, keepdims=True), 1e-12)
  columns |= {f"rot_{i}": quats[:, i] for i in range(4)}
  table = np.empty(count, [(name, "<f4") for name in columns])
  for name, column in columns.items():
    table[name] = column
  header = [
    "ply",
    "format binary_little_endian 1.0",
    f"comment uajax splats{' at rest' if motion is None else ''}, metres",
    f"element vertex {count}",
    *(f"property float {name}" for name in columns),
    "end_header",
  ]
  with saving.aside(path) as partial:
    partial.write_bytes("\n".join([*header, ""]).encode("ascii") + table.tobytes())
  return path


def write_plys(
  path: str | os.PathLike, run_path: str | os.PathLike, audio: str | os.PathLike,
  names: Sequence[str] = LAYERS, emotion: str | None = None, intensity: float = 1.0,
) -> pathlib.Path:
  """A folder with the splats of every frame in which the run's person says `audio`.

      face_00000.ply, mouth_00000.ply, ...   25 a second, splats in the same order in all of them
      cameras.json   width, height (px), and for each frame viewmat (world to camera) and K (px)

  A frame's picture is the face drawn over the mouth. At most ten minutes are taken.

  Raises:
    UserError: the run, its subject or the recording cannot be used; the folder is not empty; disk
      full.
  """
  from uajax.view.stage import Acting, Stage, read_speech

  path = pathlib.Path(path)
  stage = Stage(run_path)
  talk = stage.hear(read_speech(audio), pathlib.Path(audio).name)
  progress = Progress("splats", talk.frames, compiles=True)
  with saving.aside(path, folder=True) as partial:
    for i in range(talk.frames):
      motion = stage.move(stage.controls(talk, i, Acting(emotion, intensity, ())))
      for name in names:
        write_ply(partial / f"{name}_{i:05}.ply", getattr(stage.avatar, name),
                  getattr(motion, name))
      progress.advance()
    cameras = [stage.cameras[pose] for pose in talk.poses]
    said = [{"viewmat": np.asarray(c.viewmat).tolist(), "K": np.asarray(c.K).tolist()}
            for c in cameras]
    (partial / "cameras.json").write_text(
      json.dumps({"width": stage.width, "height": stage.height, "frames": said}), encoding="utf-8")
  progress.close()
  return path


def write_stablehlo(path: str | os.PathLike, avatar: Avatar, size: int = 512) -> pathlib.Path:
  """A program that draws frames, for CPUs, NVIDIA GPUs and TPUs; `jax.export.deserialize` reads it.

  It is called with, in this order, float32 all but the last: audio [f 8 d w], action_units [f 6],
  f_exp [f 64], f_tone [f 64], emotion [f 128] (types.Controls), viewmats [f 4 4] and Ks [f 3 3]
  (types.Camera), and background uint8 [h w 3]; any number of frames. It returns pictures uint8
  [f h w 3], and for each frame how many pairs of splat and tile found no room, which should be 0.

  Raises:
    UserError: a size out of reach, no living splats, or the disk is full.
  """
  path = pathlib.Path(path)
  if not 16 <= size <= 4096:
    raise UserError(f"--size {size} is out of reach: choose 16 to 4096 pixels")
  avatar, known = _living(avatar, path)
  take = avatar.config

  def drive(audio, action_units, f_exp, f_tone, emotion, viewmats, intrinsics, background):
    behind = background.astype(jnp.float32) / 255

    def one(row):
      controls, camera = Controls(*row[:5]), Camera(*row[5:])
      # Plain XLA: a program with kernels for one device would run on no other.
      image = render(avatar, controls, camera, behind, known=known, doubt=False,
                     implementation="xla")
      return jnp.round(image.composite * 255).astype(jnp.uint8), image.overflow

    return jax.lax.map(
      one, (audio, action_units, f_exp, f_tone, emotion, viewmats, intrinsics))

  audio = (NEIGHBOURS, take.audio_channels, take.audio_width)
  shapes = (audio, (len(ACTION_UNITS),), (EXPRESSION,), (EXPRESSION,), (EMOTION,), (4, 4), (3, 3))
  frames = jax.export.symbolic_shape("f")
  given = [jax.ShapeDtypeStruct((*frames, *shape), jnp.float32) for shape in shapes]
  given.append(jax.ShapeDtypeStruct((size, size, 3), jnp.uint8))
  program = jax.export.export(jax.jit(drive), platforms=PLATFORMS)(*given)
  with saving.aside(path) as partial:
    partial.write_bytes(program.serialize())
  return path


def pace(path: str | os.PathLike, frames: int = 8) -> float:
  """Seconds that a program of `write_stablehlo` takes for a frame here, its compilation left out.

  It draws the head from the front, 0.7 m away, half as high as the picture.
  """
  program = jax.export.deserialize(bytearray(pathlib.Path(path).read_bytes()))
  *controls, _, _, behind = program.in_avals
  size = behind.shape[0]
  viewmat, K = np.eye(4, dtype=np.float32), np.eye(3, dtype=np.float32)
  viewmat[2, 3] = 0.7
  K[0, 0] = K[1, 1] = 1.4 * size
  K[:2, 2] = size / 2
  many = lambda one: np.repeat(one[None], frames, 0)
  given = [*(np.zeros((frames, *aval.shape[1:]), aval.dtype) for aval in controls),
           many(viewmat), many(K), np.zeros(behind.shape, behind.dtype)]
  draw = jax.jit(program.call)
  jax.block_until_ready(draw(*given))
  began_s = time.monotonic()
  jax.block_until_ready(draw(*given))
  return (time.monotonic() - began_s) / frames


def _living(avatar: Avatar, path: pathlib.Path) -> tuple[Avatar, Known]:
  """The avatar without empty slots, and what is known of its splats' places."""
  known = know(avatar)
  layers, places = {}, {}
  for name in LAYERS:
    layer = getattr(avatar, name)
    alive = np.flatnonzero(np.asarray(layer.alive))
    if not alive.size:
      raise UserError(f"{path} was not written: the {name} has no splats yet, train it first")
    keep = functools.partial(jax.tree.map, lambda x, alive=alive: x[alive])
    layers[name] = layer.replace(splats=keep(layer.splats), alive=keep(layer.alive))
    places[name] = keep(getattr(known, name))
  return avatar.replace(**layers), Known(**places)


def log_softplus(raw: np.ndarray) -> np.ndarray:
  """log(log(1 + exp(raw))) in float64, right at both ends (raw far below 0: raw itself)."""
  raw = np.asarray(raw, np.float64)
  with np.errstate(divide="ignore"):
    plain = np.log(np.logaddexp(0, raw))
  return np.where(raw < -30, raw, plain)


def _meta(avatar: Avatar) -> str:
  record = {"version": VERSION, "sh_degree": int(avatar.sh_degree)}
  return json.dumps(record | {"config": dataclasses.asdict(avatar.config)})


def _splat_shapes(count: int) -> dict[str, jax.ShapeDtypeStruct]:
  tails: dict[str, tuple[int, ...]] = {
    "means": (3,),
    "raw_scales": (3,),
    "quats": (4,),
    "logit_opacities": (),
    "sh_dc": (1, 3),
    "sh_rest": (8, 3),
  }
  return {k: jax.ShapeDtypeStruct((count, *tail), np.float32) for k, tail in tails.items()}


def _checked(arrays: Mapping[str, np.ndarray], key: str, spec, source) -> np.ndarray:
  if key not in arrays:
    raise UserError(f"{source} lacks {key}: export it again")
  array = arrays[key]
  if array.shape != spec.shape or array.dtype != spec.dtype:
    raise UserError(
      f"{source}: {key} is {array.dtype} {array.shape}, not {spec.dtype} {spec.shape}: "
      "export it again"
    )
  if array.dtype.kind == "f" and not np.isfinite(array).all():
    raise UserError(f"{source}: {key} holds NaN or infinity: export it again")
  return array


def _require_file(path: str | os.PathLike) -> pathlib.Path:
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"{path} does not exist: `uajax export` makes it")
  return path


def _line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
