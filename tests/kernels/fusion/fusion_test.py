"""The fast fusion against its dense float64 definition, and what it must mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.fusion import fuse


def beliefs(noise=1.0, members=5, modalities=4, splats=40, latent=24, seed=0):
  """Members that disagree by about 1 and report a noise (standard deviation) about `noise`."""
  rng = np.random.default_rng(seed)
  shape = (modalities, members, splats, latent)
  means = rng.normal(size=shape)
  log_vars = 2 * np.log(noise) + 0.5 * rng.normal(size=shape)
  return means.astype(np.float32), log_vars.astype(np.float32)


def oracle(means, log_vars, cotangent, ddof=1):
  with jax.enable_x64(True):
    means, log_vars, cotangent = (jnp.asarray(a, jnp.float64) for a in (means, log_vars, cotangent))

    def loss(m, s):
      return (fuse(m, s, ddof=ddof, implementation="reference").mean * cotangent).sum()

    out = fuse(means, log_vars, ddof=ddof, implementation="reference")
    return jax.tree.map(np.asarray, (out, jax.grad(loss, (0, 1))(means, log_vars)))


def relative(got, want):
  return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("members,ddof", [(1, 1), (5, 1), (5, 0)])
def test_agrees_with_the_dense_definition_however_sure_the_members_are(noise, members, ddof):
  means, log_vars = beliefs(noise, members)
  cotangent = np.random.default_rng(1).normal(size=means.shape[2:]).astype(np.float32)
  want, want_grads = oracle(means, log_vars, cotangent, ddof)

  got = fuse(means, log_vars, ddof=ddof)
  grads = jax.grad(lambda m, s: (fuse(m, s, ddof=ddof).mean * cotangent).sum(), (0, 1))(
    means, log_vars)

  assert np.abs(got.mean - want.mean).max() <= 1e-5 * np.abs(want.mean).max()
  np.testing.assert_allclose(got.aleatoric, want.aleatoric, rtol=1e-5)
  np.testing.assert_allclose(got.epistemic, want.epistemic, rtol=1e-5, atol=1e-7)
  for name, a, b in zip(("means", "log_vars"), grads, want_grads, strict=True):
    assert relative(a, b) <= 2e-6, (name, relative(a, b))


@pytest.mark.slow
def test_traces_are_differentiable():
  means, log_vars = beliefs(members=4, splats=8, latent=16)
  with jax.enable_x64(True):
    want = jax.jit(jax.grad(
      lambda m, s: fuse(m, s, implementation="reference").epistemic.sum(), (0, 1)))(
      jnp.asarray(means, jnp.float64), jnp.asarray(log_vars, jnp.float64))
  got = jax.jit(jax.grad(lambda m, s: fuse(m, s).epistemic.sum(), (0, 1)))(means, log_vars)
  for a, b in zip(got, want, strict=True):
    assert relative(a, np.asarray(b)) <= 1e-4


def test_agreeing_members_leave_no_epistemic_doubt():
  means, log_vars = beliefs()
  means = np.broadcast_to(means[:, :1], means.shape)
  out = fuse(means, log_vars)
  assert np.abs(out.epistemic).max() < 1e-10
  precision = 1 / np.exp(log_vars).mean(1)
  want = (precision * means[:, 0]).sum(0) / precision.sum(0)
  np.testing.assert_allclose(out.mean, want, rtol=1e-4, atol=1e-5)


def test_order_of_members_and_modalities_does_not_matter():
  means, log_vars = beliefs()
  out = fuse(means, log_vars)
  members, modalities = np.array([3, 1, 4, 0, 2]), np.array([2, 0, 3, 1])
  again = fuse(means[modalities][:, members], log_vars[modalities][:, members])
  for a, b in zip(out, again, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_sure_modality_outweighs_the_others():
  means, log_vars = beliefs(members=1)
  log_vars[2] = -9
  out = fuse(means, log_vars)
  assert np.abs(out.mean - means[2, 0]).max() < 0.05


def test_nothing_but_the_mean_is_computed_when_nobody_looks_at_the_traces():
  means, log_vars = beliefs()

  def flops(f):
    return jax.jit(f).lower(means, log_vars).compile().cost_analysis()["flops"]

  assert flops(lambda m, s: fuse(m, s).mean) < 0.95 * flops(lambda m, s: fuse(m, s))


def test_refuses_what_it_cannot_fuse():
  means, log_vars = beliefs()
  with pytest.raises(ValueError, match="one shape"):
    fuse(means, log_vars[:, :2])
  with pytest.raises(ValueError, match="ddof"):
    fuse(means, log_vars, ddof=5)
  with pytest.raises(ValueError, match="is none of"):
    fuse(means, log_vars, implementation="fast")  # pyright: ignore[reportArgumentType]
