import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from kernels import trial


def test_what_compiles_is_no_problem_and_what_does_not_is_told_in_a_line():
  x = jax.ShapeDtypeStruct((3,), jnp.float32)
  assert trial.problem(jnp.sin, x) is None

  def broken(x):
    raise ValueError(f"no {len(x)} of those\nnor these")

  assert trial.problem(broken, x) == "ValueError: no 3 of those"


def test_may_be_asked_within_shard_map():
  mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
  told = []

  def body(x):
    told.append(trial.problem(jnp.sin, jax.ShapeDtypeStruct((3,), jnp.float32)))
    return x

  spec = PartitionSpec("batch")
  jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(
    jnp.zeros(4))
  assert told == [None]
