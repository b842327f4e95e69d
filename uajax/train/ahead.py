"""Programs compiled before they are wanted, by a thread, while the device trains.

A training runs about ten programs, one after the other. On a GPU each takes half a minute to
compile, together a good part of the whole; nearly all of that can happen meanwhile.
"""

import concurrent.futures
import contextlib
from collections.abc import Iterable
from typing import Any

import jax


class Ahead:
  """A jitted function whose programs may be had compiled in advance. A context manager.

  What nobody prepared, or prepared for arrays of other shapes, is compiled as ever.
  """

  def __init__(self, function: Any, *, active: bool = True):
    """
    Args:
      function: under `jax.jit`; of its arguments those given by name are the static ones.
      active: whether anything is compiled ahead at all.
    """
    self._function, self.active = function, active
    self._programs: dict[Any, concurrent.futures.Future | None] = {}
    self._busy: concurrent.futures.Future | None = None
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self.used = 0  # programs that were compiled in advance and then called for

  def __enter__(self) -> "Ahead":
    return self

  def __exit__(self, *_) -> None:
    self._thread.shutdown(cancel_futures=True)

  def __call__(self, static: dict[str, Any], *arrays: Any) -> Any:
    """The function's answer."""
    if not self.active:
      return self._function(*arrays, **static)
    key = _key(static, arrays)
    program = self._programs.setdefault(key, None)
    if isinstance(program, concurrent.futures.Future):
      with contextlib.suppress(Exception):  # it will be raised again below
        self._programs[key] = program = program.result()
        self.used += 1
    if not callable(program):
      return self._function(*arrays, **static)
    return program(*arrays)

  def prepare(self, upcoming: Iterable[tuple[dict[str, Any], tuple]]) -> None:
    """Has the next program that is not known yet compiled, unless the thread is still busy.

    Args:
      upcoming: what will be called, in order: static arguments, and arrays or their shapes. It
        is read no further than to the first that is not known.
    """
    if not self.active or (self._busy is not None and not self._busy.done()):
      return
    for static, arrays in upcoming:
      key = _key(static, arrays)
      if key not in self._programs:
        shapes = jax.tree.map(_shape, arrays)
        self._busy = self._programs[key] = self._thread.submit(self._compile, static, shapes)
        return

  def _compile(self, static, shapes):
    return self._function.lower(*shapes, **static).compile()


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  """All of an array that a program depends on. Where it lies counts only if it was put there."""
  placed = x.sharding if _is_spread(x) else None
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed, weak_type=_is_weak(x))


def _is_weak(x: Any) -> bool:
  return getattr(x, "weak_type", False)  # keys have none


def _is_spread(x: Any) -> bool:
  return x.sharding is not None and len(x.sharding.device_set) > 1


def _key(static: dict[str, Any], arrays: tuple):
  leaves, tree = jax.tree.flatten(arrays)
  seen = tuple((x.shape, x.dtype, _is_weak(x), x.sharding if _is_spread(x) else None)
               for x in leaves)
  return tuple(sorted(static.items(), key=lambda item: item[0])), tree, seen
