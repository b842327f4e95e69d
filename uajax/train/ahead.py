"""Programs compiled before they are wanted, by a thread, while the device trains.

A training runs some twenty programs. On a GPU the larger ones take half a minute each to compile,
together a good part of the whole; nearly all of that can happen meanwhile.
"""

import concurrent.futures
import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax


class Call(NamedTuple):
  """A jitted function and what it is, or will be, given."""

  function: Any  # under `jax.jit`
  static: dict[str, Any]  # its static arguments, given by name
  arrays: tuple  # all others, or their shapes


class Ahead:
  """Jitted functions whose programs may be had compiled in advance. A context manager.

  What nobody prepared, or prepared for arrays of other shapes, is compiled as ever.
  """

  def __init__(self, *, active: bool = True):
    """
    Args:
      active: whether anything is compiled ahead at all.
    """
    self.active = active
    self._programs: dict[Any, concurrent.futures.Future | None] = {}
    self._busy: concurrent.futures.Future | None = None
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self.used = 0  # programs that were compiled in advance and then called for

  def __enter__(self) -> "Ahead":
    return self

  def __exit__(self, *_) -> None:
    self._thread.shutdown(cancel_futures=True)

  def __call__(self, call: Call) -> Any:
    """The function's answer."""
    function, static, arrays = call
    if not self.active:
      return function(*arrays, **static)
    key = _key(call)
    program = self._programs.setdefault(key, None)
    if isinstance(program, concurrent.futures.Future):
      with contextlib.suppress(Exception):  # it will be raised again below
        self._programs[key] = program = program.result()
        self.used += 1
    if not callable(program):
      return function(*arrays, **static)
    return program(*arrays)

  def prepare(self, upcoming: Iterable[Call]) -> None:
    """Has the next program that is not known yet compiled, unless the thread is still busy.

    Args:
      upcoming: what will be called, in order. It is read no further than to the first that is
        not known.
    """
    if not self.active or (self._busy is not None and not self._busy.done()):
      return
    for call in upcoming:
      key = _key(call)
      if key not in self._programs:
        shapes = call._replace(arrays=jax.tree.map(_shape, call.arrays))
        self._busy = self._programs[key] = self._thread.submit(self._compile, shapes)
        return

  def _compile(self, call: Call):
    return call.function.lower(*call.arrays, **call.static).compile()


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
