"""Times of the fusion on this machine: `python -m kernels.fusion.bench [splats ...]`.

Prints, for the face's and the mouth's ensembles, milliseconds of one member a modality (stage 1)
and of all (stage 2), with plain JAX and with the kernels where they work: the mean, the mean with
both traces, and the mean with its gradient.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from kernels.fusion.api import Implementation, choose, fuse_answers

CASES = {"face": (4, 10, 48), "mouth": (3, 10, 48), "small": (4, 4, 16)}  # modalities, members, z


def beliefs(modalities: int, members: int, splats: int, latent: int, seed: int = 0):
  """Members that disagree as much as they doubt."""
  rng = np.random.default_rng(seed)
  shape = (modalities, members, splats, latent)
  return jnp.asarray(rng.normal(size=shape), "f4"), jnp.asarray(rng.normal(size=shape), "f4")


def measure(function, *args, repeats: int = 20) -> tuple[float, float]:
  """Median milliseconds of a compiled call, and seconds to compile it."""
  start = time.perf_counter()
  compiled = jax.jit(function).lower(*args).compile()
  compile_s = time.perf_counter() - start
  times = []
  for _ in range(repeats + 2):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    times.append(time.perf_counter() - start)
  return 1e3 * float(np.median(times[2:])), compile_s


def main(splats: list[int]) -> None:
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; ms (s to compile)")
  print(f"{'':>28}{'mean':>16}{'and traces':>16}{'and gradient':>16}")
  for name, (modalities, members, latent) in CASES.items():
    for n in splats:
      for count in (1, members):
        answers = [*jnp.concatenate(beliefs(modalities, count, n, latent), -1).swapaxes(2, 3)]
        implementations: set[Implementation] = {"xla"} if count == 1 else {"xla", choose()[0]}
        for implementation in sorted(implementations):
          cells = ["{:.2f} ({:.1f})".format(*measure(program, answers))
                   for program in _programs(implementation)]
          label = f"{name} {n} stage {1 if count == 1 else 2} {implementation}"
          print(f"{label:>28}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def _programs(implementation: Implementation):
  run = functools.partial(fuse_answers, limit=10.0, implementation=implementation)
  return (
    lambda answers: run(answers).mean,
    run,
    jax.value_and_grad(lambda answers: jnp.square(run(answers).mean).sum()),
  )


if __name__ == "__main__":
  main([int(n) for n in sys.argv[1:]] or [3000, 30000])
