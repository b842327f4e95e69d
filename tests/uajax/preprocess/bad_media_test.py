"""Videos that cannot be used end in one clear line within seconds; odd ones go through."""

import itertools
import struct
import time

import av
import numpy as np
import pytest
from PIL import Image

from uajax import media
from uajax.data import folder
from uajax.errors import UserError
from uajax.preprocess import pipeline

SIZE = 160


def tone(seconds):
  return (0.2 * np.sin(np.arange(round(seconds * 16_000)) / 5)).astype(np.float32)


@pytest.fixture(scope="module")
def faces(shared):
  """60 frames of a real clip, small, and its sound."""
  shared("models/face_landmarker.task")
  clip = shared("data/clips/obama_20s.mp4")
  frames = [
    np.asarray(Image.fromarray(image).resize((SIZE, SIZE)))
    for image in itertools.islice(media.read_frames(clip), 60)
  ]
  return frames, media.read_audio(clip, limit_s=2.4)


def find(data, kind):
  """Where the sizes of an MP4's boxes of this kind stand."""
  at = data.find(kind)
  while at >= 0:
    yield at - 4
    at = data.find(kind, at + 1)


def as_matroska(path):
  """The streams of a film in another container."""
  with av.open(str(path)) as source, av.open(str(path.with_suffix(".mkv")), "w") as target:
    to = {s.index: target.add_stream_from_template(s) for s in source.streams}
    for packet in source.demux():
      if packet.dts is not None:
        packet.stream = to[packet.stream.index]
        target.mux(packet)
  return path.with_suffix(".mkv").read_bytes()


def claim_eight_hours(data):
  """Sets the length that the head of a Matroska file states, in milliseconds."""
  at = data.index(b"\x44\x89\x88") + 3
  return data[:at] + struct.pack(">d", 8 * 3600e3) + data[at + 8 :]


def bad_files(root, frames, sound):
  """Name -> what the line must say."""
  whole = root / "whole.mp4"
  media.write_video(whole, frames, audio=sound)
  data = whole.read_bytes()

  def write(name, content):
    (root / name).write_bytes(content)
    return root / name

  def film(name, pictures, audio):
    media.write_video(root / name, pictures, audio=audio)
    return root / name

  grey = [np.full((SIZE, SIZE, 3), 40 + f, np.uint8) for f in range(60)]
  Image.fromarray(frames[0]).save(root / "photo.jpg")
  yield write("truncated.mp4", data[: len(data) * 2 // 3]), "cut off"
  yield film("mute.mp4", frames, None), "holds no sound"
  yield film("silent.mp4", frames, np.zeros(38_400, np.float32)), "is silent"
  yield film("empty room.mp4", grey, tone(2.4)), "no face was found"
  yield film("black.mp4", [0 * f for f in grey], tone(2.4)), "no face was found"
  yield film("still.mp4", [frames[0]] * 60, sound), "never moves"
  yield film("one frame.mp4", frames[:1], sound), "at least 2 s"
  yield write("photo.mp4", (root / "photo.jpg").read_bytes()), "is not a video"
  yield write("text.mov", b"no film\n" * 100), "not a sound or video file"
  yield write("eight hours.mkv", claim_eight_hours(as_matroska(whole))), "after 2.5 of 28800.0 s"
  for name, at, value in (
    ("tiny moov", next(find(data, b"moov")), (9).to_bytes(4)),
    ("huge trak", next(find(data, b"trak")), (2**32 - 1).to_bytes(4)),
    ("huge stsz", next(find(data, b"stsz")), (2**32 - 1).to_bytes(4)),
  ):  # fmt: skip
    yield write(f"{name}.mp4", data[:at] + value + data[at + 4 :]), f"{name}\\.mp4"


def test_each_ends_in_one_line_within_seconds(faces, tmp_path):
  out = tmp_path / "subject"
  for path, words in bad_files(tmp_path, *faces):
    began = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
      pipeline.run(path, out)
    line = str(caught.value)
    assert "\n" not in line and 40 < len(line) < 300 and ": " in line, line
    assert time.monotonic() - began < 10, path
    assert not out.exists() and not out.with_name("subject.work").exists(), path


def test_a_wrong_ending_does_not_matter(faces, tmp_path):
  frames, sound = faces
  media.write_video(tmp_path / "a.mp4", frames, audio=sound)
  path = (tmp_path / "a.mp4").rename(tmp_path / "a.txt")
  assert media.probe(path).frames == 60


@pytest.mark.slow
def test_of_two_people_and_two_scenes_one_is_followed(faces, tmp_path):
  """Two people side by side, the right one larger; then a cut to another room, and back."""
  frames, sound = faces
  room = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 8, 3)).astype(np.uint8)).resize(
      (320, SIZE), Image.Resampling.BICUBIC
    )
  )
  clip = []
  for f, image in enumerate(frames + frames[:4]):
    wide = np.full((SIZE, 320, 3), 70, np.uint8)
    wide[60:, :100] = np.asarray(Image.fromarray(image).resize((100, 100)))[:, ::-1]
    wide[:, 160:] = image
    if 40 <= f < 50:  # elsewhere, the same face on the other side
      wide = room.copy()
      wide[:, :160] = image
    clip.append(wide)
  path = tmp_path / "two.mp4"
  media.write_video(path, clip, audio=np.tile(sound, 2)[: len(clip) * 640])
  report = pipeline.run(
    path, tmp_path / "subject", pipeline.Settings(size=128, looks=1, focal_px=260.0)
  )
  assert report["other_faces"] == 1 and report["cut_out"]["left"] >= 140
  assert report["spans"]["cuts"] == [40, 50]
  assert [s["reason"] for s in report["spans"]["left_out"]] == ["another scene"]
  assert report["frames"] == {"all": 64, "used": 54, "left_out": [[40, 49]]}
  text = " ".join(report["warnings"])
  assert "1 further face(s)" in text and "is cut 2 times" in text
  ids = [*folder.frame_ids(tmp_path / "subject", "train"), *folder.frame_ids(
    tmp_path / "subject", "val")]  # fmt: skip
  assert ids == [*range(40), *range(50, 64)]
