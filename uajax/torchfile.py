"""Tensors in torch's files, without torch and without executing what a file says.

A torch file is a pickle that names its tensors' storages, which lie beside it in a zip archive
(or behind it, in the format before torch 1.6). Pickles are programs; this reader lets one build
containers, numbers, strings and tensors, and refuses every other name. What a tensor claims
about its storage is checked before anything is looked at.
"""

import collections
import math
import os
import pickle
import struct
import zipfile
from typing import Any, BinaryIO, Literal

import numpy as np

from uajax.errors import UserError
from uajax.saving import aside

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_PICKLE_LIMIT = 1 << 28  # bytes of a pickle itself, its tensors not counted
_COPY_LIMIT = 1 << 22  # elements that a tensor may claim beyond its storage (an expanded view)
_DEPTH = 100  # of containers in containers
_Order = Literal["<", ">"]

# Storage class or dtype -> what NumPy reads (bfloat16 is widened afterwards).
_DTYPES = {
  "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "bf16",
  "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1",
  "ByteStorage": "u1", "BoolStorage": "b1", "ComplexFloatStorage": "c8",
  "ComplexDoubleStorage": "c16", "UntypedStorage": "u1",
  "float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "bf16", "int64": "i8",
  "int32": "i4", "int16": "i2", "int8": "i1", "uint8": "u1", "uint16": "u2", "uint32": "u4",
  "uint64": "u8", "bool": "b1", "complex64": "c8", "complex128": "c16",
}
_STORAGES = {np.dtype(code): name for name, code in _DTYPES.items()
             if name.endswith("Storage") and name != "UntypedStorage" and code != "bf16"}


def load(path: str | os.PathLike) -> Any:
  """Reads a file that `torch.save` wrote.

  Returns:
    The dicts, lists, tuples, numbers and strings that it holds, with NumPy arrays for tensors
    and parameters (bfloat16 as float32). Arrays may share memory and are read-only.

  Raises:
    UserError: where the file is missing, damaged, or names anything but tensors and containers.
  """
  try:
    with open(path, "rb") as file:
      if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
          return _Reader(path).read_archive(archive, os.fstat(file.fileno()).st_size)
      file.seek(0)
      return _Reader(path).read_legacy(file)
  except UserError:
    raise
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror or error}): give a file that "
                    "torch.save wrote") from error
  except Exception as error:  # whatever a damaged file provokes in pickle, zipfile or NumPy
    raise UserError(f"{path} is no sound torch file ({type(error).__name__}: "
                    f"{_line(error)}): get it anew") from error


def save(path: str | os.PathLike, value: Any) -> None:
  """Writes arrays, and lists, tuples and dicts of them, for `torch.load(weights_only=True)`.

  Args:
    value: NumPy or JAX arrays, numbers, strings, None, or containers of these.

  Raises:
    UserError: where the file cannot be written.
    TypeError: for any other value.
  """
  writer = _Writer()
  writer.write(value)
  with aside(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr("archive/data.pkl", writer.finish())
    archive.writestr("archive/byteorder", b"little")
    for key, array in enumerate(writer.arrays):
      archive.writestr(f"archive/data/{key}", array.tobytes())
    archive.writestr("archive/version", b"3\n")


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())[:200]


class _Sealed:
  """What no pickle opcode can change: BUILD would otherwise set attributes at the file's will."""

  def __setstate__(self, state):
    raise ValueError("it gives attributes to what has none")


class _Storage(_Sealed):
  """Raw memory that tensors are views of; in the old format its bytes come after the pickle."""

  def __init__(self, code: str, count: int):
    self.code, self.count = code, count
    self.data: bytes = b""


class _Tensor(_Sealed):
  """A tensor as the pickle describes it."""

  def __init__(self, storage, offset, shape, strides, code=None):
    integers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(i) is int and i >= 0 for i in integers):
      raise ValueError("a tensor is described by no storage or by no sizes")
    if len(shape) != len(strides) or len(shape) > 32:
      raise ValueError("a tensor's sizes and strides differ in number")
    self.storage, self.offset = storage, offset
    self.shape, self.strides = tuple(shape), tuple(strides)
    self.code = code or storage.code

  def array(self, order: _Order) -> np.ndarray:
    stored = "u2" if self.code == "bf16" else self.code
    dtype = np.dtype(stored).newbyteorder(order)
    memory = np.frombuffer(self.storage.data, np.uint8)
    memory = memory[: memory.size // dtype.itemsize * dtype.itemsize].view(dtype)
    size = math.prod(self.shape)
    last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
    if size and last >= memory.size:
      raise ValueError(f"a tensor {self.shape} reaches beyond its storage")
    if size > memory.size + _COPY_LIMIT:
      raise ValueError(f"a tensor {self.shape} repeats a storage of {memory.size} elements")
    if not size:
      array = np.zeros(self.shape, dtype)
    else:
      strides = [s * dtype.itemsize for s in self.strides]
      array = np.lib.stride_tricks.as_strided(
        memory[self.offset :], self.shape, strides, writeable=False)
    if self.code == "bf16":  # the upper half of a float32
      array = (array.astype(np.uint32) << 16).view(np.float32)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


class _Name(_Sealed):
  """A name that stands for a value: a storage class, a dtype."""

  def __init__(self, name: str):
    self.name = name


class _Call(_Sealed):
  """A function that the file may call."""

  def __init__(self, function):
    self.function = function

  def __call__(self, *args):
    return self.function(*args)


class _NumpyType:
  """A NumPy dtype by its code; only plain numbers."""

  def __init__(self, code, *_):
    if not isinstance(code, str) or len(code) > 4 or np.dtype(code).kind not in "biufc":
      raise ValueError(f"NumPy type {code!r} is no number")
    self.dtype = np.dtype(code)

  def __setstate__(self, state):
    if state[1] in ("<", ">"):
      self.dtype = self.dtype.newbyteorder(state[1])


class _NumpyArray:
  """A NumPy array of plain numbers."""

  def __init__(self, *_):
    self.array = np.zeros(0)

  def __setstate__(self, state):
    _, shape, kind, fortran, data = state
    if not isinstance(kind, _NumpyType) or not isinstance(data, bytes):
      raise ValueError("a NumPy array is not of plain numbers")
    self.array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _rebuild_tensor(storage, offset, shape, strides, *_):
  return _Tensor(storage, offset, shape, strides)


def _rebuild_tensor_typed(storage, offset, shape, strides, requires_grad, hooks, dtype, *_):
  return _Tensor(storage, offset, shape, strides, _DTYPES[dtype.name])


def _rebuild_scalar(kind, data):
  return np.frombuffer(data, kind.dtype, count=1)[0].item()


def _encode(text, encoding):
  if encoding != "latin1":
    raise ValueError(f"bytes are encoded as {encoding!r}")
  return text.encode("latin1")


_FUNCTIONS = {
  ("collections", "OrderedDict"): collections.OrderedDict,
  ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
  ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_typed,
  ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
  ("torch", "Size"): lambda sizes=(): tuple(sizes),
  ("torch", "device"): lambda *parts: ":".join(map(str, parts)),
  ("_codecs", "encode"): _encode,
  ("numpy", "dtype"): _NumpyType,
  **{(f"numpy.{core}.multiarray", "scalar"): _rebuild_scalar for core in ("core", "_core")},
  **{(f"numpy.{core}.multiarray", "_reconstruct"): _NumpyArray for core in ("core", "_core")},
}
_NAMES = {
  **{key: _Call(function) for key, function in _FUNCTIONS.items()},
  **{("torch", name): _Name(name) for name in _DTYPES},
  ("torch.storage", "UntypedStorage"): _Name("UntypedStorage"),
  ("numpy", "ndarray"): _Name("ndarray"),
}


class _Reader:
  """One file being read."""

  def __init__(self, path):
    self.path = path
    self.storages: dict[str, _Storage] = {}
    self.order: _Order = "<"

  def read_archive(self, archive: zipfile.ZipFile, size: int) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    roots = [name for name in members if name == "data.pkl" or name.count("/") == 1
             and name.endswith("/data.pkl")]
    if len(roots) != 1:
      raise UserError(f"{self.path} holds {len(roots)} data.pkl where a torch file has one: give a "
                      "file that torch.save wrote")
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > size
           for info in members.values()):
      raise UserError(f"{self.path} is compressed, as torch files never are: unpack and save it "
                      "with torch again")
    root = roots[0].removesuffix("data.pkl")
    if members[roots[0]].file_size > _PICKLE_LIMIT:
      raise ValueError("its pickle is beyond all measure")
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") == b"big":
      self.order = ">"
    with archive.open(roots[0]) as file:
      value = self._unpickle(file)
    for key, storage in self.storages.items():
      storage.data = archive.read(f"{root}data/{key}")
      self._check(storage)
    return self._arrays(value)

  def read_legacy(self, file: BinaryIO) -> Any:
    size = os.fstat(file.fileno()).st_size
    try:
      magic = self._unpickle(file)
    except UserError:
      raise
    except Exception:
      magic = None
    if magic != _LEGACY_MAGIC:
      raise UserError(f"{self.path} is no torch file: give a file that torch.save wrote")
    _version, about, value, keys = (self._unpickle(file) for _ in range(4))
    if isinstance(about, dict) and about.get("little_endian") is False:
      self.order = ">"
    for key in keys:
      storage = self.storages[key]
      (count,) = struct.unpack("<q", file.read(8))
      if count != storage.count:
        raise ValueError(f"storage {key} has {count} elements, not {storage.count}")
      length = count * _itemsize(storage.code)
      if not 0 <= length <= size:
        raise ValueError(f"storage {key} is longer than the file")
      storage.data = file.read(length)
    for storage in self.storages.values():
      self._check(storage)
    return self._arrays(value)

  def _check(self, storage: _Storage) -> None:
    if len(storage.data) < storage.count * _itemsize(storage.code):
      raise ValueError("a storage is shorter than it claims")

  def _unpickle(self, file) -> Any:
    reader = self

    class Unpickler(pickle.Unpickler):

      def find_class(self, module, name):
        try:
          return _NAMES[module, name]
        except KeyError:
          raise UserError(f"{reader.path} asks to run {module}.{name}, which may be harmful, and "
                          "is not read: save only its tensors with torch again") from None

      def persistent_load(self, pid):
        return reader._storage(pid)

    return Unpickler(file).load()

  def _storage(self, pid) -> _Storage:
    tag, kind, key, _place, count = pid[:5]
    if tag != "storage" or not isinstance(kind, _Name) or kind.name not in _DTYPES:
      raise ValueError("an unknown kind of storage")
    if not isinstance(key, str) or not key.isalnum() or type(count) is not int or count < 0:
      raise ValueError("a storage without name or size")
    if len(pid) > 5 and pid[5] is not None:
      raise ValueError("views of storages are not read")
    known = self.storages.setdefault(key, _Storage(_DTYPES[kind.name], count))
    if known.code != _DTYPES[kind.name]:
      raise ValueError("one storage of two types")
    return known

  def _arrays(self, value: Any) -> Any:
    """Puts arrays in the places of tensors; each object once, however often it is named."""
    done: dict[int, Any] = {}
    keep = []  # an id is only unique while its object lives

    def convert(x, depth):
      if x is None or isinstance(x, bool | int | float | complex | str | bytes):
        return x
      if depth > _DEPTH:
        raise ValueError("containers within containers without end")
      if id(x) not in done:
        keep.append(x)
        done[id(x)] = build(x, depth + 1)
      return done[id(x)]

    def build(x, depth):
      if isinstance(x, _Tensor):
        return x.array(self.order)
      if isinstance(x, _NumpyArray):
        return x.array
      if isinstance(x, _Storage):
        return np.frombuffer(x.data, np.uint8)
      if isinstance(x, dict):
        return {convert(k, depth): convert(v, depth) for k, v in x.items()}
      if isinstance(x, list | tuple | set | frozenset):
        return type(x)(convert(v, depth) for v in x)
      if isinstance(x, _Name):
        return x.name
      raise ValueError(f"a {type(x).__name__} among the tensors")

    return convert(value, 0)


def _itemsize(code: str) -> int:
  return 2 if code == "bf16" else np.dtype(code).itemsize


class _Writer:
  """Writes a pickle (protocol 2) by hand: torch's names need no torch that way."""

  def __init__(self):
    self.arrays: list[np.ndarray] = []
    self.out = bytearray(pickle.PROTO + b"\x02")

  def finish(self) -> bytes:
    return bytes(self.out + pickle.STOP)

  def write(self, x: Any) -> None:
    if x is None:
      self.out += pickle.NONE
    elif isinstance(x, bool | np.bool_):
      self.out += pickle.NEWTRUE if x else pickle.NEWFALSE
    elif isinstance(x, int | np.integer):
      self._integer(int(x))
    elif isinstance(x, float | np.floating):
      self.out += pickle.BINFLOAT + struct.pack(">d", float(x))
    elif isinstance(x, str):
      data = x.encode()
      self.out += pickle.BINUNICODE + struct.pack("<I", len(data)) + data
    elif isinstance(x, dict):
      self.out += pickle.EMPTY_DICT + pickle.MARK
      for key, value in x.items():
        self.write(key)
        self.write(value)
      self.out += pickle.SETITEMS
    elif isinstance(x, list):
      self.out += pickle.EMPTY_LIST + pickle.MARK
      for value in x:
        self.write(value)
      self.out += pickle.APPENDS
    elif isinstance(x, tuple):
      self.out += pickle.MARK
      for value in x:
        self.write(value)
      self.out += pickle.TUPLE
    elif hasattr(x, "__array__"):
      self._tensor(np.asarray(x))
    else:
      raise TypeError(f"a torch file holds no {type(x).__name__}")

  def _integer(self, x: int) -> None:
    if -(2**31) <= x < 2**31:
      self.out += pickle.BININT + struct.pack("<i", x)
    else:
      data = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
      self.out += pickle.LONG1 + bytes([len(data)]) + data

  def _name(self, module: str, name: str) -> None:
    self.out += pickle.GLOBAL + f"{module}\n{name}\n".encode()

  def _tensor(self, array: np.ndarray) -> None:
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
    if array.dtype not in _STORAGES:
      raise TypeError(f"torch has no tensors of {array.dtype}")
    self._name("torch._utils", "_rebuild_tensor_v2")
    self.out += pickle.MARK
    self.out += pickle.MARK
    self.write("storage")
    self._name("torch", _STORAGES[array.dtype])
    self.write(str(len(self.arrays)))
    self.write("cpu")
    self.write(array.size)
    self.out += pickle.TUPLE + pickle.BINPERSID
    self.write(0)
    self.write(array.shape)
    self.write(tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim)))  # strides
    self.write(False)
    self._name("collections", "OrderedDict")
    self.out += pickle.EMPTY_TUPLE + pickle.REDUCE
    self.out += pickle.TUPLE + pickle.REDUCE
    self.arrays.append(array)
