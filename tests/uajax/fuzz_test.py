"""Damaged files: each is read, or refused in one line; nothing crashes, hangs or eats memory.

The files are read in a process of its own, so that a crash of a decoder is seen as one.
"""

import fractions
import json
import subprocess
import sys

import av
import numpy as np
import pytest

READER = """
import json, resource, signal, sys, time
from uajax import media
from uajax.errors import UserError

def late(*_):
  raise TimeoutError

def peak_mb():
  try:  # of this program alone: the other counts what its parent held when it forked
    lines = open("/proc/self/status").read().split("VmHWM:")[1]
    return int(lines.split()[0]) // 1024
  except (OSError, IndexError):
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

signal.signal(signal.SIGALRM, late)
for path in sys.argv[1:]:
  print(json.dumps({"file": path, "began": True}), flush=True)
  began, said = time.monotonic(), []
  for read in (lambda p: sum(1 for _ in media.read_frames(p)), lambda p: len(media.read_audio(p))):
    signal.alarm(20)
    try:
      said.append(read(path))
    except UserError as error:
      said.append(str(error))
    finally:
      signal.alarm(0)
  print(json.dumps({"file": path, "said": said, "s": time.monotonic() - began, "mb": peak_mb()}))
"""


def write_film(path, codec, sound):
  """40 small pictures with sound."""
  rng = np.random.default_rng(0)
  with av.open(str(path), "w") as container:
    video = container.add_stream(codec, rate=25)
    video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
    audio = container.add_stream(sound, rate=16_000, layout="mono")
    form = audio.codec_context.format.name
    size = audio.codec_context.frame_size or 640
    for i in range(40):
      image = np.full((48, 64, 3), 40 + 4 * i, np.uint8)
      image[:, i : i + 8] = rng.integers(0, 256, 3)
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      container.mux(video.encode(frame))
    container.mux(video.encode(None))
    for at in range(0, 25_600 - size, size):
      wave = 0.3 * np.sin(np.arange(at, at + size) / 8)[None]
      wave = np.round(wave * 32767).astype(np.int16) if form == "s16" else wave.astype(np.float32)
      piece = av.AudioFrame.from_ndarray(wave, format=form, layout="mono")
      piece.sample_rate, piece.pts, piece.time_base = 16_000, at, fractions.Fraction(1, 16_000)
      container.mux(audio.encode(piece))
    container.mux(audio.encode(None))
  return path.read_bytes()


def boxes(data, begin=0, end=None):
  """Where the sizes of an MP4's boxes stand, those within boxes included."""
  end = len(data) if end is None else end
  while begin + 8 <= end:
    size, kind = int.from_bytes(data[begin : begin + 4], "big"), data[begin + 4 : begin + 8]
    yield begin
    if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"):
      yield from boxes(data, begin + 8, min(begin + size, end))
    if size < 8:
      return
    begin += size


def mutate(data, rng, kind):
  out = bytearray(data)
  if kind == "flip":
    for at in rng.integers(0, len(out), rng.integers(1, 40)):
      out[at] ^= 1 << int(rng.integers(8))
  elif kind == "header":
    for at in rng.integers(0, min(len(out), 1200), rng.integers(1, 12)):
      out[at] = int(rng.integers(256))
  elif kind == "cut":
    del out[int(rng.integers(1, len(out))) :]
  elif kind == "hole":
    at, size = int(rng.integers(len(out))), int(rng.integers(1, 2000))
    del out[at : at + size]
  elif kind == "box":  # also of files that have none: then any four bytes
    places = list(boxes(data)) or [int(rng.integers(len(out) - 4))]
    at = places[int(rng.integers(len(places)))]
    value = [0, 1, 7, 2**31, 2**32 - 1, int(rng.integers(2**32))][int(rng.integers(6))]
    out[at : at + 4] = value.to_bytes(4, "big")
  return bytes(out)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
  root = tmp_path_factory.mktemp("films")
  return {
    name: write_film(root / name, codec, sound)
    for name, codec, sound in (
      ("a.mp4", "libx264", "aac"), ("b.mkv", "mpeg4", "pcm_s16le"),
      ("c.avi", "msmpeg4v3", "pcm_s16le"), ("d.webm", "libvpx-vp9", "libopus"),
      ("e.ts", "mpeg2video", "mp2"),
    )
  }  # fmt: skip


def read_all(paths):
  done = subprocess.run(
    [sys.executable, "-c", READER, *map(str, paths)], capture_output=True, text=True, timeout=900
  )
  answers = [json.loads(line) for line in done.stdout.splitlines()]
  assert done.returncode == 0, f"{answers[-1]}: {done.returncode} {done.stderr[-800:]}"
  return [answer for answer in answers if "said" in answer]


def fuzz(films, folder, count, seed):
  rng = np.random.default_rng(seed)
  paths = []
  for i in range(count):
    name = list(films)[i % len(films)]
    kind = ("flip", "header", "cut", "hole", "box")[i // len(films) % 5]
    path = folder / f"{i}_{kind}_{name}"
    path.write_bytes(mutate(films[name], rng, kind))
    paths.append(path)
  answers = read_all(paths)
  assert len(answers) == count
  for answer in answers:
    assert answer["s"] < 10 and answer["mb"] < 700, answer
    for said in answer["said"]:
      assert "\n" not in str(said) and len(str(said)) < 400, answer
  return answers


def test_the_films_themselves_are_read(films, tmp_path):
  paths = []
  for name, data in films.items():
    paths.append(tmp_path / name)
    paths[-1].write_bytes(data)
  for answer in read_all(paths):
    pictures, samples = answer["said"]
    assert pictures == 40 and abs(samples - 25_600) < 1500, answer


def test_twenty_mutated_files(films, tmp_path):
  answers = fuzz(films, tmp_path, 20, seed=1)
  assert any(isinstance(a["said"][0], str) for a in answers)  # some were beyond reading


@pytest.mark.slow
def test_two_hundred_mutated_files(films, tmp_path):
  fuzz(films, tmp_path, 200, seed=2)


@pytest.mark.parametrize("name", ["a.mp4", "b.mkv", "c.avi", "d.webm"])
def test_files_cut_off_anywhere_are_said_to_be(films, tmp_path, name):
  data = films[name]
  for share in (0.2, 0.5):
    (tmp_path / f"{share}_{name}").write_bytes(data[: int(share * len(data))])
  for answer in read_all(sorted(tmp_path.iterdir())):
    assert all("cut off" in str(said) for said in answer["said"]), answer
