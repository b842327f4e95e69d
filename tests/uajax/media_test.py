import fractions
import resource
import wave

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace

from uajax import media
from uajax.errors import UserError


def moving(count, height=48, width=64):
  """Smooth colours, a bar that moves 2 px a frame over the upper half."""
  rows, columns = np.linspace(40, 200, height)[:, None], np.linspace(60, 220, width)[None, :]
  base = np.stack(np.broadcast_arrays(rows, columns, (rows + columns) / 2), -1).astype(np.uint8)
  for i in range(count):
    frame = base.copy()
    frame[: height // 2, 2 * i % width : 2 * i % width + 4] = 255
    yield frame


def chirp(seconds, rate=16_000):
  t = np.arange(round(seconds * rate)) / rate
  return (0.5 * np.sin(2 * np.pi * (200 + 300 * t) * t)).astype(np.float32)


def bar_at(frame):
  return int(np.argmax(frame[4].astype(int).sum(-1) > 740))


def lag(a, b):
  """Samples by which b comes after a."""
  return int(np.argmax(np.correlate(b, a, "full"))) - (len(a) - 1)


@pytest.mark.parametrize("count, audio_s", [(20, 2.0), (20, 0.3), (3, 3.0), (1, 1.0)])
def test_a_film_is_as_long_as_its_pictures_whatever_the_sound(tmp_path, count, audio_s):
  path = tmp_path / "film.mp4"
  assert media.write_video(path, moving(count), audio=chirp(audio_s)) == count
  info = media.probe(path)
  assert (info.width, info.height, info.fps, info.frames) == (64, 48, 25, count)
  assert info.has_audio and info.duration_s == pytest.approx(count / 25)
  assert len(media.read_audio(path)) == count * 640
  assert sum(1 for _ in media.read_frames(path)) == count


def test_pictures_and_sound_come_back_in_their_place(tmp_path):
  path = tmp_path / "film.mp4"
  frames, sound = list(moving(25)), chirp(1.0)
  media.write_video(path, frames, audio=sound)
  back = list(media.read_frames(path))
  error = np.mean([(a.astype(float) - b) ** 2 for a, b in zip(frames, back, strict=True)])
  assert 10 * np.log10(255**2 / error) > 30
  assert np.abs(np.mean(np.asarray(frames, float) - back, (0, 1, 2))).max() < 2.5  # no colour cast
  assert [bar_at(frame) for frame in back] == pytest.approx([2 * i for i in range(25)], abs=1)
  assert lag(sound, media.read_audio(path)) == 0


def test_odd_sizes_are_padded_by_the_last_row_and_column(tmp_path):
  path = tmp_path / "film.mp4"
  media.write_video(path, moving(3, 47, 63))
  info = media.probe(path)
  assert (info.height, info.width, info.has_audio) == (48, 64, False)
  with pytest.raises(UserError, match="holds no sound"):
    media.read_audio(path)


def test_other_rates_are_sampled_at_the_nearest_frame(tmp_path):
  for fps in (50, 12):
    path = tmp_path / f"{fps}.mp4"
    media.write_video(path, moving(fps // 2), fps=fps, quality=8)
    back = list(media.read_frames(path))
    assert len(back) == round((fps // 2) / fps * 25)
    shown = [bar_at(frame) / 2 / fps for frame in back]
    assert np.abs(np.asarray(shown) - np.arange(len(back)) / 25).max() <= 0.5 / min(fps, 25) + 0.03


def test_uneven_timestamps_keep_their_time(tmp_path):
  path = tmp_path / "film.mkv"
  times_ms = [0, 40, 80, 410, 450, 490]  # nothing new for 330 ms
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=25, options={"crf": "8"})
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 1000)
    for ms, frame in zip(times_ms, moving(6), strict=True):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709)
      picture.pts, picture.time_base = ms, stream.codec_context.time_base
      container.mux(stream.encode(picture))
    container.mux(stream.encode(None))
  numbers = [round(bar_at(frame) / 2) for frame in media.read_frames(path)]
  assert numbers == [0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 5]


def test_rotated_films_are_upright(tmp_path):
  path = tmp_path / "phone.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=25, options={"crf": "8"})
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    stream.set_display_rotation(90)
    for frame in moving(2):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode(None))
  with av.open(str(path)) as container:
    assert next(container.decode(video=0)).rotation == 90  # counter-clockwise
  info = media.probe(path)
  assert (info.height, info.width) == (64, 48)
  back = list(media.read_frames(path))
  assert back[0].shape == (64, 48, 3)
  upright = np.rot90(next(moving(1)), 1).astype(float)
  assert np.abs(back[0] - upright).mean() < 6


@pytest.mark.parametrize("rate, channels", [(8000, 1), (44_100, 2), (48_000, 6)])
def test_any_sound_becomes_16_khz_mono(tmp_path, rate, channels):
  path = tmp_path / "sound.wav"
  sound = chirp(1.0, rate)
  pcm = np.round(np.tile(sound[:, None], (1, channels)) * 32767).astype("<i2")
  with wave.open(str(path), "wb") as file:
    file.setparams((channels, 2, rate, 0, "NONE", ""))
    file.writeframes(pcm.tobytes())
  back = media.read_audio(path)
  assert back.dtype == np.float32 and abs(len(back) - 16_000) <= 2
  count = min(len(back), 16_000)
  assert np.corrcoef(back[:count], chirp(1.0)[:count])[0, 1] > 0.99
  assert np.abs(back).max() == pytest.approx(0.5, abs=0.05)


def test_sound_that_starts_late_is_put_in_its_place(tmp_path):
  path = tmp_path / "late.mkv"
  sound = chirp(0.5)
  with av.open(str(path), "w") as container:
    video = container.add_stream("libx264", rate=25)
    video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
    audio = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
    for frame in moving(25):
      container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(video.encode(None))
    pcm = np.round(sound * 32767).astype(np.int16)[None, :]
    frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
    frame.sample_rate, frame.pts = 16_000, 4000
    container.mux(audio.encode(frame))
    container.mux(audio.encode(None))
  back = media.read_audio(path)
  assert lag(sound, back) == pytest.approx(4000, abs=20)


def test_wav_keeps_every_sample(tmp_path):
  path = tmp_path / "a.wav"
  sound = np.round(chirp(0.2) * 32768) / np.float32(32768)
  media.write_wav(path, sound)
  back, rate = media.read_wav(path)
  assert rate == 16_000
  np.testing.assert_array_equal(back, sound)
  np.testing.assert_allclose(media.read_audio(path), sound, atol=1e-6)
  media.write_wav(path, np.asarray([2.0, -2.0]))
  assert np.abs(media.read_wav(path)[0]).max() <= 1


def _half(path, out):
  out.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  root = tmp_path_factory.mktemp("media")
  media.write_video(root / "whole.mp4", moving(50), audio=chirp(2.0))
  _half(root / "whole.mp4", root / "cut.mp4")
  media.write_wav(root / "whole.wav", chirp(1.0))
  _half(root / "whole.wav", root / "cut.wav")
  media.write_wav(root / "nothing.wav", np.zeros(0))
  (root / "text.mp4").write_text("no film\n" * 100)
  (root / "empty.mp4").write_bytes(b"")
  import PIL.Image

  PIL.Image.new("RGB", (32, 32)).save(root / "photo.jpg")
  return root


@pytest.mark.parametrize("name, words", [
  ("missing.mp4", "does not exist"),
  ("", "is a folder"),
  ("text.mp4", "not a sound or video file"),
  ("empty.mp4", "is empty"),
  ("photo.jpg", "is not a video"),
  ("whole.wav", "is not a video"),
  ("cut.mp4", r"cut off or damaged.* \d+ frames could be read"),
])  # fmt: skip
def test_what_is_no_film_is_refused_in_one_line(files, name, words):
  with pytest.raises(UserError, match=words) as caught:
    list(media.read_frames(files / name))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, words", [
  ("missing.wav", "does not exist"),
  ("nothing.wav", "0 s of sound"),
  ("cut.wav", r"cut off: it holds \d+ of \d+ bytes"),
  ("cut.mp4", "s of sound could be read"),
  ("photo.jpg", "no sound"),
  ("text.mp4", "not a sound or video file"),
])  # fmt: skip
def test_what_is_no_sound_is_refused_in_one_line(files, name, words):
  with pytest.raises(UserError, match=words) as caught:
    media.read_audio(files / name)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("samples, words", [
  (np.zeros(0), "0 s"), (np.zeros(16_000), "silent"), (np.full(100, np.nan), "not finite"),
])  # fmt: skip
def test_speech_must_be_heard(samples, words):
  with pytest.raises(UserError, match=words):
    media.check_speech(samples.astype(np.float32), "x.wav")
  media.check_speech(0.01 * chirp(1.0), "x.wav")


def test_a_failing_film_leaves_the_earlier_one(tmp_path):
  path = tmp_path / "film.mp4"
  media.write_video(path, moving(5))
  before = path.read_bytes()

  def torn():
    yield from moving(3)
    raise UserError("the renderer failed: try again")

  with pytest.raises(UserError, match="the renderer failed"):
    media.write_video(path, torn())
  with pytest.raises(UserError, match="no frames"):
    media.write_video(path, [])
  with pytest.raises(ValueError, match="frame 1"):
    media.write_video(path, [*moving(1), *moving(1, 32, 32)])
  assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (10, 240, 320, 3)).astype(np.uint8)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as if the disk ended there
  try:
    with pytest.raises(UserError, match="the disk is full.*run again"):
      media.write_video(tmp_path / "film.mp4", noise)
    with pytest.raises(UserError, match="the disk is full"):
      media.write_wav(tmp_path / "a.wav", chirp(2.0))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not list(tmp_path.iterdir())


def test_a_real_clip_at_30_fps(shared):
  path = shared("data/clips/mead_sad_4s_1080p.mp4")
  info = media.probe(path)
  assert (info.width, info.height, info.has_audio) == (1920, 1080, True)
  frames = media.read_frames(path)
  assert next(frames).shape == (1080, 1920, 3)
  assert 1 + sum(1 for _ in frames) == round(info.duration_s * 25)
  assert abs(len(media.read_audio(path)) / 16_000 - info.duration_s) < 0.1
