"""torch files without torch: what is read, and what is refused."""

import collections
import pickle
import struct
import zipfile

import numpy as np
import pytest

from uajax import torchfile
from uajax.errors import UserError


def archive(path, program: bytes, storages: dict[str, bytes]):
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("x/data.pkl", program)
    for key, data in storages.items():
      file.writestr(f"x/data/{key}", data)
  return path


def string(text: str) -> bytes:
  data = text.encode()
  return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def numbers(values) -> bytes:
  return pickle.MARK + b"".join(
    pickle.BININT + struct.pack("<i", v) for v in values) + pickle.TUPLE


def tensor(shape, strides, offset=0, count=6, kind="FloatStorage") -> bytes:
  """The opcodes of one tensor over storage 0."""
  storage = (pickle.MARK + string("storage") + f"ctorch\n{kind}\n".encode() + string("0")
             + string("cpu") + pickle.BININT + struct.pack("<i", count) + pickle.TUPLE
             + pickle.BINPERSID)
  return (b"ctorch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + storage + pickle.BININT
          + struct.pack("<i", offset) + numbers(shape) + numbers(strides) + pickle.NEWFALSE
          + b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE
          + pickle.REDUCE)


def program(body: bytes) -> bytes:
  return pickle.PROTO + b"\x02" + body + pickle.STOP


SIX = np.arange(6, dtype="<f4").tobytes()


def test_what_is_saved_is_loaded(tmp_path):
  value = {
    "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
    "list": [np.float64([1.5]), np.arange(3), np.array([True, False]), np.float16([[2]])],
    "scalar": np.array(3.0, np.float32), "empty": np.zeros((0, 4), np.float32),
    "rest": (1, -(2**40), 2.5, "text", None, True)}
  torchfile.save(tmp_path / "x.pth", value)
  loaded = torchfile.load(tmp_path / "x.pth")
  assert loaded["rest"] == value["rest"]
  for a, b in zip([loaded["plain"], *loaded["list"], loaded["scalar"], loaded["empty"]],
                  [value["plain"], *value["list"], value["scalar"], value["empty"]], strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  assert not list(tmp_path.glob("*partial*"))


def test_views_are_laid_out_as_torch_lays_them(tmp_path):
  path = archive(tmp_path / "x.pth", program(tensor((3, 2), (1, 3))), {"0": SIX})
  np.testing.assert_array_equal(torchfile.load(path), [[0, 3], [1, 4], [2, 5]])
  path = archive(tmp_path / "y.pth", program(tensor((2,), (2,), offset=1)), {"0": SIX})
  np.testing.assert_array_equal(torchfile.load(path), [1, 3])


def test_half_precision_is_read(tmp_path):
  values = np.float32([1.5, -2, 3e20])
  data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
  path = archive(tmp_path / "x.pth",
                 program(tensor((3,), (1,), count=3, kind="BFloat16Storage")), {"0": data})
  np.testing.assert_allclose(torchfile.load(path), values, rtol=1e-2)


def test_the_format_before_torch_1_6_is_read(tmp_path):
  path = tmp_path / "old.pth"
  head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001,
                                               {"little_endian": True}))
  keys = pickle.dumps(["0"], 2)
  path.write_bytes(head + program(tensor((2, 3), (3, 1))) + keys + struct.pack("<q", 6) + SIX)
  np.testing.assert_array_equal(torchfile.load(path), np.arange(6).reshape(2, 3))


def test_numpy_scalars_in_checkpoints_are_read(tmp_path):
  body = (b"cnumpy.core.multiarray\nscalar\n" + pickle.MARK
          + b"cnumpy\ndtype\n" + pickle.MARK + string("f8") + pickle.NEWFALSE + pickle.NEWTRUE
          + pickle.TUPLE + pickle.REDUCE
          + b"c_codecs\nencode\n" + pickle.MARK + string("\0\0\0\0\0\0\xf8?") + string("latin1")
          + pickle.TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE)
  assert torchfile.load(archive(tmp_path / "x.pth", program(body), {})) == 1.5


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "numpy.load"])
def test_what_would_run_is_refused_by_its_name(tmp_path, name):
  module, function = name.rsplit(".", 1)
  flag = tmp_path / "run"
  body = (f"c{module}\n{function}\n".encode() + pickle.MARK + string(f"touch {flag}")
          + pickle.TUPLE + pickle.REDUCE)
  with pytest.raises(UserError, match=f"asks to run {name}"):
    torchfile.load(archive(tmp_path / "x.pth", program(body), {}))
  assert not flag.exists()


@pytest.mark.parametrize("body", [
  tensor((4, 2), (2, 1)),  # longer than its storage
  tensor((3,), (1,), offset=4),
  tensor((2,), (-1,)),
  tensor((2**30,), (0,)),  # a storage repeated without end
  tensor((2, 3), (3, 1), count=100),  # a storage shorter than it claims
  tensor((2, 3), (3, 1)) + pickle.EMPTY_DICT + string("shape") + string("x") + pickle.SETITEM
  + pickle.BUILD,  # attributes set on a tensor
  b"ctorch._utils\n_rebuild_tensor_v2\n" + pickle.EMPTY_DICT + string("function") + pickle.NONE
  + pickle.SETITEM + pickle.BUILD,  # and on what we call
  pickle.EMPTY_LIST + pickle.BINPUT + b"\0" + pickle.BINGET + b"\0" + pickle.APPEND,  # endless
  b"\xff",
])
def test_what_does_not_add_up_is_refused_in_one_line(tmp_path, body):
  path = archive(tmp_path / "x.pth", program(body), {"0": SIX})
  with pytest.raises(UserError) as error:
    torchfile.load(path)
  assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("data", [b"", b"no torch file at all", b"\x80\x02}."])
def test_other_files_are_refused(tmp_path, data):
  (tmp_path / "x.pth").write_bytes(data)
  with pytest.raises(UserError, match="torch file"):
    torchfile.load(tmp_path / "x.pth")
  with pytest.raises(UserError, match="cannot be read"):
    torchfile.load(tmp_path / "missing.pth")


def test_compressed_archives_are_refused(tmp_path):
  with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as file:
    file.writestr("x/data.pkl", program(tensor((6,), (1,))))
    file.writestr("x/data/0", bytes(1 << 20))
  with pytest.raises(UserError, match="compressed"):
    torchfile.load(tmp_path / "x.pth")


def test_nothing_but_tensors_is_saved(tmp_path):
  with pytest.raises(TypeError, match="OrderedDict|Counter|set"):
    torchfile.save(tmp_path / "x.pth", {1, 2})
  torchfile.save(tmp_path / "x.pth", collections.OrderedDict(a=np.zeros(2, np.float32)))
  assert list(torchfile.load(tmp_path / "x.pth")) == ["a"]
