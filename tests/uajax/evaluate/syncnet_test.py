"""SyncNet: against plain NumPy on made-up weights, in the layout of the published file."""

import numpy as np
import pytest

from uajax import torchfile
from uajax.errors import UserError
from uajax.evaluate import syncnet

PLACES = (0, 4, 8, 11, 14, 18)
HEARING = ((64, 1, 3, 3), (192, 64, 3, 3), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3),
           (512, 256, 5, 4))  # fmt: skip
SEEING = ((96, 3, 5, 7, 7), (256, 96, 1, 5, 5), (256, 256, 1, 3, 3), (256, 256, 1, 3, 3),
          (256, 256, 1, 3, 3), (512, 256, 1, 6, 6))  # fmt: skip

# Every third coefficient of three rows.
GOLDEN = [
  [19.290, -18.767, 15.409, -48.370, -4.340],
  [20.104, 14.305, -38.032, -17.050, 0.919],
  [20.446, 41.076, -1.976, -30.300, -28.877],
]


@pytest.fixture(scope="module")
def tensors():
  rng = np.random.default_rng(0)
  out = {}

  def norm(name, size):
    out[f"{name}.weight"] = rng.uniform(0.5, 1.5, size)
    out[f"{name}.bias"], out[f"{name}.running_mean"] = rng.normal(size=(2, size)) * 0.1
    out[f"{name}.running_var"] = rng.uniform(0.5, 1.5, size)
    out[f"{name}.num_batches_tracked"] = np.array(7)

  for branch, shapes in (("aud", HEARING), ("lip", SEEING)):
    for place, shape in zip(PLACES, shapes, strict=True):
      fan = np.prod(shape[1:])
      out[f"netcnn{branch}.{place}.weight"] = rng.normal(size=shape) * (2 / fan) ** 0.5
      out[f"netcnn{branch}.{place}.bias"] = 0.1 * rng.normal(size=shape[0])
      norm(f"netcnn{branch}.{place + 1}", shape[0])
    for place, shape in ((0, (512, 512)), (3, (1024, 512))):
      out[f"netfc{branch}.{place}.weight"] = rng.normal(size=shape) / 20
      out[f"netfc{branch}.{place}.bias"] = 0.1 * rng.normal(size=shape[0])
    norm(f"netfc{branch}.1", 512)
  return {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in out.items()}


@pytest.fixture(scope="module")
def params(tensors, tmp_path_factory):
  path = tmp_path_factory.mktemp("syncnet") / syncnet.FILE
  torchfile.save(path, tensors)
  return syncnet.load(path)


def norm(t, name, x):
  """In evaluation mode; channels first."""
  shape = (-1, *[1] * (x.ndim - 1))
  scale, shift, mean, var = (
    t[f"{name}.{n}"].reshape(shape) for n in ("weight", "bias", "running_mean", "running_var")
  )
  return (x - mean) / np.sqrt(var + 1e-5) * scale + shift


def windows(x, size, stride, padding, fill):
  x = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2), constant_values=fill)
  view = np.lib.stride_tricks.sliding_window_view(x, size, (1, 2))
  return view[:, :: stride[0], :: stride[1]]


def convolve(kernel, bias, x, stride, padding):
  """[c h w] -> [o h w]."""
  seen = windows(x, kernel.shape[2:], (stride, stride), padding, 0)
  return np.einsum("chwij,ocij->ohw", seen, kernel, optimize=True) + bias[:, None, None]


def pool(x, size, stride, padding=0):
  return windows(x, size, stride, padding, -np.inf).max((-1, -2))


def connect(t, branch, x):
  x = t[f"netfc{branch}.0.weight"] @ x.reshape(-1) + t[f"netfc{branch}.0.bias"]
  x = np.maximum(norm(t, f"netfc{branch}.1", x), 0)
  return t[f"netfc{branch}.3.weight"] @ x + t[f"netfc{branch}.3.bias"]


def test_sound_is_heard_as_by_plain_numpy(params, tensors):
  sound = 3 * np.random.default_rng(1).normal(size=(2, 13, 20)).astype(np.float32)
  found = np.asarray(syncnet.hear(params, sound))
  x = sound[1][None]
  for place in PLACES:
    name = f"netcnnaud.{place}"
    x = convolve(tensors[f"{name}.weight"], tensors[f"{name}.bias"], x, 1, int(place < 18))
    x = np.maximum(norm(tensors, f"netcnnaud.{place + 1}", x), 0)
    if place == 4:
      x = pool(x, (3, 3), (1, 2))
    if place == 14:
      x = pool(x, (3, 3), (2, 2))
  assert x.shape == (512, 1, 1)
  np.testing.assert_allclose(found[1], connect(tensors, "aud", x), rtol=1e-3, atol=1e-4)


def test_faces_are_seen_as_by_plain_numpy(params, tensors):
  faces = np.random.default_rng(2).integers(0, 256, (6, 224, 224, 3), np.uint8)
  found = np.asarray(syncnet.see(params, faces))
  assert found.shape == (2, 1024)
  x = faces[1:, :, :, ::-1].astype(np.float32)  # blue first
  kernel = tensors["netcnnlip.0.weight"]  # five pictures as one of fifteen channels
  x = np.concatenate([picture.transpose(2, 0, 1) for picture in x])
  flat = kernel.transpose(0, 2, 1, 3, 4).reshape(96, 15, 7, 7)
  x = convolve(flat, tensors["netcnnlip.0.bias"], x, 2, 0)
  x = pool(np.maximum(norm(tensors, "netcnnlip.1", x), 0), (3, 3), (2, 2))
  for place in PLACES[1:]:
    kernel = tensors[f"netcnnlip.{place}.weight"][:, :, 0]
    stride, padding = (2, 1) if place == 4 else (1, int(place < 18))
    x = convolve(kernel, tensors[f"netcnnlip.{place}.bias"], x, stride, padding)
    x = np.maximum(norm(tensors, f"netcnnlip.{place + 1}", x), 0)
    if place in (4, 14):
      x = pool(x, (3, 3), (2, 2), int(place == 4))
  assert x.shape == (512, 1, 1)
  truth = connect(tensors, "lip", x)
  np.testing.assert_allclose(found[1], truth, rtol=1e-3, atol=1e-4 * np.abs(truth).max())


def test_cepstra_are_those_of_python_speech_features():
  t = np.arange(3200) / 16000
  sound = 0.3 * np.sin(2 * np.pi * 220 * t) + 0.1 * np.sin(2 * np.pi * (900 + 4000 * t) * t)
  found = syncnet.cepstra(sound)
  assert found.shape == (19, 13)
  # By python_speech_features 0.6: mfcc((sound * 32768).round().astype(np.int16), 16000)
  np.testing.assert_allclose(found[[0, 9, 18], ::3], GOLDEN, rtol=1e-4, atol=1e-3)
  assert np.isfinite(syncnet.cepstra(np.zeros(100))).all()


def test_the_offset_is_where_things_fit():
  rng = np.random.default_rng(3)
  heard = rng.normal(size=(60, 8))
  for late in (0, 4, -3):
    seen = np.roll(heard, -late, 0)  # what is seen now is heard `late` frames later
    found = syncnet.conclude(syncnet.distances(seen, heard))
    assert found.offset_frames == late and found.confidence > 1
    assert found.distance < 0.5
  table = np.tile(np.arange(31.0), (5, 1))
  assert syncnet.conclude(table) == syncnet.Sync(15.0, 0.0, -15)


def test_a_film_is_seen_in_rows_of_frames_and_held_against_its_sound(params, monkeypatch):
  monkeypatch.setattr(syncnet, "LEAST_FRAMES", 12)
  rng = np.random.default_rng(4)
  points = np.array([[30.0, 20.0], [90.0, 100.0]])
  watcher = syncnet.Watcher(params)
  image = rng.integers(0, 256, (120, 120, 3), np.uint8)
  for number in (*range(3, 17), 50, 51):
    watcher.add(number, np.roll(image, number, 0), points)
  watcher.flush()
  lengths = [(first, sum(map(len, pieces))) for first, pieces in watcher.runs]
  assert lengths == [(3, 10), (50, 0)]
  sound = 0.1 * rng.normal(size=19 * 640)
  found = syncnet.judge(params, watcher, sound)
  assert found is not None and found.distance > 0 and found.confidence >= 0
  assert syncnet.judge(params, watcher, sound[:640]) is None  # the sound ends before


def test_other_files_are_refused(tensors, tmp_path):
  path = tmp_path / "other.model"
  torchfile.save(path, {**tensors, "netfclip.3.bias": np.zeros(512, np.float32)})
  with pytest.raises(UserError, match="netfclip.3.bias where .1024,. is needed"):
    syncnet.load(path)
  torchfile.save(path, {k: v for k, v in tensors.items() if k != "netcnnaud.18.weight"})
  with pytest.raises(UserError, match="nothing as netcnnaud.18.weight"):
    syncnet.load(path)
  torchfile.save(path, {**tensors, "netfcaud.0.bias": np.full(512, np.nan, np.float32)})
  with pytest.raises(UserError, match="not finite"):
    syncnet.load(path)
  torchfile.save(path, [1])
  with pytest.raises(UserError, match="no named tensors"):
    syncnet.load(path)
