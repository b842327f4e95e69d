"""Times the implementations on head-sized scenes: `python -m kernels.splat.bench --help`.

Forward, and forward plus backward, of RGB, alpha, depth and two detached feature channels, with
gsplat's RGB beside them in the same process where it is installed and has a GPU. Every figure is
the median of several runs of ten calls that are given to the device at once, after a warm-up.
Memory is what a training step takes that moves all that is learnt along its gradient, in place.
Prints a table and, if asked, writes JSON.
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
CALLS = 10  # given to the device at once: a training loop does not wait for each step either
RATE = 1e-9  # of learning: nothing shall move
QUICK = ("3000x128",)
FULL = ("10000x256", "10000x512", "30000x512", "100000x512", "1000000x512", "30000x1024",
        "100000x1024", "1000000x1024", "30000x2048", "1000000x2048")


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--cases", nargs="+", default=["full"],
                      help="SPLATSxSIDE, such as 5000x200; full (the table of the README; "
                           f"default), quick; or of: {', '.join(CASES)}")
  parser.add_argument("--implementations", nargs="+", default=[None],
                      help="reference, xla, pallas; left out: the device's default")
  parser.add_argument("--repeat", type=int, default=9, help="runs of ten calls")
  parser.add_argument("--json", help="file to write")
  args = parser.parse_args()
  names = {"full": FULL, "quick": QUICK}.get(args.cases[0], args.cases)
  cases = {name: _case(parser, name) for name in names}
  device = jax.devices()[0].device_kind
  peer = _gsplat()
  print(f"{device}, jax {jax.__version__}"
        + (f", gsplat {peer.__version__}" if peer else ", no gsplat to compare with")
        + f"; ms a call, medians of {args.repeat} runs; MB at the peak of a training step")
  rows = []
  for name, case in cases.items():
    results = {i or "default": measure(case, i, args.repeat) for i in args.implementations}
    if peer:
      results["gsplat"] = measure_gsplat(peer, case, args.repeat)
    for which, result in results.items():
      base = results.get("gsplat", next(iter(results.values())))
      ratio = result["backward_ms"] / base["backward_ms"]
      rows.append(dict(case=name, implementation=which, device=device, ratio=ratio, **result))
      print(f"{name:14} {which:10} forward {result['forward_ms']:8.3f}  with backward "
            f"{result['backward_ms']:8.3f}  ratio {ratio:5.2f}  {result['peak_mb']:7.0f} MB",
            flush=True)
  if args.json:
    with open(args.json + ".part", "w") as file:
      json.dump(dict(jax=jax.__version__, gsplat=peer and peer.__version__, device=device,
                     rows=rows), file, indent=1)
    os.replace(args.json + ".part", args.json)


def measure(case: Case, implementation: str | None, repeat: int) -> dict[str, float]:
  """Times and memory of one implementation."""
  inputs = jax.tree.map(lambda x: x if isinstance(x, int) else jnp.asarray(x), scene(case))
  learnt = {k: inputs.pop(k) for k in LEARNT}
  run = functools.partial(rasterize, **inputs, implementation=implementation, detached=True)
  capacity = None
  if implementation != "reference":  # room as a training loop would make it: a tenth to spare
    capacity = 1 << 12
    while (overflow := int(run(**learnt, capacity=capacity).overflow)) > 0:
      capacity = int(1.1 * (capacity + overflow))

  def loss(learnt):
    out = run(**learnt, capacity=capacity)
    return sum(jnp.mean(x**2) for x in out[:4])

  forward = jax.jit(loss).lower(learnt).compile()
  backward = jax.jit(jax.grad(loss)).lower(learnt).compile()

  def step(learnt):
    return jax.tree.map(lambda x, g: x - RATE * g, learnt, jax.grad(loss)(learnt))

  use = jax.jit(step, donate_argnums=0).lower(learnt).compile().memory_analysis()
  peak = (use.temp_size_in_bytes + use.argument_size_in_bytes + use.output_size_in_bytes
          - use.alias_size_in_bytes if use else float("nan"))
  return dict(forward_ms=_median(lambda: forward(learnt), jax.block_until_ready, repeat),
              backward_ms=_median(lambda: backward(learnt), jax.block_until_ready, repeat),
              peak_mb=peak / 1e6)


def _gsplat():
  """gsplat, if it is installed and can run."""
  if not (importlib.util.find_spec("gsplat") and importlib.util.find_spec("torch")):
    return None
  # By name, since neither is a dependency, not even an optional one.
  return importlib.import_module("gsplat") if (
      importlib.import_module("torch").cuda.is_available()) else None


def measure_gsplat(gsplat, case: Case, repeat: int) -> dict[str, float]:
  """The same of gsplat, RGB only."""
  torch = importlib.import_module("torch")
  inputs = {k: torch.as_tensor(x, device="cuda") if hasattr(x, "shape") else x
            for k, x in scene(case).items() if k != "features"}
  learnt = [inputs[k].requires_grad_() for k in LEARNT if k in inputs]

  def forward():
    color, *_ = gsplat.rasterization(
        *learnt, inputs["viewmats"], inputs["Ks"], inputs["width"], inputs["height"],
        sh_degree=inputs["sh_degree"], packed=False)
    return (color**2).mean()

  def plain():
    with torch.no_grad():
      return forward()

  def wait(_):
    torch.cuda.synchronize()

  def gradient():
    return torch.autograd.grad(forward(), learnt)

  times = dict(forward_ms=_median(plain, wait, repeat),
               backward_ms=_median(gradient, wait, repeat))
  torch.cuda.reset_peak_memory_stats()
  grads = gradient()
  with torch.no_grad():
    for x, grad in zip(learnt, grads, strict=True):
      x.sub_(grad, alpha=RATE)
  torch.cuda.synchronize()
  return dict(**times, peak_mb=torch.cuda.max_memory_allocated() / 1e6)


def _median(call, wait, repeat):
  times = []
  for _ in range(repeat + 1):
    start = time.perf_counter()
    for _ in range(CALLS):
      result = call()
    wait(result)
    times.append((time.perf_counter() - start) / CALLS)
  return 1e3 * statistics.median(times[1:])  # the first run warms up


def _case(parser, name):
  if name in CASES:
    return CASES[name]
  splats, _, side = name.partition("x")
  if not (splats.isdecimal() and side.isdecimal() and int(splats) and int(side)):
    parser.error(f"--cases {name}: neither a named case nor SPLATSxSIDE")
  return Case(int(splats), int(side), int(side))


if __name__ == "__main__":
  main()
