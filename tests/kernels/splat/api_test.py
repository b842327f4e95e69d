"""What a user of `rasterize` relies on: properties first, then the implementations' agreement."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.splat import api, choose, rasterize, tuning
from kernels.splat.cases import CASES, scene

CAPACITY = 8192  # enough for all small cases; one size for all compiles once
SHOWN = ("color", "alpha", "depth", "features")
LEARNT = ("means", "quats", "scales", "opacities", "colors", "features", "viewmats", "Ks",
          "probe")


def tiny(**changes):
  """Three faint splats behind one another, the first nearest, before a 30x22 px camera."""
  arrays = dict(
      means=np.array([[0, 0, 0], [0.05, 0, 0.3], [-0.05, 0.05, 0.6]], np.float32),
      quats=np.eye(4, dtype=np.float32)[[0, 0, 0]], scales=np.full((3, 3), 0.2, np.float32),
      opacities=np.array([0.5, 0.6, 0.7], np.float32), colors=np.eye(3, dtype=np.float32),
      viewmats=np.eye(4, dtype=np.float32)[None], width=30, height=22, capacity=64,
      Ks=np.array([[[40, 0, 15], [0, 40, 11], [0, 0, 1]]], np.float32))
  arrays["viewmats"][0, 2, 3] = 2
  return arrays | changes


def differentiate(inputs, weights=None, **settings):
  """The images, and the gradients of their weighed sum (at random if no weights are given).

  Settings, capacity and sizes are the same wherever they can be: every new set compiles anew.
  """
  inputs = dict(inputs)
  cameras, n = len(inputs["viewmats"]), len(inputs["means"])
  inputs["probe"] = np.zeros((cameras, n, 2), np.float32)
  learnt = {name: jnp.asarray(inputs.pop(name)) for name in LEARNT}
  if weights is None:
    channels = (3, 1, 1, learnt["features"].shape[1])
    weights = {name: jax.random.normal(key, (cameras, inputs["height"], inputs["width"], c))
               for name, key, c in zip(SHOWN, jax.random.split(jax.random.key(0), 4), channels,
                                       strict=True)}
  settings = dict(detached=(1,), extent="exact", implementation="xla",
                  capacity=CAPACITY) | settings
  return _differentiate(learnt, inputs.pop("backgrounds"), weights, **inputs, **settings)


@functools.partial(jax.jit, static_argnames=(
    "width", "height", "sh_degree", "detached", "extent", "implementation", "capacity"))
def _differentiate(learnt, backgrounds, weights, **settings):
  def loss(learnt):
    out = rasterize(**learnt, backgrounds=backgrounds, **settings)
    return sum(jnp.sum(weights[name] * getattr(out, name)) for name in SHOWN), out

  return jax.grad(loss, has_aux=True)(learnt)


def assert_same_gradients(got, expected, rtol=1e-3):
  chex.assert_tree_all_finite(got)
  for name in expected:
    gap = np.linalg.norm(got[name] - expected[name])
    assert gap <= rtol * np.linalg.norm(expected[name]) + 1e-6, (name, gap)


# Properties.


def test_one_splat_shows_its_colour_where_it_stands():
  out = rasterize(**tiny(opacities=np.array([0.5, 0, 0], np.float32)))
  # Its mean projects onto (15, 11), the corner of four pixels: sigma^2 = (40 * 0.2 / 2)^2 + 0.3.
  alpha = 0.5 * np.exp(-0.25 / (16 + 0.3))
  np.testing.assert_allclose(out.alpha[0, 10:12, 14:16, 0], alpha, rtol=1e-5)
  np.testing.assert_allclose(out.color[0, 10, 14], [alpha, 0, 0], rtol=1e-5)
  np.testing.assert_allclose(out.depth[0, 10, 14], 2 * alpha, rtol=1e-5)
  assert out.radii[0, 0] == 13  # 3 sqrt(16.3 + sqrt(0.1)), rounded up


def test_order_matters():
  near, far = rasterize(**tiny()), rasterize(**tiny(colors=np.eye(3, dtype=np.float32)[::-1]))
  assert near.color[0, 11, 15, 0] > 1.5 * near.color[0, 11, 15, 2]
  assert far.color[0, 11, 15, 2] > 1.5 * far.color[0, 11, 15, 0]
  np.testing.assert_allclose(near.alpha, far.alpha)


def test_the_order_of_arrays_does_not_matter():
  inputs = scene(CASES["sharp"]) | dict(capacity=CAPACITY)
  shuffle = np.random.default_rng(0).permutation(CASES["sharp"].splats)
  shuffled = inputs | {k: inputs[k][shuffle] for k in (
      "means", "quats", "scales", "opacities", "colors", "features")}
  a, b = rasterize(**inputs), rasterize(**shuffled)
  for name in SHOWN:
    # Not to the bit: XLA may round the first splats of an array and its last ones differently.
    np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(a.radii[:, shuffle], b.radii)


def test_light_is_neither_made_nor_lost():
  inputs = scene(CASES["sharp"]) | dict(capacity=CAPACITY)
  n = len(inputs["means"])
  # White before white is white; with SH, 0.5 of each channel comes from zeros.
  white = np.zeros_like(inputs["colors"])
  white[:, 0] = 0.5 / 0.28209479
  ones = np.ones((n, 2), np.float32)
  out = rasterize(**inputs | dict(colors=white, features=ones,
                                  backgrounds=np.ones(3, np.float32)))
  np.testing.assert_allclose(out.color, 1, atol=1e-5)
  np.testing.assert_allclose(out.features, np.tile(out.alpha, 2), atol=1e-5)
  assert out.alpha.min() >= 0 and 0.9 < out.alpha.max() <= 1 - 1e-4 + 1e-6


def test_the_background_shows_through_what_is_left():
  inputs = scene(CASES["sharp"]) | dict(capacity=CAPACITY)
  over = rasterize(**inputs)
  bare = rasterize(**inputs | dict(backgrounds=None))
  np.testing.assert_allclose(
      over.color, bare.color + (1 - bare.alpha) * inputs["backgrounds"][None, None, None],
      atol=1e-6)


def test_a_world_twice_as_large_looks_the_same():
  inputs = tiny()
  large = dict(means=2 * inputs["means"], scales=2 * inputs["scales"],
               viewmats=inputs["viewmats"] * np.array([1, 1, 1, 2], np.float32)[None, None])
  a, b = rasterize(**inputs), rasterize(**inputs | large)
  np.testing.assert_allclose(a.color, b.color, atol=1e-5)
  np.testing.assert_allclose(2 * a.depth, b.depth, atol=1e-5)


def test_pixels_do_not_depend_on_the_image_around_them():
  inputs = scene(CASES["sharp"]) | dict(capacity=CAPACITY)
  whole = rasterize(**inputs)
  part = rasterize(**inputs | dict(width=47, height=41))
  np.testing.assert_allclose(part.color, whole.color[:, :41, :47], atol=1e-5)


def test_cameras_are_independent():
  inputs = scene(CASES["sharp"])
  views = np.concatenate([inputs["viewmats"]] * 2)
  views[1, 0, 3] = 0.02
  Ks = np.concatenate([inputs["Ks"]] * 2)
  grounds = np.array([[1, 0, 0], [0, 0, 1]], np.float32)
  both = rasterize(**inputs | dict(viewmats=views, Ks=Ks, backgrounds=grounds),
                   capacity=2 * CAPACITY)
  for i in range(2):
    alone = rasterize(**inputs | dict(viewmats=views[i:i + 1], Ks=Ks[i:i + 1],
                                      backgrounds=grounds[i]), capacity=CAPACITY)
    np.testing.assert_allclose(both.color[i], alone.color[0], atol=1e-6)
    np.testing.assert_array_equal(both.radii[i], alone.radii[0])


# Gradients.


def test_gradient_matches_finite_differences_in_float64():
  with jax.enable_x64(True):
    inputs = {k: jnp.asarray(x, jnp.float64) if isinstance(x, np.ndarray) else x
              for k, x in scene(CASES["smooth"]).items()}
    n = CASES["smooth"].splats
    inputs["probe"] = jnp.zeros((1, n, 2))
    learnt = {k: inputs.pop(k) for k in LEARNT}

    @jax.jit
    def loss(learnt):
      out = rasterize(**learnt, **inputs, implementation="reference")
      assert out.color.dtype == jnp.float64
      return sum(jnp.mean(getattr(out, name)**2) for name in SHOWN)

    grad = jax.jit(jax.grad(loss))(learnt)
    for i, name in enumerate(LEARNT):
      step = 1e-5 * jax.random.normal(jax.random.key(i), learnt[name].shape)
      if name == "viewmats":
        step = step.at[:, 3].set(0)
      slope = (loss(learnt | {name: learnt[name] + step})
               - loss(learnt | {name: learnt[name] - step})) / 2
      np.testing.assert_allclose(jnp.vdot(grad[name], step), slope, rtol=1e-4, err_msg=name)


def test_probe_moves_splats_as_the_principal_point_does():
  grads, _ = differentiate(scene(CASES["sharp"]))
  np.testing.assert_allclose(grads["probe"].sum((0, 1)), grads["Ks"][0, :2, 2], rtol=1e-3)
  assert (jnp.abs(grads["probe"]).sum(-1) > 0).sum() > 50


def test_detached_features_leave_geometry_alone():
  inputs = scene(CASES["sharp"])
  nothing = {name: jnp.zeros((1, 44, 50, c)) for name, c in zip(SHOWN, (3, 1, 1, 2), strict=True)}
  for channel in range(2):  # channel 1 is detached
    weights = nothing | dict(features=nothing["features"].at[..., channel].set(1))
    grads, _ = differentiate(inputs, weights)
    assert jnp.abs(grads["features"][:, channel]).max() > 1e-3
    assert jnp.abs(grads["features"][:, 1 - channel]).max() == 0
    for name in ("means", "quats", "scales", "opacities", "viewmats", "probe"):
      assert (jnp.abs(grads[name]).max() > 1e-4) == (channel == 0), name
  assert api._attached(2, True) == api._attached(2, (0, 1)) == (True,) * 4 + (False,) * 2


# The implementations against each other.


@pytest.mark.parametrize("name,extent,implementation", [
    ("sharp", "exact", "xla"), ("sharp", "exact", "pallas"), ("sharp", "official", "xla"),
    ("crowded", "exact", "xla"), ("crowded", "exact", "pallas")])
def test_implementations_agree_with_the_reference(name, extent, implementation):
  inputs = scene(CASES[name])
  expected, shown = differentiate(inputs, extent=extent, implementation="reference")
  grads, out = differentiate(inputs, extent=extent, implementation=implementation)
  assert out.overflow == 0
  assert jnp.abs(shown.color).max() > 0.1
  chex.assert_trees_all_close(out, shown, atol=1e-4)
  assert_same_gradients(grads, expected)


def test_tiles_of_several_strips_show_the_same(monkeypatch):
  config = tuning.Config(backend="interpret", tile=(16, 8), coarse=(16, 32))
  inputs = scene(CASES["sharp"])
  expected, shown = differentiate(inputs, implementation="xla")
  monkeypatch.setitem(tuning.TUNED, ("cpu", "pallas"), config)
  monkeypatch.setattr(tuning, "LARGE", 0)
  monkeypatch.setattr(tuning, "FEW", 0)
  grads, out = differentiate(inputs, implementation="pallas")
  chex.assert_trees_all_close(out, shown, atol=1e-4)
  assert_same_gradients(grads, expected)


def test_tiles_are_taller_on_large_images():
  config = tuning.pick("gpu", "pallas")
  assert tuning.coarsen(config, 30_000, 1024**2).tile == (16, 32)
  assert tuning.coarsen(config, 30_000, 512**2) == config
  assert tuning.coarsen(config, 1_000_000, 1024**2).tile == (16, 16)
  assert tuning.coarsen(config, 1_000_000, 1000**2) == config


def test_extents_differ_by_what_official_cuts_off():
  inputs = scene(CASES["sharp"]) | dict(capacity=CAPACITY)
  exact, official = (rasterize(**inputs, extent=e).color for e in api.EXTENTS)
  assert 0 < jnp.abs(exact - official).max() < 0.1


@pytest.mark.parametrize("implementation", ("xla", "pallas"))
def test_vmap_draws_each_as_alone(implementation):
  inputs = scene(CASES["sharp"])
  means = np.stack([inputs.pop("means")] * 2)
  means[1, :, 0] += 0.01
  run = functools.partial(differentiate, implementation=implementation)
  mapped = jax.jit(jax.vmap(lambda m: run(inputs | dict(means=m))))(means)
  alone = [run(inputs | dict(means=m)) for m in means]
  chex.assert_trees_all_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *alone), rtol=1e-3,
                              atol=1e-3)


def test_the_same_inputs_give_the_same_bits():
  inputs = scene(CASES["crowded"])
  chex.assert_trees_all_equal(differentiate(inputs), differentiate(inputs))


# Trouble.


def test_broken_splats_are_dropped_and_counted():
  inputs = scene(CASES["sharp"])
  broken = {k: np.array(x) if isinstance(x, np.ndarray) else x for k, x in inputs.items()}
  for i, (name, bad) in enumerate([
      ("means", np.nan), ("quats", np.inf), ("scales", np.inf), ("scales", 1e30),
      ("opacities", np.nan), ("colors", np.nan), ("features", -np.inf)]):
    broken[name].reshape(len(broken["means"]), -1)[i, -1] = bad
  without = inputs | dict(opacities=np.where(np.arange(150) < 7, 0, inputs["opacities"]))
  grads, out = differentiate(broken)
  expected, clean = differentiate(without)
  assert out.dropped == 7 and clean.dropped == 0
  for name in SHOWN:
    np.testing.assert_allclose(getattr(out, name), getattr(clean, name), atol=1e-5)
  assert (out.radii[0, :7] == 0).all()
  chex.assert_tree_all_finite(grads)
  for name in ("means", "quats", "scales", "opacities", "colors", "features"):
    assert jnp.abs(grads[name][:7]).max() == 0
    np.testing.assert_allclose(grads[name][7:], expected[name][7:], rtol=1e-2, atol=1e-3)


def test_odd_splats_are_harmless():
  inputs = scene(CASES["sharp"])
  inputs["quats"][0] = 0
  inputs["scales"][1] = 0
  inputs["scales"][2] = [1e3, 1e-9, 1e-9]  # a needle through the whole world
  inputs["means"][3] = [0, 0, -0.6]  # in the camera
  inputs["means"][4] = [0, 0, -0.55]  # before it, nearer than is drawn
  inputs["means"][5] = [0, 0, -9]  # behind it
  inputs["means"][6] = [900, 0, 0]  # far beside the image
  inputs["opacities"][7] = 0
  inputs["scales"][8] = 100  # everywhere
  _, shown = differentiate(inputs, implementation="reference")
  for implementation in ("xla", "pallas"):
    grads, out = differentiate(inputs, implementation=implementation)
    chex.assert_tree_all_finite((grads, out))
    chex.assert_trees_all_close(out.color, shown.color, atol=1e-4)
  assert out.dropped == 0
  assert (out.radii[0, jnp.array([3, 4, 5, 6, 7])] == 0).all() and out.radii[0, 8] > 0


@pytest.mark.parametrize("implementation", ("reference", "xla"))
def test_nothing_to_draw(implementation):
  n = np.zeros
  inputs = tiny(means=n((0, 3)), quats=n((0, 4)), scales=n((0, 3)), opacities=n(0),
                colors=n((0, 3)), backgrounds=np.array([0.2, 0.3, 0.4]))
  out = rasterize(**inputs, implementation=implementation)
  np.testing.assert_allclose(out.color, jnp.broadcast_to(
      jnp.array([0.2, 0.3, 0.4])[None, None, None], (1, 22, 30, 3)), rtol=1e-6)
  assert out.radii.shape == (1, 0) and out.features.shape == (1, 22, 30, 0)
  assert out.alpha.max() == out.overflow == out.dropped == 0


def test_what_does_not_fit_is_counted_and_room_is_made():
  inputs = scene(CASES["sharp"])
  small = rasterize(**inputs, capacity=64)
  chex.assert_tree_all_finite(small)
  enough = rasterize(**inputs, capacity=64 + int(small.overflow))
  assert small.overflow > 0 and enough.overflow == 0
  assert jnp.abs(enough.color - small.color).max() > 0.1
  measured = rasterize(**inputs)
  assert measured.overflow == 0
  np.testing.assert_allclose(measured.color, enough.color, atol=1e-6)


def test_capacity_is_measured_in_a_gradient_and_guessed_under_jit():
  inputs = tiny(capacity=None)

  def loss(opacities):
    out = rasterize(**inputs | dict(opacities=opacities))
    return out.color.mean(), out.overflow

  slope, measured = jax.grad(loss, has_aux=True)(jnp.asarray(inputs["opacities"]))
  _, guessed = jax.jit(loss)(inputs["opacities"])
  assert measured == guessed == 0
  assert jnp.abs(slope).min() > 0


@pytest.mark.parametrize("change", [
    dict(quats=np.zeros((3, 3))), dict(opacities=np.zeros((3, 1))), dict(colors=np.zeros((2, 3))),
    dict(sh_degree=2, colors=np.zeros((3, 4, 3))), dict(sh_degree=4, colors=np.zeros((3, 25, 3))),
    dict(Ks=np.zeros((2, 3, 3))), dict(backgrounds=np.zeros((2, 3))), dict(width=0),
    dict(extent="whole"), dict(implementation="cuda"), dict(capacity=0), dict(detached=(0,)),
    dict(features=np.zeros((2, 1))), dict(probe=np.zeros((3, 2)))])
def test_wrong_use_is_said_at_once(change):
  with pytest.raises(ValueError, match=r"\w+ .*\d|=|\w+"):
    rasterize(**tiny(**change))


def test_the_guess_of_room_grows_slowly_with_large_scenes():
  guessed = []

  def pairs(n, size):
    """A splat and camera."""
    shapes = [(n, 3), (n, 4), (n, 3), (n,), (n, 3), (n, 0), (2, 4, 4), (2, 3, 3)]
    settings = dict(width=size, height=size, sh_degree=None, extent="exact")

    def guess(*splats, viewmats, Ks):
      guessed.append(api._capacity(splats, viewmats, Ks, None, tuning.pick("cpu", "xla"), settings))

    *splats, viewmats, Ks = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    jax.eval_shape(guess, *splats, viewmats=viewmats, Ks=Ks)
    return guessed[-1] / (2 * n)

  assert 32 <= pairs(1000, 512) < 40
  assert 4 <= pairs(2_000_000, 512) < 5.2
  assert 1 <= pairs(2_000_000, 8) < 1.3  # a single tile


def test_says_what_draws_and_why():
  assert choose() == ("xla", "the default on cpu")
  inputs = tiny()
  np.testing.assert_array_equal(rasterize(**inputs).color,
                                rasterize(**inputs, implementation="xla").color)


def test_falls_back_to_plain_xla_with_one_warning(monkeypatch):
  # Here the kernels for NVIDIA cards cannot compile, as on a card too old for them.
  monkeypatch.setitem(tuning.DEFAULT, "cpu", "pallas")
  monkeypatch.setitem(tuning.TUNED, ("cpu", "pallas"), tuning.pick("gpu", "pallas"))
  api._choose.cache_clear()
  try:
    with pytest.warns(RuntimeWarning, match="plain XLA draws instead") as caught:
      first = jax.jit(lambda: rasterize(**tiny()))()
      second = rasterize(**tiny())
      implementation, reason = choose()
  finally:
    api._choose.cache_clear()
  assert len(caught) == 1
  assert implementation == "xla" and "Pallas kernels do not compile here: " in reason
  chex.assert_trees_all_close(first, second)
  chex.assert_trees_all_close(second, rasterize(**tiny(implementation="xla")))


def test_what_compiles_is_the_same_within_shard_map(monkeypatch):
  # As on a card: several devices that train ask from within.
  monkeypatch.setitem(tuning.TUNED, ("cpu", "pallas"), tuning.pick("gpu", "pallas"))
  mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
  told = [api._trial("cpu")]

  def body(x):
    told.append(api._trial("cpu"))
    return x

  spec = jax.sharding.PartitionSpec("batch")
  jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(
      jnp.zeros(4))
  assert told[0] and told[1] == told[0]


def test_many_splats_are_projected_in_pieces_as_they_are_at_once(monkeypatch):
  seen = []

  def of(some):
    means, opacities = some
    seen.append(len(means))
    return {"far": jnp.linalg.norm(means, axis=1), "seen": means[:, :2] * opacities[:, None]}

  def differentiate(splats):
    value = lambda splats: sum(jnp.sum(x**2) for x in jax.tree.leaves(api._in_pieces(of, splats)))
    return api._in_pieces(of, splats), jax.grad(value)(splats)

  splats = jax.random.normal(jax.random.key(0), (24, 3)), jnp.linspace(0, 1, 24)
  at_once = differentiate(splats)
  assert set(seen) == {24}
  monkeypatch.setattr(api, "MANY", 24)
  seen.clear()
  chex.assert_trees_all_close(differentiate(splats), at_once, rtol=1e-6)
  assert set(seen) == {24 // api.PIECES}
