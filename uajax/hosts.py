"""Several processes that train one avatar: what the first alone does, and what all agree on.

Every process runs the same program on its own devices and holds the same state. Only the first
writes. In a single process each function here is the plain thing that it stands for.
"""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from uajax.errors import Stopped, UserError


@contextlib.contextmanager
def joined(coordinator: str | None = None, processes: int | None = None,
           process: int | None = None) -> Iterator[None]:
  """Within, this process is one of `processes`; call it before anything computes.

  Args:
    coordinator: HOST:PORT of the first process, the same in all. None leaves all three to what
      JAX finds out about the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU).
    process: the number of this one, from 0.

  Raises:
    UserError: no cluster was found, or not all processes came together.
  """
  # Training itself heeds SIGTERM; JAX would take the signal away.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(coordinator, processes, process)
  except (ValueError, RuntimeError) as error:
    line = (str(error).strip().splitlines() or ["no reason given"])[0]
    raise UserError(
      f"the processes did not come together ({line}): start all of them with the same "
      "--coordinator HOST:PORT and --processes N, and each with its own --process 0..N-1"
    ) from error
  try:
    yield
  except Stopped:
    jax.distributed.shutdown()
    raise
  # After any other failure the rest may wait for this process: its end ends them.
  jax.distributed.shutdown()


def count() -> int:
  return jax.process_count()


def number() -> int:
  """Which of them this is, from 0."""
  return jax.process_index()


def is_first() -> bool:
  return number() == 0


def largest(value: int) -> int:
  """The largest of the values that the processes give."""
  if count() == 1:
    return value
  return int(multihost_utils.process_allgather(np.asarray([value], np.int32)).max())


def alone(act: Callable[[], None]) -> None:
  """Calls `act` in the first process while the others wait.

  Raises:
    UserError: `act` failed with one; in every process.
  """
  told(lambda: act() or b"")


def told(make: Callable[[], bytes]) -> bytes:
  """What `make` gives in the first process, for all.

  Raises:
    UserError: `make` failed with one; in every process.
  """
  if count() == 1:
    return make()
  failed, message = False, b""
  if is_first():
    try:
      message = make()
    except UserError as error:
      failed, message = True, str(error).encode()
  length, failed = (int(n) for n in multihost_utils.broadcast_one_to_all(
    np.asarray([len(message), failed], np.int32)))
  padded = np.zeros(length, np.uint8)
  padded[: len(message)] = np.frombuffer(message, np.uint8)
  message = np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes() if length else b""
  if failed:
    raise UserError(message.decode())
  return message


def local(tree):
  """The first process's own copy of arrays that all hold, to compute with it alone."""
  return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
