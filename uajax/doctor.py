"""What this machine can do: one finding a line, each problem with its remedy."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from uajax import cache
from uajax.memory import free_bytes

FREE_DISK_GIB = 6  # a demo run with its clips
MEMORY_GIB = 6
PYTHONS = ((3, 11), (3, 14))  # from, below
JAX = ((0, 10, 2), (0, 13))  # from, below

# distribution -> (module, what it is for). What train, synthesize and evaluate cannot do without.
NEEDED = {
  "jax": ("jax", "everything"),
  "jaxlib": ("jaxlib", "everything"),
  "flax": ("flax", "the networks"),
  "optax": ("optax", "training"),
  "orbax-checkpoint": ("orbax.checkpoint", "checkpoints"),
  "chex": ("chex", "checks of what enters a module"),
  "numpy": ("numpy", "everything"),
  "jaxtyping": ("jaxtyping", "everything"),
  "pillow": ("PIL", "subject folders"),
}
# What single commands need.
WANTED = {
  "librosa": ("librosa", "speech features: extract, synthesize, preprocess"),
  "av": ("av", "video and sound: synthesize, preprocess, evaluate of two films"),
  "tyro": ("tyro", "the command line"),
  "tensorflow-datasets": ("tensorflow_datasets", "the record cache of a subject"),
  "grain": ("grain", "the frame loader for subjects larger than memory"),
  "ai-edge-litert": ("ai_edge_litert", "preprocess: landmarks, masks, action units"),
  "matplotlib": ("matplotlib", "training curves"),
  "safetensors": ("safetensors", "export --format safetensors"),
  "tensorboard": ("tensorboard", "metrics in TensorBoard"),
}


Status = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
  """One thing looked at."""

  status: Status
  subject: str  # a word or two
  text: str  # what was found
  remedy: str = ""  # what to do about it, where something is to be done

  def __str__(self) -> str:
    remedy = f"; {self.remedy}" if self.remedy else ""
    return f"{self.status:<4} {self.subject:<20} {self.text}{remedy}"


def examine() -> list[Finding]:
  """Looks at everything. A part that cannot even be looked at is a finding, not an exception."""
  findings: list[Finding] = []
  for look in (_python, _packages, _devices, _rasteriser, _fusion, _machine, _cache, _codecs,
               _weights):
    findings += _survive(look)
  return findings


def healthy(findings: list[Finding]) -> bool:
  """Whether nothing failed; warnings are allowed."""
  return all(finding.status != "fail" for finding in findings)


def _survive(look: Callable[[], Iterator[Finding]]) -> list[Finding]:
  found: list[Finding] = []
  name = look.__name__.strip("_")
  try:
    for finding in look():
      found.append(finding)
  except Exception as error:  # whatever is broken here, the rest is still worth knowing
    line = str(error).strip().splitlines()
    text = f"could not be examined: {type(error).__name__}: {line[0] if line else ''}"
    found.append(Finding("fail", name, text, "reinstall with `make setup`"))
  return found


def _python() -> Iterator[Finding]:
  version = sys.version_info[:2]
  text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
  if PYTHONS[0] <= version < PYTHONS[1]:
    yield Finding("ok", "python", text)
  else:
    yield Finding("warn", "python", text, "tried with 3.11 to 3.13 only")


def _packages() -> Iterator[Finding]:
  parts: tuple[tuple[dict, Status], ...] = ((NEEDED, "fail"), (WANTED, "warn"))
  for packages, status in parts:
    for name, (module, purpose) in packages.items():
      try:
        version = importlib.metadata.version(name)
        present = importlib.util.find_spec(module) is not None
      except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError):
        version, present = "", False
      if not present:
        remedy = f"needed for {purpose}: run `pip install '{name}'`"
        yield Finding(status, name, "not installed", remedy)
        continue
      if name == "jax" and not JAX[0] <= _numbers(version) < JAX[1]:
        low, high = (".".join(map(str, v)) for v in JAX)
        remedy = f"tried with {low} to below {high}: run `pip install 'jax>={low},<{high}'`"
        yield Finding("warn", name, version, remedy)
        continue
      yield Finding("ok", name, version)


def _devices() -> Iterator[Finding]:
  import jax

  try:
    devices = jax.devices()
  except RuntimeError as error:  # a plugin is there, its device is not
    line = str(error).splitlines()[0]
    yield Finding("fail", "devices", line, "check the driver, or set JAX_PLATFORMS=cpu")
    return
  kinds: dict[str, int] = {}
  for device in devices:
    kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
  text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
  text = f"{text} (JAX backend {jax.default_backend()})"
  if jax.default_backend() == "cpu":
    card = shutil.which("nvidia-smi") or pathlib.Path("/proc/driver/nvidia").exists()
    if card and os.environ.get("JAX_PLATFORMS", "") != "cpu":
      remedy = "an NVIDIA card is present, JAX does not use it: run `make setup DEVICE=cuda13`"
      yield Finding("warn", "devices", text, remedy)
    else:
      remedy = "enough for the demo; train a real subject on a GPU (`make setup DEVICE=cuda13`)"
      yield Finding("ok", "devices", text, remedy)
  else:
    yield Finding("ok", "devices", text)


def _rasteriser() -> Iterator[Finding]:
  """Not only which implementation is picked: it draws a splat with it."""
  import jax.numpy as jnp

  from kernels import splat

  with warnings.catch_warnings():  # what `choose` would warn of is said below
    warnings.simplefilter("ignore")
    implementation, reason = splat.choose()
    out = splat.rasterize(
      means=jnp.array([[0.0, 0.0, 1.0]]),
      quats=jnp.array([[1.0, 0.0, 0.0, 0.0]]),
      scales=jnp.full((1, 3), 0.2),
      opacities=jnp.array([0.9]),
      colors=jnp.array([[1.0, 0.5, 0.0]]),
      viewmats=jnp.eye(4)[None],
      Ks=jnp.array([[[16.0, 0.0, 8.0], [0.0, 16.0, 8.0], [0.0, 0.0, 1.0]]]),
      width=16,
      height=16,
    )
    centre = [round(float(value), 2) for value in out.color[0, 8, 8]]
  if not (0.8 < centre[0] < 0.92 and abs(centre[1] - centre[0] / 2) < 0.02 and centre[2] == 0):
    text = f"{implementation} ({reason}) draws a test splat as {centre}"
    remedy = "expected about [0.89, 0.44, 0]: try another JAX version, and please report this"
    yield Finding("fail", "rasteriser", text, remedy)
    return
  yield _chosen("rasteriser", f"{implementation} ({reason}) drew a test splat right", reason)


def _fusion() -> Iterator[Finding]:
  """Fuses two beliefs, each of two members."""
  import jax.numpy as jnp

  from kernels import fusion

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    implementation, reason = fusion.choose()
    means = jnp.array([[0.0, 0.0], [1.0, 3.0]])[:, :, None, None]
    mean = round(float(fusion.fuse(means, jnp.zeros_like(means)).mean[0, 0]), 3)
  if mean != 0.5:  # of 0 with variance 1, and 2 with 1 + 2, for its members differ by 2
    text = f"{implementation} ({reason}) fuses two test beliefs into {mean}"
    remedy = "expected 0.5: try another JAX version, and please report this"
    yield Finding("fail", "fusion", text, remedy)
    return
  yield _chosen("fusion", f"{implementation} ({reason}) fused two test beliefs right", reason)


def _chosen(subject: str, text: str, reason: str) -> Finding:
  if "not compile" in reason:
    return Finding("warn", subject, text, "slow but right; `make test-device` says more")
  return Finding("ok", subject, text)


def _machine() -> Iterator[Finding]:
  usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  yield Finding("ok", "processors", f"{usable} usable of {os.cpu_count()}")
  memory = _memory_gib()
  if memory is None:
    yield Finding("warn", "memory", "size unknown", f"the demo needs {MEMORY_GIB} GiB")
  elif memory < MEMORY_GIB:
    remedy = f"the demo needs {MEMORY_GIB} GiB: close other programs or add swap"
    yield Finding("warn", "memory", f"{memory:.1f} GiB available", remedy)
  else:
    yield Finding("ok", "memory", f"{memory:.1f} GiB available")
  free = shutil.disk_usage(pathlib.Path.cwd()).free / 2**30
  text = f"{free:.1f} GiB free in the working folder"
  if free < FREE_DISK_GIB:
    yield Finding("warn", "disk", text, f"make room: a run takes up to {FREE_DISK_GIB} GiB")
  else:
    yield Finding("ok", "disk", text)


def _cache() -> Iterator[Finding]:
  folder = cache.compiled()
  if not cache.writable(folder):
    remedy = "every start compiles anew: set UAJAX_CACHE to a folder that you may write to"
    yield Finding("warn", "compile cache", f"{folder} is not writable", remedy)
    return
  size = cache.size_bytes(folder) / 2**20
  yield Finding("ok", "compile cache", f"{folder}, {size:.0f} MiB")


def _codecs() -> Iterator[Finding]:
  try:
    import av
    from av.codec import Codec
  except ImportError:
    yield Finding("warn", "codecs", "unknown without PyAV", "run `pip install av`")
    return
  needs = (("h264", "r"), ("libx264", "w"), ("aac", "r"), ("aac", "w"))
  missing = []
  for name, mode in needs:
    try:
      Codec(name, mode)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except Exception:  # the class of the error differs between PyAV versions
      missing.append(f"{name} {'decoder' if mode == 'r' else 'encoder'}")
  if missing:
    remedy = "install PyAV's own wheel: `pip install --force-reinstall --only-binary :all: av`"
    yield Finding("fail", "codecs", f"PyAV lacks: {', '.join(missing)}", remedy)
  else:
    yield Finding("ok", "codecs", f"H.264 and AAC in PyAV {av.__version__}, no ffmpeg needed")


def _weights() -> Iterator[Finding]:
  """Pretrained models, by name and hash; nothing is fetched."""
  from uajax.preprocess import weights

  for finding in weights.inventory():
    yield Finding(*finding)


def _numbers(version: str) -> tuple[int, ...]:
  """`0.11.2.dev3` -> (0, 11, 2)."""
  numbers = []
  for part in version.split(".")[:3]:
    digits = part[: next((i for i, c in enumerate(part) if not c.isdigit()), len(part))]
    if not digits:
      break
    numbers.append(int(digits))
  return tuple(numbers)


def _memory_gib() -> float | None:
  free = free_bytes()
  return None if free is None else free / 2**30
