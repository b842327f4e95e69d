"""Layers, the composite and the avatar as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uajax.avatar import Avatar, Controls, Layer, composite, deform, init_motion, know, render
from uajax.camera import from_opengl
from uajax.config import Motion, Planes
from uajax.render import render_layer
from uajax.types import Splats

CONFIG = Motion(
  audio_channels=4, members=2, hidden=8, latent=4, features=8, still_heads=False,
  planes=Planes(features=4, resolution=4, multiples=(1,)),
  emotion_planes=Planes(features=4, resolution=4, multiples=(1,)))
WIDTH, HEIGHT, COUNT = 24, 16, 20


def splats(seed=0, count=COUNT):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return Splats(
    means=0.015 * normal(count, 3), raw_scales=jnp.full((count, 3), -6.0), quats=normal(count, 4),
    logit_opacities=jnp.full(count, 2.0), sh_dc=normal(count, 1, 3), sh_rest=normal(count, 8, 3))


@pytest.fixture(scope="module")
def camera():
  pose = np.eye(4)
  pose[2, 3] = 0.6
  return from_opengl(pose, 100.0, WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def avatar():
  face, mouth = init_motion(jax.random.key(0), CONFIG)
  alive = jnp.ones(COUNT, bool)
  return Avatar(Layer(splats(0), alive, face), Layer(splats(1), alive, mouth), CONFIG)


@pytest.fixture(scope="module")
def controls():
  normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  return Controls(normal(0, 8, 4, 16), normal(1, 6), normal(2, 64), normal(3, 64), normal(4, 128))


def draw(camera, layer=None, alive=None, motion=None, **kwargs):
  alive = jnp.ones(COUNT, bool) if alive is None else alive
  return render_layer(layer or splats(), alive, motion, camera, WIDTH, HEIGHT,
                      background=jnp.zeros(3), implementation="reference", **kwargs)


def test_face_covers_mouth_covers_background():
  one = jnp.ones((1, 4, 1))
  red, green, blue = (one * jnp.array([[c]]) for c in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]))
  face_alpha = jnp.array([1.0, 0, 0, 0.5])[None, :, None]
  mouth_alpha = jnp.array([1.0, 1, 0, 0.5])[None, :, None]
  out = composite(red * face_alpha, face_alpha, green * mouth_alpha, mouth_alpha, blue)
  np.testing.assert_allclose(
    out[0], [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.25, 0.25]], atol=1e-6)


def test_dead_slots_are_not_drawn_whatever_they_hold(camera):
  half = np.arange(COUNT) < COUNT // 2
  some = jax.tree.map(lambda x: x[: COUNT // 2], splats())
  want = draw(camera, some, jnp.ones(COUNT // 2, bool))
  got = draw(camera, alive=jnp.asarray(half))
  np.testing.assert_allclose(got.color, want.color, atol=1e-6)
  assert (got.radii[COUNT // 2 :] == 0).all()


def test_muting_bands_equals_having_none(camera):
  bare = splats()._replace(sh_rest=jnp.zeros((COUNT, 8, 3)))
  first = splats()._replace(sh_rest=splats().sh_rest.at[:, 3:].set(0))
  want = [draw(camera, layer).color for layer in (bare, first, splats())]
  for degree, picture in enumerate(want):
    np.testing.assert_allclose(draw(camera, active_sh=jnp.asarray(degree)).color, picture,
                               atol=1e-6)
  assert np.abs(want[0] - want[2]).max() > 1e-3


def test_motion_is_added_to_the_raw_parameters(camera, avatar, controls):
  motion = deform(avatar, controls).face
  moved = avatar.face.splats._replace(
    means=avatar.face.splats.means + motion.d_mean,
    quats=avatar.face.splats.quats + motion.d_quat,
    raw_scales=avatar.face.splats.raw_scales + motion.d_scale)
  got, want = draw(camera, avatar.face.splats, motion=motion), draw(camera, moved)
  np.testing.assert_array_equal(got.color, want.color)
  assert np.abs(got.color - draw(camera, avatar.face.splats).color).max() > 1e-3


def test_probe_moves_splats_by_pixels(camera):
  grad = jax.grad(lambda p: jnp.square(draw(camera, probe=p).color).sum())(jnp.zeros((COUNT, 2)))
  assert grad.shape == (COUNT, 2) and np.abs(grad).max() > 0


def test_a_frame_has_all_its_layers(avatar, controls, camera):
  background = jax.random.uniform(jax.random.key(0), (HEIGHT, WIDTH, 3))
  image = render(avatar, controls, camera, background)
  want = composite(image.face, image.face_alpha, image.mouth, image.mouth_alpha, background)
  np.testing.assert_allclose(image.composite, want, atol=1e-6)
  assert image.uncertainty.shape == (HEIGHT, WIDTH)
  assert (image.uncertainty[np.asarray(image.face_alpha[..., 0]) > 0.1] > 0).all()
  empty = np.asarray(image.face_alpha + image.mouth_alpha)[..., 0] == 0
  assert empty.any()
  np.testing.assert_allclose(image.composite[empty], background[empty], atol=1e-6)


def test_what_is_known_of_the_places_or_not_asked_for_changes_no_picture(avatar, controls, camera):
  background = jnp.full((HEIGHT, WIDTH, 3), 0.5)
  run = jax.jit(lambda known, doubt: render(avatar, controls, camera, background, known=known,
                                            doubt=doubt), static_argnums=1)
  whole = run(None, True)
  known = run(know(avatar), True)
  for a, b in zip(known, whole, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  bare = run(know(avatar), False)
  np.testing.assert_allclose(bare.composite, whole.composite, atol=1e-6)
  assert np.abs(whole.uncertainty).max() > 0 == np.abs(bare.uncertainty).max()


@pytest.mark.slow
def test_drawing_compiles_for_many_frames_at_once(avatar, controls, camera):
  background = jnp.zeros((HEIGHT, WIDTH, 3))
  many = jax.tree.map(lambda x: jnp.stack([x, x]), controls)
  shoot = jax.jit(lambda c: render(avatar, c, camera, background, capacity=1024).composite)
  pictures = jax.jit(jax.vmap(shoot))(many)
  np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-6)
  np.testing.assert_allclose(pictures[0], shoot(controls), atol=1e-5)


def test_uncertainty_and_attention_pull_at_no_geometry(avatar, controls, camera):
  def loss(means):
    layer = avatar.face.replace(splats=avatar.face.splats._replace(means=means))
    features = jnp.ones((COUNT, 3))
    return draw(camera, layer.splats, features=features, detached=True).features.sum()

  assert np.abs(jax.grad(loss)(avatar.face.splats.means)).max() == 0
