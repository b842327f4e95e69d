"""The doctor names what is missing and survives what is broken."""

import importlib.metadata
import types

from uajax import doctor


def by_subject(findings):
  return {finding.subject: finding for finding in findings}


def test_this_machine_is_described():
  findings = doctor.examine()
  found = by_subject(findings)
  for subject in ("python", "jax", "devices", "rasteriser", "fusion", "codecs", "memory", "disk"):
    assert subject in found, subject
  for kernel in ("rasteriser", "fusion"):
    assert found[kernel].status == "ok", str(found[kernel])
  assert doctor.healthy(findings), [str(f) for f in findings if f.status == "fail"]
  assert all("\n" not in str(finding) for finding in findings)
  assert all(f.remedy for f in findings if f.status != "ok")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
  real = importlib.metadata.version

  def version(name):
    if name in ("optax", "librosa"):
      raise importlib.metadata.PackageNotFoundError(name)
    return "0.9.1" if name == "jax" else real(name)

  monkeypatch.setattr(doctor.importlib.metadata, "version", version)
  found = by_subject(doctor._packages())
  assert found["optax"].status == "fail" and "pip install 'optax'" in found["optax"].remedy
  assert found["librosa"].status == "warn" and "synthesize" in found["librosa"].remedy
  assert found["jax"].status == "warn" and "0.10.2" in found["jax"].remedy
  assert not doctor.healthy(list(found.values()))


def test_what_breaks_while_looking_is_a_finding():
  def _odd():
    yield doctor.Finding("ok", "first", "seen")
    raise RuntimeError("two\nlines")

  first, second = doctor._survive(_odd)
  assert first.text == "seen" and second.status == "fail"
  assert "RuntimeError: two" in second.text and "\n" not in str(second)


def test_a_wrong_picture_is_a_failure(monkeypatch):
  from kernels import splat

  real = splat.rasterize
  dark = lambda **how: real(**{**how, "opacities": how["opacities"] * 0.5})
  monkeypatch.setattr(splat, "rasterize", dark)
  (finding,) = doctor._rasteriser()
  assert finding.status == "fail" and "[0.4" in finding.text


def test_kernels_that_do_not_compile_are_a_warning(monkeypatch):
  from kernels import fusion, splat

  for kernel, look in ((splat, doctor._rasteriser), (fusion, doctor._fusion)):
    monkeypatch.setattr(
      kernel, "choose", lambda: ("xla", "the Pallas kernels do not compile here: X"))
    (finding,) = look()
    assert finding.status == "warn" and "compile here: X" in finding.text and finding.remedy


def test_a_fusion_that_fuses_wrong_is_a_failure(monkeypatch):
  from kernels import fusion

  real = fusion.fuse
  monkeypatch.setattr(fusion, "fuse", lambda means, log_vars: real(means + 0.1, log_vars))
  (finding,) = doctor._fusion()
  assert finding.status == "fail" and "0.6" in finding.text


def test_versions_are_compared_as_numbers():
  for text, numbers in (("0.11.2.dev3", (0, 11, 2)), ("1.2rc1", (1, 2)), ("x", ())):
    assert doctor._numbers(text) == numbers


def test_a_full_disk_and_little_memory_are_said(monkeypatch):
  usage = lambda _: types.SimpleNamespace(free=2**20)
  monkeypatch.setattr(doctor.shutil, "disk_usage", usage)
  monkeypatch.setattr(doctor, "_memory_gib", lambda: 1.5)
  found = by_subject(doctor._machine())
  assert found["disk"].status == found["memory"].status == "warn"


def test_the_cache_is_named_with_its_size_and_an_unwritable_one_said(monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "a" / "b"))
  (finding,) = doctor._cache()
  assert finding.status == "ok" and finding.text == f"{tmp_path}/a/b, 0 MiB"
  (tmp_path / "a").write_bytes(bytes(3 * 2**20))
  (finding,) = doctor._cache()
  assert finding.status == "warn" and "UAJAX_CACHE" in finding.remedy
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  (finding,) = doctor._cache()
  assert finding.text == f"{tmp_path}, 3 MiB"
