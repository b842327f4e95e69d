"""Whether kernels compile here, asked before they are chosen."""

import jax


def problem(function, *arrays: jax.ShapeDtypeStruct) -> str | None:
  """Compiles a function of such arrays; returns what went wrong, in a line, or None."""
  try:
    jax.jit(function).lower(*arrays).compile()
  except Exception as error:  # whatever the compiler's trouble is, plain XLA does the same
    line = (str(error).strip() or "no message").splitlines()[0][:200]
    return f"{type(error).__name__}: {line}"
  return None
