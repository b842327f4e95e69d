"""Times the implementations on the named scenes: `python -m kernels.splat.bench --help`.

Forward and forward plus backward, as medians after a warm-up, with gsplat beside them where it
is installed and has a GPU. Prints a table and, if asked, writes JSON.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp

from kernels.splat import rasterize
from kernels.splat.cases import CASES, Case, scene

LEARNT = ("means", "quats", "scales", "opacities", "colors", "features")


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--cases", nargs="+", default=["demo", "demo crowded"],
                      help=f"of: {', '.join(CASES)}; or SPLATSxSIDE, such as 5000x200")
  parser.add_argument("--implementations", nargs="+", default=[None],
                      help="reference, xla, pallas; left out: the device's default")
  parser.add_argument("--repeat", type=int, default=20)
  parser.add_argument("--json", help="file to write")
  args = parser.parse_args()
  device = jax.devices()[0].device_kind
  print(f"{device}, jax {jax.__version__}; medians of {args.repeat}, ms")
  rows = []
  for name in args.cases:
    case = _case(parser, name)
    results = {i or "default": measure(case, i, args.repeat) for i in args.implementations}
    if importlib.util.find_spec("gsplat"):
      results["gsplat"] = measure_gsplat(case, args.repeat)
    base = next(iter(results.values()))["backward_ms"]
    for which, result in results.items():
      rows.append(dict(case=name, implementation=which, device=device, **result))
      print(f"{name:14} {which:10} forward {result['forward_ms']:9.3f}  with backward "
            f"{result['backward_ms']:9.3f}  ratio {result['backward_ms'] / base:6.2f}  "
            f"compiled in {result['compile_s']:.1f} s")
  if args.json:
    with open(args.json + ".part", "w") as file:
      json.dump(dict(jax=jax.__version__, device=device, rows=rows), file, indent=1)
    os.replace(args.json + ".part", args.json)


def measure(case: Case, implementation: str | None, repeat: int) -> dict[str, float]:
  """Median times of one implementation: RGB, alpha, depth and detached features."""
  inputs = jax.tree.map(lambda x: x if isinstance(x, int) else jnp.asarray(x), scene(case))
  learnt = {k: inputs.pop(k) for k in LEARNT}
  run = functools.partial(rasterize, **inputs, implementation=implementation, detached=True)
  needed = 1 << 12
  while implementation != "reference" and run(**learnt, capacity=needed).overflow > 0:
    needed *= 2

  def loss(learnt):
    out = run(**learnt, capacity=needed)
    return sum(jnp.mean(x**2) for x in out[:4])

  start = time.perf_counter()
  forward = jax.jit(loss).lower(learnt).compile()
  backward = jax.jit(jax.value_and_grad(loss)).lower(learnt).compile()
  compiled = time.perf_counter() - start
  return dict(
      forward_ms=_median(lambda: jax.block_until_ready(forward(learnt)), repeat),
      backward_ms=_median(lambda: jax.block_until_ready(backward(learnt)), repeat),
      compile_s=compiled)


def measure_gsplat(case: Case, repeat: int) -> dict[str, float]:
  """The same of gsplat, RGB only."""
  # By name, since neither is a dependency, not even an optional one.
  gsplat, torch = importlib.import_module("gsplat"), importlib.import_module("torch")
  inputs = {k: torch.as_tensor(x, device="cuda") if hasattr(x, "shape") else x
            for k, x in scene(case).items()}
  names = ("means", "quats", "scales", "opacities", "colors")
  learnt = [inputs[k].requires_grad_() for k in names]

  def forward():
    color, *_ = gsplat.rasterization(
        *learnt, inputs["viewmats"], inputs["Ks"], inputs["width"], inputs["height"],
        sh_degree=inputs["sh_degree"], packed=False)
    torch.cuda.synchronize()
    return color

  def backward():
    torch.autograd.grad((forward()**2).mean(), learnt)
    torch.cuda.synchronize()

  start = time.perf_counter()
  backward()
  return dict(compile_s=time.perf_counter() - start, forward_ms=_median(forward, repeat),
              backward_ms=_median(backward, repeat))


def _median(run, repeat):
  run()
  times = []
  for _ in range(repeat):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return 1e3 * statistics.median(times)


def _case(parser, name):
  if name in CASES:
    return CASES[name]
  splats, _, side = name.partition("x")
  if not (splats.isdecimal() and side.isdecimal() and int(splats) and int(side)):
    parser.error(f"--cases {name}: neither a named case nor SPLATSxSIDE")
  return Case(int(splats), int(side), int(side))


if __name__ == "__main__":
  main()
