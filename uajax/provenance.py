"""Where a film comes from: a signed C2PA manifest in every MP4, and an optional visible mark.

The manifest (https://c2pa.org) says that the film is synthesised, by what, from which run and which
sound, under a signature that breaks when a byte of the film is changed. Players that know C2PA show
it; `uajax verify` reads it. It is signed with the user's certificate (`$UAJAX_CERTIFICATE`, a PEM
chain, and `$UAJAX_KEY`), or with one that this machine made for itself: such a signature shows that
nothing was changed, not who made it. A manifest can be cut out of a file; it informs, it does not
prevent.
"""

import contextlib
import datetime
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from uajax import cache, runs, saving
from uajax.errors import UserError

SYNTHESIS = "org.uajax.synthesis"  # our assertion: run, checkpoint, sound, emotion
SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
LOCAL = "uajax local certificate"
_DAYS = 3650


class Credentials(NamedTuple):
  """What signs."""

  chain: bytes  # PEM certificates, the signer's first
  key: bytes  # PEM
  algorithm: str  # C2PA's name of it


class Verdict(NamedTuple):
  """What a film says of itself, and whether that holds."""

  holds: bool  # signed, and nothing was changed since
  trusted: bool  # by a certificate on a trust list
  maker: str
  signer: str
  synthesis: dict[str, Any]  # our assertion, empty in films of others
  faults: tuple[str, ...]


def credentials() -> Credentials:
  """The user's, or this machine's own, which are made if need be.

  Raises:
    UserError: only one of certificate and key is named, or they cannot be read.
  """
  named = [os.environ.get(name) for name in ("UAJAX_CERTIFICATE", "UAJAX_KEY")]
  if not any(named):
    return _local()
  if not all(named):
    raise UserError("UAJAX_CERTIFICATE and UAJAX_KEY belong together: set both, or none")
  try:
    chain, key = (pathlib.Path(str(name)).read_bytes() for name in named)
  except OSError as error:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): name PEM files by "
                    "UAJAX_CERTIFICATE and UAJAX_KEY, or unset both") from None
  return Credentials(chain, key, _algorithm(key, str(named[1])))


def sign(film: str | os.PathLike, synthesis: dict[str, Any], by: Credentials) -> None:
  """Gives an MP4, MOV or GIF its manifest, in place: the file changes as a whole or not at all.

  Args:
    synthesis: JSON values, kept as our assertion.

  Raises:
    UserError: the certificate does not do, or the disk is full.
  """
  import c2pa

  film = pathlib.Path(film)
  made_by = {"name": "uajax", "version": runs.own_version()}
  created = {"action": "c2pa.created", "digitalSourceType": SOURCE, "softwareAgent": made_by}
  manifest = {
    "claim_generator_info": [made_by],
    "title": film.name,
    "assertions": [{"label": "c2pa.actions", "data": {"actions": [created]}},
                   {"label": SYNTHESIS, "data": synthesis}],
  }
  try:
    signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(
      by.algorithm.encode(), by.chain, by.key, None))
    with (saving.aside(film) as partial, open(film, "rb") as source,
          open(partial, "w+b") as signed):
      c2pa.Builder(json.dumps(manifest)).sign(signer, _form(film), source, signed)
  except c2pa.C2paError as error:
    raise UserError(f"{film} could not be signed ({_line(error)}): check UAJAX_CERTIFICATE and "
                    "UAJAX_KEY, or give --no-provenance") from None


def verify(film: str | os.PathLike) -> Verdict:
  """Reads a film's manifest.

  Raises:
    UserError: no such file, no film, or it carries no manifest.
  """
  import c2pa

  film = pathlib.Path(film)
  if not film.is_file():
    raise UserError(f"{film} does not exist: give a film")
  try:
    with open(film, "rb") as file:
      found = json.loads(c2pa.Reader(_form(film), file).json())
  except c2pa.C2paError as error:
    if "ManifestNotFound" in f"{type(error).__name__} {error}":
      raise UserError(f"{film} carries no manifest: nothing is known of where it comes from"
                      ) from None
    raise UserError(f"{film} is no film, or its manifest is damaged ({_line(error)})") from None
  active = found["manifests"][found["active_manifest"]]
  faults = tuple(fault for fault in found.get("validation_status", ())
                 if fault.get("code") != "signingCredential.untrusted")
  untrusted = any(fault.get("code") == "signingCredential.untrusted"
                  for fault in found.get("validation_status", ()))
  makers = active.get("claim_generator_info") or [{}]
  signature = active.get("signature_info") or {}
  ours = next((a["data"] for a in active.get("assertions", ()) if a["label"] == SYNTHESIS), {})
  return Verdict(
    holds=not faults, trusted=not faults and not untrusted,
    maker=" ".join(str(makers[0].get(key, "")) for key in ("name", "version")).strip(),
    signer=", ".join(str(signature[k]) for k in ("common_name", "issuer") if signature.get(k)),
    synthesis=ours, faults=tuple(str(f.get("explanation") or f.get("code")) for f in faults))


def _form(film: pathlib.Path) -> str:
  return {".mov": "video/quicktime", ".gif": "image/gif"}.get(film.suffix.lower(), "video/mp4")


def digest(path: str | os.PathLike) -> str:
  """SHA-256 of a file, in hexadecimal."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def mark(image: UInt8[np.ndarray, "h w 3"], text: str) -> UInt8[np.ndarray, "h w 3"]:
  """The picture with text at its lower left, a twentieth of its height, on black.

  Raises:
    UserError: there is no text, or in as many lines as it needs it would hide the face.
  """
  from PIL import Image, ImageDraw, ImageFont

  picture = Image.fromarray(image)
  size = max(8, picture.height // 20)
  font = ImageFont.load_default(size)
  draw = ImageDraw.Draw(picture)
  edge = size // 4
  lines: list[str] = []
  for word in text.split():
    longer = " ".join([*lines[-1:], word])
    if lines and font.getlength(longer) <= picture.width - size - edge:
      lines[-1] = longer
    else:
      lines.append(word)
  widest = max(map(font.getlength, lines), default=0)
  if not 1 <= len(lines) <= 3 or widest > picture.width - size - edge:
    raise UserError(f"--mark {text[:60]!r} does not fit into three lines of a picture "
                    f"{picture.width} px wide: give a few words")
  for up, line in enumerate(reversed(lines)):
    place = size // 2, picture.height - size // 2 - up * (size + 2 * edge)
    box = draw.textbbox(place, line, font=font, anchor="ls")
    draw.rectangle((box[0] - edge, box[1] - edge, box[2] + edge, box[3] + edge), fill=(0, 0, 0))
    draw.text(place, line, font=font, anchor="ls", fill=(255, 255, 255))
  return np.asarray(picture)


def _algorithm(pem: bytes, where: str) -> str:
  from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
  from cryptography.hazmat.primitives.serialization import load_pem_private_key

  try:
    key = load_pem_private_key(pem, None)
  except (ValueError, TypeError) as error:
    raise UserError(f"{where} is no PEM key without a password ({_line(error)})") from None
  if isinstance(key, ec.EllipticCurvePrivateKey):
    named = {256: "es256", 384: "es384", 521: "es512"}.get(key.curve.key_size)
    if named:
      return named
  if isinstance(key, rsa.RSAPrivateKey):
    return "ps256"
  if isinstance(key, ed25519.Ed25519PrivateKey):
    return "ed25519"
  raise UserError(f"{where} holds a kind of key that C2PA does not sign with: take EC, RSA or "
                  "Ed25519")


def _local() -> Credentials:
  """This machine's own, kept in the user's cache; where that cannot be written, for once."""
  begin = b"-----BEGIN CERTIFICATE-----"
  with contextlib.suppress(RuntimeError, OSError, UserError):
    kept = cache.root() / "provenance" / "local.pem"
    if not kept.is_file():
      with saving.aside(kept) as partial:
        partial.touch(0o600)
        partial.write_bytes(_make_local())
    key, *chain = kept.read_bytes().split(begin)
    if chain:
      return Credentials(begin + begin.join(chain), key, "es256")
  key, *chain = _make_local().split(begin)
  return Credentials(begin + begin.join(chain), key, "es256")


def _make_local() -> bytes:
  """A key and its certificate, under an authority whose own key is thrown away; PEM."""
  from cryptography import x509
  from cryptography.hazmat.primitives import hashes, serialization
  from cryptography.hazmat.primitives.asymmetric import ec
  from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

  root, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
  now = datetime.datetime.now(datetime.UTC)

  def name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, LOCAL),
                      x509.NameAttribute(NameOID.COMMON_NAME, common)])

  def certify(common: str, public, authority: bool) -> x509.Certificate:
    usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment",
                           "key_agreement", "encipher_only", "decipher_only"), False)
    made = (
      x509.CertificateBuilder().subject_name(name(common)).issuer_name(name("authority"))
      .public_key(public).serial_number(x509.random_serial_number())
      .not_valid_before(now - datetime.timedelta(days=1))
      .not_valid_after(now + datetime.timedelta(days=_DAYS))
      .add_extension(x509.BasicConstraints(authority, None), critical=True)
      .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=authority,
                                   crl_sign=authority, **usage), critical=True)
      .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
      .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()),
                     critical=False))
    if not authority:  # C2PA wants the purpose said
      purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
      made = made.add_extension(purpose, critical=False)
    return made.sign(root, hashes.SHA256())

  pem = serialization.Encoding.PEM
  certificates = (certify("this machine", own.public_key(), False),
                  certify("authority", root.public_key(), True))
  key = own.private_bytes(
    pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
  return key + b"".join(certificate.public_bytes(pem) for certificate in certificates)


def _line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
