"""What JAX says of arrays that differ between devices."""

import jax

UNCHECKED = "within jax.shard_map the Pallas kernels need it called with check_vma=False"


def varies(*arrays) -> bool:
  """Whether any is checked to vary over devices, as in `shard_map` unless told otherwise."""
  kinds = (getattr(jax.typeof(x), "manual_axis_type", None) for x in arrays)
  return any(bool(getattr(kind, "varying", ())) for kind in kinds)
