"""The motion networks: what the savings must not change, and what a user would notice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uajax import types
from uajax.config import Motion, Planes
from uajax.errors import UserError
from uajax.models import motion
from uajax.models.audio import AudioAttention, AudioNet
from uajax.models.codebook import look_up
from uajax.models.fusion import Modality, UncertaintyFusion
from uajax.models.motion import FaceMotion, MouthMotion

SMALL = Motion(
  audio_channels=6, members=3, hidden=8, latent=5, features=8, still_heads=False,
  planes=Planes(features=4, resolution=8, multiples=(1, 2)),
  emotion_planes=Planes(features=4, resolution=4, multiples=(1, 2)))
SPLATS = 12


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def controls(seed=0, channels=6):
  return types.Controls(normal(seed, 8, channels, 16), normal(seed + 1, 6), normal(seed + 2, 64),
                        normal(seed + 3, 64), normal(seed + 4, 128))


@pytest.fixture(scope="module")
def points():
  return 0.05 * normal(9, SPLATS, 3)


@pytest.fixture(scope="module")
def face(points):
  """The network compiled, and its parameters."""
  net = FaceMotion(SMALL)
  return jax.jit(net.apply), jax.jit(net.init)(jax.random.key(0), points, controls())


def test_folding_constants_and_gains_equals_feeding_them_to_every_splat(points):
  net = UncertaintyFusion(dataclasses.replace(SMALL, members=1))
  varying, constant, gain = normal(1, SPLATS, 6), normal(2, 4), normal(3, 6)
  folded = {"a": Modality(varying, gain, constant)}
  fed = {"a": Modality(jnp.concatenate(
    [jnp.broadcast_to(constant[None], (SPLATS, 4)), varying * gain[None]], -1))}
  params = net.init(jax.random.key(0), folded, points)
  ask = jax.jit(net.apply)
  for a, b in zip(jax.tree.leaves(ask(params, folded, points)),
                  jax.tree.leaves(ask(params, fed, points)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_groups_of_parameters_bear_the_names_that_the_optimiser_knows(face, points):
  ask, params = face
  assert set(params["params"]) == {
    "planes", "audio", "audio_attention", "audio_channels", "eye_attention", "expression",
    "acts", "emotion", "fusion", "mean_head", "rotation_head", "scale_head", "doubt_head",
    "familiar"}
  ensembles = params["params"]["fusion"]["ensembles"]
  assert set(ensembles) == {"audio", "content", "style", "emotion"}
  assert all(leaf.shape[0] == SMALL.members for leaf in jax.tree.leaves(ensembles))
  mouth = jax.eval_shape(MouthMotion(SMALL).init, jax.random.key(0), points, controls())
  assert set(mouth["params"]) == {"planes", "audio", "audio_attention", "fusion", "mean_head"}


@pytest.mark.parametrize("modalities, uncertainty", [
  (("audio",), False), (("audio", "content", "style"), True), (("emotion", "audio"), False)])
def test_what_is_left_out_has_no_parameters_and_moves_nothing(points, modalities, uncertainty):
  net = FaceMotion(dataclasses.replace(SMALL, modalities=modalities, uncertainty=uncertainty))
  params = jax.jit(net.init)(jax.random.key(0), points, controls())
  ensembles = params["params"]["fusion"]["ensembles"]
  assert set(ensembles) == set(modalities)
  assert ("emotion" in params["params"]) == ("emotion" in modalities)
  assert all(("log_var_kernel" in one) == uncertainty for one in ensembles.values())
  ask = jax.jit(net.apply)
  before = ask(params, points, controls())
  for name, change in (("content", "f_exp"), ("style", "f_tone"), ("emotion", "emotion")):
    changed = controls()._replace(**{change: 10 * getattr(controls(), change)})
    moved = np.abs(ask(params, points, changed).d_quat - before.d_quat).max()
    assert moved > 1e-6 if name in modalities else moved == 0, name
  assert (np.asarray(before.aleatoric + before.epistemic) > 0).all() == uncertainty
  member = ask(params, points, controls(), jnp.array([1, 0, 0, 2]))
  assert np.abs(member.d_quat - before.d_quat).max() > 1e-6


@pytest.mark.parametrize("uncertainty", [True, False])
def test_a_silent_modality_moves_nothing(points, uncertainty):
  net = FaceMotion(dataclasses.replace(
    SMALL, modalities=("audio", "content"), uncertainty=uncertainty))
  ask = jax.jit(net.apply)
  params = jax.jit(net.init)(jax.random.key(0), points, controls())
  silent = jnp.array([False, True, True, True])
  moves = []
  for f_exp in (controls().f_exp, 10 * controls().f_exp):
    said = controls()._replace(f_exp=f_exp)
    moves.append([ask(params, points, said, None, hush).d_quat
                  for hush in (silent, jnp.zeros(4, bool))])
  (hushed, heard), (hushed_too, heard_too) = moves
  assert np.abs(hushed_too - hushed).max() < 1e-4 * np.abs(heard_too - heard).max()


@pytest.mark.parametrize("modalities", [(), ("content",), ("audio", "audio")])
def test_modalities_without_audio_or_named_twice_are_refused(points, modalities):
  net = MouthMotion(dataclasses.replace(SMALL, modalities=modalities))
  with pytest.raises(UserError, match=r"model\.motion\.modalities"):
    jax.eval_shape(net.init, jax.random.key(0), points, controls())


def test_one_member_hears_only_itself(face, points):
  ask, params = face
  members = jnp.array([2, 0, 1, 0])
  before = ask(params, points, controls(), members)

  def shake(path, leaf):  # every member but those asked
    names = [p.key for p in path]
    if "ensembles" not in names:
      return leaf
    asked = members[["audio", "content", "style", "emotion"].index(names[3])]
    return leaf.at[jnp.arange(SMALL.members) != asked].add(1.0)

  after = ask(jax.tree_util.tree_map_with_path(shake, params), points, controls(), members)
  for a, b in zip(before, after, strict=True):
    np.testing.assert_array_equal(a, b)
  compiled = ask._cache_size()
  other = ask(params, points, controls(), jnp.array([0, 0, 1, 0]))
  assert ask._cache_size() == compiled, "another member must not compile anew"
  assert np.abs(other.d_quat - before.d_quat).max() > 1e-6


def test_equal_members_say_together_what_each_says_alone(face, points):
  ask, params = face

  def level(path, leaf):
    names = [p.key for p in path]
    return jnp.broadcast_to(leaf[:1], leaf.shape) if "ensembles" in names else leaf

  params = jax.tree_util.tree_map_with_path(level, params)
  one = ask(params, points, controls(), jnp.zeros(4, int))
  all_ = ask(params, points, controls())
  for a, b in zip(one, all_, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  assert np.abs(all_.epistemic).max() < 1e-6


def test_gradients_are_finite_where_attention_vanishes(face, points):
  ask, params = face
  params = jax.tree.map(lambda x: x, params)  # a copy to write into
  params["params"]["eye_attention"]["second"]["kernel"] *= 0

  def loss(params, points):
    out = ask(params, points, controls())
    return sum(leaf.sum() for leaf in out)

  grads = jax.jit(jax.grad(loss, (0, 1)))(params, points)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  assert np.abs(grads[1]).max() > 0, "the splats' centres must learn, too"


def test_what_calibrates_the_doubt_learns_from_it_alone_and_moves_nothing(points):
  net = FaceMotion(SMALL)
  params = jax.jit(net.init)(jax.random.key(0), points, controls())

  @jax.jit
  def gradients(params):
    of = lambda name: jax.grad(
      lambda p: getattr(net.apply(p, points, controls()), name).sum())(params)
    return of("aleatoric")["params"], of("d_quat")["params"]

  doubt, moves = gradients(params)
  assert any(leaf.any() for leaf in jax.tree.leaves(doubt.pop("doubt_head")))
  assert not any(leaf.any() for leaf in jax.tree.leaves(doubt))
  assert not any(leaf.any() for leaf in jax.tree.leaves((moves["doubt_head"], moves["familiar"])))


def test_sound_unlike_the_trainings_raises_all_doubt_and_moves_nothing_else(face, points):
  ask, params = face
  familiar = {"mean": jnp.full(SMALL.audio_code, 100.0), "whiten": jnp.eye(SMALL.audio_code)}
  strange = {"params": params["params"] | {"familiar": familiar}}
  before, after = ask(params, points, controls()), ask(strange, points, controls())
  for name in ("aleatoric", "epistemic"):
    ratio = getattr(after, name) / getattr(before, name)
    assert ratio.min() > 100
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
  for name in ("d_mean", "d_quat", "d_scale", "attention"):
    np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_still_heads_start_without_motion(points):
  net = FaceMotion(dataclasses.replace(SMALL, members=1, still_heads=True))
  motion, _ = jax.jit(net.init_with_output)(jax.random.key(0), points, controls())
  assert all(np.abs(x).max() == 0 for x in (motion.d_mean, motion.d_quat, motion.d_scale))


def test_mouth_moves_mostly_up_and_down(points):
  net = MouthMotion(SMALL)
  motion, params = jax.jit(net.init_with_output)(jax.random.key(0), points, controls())
  kernel = params["params"]["mean_head"]["second"]
  kernel["kernel"] = jnp.broadcast_to(kernel["kernel"][:, :1], kernel["kernel"].shape)
  kernel["bias"] = jnp.broadcast_to(kernel["bias"][:1], (3,))
  x, y, z = jax.jit(net.apply)(params, points, controls(), jnp.array([0, 1, 2, 0])).d_mean.T
  np.testing.assert_allclose(x, y / 5, rtol=1e-5)
  np.testing.assert_allclose(z, y / 5, rtol=1e-5)
  assert np.abs(motion.d_quat).max() == np.abs(motion.attention).max() == 0


def test_other_audio_features_than_in_training_are_refused(face, points):
  ask, params = face
  with pytest.raises(UserError, match="audio windows"):
    ask(params, points, controls(channels=7))


@pytest.mark.parametrize("channels,width", [(29, 16), (1024, 2), (80, 20)])
def test_audio_windows_of_any_width_become_one_code(channels, width):
  codes, _ = jax.jit(AudioNet().init_with_output)(jax.random.key(0), normal(0, 8, channels, width))
  code, _ = jax.jit(AudioAttention().init_with_output)(jax.random.key(0), codes)
  assert codes.shape == (8, 32) and code.shape == (32,)
  assert (code <= codes.max(0) + 1e-6).all() and (code >= codes.min(0) - 1e-6).all()


def test_code_book_answers_a_clear_question_with_its_entry():
  book = jnp.eye(4)
  np.testing.assert_allclose(look_up(book, 200 * book[2]), book[2], atol=1e-6)
  np.testing.assert_allclose(look_up(book, jnp.zeros(4)), 0.25)


@pytest.mark.parametrize("acts", (True, False))
def test_action_units_move_splats_though_speech_says_all(points, acts):
  """Lids must not wait for what the fusion leaves of them: each frame's speech names it, too."""
  net = FaceMotion(dataclasses.replace(SMALL, acts=acts))
  params = jax.jit(net.init)(jax.random.key(0), points, controls())
  said = params["params"]["fusion"]["ensembles"]["audio"]
  said["hidden_kernel"] = jnp.zeros_like(said["hidden_kernel"])  # the members heed nothing
  awake, ask = controls(), jax.jit(net.apply)
  asleep = awake._replace(action_units=awake.action_units.at[5].add(2.0))
  shift = np.abs(ask(params, points, asleep).d_mean - ask(params, points, awake).d_mean)
  assert (shift.max() > 1e-5) == acts  # metres


def test_every_splat_heeds_every_action_unit_before_training(points):
  """What a ReLU has shut everywhere stays shut: some avatars would never blink."""
  net = FaceMotion(SMALL)
  begin = jax.jit(lambda key: net.apply(
    net.init(key, points, controls()), points, method="places").eyes)
  for seed in range(4):
    assert (np.asarray(begin(jax.random.key(seed))) > 0).all()


def test_a_gate_that_shut_lets_little_through_and_opens_again():
  """With a ReLU next to no splat heeds an action unit after 3000 steps of the demo."""
  shut = jnp.asarray([-0.5, 0.5])
  np.testing.assert_allclose(motion._ajar(shut, 0.1), [-0.05, 0.5])
  np.testing.assert_array_equal(motion._ajar(shut, 0.0), [0.0, 0.5])  # as imported avatars have it
  pull = jax.grad(lambda x: motion._ajar(x, 0.1).sum())(shut)
  assert 0 < pull[0] < pull[1] == 1


@pytest.mark.parametrize("ajar", [0.0, 0.1])
def test_hidden_units_of_a_gate_that_shut_open_again(ajar):
  """As the above: of the eye gate's 16 one was left, and no lid moved."""
  gate, where = motion.Gate(3, 2, ajar=ajar), jnp.ones((5, 4))
  params = {"first": {"kernel": -jnp.ones((4, 3))}, "second": {"kernel": jnp.ones((3, 2))}}
  answer, back = jax.vjp(lambda params: gate.apply({"params": params}, where), params)
  assert (answer < 0).all() == (ajar > 0)
  pull, = back(jnp.ones_like(answer))
  assert (pull["first"]["kernel"] > 0).all() == (ajar > 0)
