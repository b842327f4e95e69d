"""How long a training step and a drawn frame take here: `python -m uajax.train.bench --help`.

A head-sized shell of splats stands for an avatar: what is timed is the real training step of each
phase (motion networks, rasteriser, losses, optimiser) and the real drawing of a frame, face and
mouth composited on the device. Prints milliseconds, the device memory that a step takes, and
frames a second; `--trace` writes a profile that TensorBoard opens.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kernels.splat.cases import Case, scene
from uajax import avatar as avatars
from uajax import config, types
from uajax.train import densify, optimizer, outlook, step
from uajax.train.ahead import compiled

FRAMES = 8  # different frames that steps look at
RUNS = 5
PHASES = ("static", "sample", "ensemble", "fuse")  # stage 1 is "sample", stage 2 "ensemble"


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--splats", type=int, default=30_000, help="of the face")
  parser.add_argument("--mouth-splats", type=int, default=10_000)
  parser.add_argument("--side", type=int, default=512, help="of the picture, px")
  parser.add_argument("--batch", type=int, default=1,
                      help="frames a step, shared among the devices that divide them")
  parser.add_argument("--preset", choices=config.PRESETS, default="paper")
  parser.add_argument("--phases", nargs="*", choices=PHASES, default=PHASES)
  parser.add_argument("--steps", type=int, default=50, help="of a run; the median of five counts")
  parser.add_argument("--trace", help="folder for a profile of one more run of each phase")
  args = parser.parse_args()
  experiment = dataclasses.replace(config.preset(args.preset), batch=args.batch)
  avatar = dummy(experiment, args.splats, args.mouth_splats)
  material, chunk = clip(experiment, args.side, args.steps)
  mesh = step.mesh_of(experiment)
  print(f"{1 if mesh is None else mesh.size} x {jax.devices()[0].device_kind}, jax "
        f"{jax.__version__}; {args.splats} splats of the face, {args.mouth_splats} of the mouth, "
        f"{args.side} px, networks of preset {args.preset}", flush=True)
  for phase in args.phases:
    ms, compile_s, peak_mb = time_steps(experiment, avatar, phase, material, chunk, args.steps,
                                        args.trace)
    print(f"{phase:9} step {ms:8.2f} ms   {1e3 * args.batch / ms:6.0f} frames a second   "
          f"{peak_mb:6.0f} MB a device   compiled in {compile_s:.0f} s", flush=True)
  for doubt in (False, True):
    ms = time_frames(avatar, material, args.side, args.steps, doubt)
    print(f"frame {'with' if doubt else 'without'} uncertainty {ms:8.2f} ms   "
          f"{1e3 / ms:6.0f} frames a second", flush=True)


def dummy(experiment: config.Experiment, splats: int, mouth_splats: int) -> avatars.Avatar:
  """An avatar that has learnt nothing, with slots as training would have them: a power of two."""
  motions = avatars.init_motion(jax.random.key(0), experiment.model.motion)
  layers = [_layer(count, shrink, motion) for count, shrink, motion in zip(
    (splats, mouth_splats), (1.0, 0.3), motions, strict=True)]
  return avatars.Avatar(*layers, config=experiment.model.motion)


def _layer(count: int, shrink: float, motion: dict) -> avatars.Layer:
  shell = scene(Case(count, 512, 512))
  slots = 1 << (count - 1).bit_length()
  fill = lambda x: jnp.pad(x.astype(np.float32), ((0, slots - count), *((0, 0),) * (x.ndim - 1)))
  splats = types.Splats(
    means=fill(shrink * shell["means"]), raw_scales=fill(np.log(np.expm1(shell["scales"]))),
    quats=fill(shell["quats"]),
    logit_opacities=fill(np.log(shell["opacities"] / (1 - shell["opacities"]))),
    sh_dc=fill(shell["colors"][:, :1]), sh_rest=fill(shell["colors"][:, 1:]))
  return avatars.Layer(splats, jnp.arange(slots) < count, motion)


def clip(experiment: config.Experiment, side: int, steps: int) -> tuple[step.Material, step.Chunk]:
  """Frames of noise, classes of a face."""
  rng = np.random.default_rng(0)
  take = experiment.model.motion
  normal = lambda *shape: jnp.asarray(rng.normal(size=(FRAMES, *shape)), jnp.float32)
  shell = scene(Case(1, side, side))
  many = lambda x: jnp.broadcast_to(jnp.asarray(x), (FRAMES, *np.shape(x)))
  lips, eyes = np.array([[0.55, 0.67, 0.44, 0.56], [0.35, 0.47, 0.34, 0.66]]) * side
  classes = np.zeros((side, side), np.uint8)
  rows, columns = np.indices((side, side)) / side
  head = (rows - 0.5)**2 / 0.36**2 + (columns - 0.5)**2 / 0.26**2 < 1
  classes[head] = types.FACE
  classes[head & (rows < 0.25)] = types.HAIR
  r0, r1, c0, c1 = lips.astype(np.int32)
  classes[(r0 + r1) // 2 - side // 32:(r0 + r1) // 2 + side // 32, c0:c1] = types.MOUTH
  material = step.Material(
    camera=types.Camera(many(shell["viewmats"][0]), many(shell["Ks"][0])),
    controls=types.Controls(
      normal(types.NEIGHBOURS, take.audio_channels, take.audio_width),
      jnp.abs(normal(len(types.ACTION_UNITS))), normal(types.EXPRESSION),
      normal(types.EXPRESSION), normal(types.EMOTION)),
    lips=many(lips.astype(np.int32)), eyes=many(eyes.astype(np.int32)),
    guide=types.Guide(*(jnp.abs(normal()) for _ in types.Guide._fields)),
    mouth_share=jnp.full(FRAMES, np.mean(classes == types.MOUTH), jnp.float32))
  batch = experiment.batch
  picture = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
  chunked = lambda x: jnp.broadcast_to(jnp.asarray(x), (steps, batch, *x.shape))
  frames = jnp.arange(steps * batch, dtype=jnp.int32).reshape(steps, batch) % FRAMES
  return material, step.Chunk(jnp.zeros((), jnp.int32), frames, types.Pictures(
    chunked(picture), chunked(picture), chunked(classes)))


def time_steps(experiment: config.Experiment, avatar: avatars.Avatar, phase: str, material,
               chunk, steps: int, trace: str | None) -> tuple[float, float, float]:
  """Milliseconds a step, seconds to compile, and MB that a step takes beside the frames."""
  stage = experiment.fuse if phase == "fuse" else experiment.face
  first = {"static": 0, "sample": stage.warm_steps, "ensemble": stage.ensemble_from, "fuse": 0}
  stage = dataclasses.replace(stage, lpips_from=stage.steps)  # weights may not be at hand
  kind = "ensemble" if phase == "fuse" else phase
  number = jnp.asarray(first[phase], jnp.int32)
  chunk = chunk.replace(
    first=number, pictures=chunk.pictures if phase == "fuse" else
    chunk.pictures._replace(background=None))
  state = step.State(
    avatar=avatar, opt=optimizer.init(optimizer.trainable(avatar, stage)),
    stats=densify.no_stats(len(avatar.face.alive)), step=number, skipped=jnp.zeros((), jnp.int32))
  mesh = step.mesh_of(experiment)
  state = jax.tree.map(jnp.copy, state)  # whose memory the steps take
  state, sums, material, key = step.spread(
    (state, step.no_sums(), material, jax.random.key(0)), mesh)
  if mesh is not None:
    shared = NamedSharding(mesh, PartitionSpec(None, step.FRAMES))
    chunk = step.spread(chunk, mesh).replace(pictures=jax.device_put(chunk.pictures, shared))
  count = jnp.asarray(steps)
  begun = time.perf_counter()
  program = compiled(step.run_steps.lower(
    state, sums, count, material, chunk, None, key, experiment=experiment, stage=stage,
    phase=kind, mesh=mesh), tuned=outlook.is_long(stage, first[phase]))
  compile_s = time.perf_counter() - begun
  use = program.memory_analysis()
  frames = sum(x.nbytes for x in jax.tree.leaves(chunk.pictures)) // (mesh.size if mesh else 1)
  peak = (use.temp_size_in_bytes + use.argument_size_in_bytes + use.output_size_in_bytes
          - use.alias_size_in_bytes - frames if use else float("nan"))

  def run(state):
    # The same steps each time: schedules depend on their number.
    state = state.replace(step=step.spread(jnp.copy(number), mesh))  # it is donated
    return jax.block_until_ready(program(
      state, sums, count, material, chunk, None, key))[0]

  state, times = run(state), []
  for _ in range(RUNS):
    begun = time.perf_counter()
    state = run(state)
    times.append((time.perf_counter() - begun) / steps)
  if trace:
    with jax.profiler.trace(f"{trace}/{phase}"):
      run(state)
  return 1e3 * statistics.median(times), compile_s, peak / 1e6


def time_frames(avatar: avatars.Avatar, material, side: int, frames: int, doubt: bool) -> float:
  """Milliseconds a frame, drawn one after the other without waiting for each."""
  background = jnp.zeros((side, side, 3))

  @jax.jit
  def draw(avatar, known, controls, camera):
    image = avatars.render(avatar, controls, camera, background, known=known, doubt=doubt)
    return image.composite, image.uncertainty

  known = avatars.know(avatar)
  scenes = [jax.tree.map(lambda x, i=i: x[i % FRAMES], (material.controls, material.camera))
            for i in range(frames)]
  jax.block_until_ready(draw(avatar, known, *scenes[0]))
  times = []
  for _ in range(RUNS):
    begun = time.perf_counter()
    jax.block_until_ready([draw(avatar, known, *each)[0] for each in scenes])
    times.append((time.perf_counter() - begun) / frames)
  return 1e3 * statistics.median(times)


if __name__ == "__main__":
  main()
