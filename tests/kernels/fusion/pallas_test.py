"""The fusion's Pallas kernels: they fuse as the definition does, and lower without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.fusion import api, bench, fuse, fuse_answers, pallas

HAS_GPU = any(d.platform == "gpu" for d in jax.devices())


@functools.partial(jax.jit, static_argnames=("count", "ddof", "implementation"))
def slopes(means, log_vars, count, ddof, implementation):
  def looks(means, log_vars):
    out = fuse(means, log_vars, ddof=ddof, implementation=implementation)
    return sum(jnp.sum(jnp.sin(x)) for x in out[:count]), out

  return jax.grad(looks, (0, 1), has_aux=True)(means, log_vars)


def gradients(means, log_vars, ddof=1, implementation=None):
  """Of something that looks at the mean alone, and of something that looks at all."""
  one, out = slopes(means, log_vars, 1, ddof, implementation)
  return out, one, slopes(means, log_vars, 3, ddof, implementation)[0]


# A block of splats and a bit, then less than one; many modalities, then many members.
@pytest.mark.parametrize("modalities,members,splats,latent,ddof,noise", [
  (4, 2, 130, 4, 1, 0.0), (2, 3, 40, 8, 0, -4.0)])
def test_fuses_as_plain_jax_does(modalities, members, splats, latent, ddof, noise):
  means, log_vars = bench.beliefs(modalities, members, splats, latent)
  log_vars = 0.5 * log_vars + noise
  expected = gradients(means, log_vars, ddof=ddof, implementation="xla")
  got = gradients(means, log_vars, ddof=ddof, implementation="pallas")
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_members_that_agree_leave_no_epistemic_doubt():
  means = jnp.broadcast_to(jnp.arange(8.0).reshape(2, 1, 1, 4), (2, 3, 5, 4))
  out = fuse(means, jnp.zeros((2, 3, 5, 4)), implementation="pallas")
  np.testing.assert_allclose(out.mean, np.tile(np.arange(4) + 2.0, (5, 1)), rtol=1e-6)
  np.testing.assert_allclose(out.epistemic, 0, atol=1e-10)


# A block and a bit, then two whole blocks, whose gradients may take the answers' place.
@pytest.mark.parametrize("splats,implementation", [(130, "xla"), (130, "pallas"), (256, "pallas")])
def test_answers_are_fused_as_means_and_clipped_log_variances_are(splats, implementation):
  means, log_vars = bench.beliefs(3, 3, splats, 4)
  answers = list(jnp.concatenate([means, 3 * log_vars], -1).swapaxes(2, 3))

  def joint(answers):
    out = fuse_answers(answers, limit=2.0, ddof=0, implementation=implementation)
    return jnp.sum(jnp.sin(out.mean)), out

  def apart(answers):
    means, log_vars = jnp.split(jnp.stack(answers).swapaxes(2, 3), 2, -1)
    out = fuse(means, jnp.clip(log_vars, -2, 2), ddof=0, implementation="xla")
    return jnp.sum(jnp.sin(out.mean)), out

  (grads, out), (expected_grads, expected) = (
    jax.jit(jax.grad(each, has_aux=True))(answers) for each in (joint, apart))
  assert np.mean(np.abs(3 * log_vars) > 2) > 0.1  # of them nothing is learnt
  for a, b in zip((*out, *grads), (*expected, *expected_grads), strict=True):
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
  assert not np.any(np.asarray(grads)[:, :, 4:][np.abs(np.asarray(answers)[:, :, 4:]) > 2])


def test_answers_of_unlike_shapes_are_refused():
  for answers in ([jnp.zeros((2, 4, 3)), jnp.zeros((2, 4, 5))], [jnp.zeros((2, 3, 3))]):
    with pytest.raises(ValueError, match="want answers of one shape"):
      fuse_answers(answers)


@pytest.mark.parametrize("mapped", (False, True))
def test_lowers_for_cuda_without_a_gpu(mapped):
  def both(*answers):
    mean, vjp = jax.vjp(lambda *x: pallas.fuse(x, 1, 10.0)[0], *answers)
    return pallas.fuse(answers, 1, 10.0), vjp(mean)

  shape = jax.ShapeDtypeStruct((2, 4, 32, 200) if mapped else (4, 32, 200), jnp.float32)
  run = jax.jit(jax.vmap(both) if mapped else both)
  text = run.trace(*[shape] * 3).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("mosaic_gpu_v2") >= 3


def test_what_the_kernels_do_not_hold_is_refused_or_left_to_plain_jax(monkeypatch):
  means, log_vars = bench.beliefs(2, 3, 4, 5)
  monkeypatch.setattr(pallas, "MOST_UNKNOWNS", 3)
  with pytest.raises(ValueError, match="take implementation='xla'"):
    fuse(means, log_vars, implementation="pallas")
  monkeypatch.setattr(api, "choose", lambda: ("pallas", "for the test"))
  np.testing.assert_array_equal(
    fuse(means, log_vars).mean, fuse(means, log_vars, implementation="xla").mean)


def test_a_gpu_whose_compiler_fails_is_warned_of_once(monkeypatch):
  monkeypatch.setattr(api, "_trial", lambda: "no such instruction")
  api._choose.cache_clear()
  with pytest.warns(RuntimeWarning, match="no such instruction"):
    chosen, reason = api._choose("gpu")
  assert chosen == "xla" and "no such instruction" in reason
  api._choose.cache_clear()


@pytest.mark.device
@pytest.mark.skipif(not HAS_GPU, reason="no GPU: the Mosaic kernels run on none but NVIDIA's")
@pytest.mark.parametrize("modalities", (4, 3))
@pytest.mark.parametrize("noise", (0.0, -9.0))
def test_fuses_right_on_a_gpu(modalities, noise):
  means, log_vars = bench.beliefs(modalities, 10, 1000, 48)
  log_vars = 0.5 * log_vars + noise
  assert api.choose()[0] == "pallas"
  # By the host: a GPU's compiler takes a minute or more for what a program this flat unrolls to.
  with jax.default_device(jax.devices("cpu")[0]):
    expected = gradients(np.asarray(means), np.asarray(log_vars), implementation="xla")
  got, again = (gradients(means, log_vars) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, got, again)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)
