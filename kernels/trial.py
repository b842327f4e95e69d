"""Whether kernels compile here, asked before they are chosen."""

import threading

import jax


def problem(function, *arrays) -> str | None:
  """Compiles a function of arrays, or of their shapes; what went wrong, in a line, or None.

  In a thread of its own: where the question comes up within `jax.shard_map`, nothing of the
  caller's mesh reaches it there.
  """
  found = []

  def compile_it():
    try:
      jax.jit(function).lower(*arrays).compile()
    except Exception as error:  # whatever the compiler's trouble is, plain XLA does the same
      line = (str(error).strip() or "no message").splitlines()[0][:200]
      found.append(f"{type(error).__name__}: {line}")

  thread = threading.Thread(target=compile_it)
  thread.start()
  thread.join()
  return found[0] if found else None
