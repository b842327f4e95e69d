"""Official checkpoints against what the official code computes from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uajax import torchfile
from uajax.avatar import Controls, deform, face_motion, init_motion, render
from uajax.camera import from_opengl
from uajax.errors import UserError
from uajax.interop import load_official

pytestmark = pytest.mark.golden
CHECKPOINT = "golden/official/official_chkpnt_fuse_latest.pth"


@pytest.fixture(autouse=True)
def float32():
  """As the values were made. Left alone, a GPU multiplies matrices in TF32, to three digits."""
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def path(shared):
  return shared(CHECKPOINT)


@pytest.fixture(scope="module")
def avatar(path):
  return load_official(path)


@pytest.fixture(scope="module", params=[0, 1])
def frame(request, shared):
  with np.load(shared(f"golden/official/official_frame{request.param}.npz")) as file:
    return dict(file)


@pytest.fixture(scope="module")
def controls(frame):
  return Controls(*(jnp.asarray(x) for x in (
    frame["auds"], frame["au_exp"], frame["f_exp"][0], frame["f_tone"][0], frame["emotion"][0])))


def relative(got, want):
  return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def test_sizes_are_read_from_the_checkpoint(avatar):
  config = avatar.config
  assert (config.members, config.hidden, config.latent, config.features) == (10, 64, 48, 64)
  assert (config.audio_channels, config.audio_width, config.audio_code) == (29, 16, 32)
  assert (config.planes.resolution, config.planes.multiples) == (8, (1, 2, 4, 8))
  assert config.emotion_planes.features == 64
  assert avatar.face.splats.means.shape == (3000, 3) and avatar.mouth.alive.shape == (1000,)
  fresh = jax.eval_shape(lambda key: init_motion(key, config), jax.random.key(0))
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(fresh) == shapes((avatar.face.motion, avatar.mouth.motion))


@pytest.mark.parametrize("stage", ["s1", "s2"])
def test_motion_is_the_official_codes(avatar, frame, controls, stage):
  members = jnp.asarray(frame["members"], jnp.int32) if stage == "s1" else None
  face, mouth = deform(avatar, controls, members)
  for name, got in (("d_xyz", face.d_mean), ("d_rot", face.d_quat), ("d_scale", face.d_scale),
                    ("ambient_aud", face.attention[:, :1]), ("ambient_eye", face.attention[:, 1:]),
                    ("mouth_d_xyz", mouth.d_mean)):
    assert relative(got, frame[f"{stage}_{name}"]) <= 1e-5, name


@jax.jit
def gradients(avatar, controls, cotangents):
  def weigh(layer):
    motion = face_motion(avatar.replace(face=layer), controls)
    return sum((x * c).sum() for x, c in zip(motion, cotangents, strict=False))

  return jax.grad(weigh, allow_int=True)(avatar.face)


def test_gradients_are_the_official_codes(avatar, frame, controls):
  cotangents = frame["cot_d_xyz"], frame["cot_d_rot"], frame["cot_d_scale"]
  layer = gradients(avatar, controls, cotangents)
  g = layer.motion
  ensembles = g["fusion"]["ensembles"]
  got = {
    "audio_net.encoder_conv.0.weight": g["audio"]["conv_0"]["kernel"].transpose(2, 1, 0),
    "audio_att_net.attentionNet.0.weight": g["audio_attention"]["weights"]["kernel"].T,
    "xyz_encoder.grids.2.1": g["planes"]["scale_2"][1].transpose(2, 0, 1)[None],
    "exp_encode_net.net.0.weight": g["expression"]["first"]["kernel"].T,
    "eye_att_net.net.0.weight": g["eye_attention"]["first"]["kernel"].T,
    "emotion_encoder.codebook.1": g["emotion"]["codebook_1"],
    "fuse_net.audio_net.0.fc_var.weight": ensembles["audio"]["log_var_kernel"][0].T,
    "fuse_net.content_net.5.fc1.weight": ensembles["content"]["hidden_kernel"][5].T,
    "fuse_net.style_net.9.fc1.weight": ensembles["style"]["hidden_kernel"][9].T,
    "fuse_net.emotion_net.3.fc_mu.weight": ensembles["emotion"]["mean_kernel"][3].T,
    "fuse_net.fc.weight": g["fusion"]["fuse"]["kernel"].T,
    "rotation_decoder.3.weight": g["rotation_head"]["second"]["kernel"].T,
    "aud_ch_att_net.net.1.weight": g["audio_channels"]["second"]["kernel"].T,
  }
  want = {key.removeprefix("gradp/"): value for key, value in frame.items()
          if key.startswith("gradp/")}
  assert got.keys() == want.keys()
  got["xyz"], want["xyz"] = layer.splats.means, frame["grad_xyz"]
  for name, value in want.items():
    error = np.linalg.norm(np.asarray(got[name]) - value) / np.linalg.norm(value)
    assert error <= 1e-3, (name, error)


def test_pictures_are_the_official_codes(avatar, frame, controls):
  width, height = int(frame["W"]), int(frame["H"])
  camera = from_opengl(frame["c2w"], float(frame["focal"]), width, height)
  background = jnp.asarray(frame["background"].transpose(1, 2, 0))
  image = render(avatar, controls, camera, background, extent="official")
  for name, got in (("face_rgb", image.face), ("face_alpha", image.face_alpha),
                    ("mouth_rgb", image.mouth), ("mouth_alpha", image.mouth_alpha),
                    ("composite", image.composite)):
    off = np.abs(np.asarray(got) - frame[f"out_{name}"].transpose(1, 2, 0)).max(-1)
    # A splat whose alpha is 1/255 to the last bit is drawn by one and skipped by the other.
    assert np.sort(off.ravel())[-3] <= 1e-4, name
    assert off.max() <= 1 / 255, name


@pytest.fixture(scope="module")
def parts(path):
  return torchfile.load(path)


@pytest.mark.parametrize("change,said", [
  (lambda p: p[:2], "fuse stage"),
  (lambda p: (p[0], {k: v for k, v in p[1].items() if "fc_var" not in k}, *p[2:]),
   "lacks fuse_net"),
  (lambda p: (p[0], p[1], p[2], p[3] | {"xyz_decoder.3.weight": np.zeros((4, 64), "f4")}),
   "xyz_decoder.3.weight of the mouth"),
  (lambda p: (p[0], p[1] | {"fuse_net.fc.bias": np.full(64, np.nan, "f4")}, *p[2:]), "not finite"),
  (lambda p: (p[0][:3], *p[1:]), "Gaussians of the face"),
  (lambda p: ((3, *p[0][1:]), *p[1:]), "SH degree 3"),
  (lambda p: (p[0], p[1], (*p[2][:5], p[2][5][:7], *p[2][6:]), p[3]), "raw_scales of the mouth"),
])
def test_what_is_missing_or_misshapen_is_named(parts, tmp_path, change, said):
  torchfile.save(tmp_path / "x.pth", change(parts))
  with pytest.raises(UserError, match=said):
    load_official(tmp_path / "x.pth")
