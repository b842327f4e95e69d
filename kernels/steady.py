"""Kernels that keep their names, so that JAX finds a compiled program again in the next process."""

import functools
import importlib
import os
from typing import Any

ATTRIBUTE = "mosaic_gpu.dump_basename"


@functools.cache
def keep_names() -> None:
  """Has Mosaic count no kernels.

  Since JAX 0.11 a kernel is lowered with the name of the files that it would be dumped to, which
  numbers the kernels of a process; and JAX takes that for a part of the program when it looks in
  its cache on disk: a training that is resumed, whose kernels come in another order, could find
  none of what had been compiled before. Where kernels are to be dumped, they are numbered as ever.
  Does nothing where JAX has no such names.
  """
  if any(name.startswith("MOSAIC_GPU_DUMP") for name in os.environ):
    return
  try:
    from jax.extend.mlir import ir
    dialect: Any = importlib.import_module("jax.experimental.mosaic.gpu").dialect
    numbered = dialect.get_or_set_dump_options
  except (ImportError, AttributeError):
    return

  def unnumbered(module):
    if ATTRIBUTE not in module.operation.attributes:
      with module.context:
        module.operation.attributes[ATTRIBUTE] = ir.StringAttr.get("kernel")
    return numbered(module)

  dialect.get_or_set_dump_options = unnumbered
