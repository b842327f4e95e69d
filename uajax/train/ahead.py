"""Programs compiled before they are wanted, by threads, while the device trains.

A training runs some fifteen programs. On a GPU the larger ones take half a minute each to compile,
together a good part of the whole; nearly all of that can happen meanwhile. A third of it, tracing
and lowering, is Python's: only one thread at a time can do that, and the thread that trains has to
wait for its turn. So programs are lowered one after the other, and turns are short.
"""

import concurrent.futures
import contextlib
import os
import sys
import threading
import time
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import jax

TURN_S = 2e-4  # of a thread, while another waits for the interpreter (Python's own: 5e-3)
NICE = 10  # by which threads that compile give way
# Left alone, XLA tries each matrix product in dozens of variants and each fusion in some, compiles
# them all, and times them on the card that trains meanwhile. That is half of the compilation and
# saves a step 6 to 20 per cent of its time: only a program of many steps earns it back.
UNTUNED: dict[str, dict[str, str | bool]] = {"gpu": {
  "xla_gpu_enable_triton_gemm": False, "xla_gpu_experimental_enable_fusion_autotuner": False}}


class Call(NamedTuple):
  """A jitted function and what it is, or will be, given."""

  function: Any  # under `jax.jit`
  static: dict[str, Any]  # its static arguments, given by name
  arrays: tuple  # all others, or their shapes
  long: bool = False  # whether it will run for minutes, so that tuning its program pays


class Ahead:
  """Jitted functions whose programs may be had compiled in advance. A context manager.

  What nobody prepared, or prepared for arrays of other shapes, is compiled as ever.
  """

  def __init__(self, *, active: bool = True, threads: int | None = None):
    """
    Args:
      active: whether anything is compiled ahead at all.
      threads: how many programs are compiled at once; None: one for every four cores, four at most.
    """
    self.active = active
    if threads is None:
      threads = min(max((os.cpu_count() or 1) // 4, 1), 4)
    self.used = 0  # programs that were compiled in advance and then called for
    self.waited_s = 0.0  # for programs that were not compiled when they were called for
    self._programs: dict[Any, Any] = {}  # compiled, a future of it, or None: not compiled here
    self._threads = concurrent.futures.ThreadPoolExecutor(threads, initializer=_step_back)
    self._most = threads
    self._busy: list[concurrent.futures.Future] = []
    self._lowering = threading.Lock()
    self._settled: Hashable = None
    self._turn_s = sys.getswitchinterval()

  def __enter__(self) -> "Ahead":
    if self.active:
      sys.setswitchinterval(min(TURN_S, self._turn_s))
    return self

  def __exit__(self, *_) -> None:
    self._threads.shutdown(cancel_futures=True)
    if self.active:
      sys.setswitchinterval(self._turn_s)

  def __call__(self, call: Call) -> Any:
    """The function's answer."""
    function, static, arrays, _ = call
    key = _key(call)
    begun, known = time.monotonic(), key in self._programs
    program = self._programs.setdefault(key, None)
    if isinstance(program, concurrent.futures.Future):
      with contextlib.suppress(Exception):  # it will be raised again below
        self._programs[key] = program = program.result()
        self.used += 1
        self.waited_s += time.monotonic() - begun
    elif not known and self.active:
      self._programs[key] = program = compiled(
        function.lower(*arrays, **static), tuned=call.long)
      self.waited_s += time.monotonic() - begun
    if callable(program):
      return program(*arrays)
    answer = function(*arrays, **static)
    if not known:
      self.waited_s += time.monotonic() - begun
    return answer

  def at_hand(self, call: Call) -> bool:
    """Whether calling for it waits for no compilation that is, or could be, done meanwhile."""
    if not self.active:
      return True
    key = _key(call)
    program = self._programs.get(key)
    return program.done() if isinstance(program, concurrent.futures.Future) else (
      key in self._programs)

  def prepare(self, upcoming: Iterable[Call], about: Hashable = None) -> None:
    """Has the next programs that are not known yet compiled, as many as threads are idle.

    Args:
      upcoming: what will be called, in order. It is read no further than need be.
      about: all that `upcoming` depends on, if given: once all of it is known, it is not read
        again.
    """
    if not self.active or (about is not None and about == self._settled):
      return
    self._busy = [each for each in self._busy if not each.done()]
    if len(self._busy) >= self._most:
      return
    for call in upcoming:
      key = _key(call)
      if key in self._programs:
        continue
      shapes = call._replace(arrays=jax.tree.map(_shape, call.arrays))
      self._programs[key] = submitted = self._threads.submit(self._compile, shapes)
      self._busy.append(submitted)
      if len(self._busy) >= self._most:
        return
    self._settled = about

  def _compile(self, call: Call):
    with self._lowering:
      lowered = call.function.lower(*call.arrays, **call.static)
    return compiled(lowered, tuned=call.long)


def _step_back() -> None:
  """Has this thread, and those that XLA starts from it, give way to the one that trains.

  A step is hundreds of launches: on cores that compilers keep busy it took twice its time.
  """
  if sys.platform == "linux":  # where threads have priorities of their own
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
      own = os.getpriority(os.PRIO_PROCESS, thread)
      os.setpriority(os.PRIO_PROCESS, thread, min(own + NICE, 19))


def compiled(lowered: jax.stages.Lowered, *, tuned: bool = False) -> jax.stages.Compiled:
  """The program; untuned as far as this version of XLA knows how to."""
  options = {} if tuned else dict(UNTUNED.get(jax.default_backend(), {}))
  while options:
    try:
      return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      unknown = [name for name in options if name in str(error)]
      if not unknown:
        raise
      options = {name: value for name, value in options.items() if name not in unknown}
  return lowered.compile()


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  """All of an array that a program depends on. Where it lies counts only if it was put there."""
  placed = x.sharding if _is_spread(x) else None
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed, weak_type=_is_weak(x))


def _is_weak(x: Any) -> bool:
  return getattr(x, "weak_type", False)  # keys have none


def _is_spread(x: Any) -> bool:
  return x.sharding is not None and len(x.sharding.device_set) > 1


def _key(call: Call):
  leaves, tree = jax.tree.flatten(call.arrays)
  seen = tuple((x.shape, x.dtype, _is_weak(x), x.sharding if _is_spread(x) else None)
               for x in leaves)
  named = tuple(sorted(call.static.items(), key=lambda item: item[0]))
  return call.function, named, tree, seen
