"""Exports: what another program reads is what the avatar is."""

import json
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

from kernels.splat import rasterize
from tests.uajax import tiny_run
from uajax import export
from uajax.avatar import composite, deform, render
from uajax.errors import UserError
from uajax.types import Camera, Controls


@pytest.fixture(scope="module")
def avatar():
  return tiny_run.avatar()


def read_ply(path):
  """A reader of its own: header by lines, rows by the declared properties."""
  head, _, body = path.read_bytes().partition(b"end_header\n")
  lines = head.decode("ascii").splitlines()
  assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
  count = next(int(line.split()[2]) for line in lines if line.startswith("element vertex"))
  names = [line.split()[2] for line in lines if line.startswith("property float")]
  table = np.frombuffer(body, "<f4").reshape(count, len(names))
  return {name: table[:, i] for i, name in enumerate(names)}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_what_was_exported_comes_back_bit_for_bit(avatar, tmp_path, kind):
  path = tmp_path / f"avatar.{kind}"
  getattr(export, f"write_{kind}")(path, avatar)
  back = getattr(export, f"load_{kind}")(path)
  assert jax.tree.structure(back) == jax.tree.structure(avatar)
  jax.tree.map(np.testing.assert_array_equal, back, avatar)
  assert back.config == avatar.config
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_ply_holds_the_living_splats_as_viewers_read_them(avatar, tmp_path):
  ply = read_ply(export.write_ply(tmp_path / "face.ply", avatar.face))
  splats = jax.tree.map(lambda x: np.asarray(x)[:14], avatar.face.splats)
  assert list(ply)[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
  np.testing.assert_array_equal(np.stack([ply[a] for a in "xyz"], -1), splats.means)
  scales = np.stack([ply[f"scale_{i}"] for i in range(3)], -1)  # viewers apply exp
  np.testing.assert_allclose(np.exp(scales), np.log1p(np.exp(splats.raw_scales)), rtol=1e-5)
  np.testing.assert_allclose(ply["opacity"], splats.logit_opacities)  # viewers apply sigmoid
  quats = np.stack([ply[f"rot_{i}"] for i in range(4)], -1)
  np.testing.assert_allclose(np.linalg.norm(quats, axis=-1), 1, rtol=1e-5)
  np.testing.assert_allclose(quats[:, 0] * np.linalg.norm(splats.quats, axis=-1),
                             splats.quats[:, 0], rtol=1e-5)  # fmt: skip
  # channel-major: all eight of red, then green, then blue
  np.testing.assert_array_equal(ply["f_rest_8"], splats.sh_rest[:, 0, 1])
  np.testing.assert_array_equal(ply["f_rest_23"], splats.sh_rest[:, 7, 2])


def test_a_ply_is_drawn_as_the_avatar_by_what_viewers_do(avatar, tmp_path):
  plyfile = pytest.importorskip("plyfile")
  rng = np.random.default_rng(3)
  take = avatar.config
  shapes = (8, take.audio_channels, take.audio_width), (6,), (64,), (64,), (128,)
  controls = Controls(*(rng.normal(size=s).astype(np.float32) for s in shapes))
  viewmat, K = np.eye(4, dtype=np.float32), np.float32([[90, 0, 24], [0, 90, 24], [0, 0, 1]])
  viewmat[2, 3] = 0.3
  behind = rng.uniform(0, 1, (48, 48, 3)).astype(np.float32)
  motion = deform(avatar, controls)
  drawn = {}
  for name in ("face", "mouth"):
    path = export.write_ply(tmp_path / f"{name}.ply", getattr(avatar, name), getattr(motion, name))
    column = plyfile.PlyData.read(str(path))["vertex"]
    many = lambda stem, count, column=column: np.stack(
      [column[f"{stem}_{i}"] for i in range(count)], -1)
    rest = many("f_rest", 24).reshape(-1, 3, 8).transpose(0, 2, 1)
    drawn[name] = rasterize(
      np.stack([column[axis] for axis in "xyz"], -1), many("rot", 4), np.exp(many("scale", 3)),
      1 / (1 + np.exp(-column["opacity"])), np.concatenate([many("f_dc", 3)[:, None], rest], 1),
      viewmat[None], K[None], 48, 48, sh_degree=2)  # fmt: skip
  face, mouth = drawn["face"], drawn["mouth"]
  got = composite(face.color[0], face.alpha[0], mouth.color[0], mouth.alpha[0], behind)
  want = render(avatar, controls, Camera(viewmat, K), behind).composite
  assert np.abs(np.asarray(got - want)).max() * 255 <= 1
  assert np.abs(np.asarray(got) - behind).max() > 0.2  # the head is in the picture
  rested = plyfile.PlyData.read(str(export.write_ply(tmp_path / "rest.ply", avatar.face)))["vertex"]
  for name, least in (("x", 1e-3), ("rot_0", 1e-2), ("scale_0", 1e-2)):
    moved = plyfile.PlyData.read(str(tmp_path / "face.ply"))["vertex"][name]
    assert np.abs(moved - rested[name]).max() > least


def test_log_softplus_is_right_far_below_zero():
  raw = np.array([-200.0, -30.1, -29.9, -5.0, 0.0, 50.0])
  want = [-200.0, -30.1, -29.9, np.log(np.log1p(np.exp(-5.0))), np.log(np.log(2)), np.log(50.0)]
  np.testing.assert_allclose(export.log_softplus(raw), want, rtol=1e-6)


def test_a_layer_without_splats_is_no_ply(avatar, tmp_path):
  dead = avatar.face.replace(alive=avatar.face.alive & False)
  with pytest.raises(UserError, match="no splats"):
    export.write_ply(tmp_path / "x.ply", dead)
  assert not list(tmp_path.iterdir())


def spoil(arrays, meta):
  means = "face/splats/means"
  yield {k: v for k, v in arrays.items() if k != means}, meta, "lacks face/splats/means"
  yield arrays | {means: arrays[means][:, :2]}, meta, "means is float32"
  yield arrays | {means: arrays[means] * np.nan}, meta, "NaN"
  yield arrays | {means: arrays[means].astype(np.float64)}, meta, "float64"
  yield arrays | {"face/more": arrays[means]}, meta, "no avatar has"
  other = json.loads(meta)
  yield arrays, json.dumps(other | {"version": 9}), "format 9"
  yield arrays, json.dumps(other | {"config": {}}), "does not fit"
  yield arrays, json.dumps(other | {"sh_degree": 7}), "SH degree 7"
  yield arrays, "{", "meta is damaged"


def test_a_spoilt_archive_is_refused_in_one_line(avatar, tmp_path):
  path = export.write_npz(tmp_path / "a.npz", avatar)
  with np.load(path) as archive:
    arrays = {name: archive[name] for name in archive.files}
  meta = str(arrays.pop("meta"))
  for changed, said, words in spoil(arrays, meta):
    np.savez(path, meta=np.array(said), **changed)
    with pytest.raises(UserError, match=words) as caught:
      export.load_npz(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_is_refused(tmp_path, content):
  path = tmp_path / "a.npz"
  path.write_bytes(content)
  with pytest.raises(UserError, match="no avatar archive"):
    export.load_npz(path)
  path.rename(tmp_path / "a.safetensors")
  with pytest.raises(UserError, match="no avatar archive"):
    export.load_safetensors(tmp_path / "a.safetensors")


def test_objects_in_an_archive_are_never_unpickled(avatar, tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, meta=np.array("{}"), x=np.array([{"a": 1}], object))
  with pytest.raises(UserError, match="no avatar archive"):
    export.load_npz(path)


SCRIPT = """
import sys
import jax, jax.export, numpy as np
program = jax.export.deserialize(open(sys.argv[1], "rb").read())
given = dict(np.load(sys.argv[2]))
pictures, overflow = program.call(*(given[str(i)] for i in range(8)))
assert not any(name.split(".")[0] in ("uajax", "kernels", "flax") for name in sys.modules)
np.savez(sys.argv[3], pictures=pictures, overflow=overflow)
"""


def test_a_program_draws_the_same_frames_where_jax_alone_is_installed(avatar, tmp_path):
  path = export.write_stablehlo(tmp_path / "avatar.stablehlo", avatar, 48)
  program = jax.export.deserialize(path.read_bytes())
  assert program.platforms == ("cpu", "cuda", "tpu")
  assert 0 < export.pace(path, 2) < 10  # of any number of frames
  rng = np.random.default_rng(0)
  take = avatar.config
  shapes = (8, take.audio_channels, take.audio_width), (6,), (64,), (64,), (128,)
  frames = 3
  controls = Controls(*(rng.normal(size=(frames, *s)).astype(np.float32) for s in shapes))
  viewmats = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
  viewmats[:, 2, 3] = 0.3 + 0.05 * np.arange(frames)
  intrinsics = np.float32([[90, 0, 24], [0, 90, 20], [0, 0, 1]])
  intrinsics = np.tile(intrinsics, (frames, 1, 1))
  behind = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
  given = (*controls, viewmats, intrinsics, behind)
  np.savez(tmp_path / "given.npz", **{str(i): x for i, x in enumerate(given)})
  # Isolated, and where the checkout is not: only installed packages are found.
  subprocess.run([sys.executable, "-I", "-c", SCRIPT, path, "given.npz", "out.npz"], check=True,
                 cwd=tmp_path)
  with np.load(tmp_path / "out.npz") as out:
    assert not out["overflow"].any() and len(out["overflow"]) == frames
    for i in range(frames):
      image = render(avatar, jax.tree.map(lambda x, i=i: x[i], controls),
                     Camera(viewmats[i], intrinsics[i]), behind.astype(np.float32) / 255)
      want = np.round(np.asarray(image.composite) * 255)
      assert np.abs(out["pictures"][i] - want).max() <= 1
      assert np.abs(want - behind).max() > 50  # the head is in the picture


def test_a_program_of_a_size_out_of_reach_is_refused(avatar, tmp_path):
  with pytest.raises(UserError, match="--size 8 is out of reach"):
    export.write_stablehlo(tmp_path / "x", avatar, 8)
