"""One training step, and many of them in one compiled loop.

Everything here is pure. A step's randomness (frames, ensemble members) is folded from the run's
key and the step's number, so that a resumed run repeats the lost steps bit for bit.
Axes: f frames, s steps of a chunk, b batch, n splat slots.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from uajax.avatar import Avatar, Known, know
from uajax.config import Experiment, Stage
from uajax.errors import UserError
from uajax.models.motion import FACE_MODALITIES, MOUTH_MODALITIES
from uajax.train import densify, noise, optimizer, sampling
from uajax.train.objective import GREEN, Moment, Phase, Setting, objective
from uajax.types import Camera, Controls, Frame, Guide, Pictures

FRAMES = "frames"  # the axis of the mesh
_no_moments = jax.jit(optimizer.init)  # one program, not one for every shape
REPORT = ("loss", "l1", "psnr", "grad_norm", "overflow", "skipped")  # of a step


class State(flax.struct.PyTreeNode):
  """All that training carries from step to step."""

  avatar: Avatar
  opt: dict
  stats: densify.Stats
  step: Int[Array, ""]  # within the stage
  skipped: Int[Array, ""]  # steps whose gradient was not finite, in a row


def enter(stage: Stage, avatar: Avatar) -> State:
  """The state in which a stage begins."""
  layer = avatar.mouth if stage.name == "mouth" else avatar.face
  zero = lambda: jnp.zeros((), jnp.int32)  # not weakly typed: resumed, the same programs serve
  return State(
    avatar=avatar, opt=_no_moments(optimizer.trainable(avatar, stage)),
    stats=densify.no_stats(layer.alive.shape[0]), step=zero(), skipped=zero())


class Material(flax.struct.PyTreeNode):
  """All of a clip but its pictures, on the device. Leading axis f."""

  camera: Camera
  controls: Controls
  lips: Int[Array, "f 4"]
  eyes: Int[Array, "f 4"]
  guide: Guide
  mouth_share: Float[Array, " f"]  # of the picture


class Chunk(flax.struct.PyTreeNode):
  """What some steps look at."""

  first: Int[Array, ""]  # step, within the stage
  frames: Int[Array, "s b"]  # of the clip
  pictures: Pictures  # leading axes s b


@functools.partial(jax.jit, static_argnames=("experiment", "stage", "steps"))
def draw(experiment: Experiment, stage: Stage, steps: int, guide: Guide, mouth_share, first, key
         ) -> Int[Array, "s b"]:
  """The frames that `steps` steps from `first` on look at; `key` is the stage's.

  Each step alone decides its frames, so that it does not matter how steps are cut into chunks.
  """
  batch = experiment.batch
  # A schedule in steps, told in frames.
  stage = dataclasses.replace(
    stage, warm_steps=stage.warm_steps * batch, guide_until=stage.guide_until * batch)
  one = lambda number: sampling.choose(stage, guide, mouth_share, number, key)
  return jax.lax.map(one, first * batch + jnp.arange(steps * batch)).reshape(steps, batch)


def spread(tree, mesh: Mesh | None):
  """The same arrays on every device of a mesh."""
  if mesh is None:
    return jax.tree.map(jnp.asarray, tree)
  everywhere = NamedSharding(mesh, PartitionSpec())
  if everywhere.is_fully_addressable:
    return jax.device_put(tree, everywhere)
  put = lambda leaf: jax.make_array_from_process_local_data(
    everywhere, np.asarray(leaf), np.shape(leaf))
  return jax.tree.map(put, tree)


def no_sums() -> dict:
  """What `run_steps` adds to, of no step yet."""
  return {name: jnp.zeros(()) for name in REPORT}


def phase_of(stage: Stage, step: int) -> Phase:
  if step < stage.warm_steps:
    return "static"
  return "sample" if step < stage.ensemble_from else "ensemble"


def is_perceptual(stage: Stage, step: int) -> bool:
  return step >= stage.lpips_from


def turning_points(stage: Stage) -> tuple[int, ...]:
  """Steps at which another program takes over."""
  points = {stage.warm_steps, stage.ensemble_from, stage.lpips_from, stage.steps}
  return tuple(sorted(p for p in points if 0 < p <= stage.steps))


def sh_degree(stage: Stage, step):
  return jnp.where(stage.name == "fuse", 2, jnp.minimum((step + 1) // stage.sh_every, 2))


def mesh_of(experiment: Experiment) -> Mesh | None:
  """As many devices of every process as share a batch evenly; None if that is but one.

  A device takes `batch` / devices frames of every step. A batch of B is one step for B frames:
  for the same schedule take 1 / B of the steps, and sqrt(B) times the rates (Adam's rule).

  Raises:
    UserError: there are processes that would get no frame, or not as many as others.
  """
  hosts = [jax.local_devices(process_index=i) for i in range(jax.process_count())]
  if experiment.batch % len(hosts):
    raise UserError(f"{len(hosts)} processes cannot share a batch of {experiment.batch} evenly: "
                    f"give --batch {len(hosts)}, or a multiple of it")
  share = experiment.batch // len(hosts)
  count = max(n for n in range(1, min(map(len, hosts)) + 1) if share % n == 0)
  devices = [device for host in hosts for device in host[:count]]
  return None if len(devices) == 1 else Mesh(np.asarray(devices), (FRAMES,))


def train_step(experiment: Experiment, stage: Stage, phase: Phase, capacity: int | None,
               state: State, material: Material, chunk: Chunk, perceptual, key,
               mesh: Mesh | None = None) -> tuple[State, dict]:
  """One step on `experiment.batch` frames.

  Args:
    chunk: says which frames; state.step must be one of its steps.
    capacity: of the rasteriser's pair list; None leaves it to the rasteriser.
    perceptual: LPIPS parameters where they are to be used, else None.
    key: of the stage.
    mesh: of the devices that share the frames, see `mesh_of`; everything else they all hold.

  Returns:
    the next state, and a scalar for each of REPORT.
  """
  step = state.step
  layer = "mouth" if stage.name == "mouth" else "face"
  slots = getattr(state.avatar, layer).alive.shape[0]
  index, pictures = jax.tree.map(
    lambda leaf: leaf[step - chunk.first], (chunk.frames, chunk.pictures))
  members = jax.random.randint(
    jax.random.fold_in(jax.random.fold_in(key, 2), step), (4,), 0, experiment.model.motion.members)
  silent = _silent(experiment, stage, step, key) if phase == "sample" else None
  moment = Moment(
    step, members, silent, sh_degree(stage, step), _backdrop(experiment, step, key))

  def gradients(index, pictures, probes, params, material, perceptual, moment, avatar):
    setting = Setting(stage, phase, perceptual, capacity)
    rest = jax.tree.map(
      lambda leaf: leaf[index],
      (material.camera, material.controls, material.lips, material.eyes))
    if stage.noise and experiment.model.audio == "mel":
      rest = rest[0], _through_noise(stage, rest[1], index, step, key), *rest[2:]
    if stage.vague:
      rest = rest[0], _vaguely(stage, rest[1], index, step, key), *rest[2:]
    frames = Frame(*pictures, *rest)

    def loss_of(params, probes, places=None):
      joined = optimizer.join(avatar, params)
      known = Known(**{layer: places})
      one = lambda frame, probe: objective(setting, moment, joined, frame, probe, known)
      if len(index) == 1:
        losses, parts = jax.tree.map(
          lambda leaf: leaf[None], one(jax.tree.map(lambda leaf: leaf[0], frames), probes[0]))
      else:
        losses, parts = jax.vmap(one)(frames, probes)
      return jnp.mean(losses), parts

    d_places = look_up = None
    if mesh is None or phase == "static" or stage.name == "fuse":
      (loss, parts), (grads, d_probes) = jax.value_and_grad(
        loss_of, argnums=(0, 1), has_aux=True)(params, probes)
    else:
      places, look_up = jax.vjp(
        lambda params: getattr(know(optimizer.join(avatar, params)), layer), params)
      (loss, parts), (grads, d_probes, d_places) = jax.value_and_grad(
        loss_of, argnums=(0, 1, 2), has_aux=True)(params, probes, places)
    # Of one frame alone: thresholds are for that, not for a share of a mean.
    height, width = pictures.image.shape[1:3]
    ndc = d_probes * (len(index) * jnp.asarray([0.5 * width, 0.5 * height]))[None, None, :]
    seen = parts.radii > 0
    stats = densify.Stats(
      jnp.where(seen, jnp.linalg.norm(ndc, axis=-1), 0.0).sum(0),
      seen.astype(jnp.float32).sum(0))
    report = {"loss": loss, "l1": parts.l1.mean(), "psnr": parts.psnr.mean()}
    overflow = parts.overflow.max()
    if mesh is not None:
      overflow = jax.lax.pmax(overflow, FRAMES)
      # All frames look up the same places: where that is known apart, the mean may be taken before
      # it is scattered into the tri-planes, which hold several times as much.
      own = grads if look_up is None else _but_planes(grads)
      devices = mesh.size
      report, own, d_places = jax.tree.map(lambda leaf: leaf / devices, (report, own, d_places))
      d_places, (report, own, stats) = _sums_in_turn(d_places, (report, own, stats))
      if look_up is None:
        grads = own
      else:
        by_places, = look_up(d_places)
        grads = jax.tree.map(lambda one, other: one if other is None else one + other,
                             by_places, own, is_leaf=lambda leaf: leaf is None)
    return report | {"overflow": overflow.astype(jnp.float32)}, grads, stats

  if mesh is not None:
    one, all_ = PartitionSpec(FRAMES), PartitionSpec()
    gradients = jax.shard_map(
      gradients, mesh=mesh, in_specs=(one, one, one, *(all_,) * 5),
      out_specs=(all_, all_, all_), check_vma=False)
  params = optimizer.trainable(state.avatar, stage)
  probes = jnp.zeros((experiment.batch, slots, 2))
  report, grads, found = gradients(index, pictures, probes, params, material, perceptual, moment,
                                   state.avatar)

  norm = _norm(grads)
  sound = jnp.isfinite(report["loss"]) & jnp.isfinite(norm)
  new_params, opt = optimizer.update(
    stage, experiment.scene_m, params, grads, state.opt, step,
    _heard(experiment.model.motion.members, members if phase == "sample" else None, silent))
  keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(sound, new, old))
  avatar = optimizer.join(state.avatar, keep(new_params, params))
  skipped = jnp.where(sound, 0, state.skipped + 1)

  stats = jax.tree.map(lambda old, new: old + jnp.where(sound, new, 0), state.stats, found)
  state = State(avatar, keep(opt, state.opt), stats, step + 1, skipped)
  return state, report | {"grad_norm": norm, "skipped": (~sound).astype(jnp.float32)}


def _but_planes(grads):
  """None in place of the tri-planes' gradients: only what is known of places depends on those."""
  is_plane = lambda path: any(getattr(key, "key", None) == "planes" for key in path)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: None if is_plane(path) else leaf, grads)


def _sums_in_turn(large, small):
  """Sums over the devices: of each array in `large` in turn, then of all in `small` at once.

  What travels at once the compiler packs into one array and unpacks again: for large arrays that
  takes as long as the way itself, so they go one after the other. Small ones are packed here,
  where the unpacking can melt into what is done with them.
  """
  leaves, tree = jax.tree.flatten(large)
  packed, unpack = ravel_pytree(small)
  sums = []
  for leaf in (*leaves, packed):
    if sums and leaf.size:  # none sets out before the one before it has come home
      leaf, sums[-1] = jax.lax.optimization_barrier((leaf, sums[-1]))
    sums.append(jax.lax.psum(leaf, FRAMES) if leaf.size else leaf)
  return jax.tree.unflatten(tree, sums[:-1]), unpack(sums[-1])


@functools.partial(jax.jit, static_argnames=("experiment", "stage", "phase", "capacity", "mesh"),
                   donate_argnames="state")
def run_steps(state: State, sums: dict, count, material: Material, chunk: Chunk, perceptual, key, *,
              experiment: Experiment, stage: Stage, phase: Phase, capacity: int | None = None,
              mesh: Mesh | None = None) -> tuple[State, dict]:
  """`count` steps of one phase in one compiled loop; adds what they report to `sums`.

  `count` is an array: a run of any length is the same program, so that where a run was cut and
  resumed does not show in its bits.
  """

  def body(_, carry):
    state, sums = carry
    state, report = train_step(
      experiment, stage, phase, capacity, state, material, chunk, perceptual, key, mesh)
    return state, {name: sums[name] + report[name] for name in REPORT}

  return jax.lax.fori_loop(0, count, body, (state, sums))


@functools.partial(jax.jit, static_argnames=("experiment", "stage"))
def grow_and_prune(state: State, material: Material, key, *, experiment: Experiment, stage: Stage
                   ) -> tuple[State, densify.Change]:
  """One round of densification and the backdrop rule of the stage."""
  name = stage.name
  layer = getattr(state.avatar, name)
  step = state.step
  key = jax.random.fold_in(jax.random.fold_in(key, 3), step)
  growing = step < stage.densify.until
  splats, alive, born, change = densify.densify(
    stage.densify, layer.splats, layer.alive, state.stats, scene_m=experiment.scene_m, step=step,
    size_limit=step > stage.warm_steps, key=key)
  splats, alive, born = jax.tree.map(
    lambda new, old: jnp.where(growing, new, old),
    (splats, alive, born), (layer.splats, layer.alive, jnp.zeros_like(born)))

  if experiment.backdrop == "green":
    alive, splats, born = _keep_off_green(stage, splats, alive, born, state, material, key)
  opt = state.opt | {"splats": densify.clear_moments(state.opt["splats"], born)}
  avatar = state.avatar.replace(**{name: layer.replace(splats=splats, alive=alive)})
  stats = densify.no_stats(alive.shape[0])
  return state.replace(avatar=avatar, opt=opt, stats=stats), change


def _keep_off_green(stage: Stage, splats, alive, born, state: State, material: Material, key):
  """The official rule for splats that took the green backdrop's colour (method.md D.3, D.4)."""
  frame = jax.random.randint(jax.random.fold_in(key, 1), (), 0, material.mouth_share.shape[0])
  camera = jax.tree.map(lambda leaf: leaf[frame], material.camera)
  degree = sh_degree(stage, state.step)
  mask = (jnp.asarray([0, 1, 1, 1, 2, 2, 2, 2, 2]) <= degree).astype(jnp.float32)
  green = densify.is_backdrop(splats, camera, mask) & alive
  if stage.name == "face":
    return alive & ~green, splats, born
  green = green & (state.step < stage.densify.until)
  return alive, densify.demote(splats, green), born | green


def _silent(experiment: Experiment, stage: Stage, step, key) -> Bool[Array, " 4"] | None:
  """Which of FACE_MODALITIES say nothing at a step: never all that the stage's layer has."""
  if not stage.silence:
    return None
  known = MOUTH_MODALITIES if stage.name == "mouth" else FACE_MODALITIES
  there = jnp.asarray(
    [name in known and name in experiment.model.motion.modalities for name in FACE_MODALITIES])
  draw = jax.random.fold_in(jax.random.fold_in(key, 5), step)
  silent = jax.random.uniform(draw, (len(FACE_MODALITIES),)) < stage.silence
  return silent & (there & ~silent).any()


def _through_noise(stage: Stage, controls: Controls, index: Int[Array, " b"], step, key
                   ) -> Controls:
  """The same frames, heard each through a noise of its own or none."""
  one = lambda windows, key: noise.add(windows, stage.noise, key)
  return controls._replace(audio=jax.vmap(one)(controls.audio, _keys(key, 6, step, index)))


def _vaguely(stage: Stage, controls: Controls, index: Int[Array, " b"], step, key) -> Controls:
  """The same frames, each with priors and an emotion that are not quite its own."""
  keys = _keys(key, 7, step, index)

  def blur(features, number):
    noise = lambda key: jax.random.normal(jax.random.fold_in(key, number), features.shape[1:])
    return features + stage.vague * jax.vmap(noise)(keys)

  return controls._replace(f_exp=blur(controls.f_exp, 0), f_tone=blur(controls.f_tone, 1),
                           emotion=blur(controls.emotion, 2))


def _keys(key, purpose: int, step, index: Int[Array, " b"]):
  """A key for each frame of a step."""
  draw = jax.random.fold_in(jax.random.fold_in(key, purpose), step)
  return jax.vmap(lambda frame: jax.random.fold_in(draw, frame))(index)


def _heard(count: int, members: Int[Array, " 4"] | None, silent: Bool[Array, " 4"] | None
           ) -> Bool[Array, "4 k"] | None:
  """Which ensemble members a step asked and heard; None where that is all of them."""
  if members is None and silent is None:
    return None
  asked = jnp.ones((len(FACE_MODALITIES), count), bool)
  if members is not None:
    asked = jnp.arange(count)[None] == members[:, None]
  return asked if silent is None else asked & ~silent[:, None]


def _backdrop(experiment: Experiment, step, key):
  if experiment.backdrop == "green":
    return jnp.asarray(GREEN)
  return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 4), step), (3,))


def _norm(tree):
  return jnp.sqrt(sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(tree)))
