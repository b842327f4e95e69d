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


@pytest.mark.parametrize("rate, channels", [(8000, 1), (44_100, 2), (48_000, 6), (48_000, 16)])
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


def put(container, stream, frames):
  """Encodes and muxes frames, then flushes."""
  for frame in [*frames, None]:
    container.mux(stream.encode(frame))


def flashes(seconds, every_s, rate, times_s, size=(32, 32)):
  """Pictures at `times_s` that are white while floor(t / every_s) is odd, and beeps alike."""
  for time_s in times_s:
    white = int(time_s / every_s + 1e-9) % 2
    yield np.full((*size, 3), 220 * white + 16, np.uint8)
  t = np.arange(round(seconds * rate)) / rate
  yield (0.4 * np.sin(2 * np.pi * 440 * t) * (np.floor(t / every_s) % 2)).astype(np.float32)


def write_flashes(path, seconds, rate, pts, time_base, *, codec="mpeg4", channels=2, every_s=1.0):
  """A film of flashes and beeps at the given timestamps of its pictures."""
  times_s = [float(p * time_base) for p in pts]
  *frames, sound = flashes(seconds, every_s, rate, times_s)
  with av.open(str(path), "w") as container:
    video = container.add_stream(codec, rate=30)
    video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
    video.codec_context.time_base = video.time_base = time_base
    layout = "stereo" if channels == 2 else "mono"
    audio = container.add_stream("pcm_s16le", rate=rate, layout=layout)
    pcm = np.repeat(np.round(sound * 32767).astype(np.int16)[:, None], channels, 1)
    block, at = rate // 2, 0
    for number, (stamp, frame) in enumerate(zip(pts, frames, strict=True)):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
      picture.pts, picture.time_base = int(stamp), time_base
      container.mux(video.encode(picture))
      while at < len(pcm) and at / rate <= times_s[number]:
        piece = av.AudioFrame.from_ndarray(
          np.ascontiguousarray(pcm[at : at + block].reshape(1, -1)), format="s16", layout=layout,
        )  # fmt: skip
        piece.sample_rate, piece.pts = rate, at
        piece.time_base = fractions.Fraction(1, rate)
        container.mux(audio.encode(piece))
        at += len(pcm[at : at + block])
    container.mux(video.encode(None))
    container.mux(audio.encode(None))


def changes(path, seconds):
  """Frames at which the film flashes, and those (in frames, with fractions) at which it beeps."""
  white = np.array([frame[16, 16, 0] > 128 for frame in media.read_frames(path)])
  sound = media.read_audio(path)
  # How long the last picture is shown is for the container to say, or to guess.
  assert abs(len(white) - 25 * seconds) < 2 and abs(len(sound) - 16_000 * seconds) <= 640
  loud = np.abs(sound[: len(sound) // 80 * 80].reshape(-1, 80)).max(1) > 0.05  # 5 ms each
  return np.flatnonzero(np.diff(white.astype(int))) + 1, (np.flatnonzero(np.diff(loud)) + 1) / 8


@pytest.mark.parametrize("fps, rate, channels, ending", [
  (fractions.Fraction(24), 48_000, 2, "mkv"),
  (fractions.Fraction(30_000, 1001), 44_100, 2, "mov"),
  (fractions.Fraction(30), 11_025, 1, "mkv"),
  (fractions.Fraction(50), 32_000, 2, "avi"),
  (fractions.Fraction(60), 22_050, 1, "mov"),
])  # fmt: skip
def test_any_rate_is_put_onto_one_clock(tmp_path, fps, rate, channels, ending):
  path = tmp_path / f"film.{ending}"
  pts = range(int(12 * fps))
  write_flashes(path, 12, rate, pts, 1 / fps, channels=channels)
  seen, heard = changes(path, 12)
  assert len(seen) == len(heard) == 11
  assert np.abs(seen - heard).max() <= 0.5 * 25 / min(fps, 25) + 0.6
  assert np.abs(heard - 25 * np.arange(1, 12)).max() < 0.5


def test_a_variable_rate_keeps_pictures_and_sound_together(tmp_path):
  path = tmp_path / "phone.mkv"
  rng = np.random.default_rng(0)
  times = np.cumsum(rng.integers(20, 60, 300))  # milliseconds from frame to frame
  seconds = float(times[-1]) / 1000
  write_flashes(path, seconds, 44_100, [0, *times.tolist()], fractions.Fraction(1, 1000))
  seen, heard = changes(path, seconds)
  assert len(seen) == len(heard) == int(seconds)
  assert np.abs(seen - heard).max() <= 1.6  # 60 ms between pictures


@pytest.mark.slow
def test_an_hour_drifts_by_less_than_a_frame(tmp_path):
  path = tmp_path / "hour.mov"
  fps = fractions.Fraction(30_000, 1001)
  write_flashes(path, 3600, 44_100, range(int(3600 * fps)), 1 / fps, channels=1, every_s=20.0)
  seen, heard = changes(path, 3600)
  assert len(seen) == len(heard) == 179
  assert np.abs(seen - heard).max() < 1.1 and np.abs(heard - 500 * np.arange(1, 180)).max() < 0.5


def sound_of(pieces, path, rate=16_000, start_ms=0):
  """A Matroska file of pieces of sound (seconds at which each begins, samples) and pictures."""
  with av.open(str(path), "w") as container:
    video = container.add_stream("mpeg4", rate=25)
    video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
    video.codec_context.time_base = fractions.Fraction(1, 1000)
    audio = container.add_stream("pcm_s16le", rate=rate, layout="mono")
    for i, image in enumerate(moving(75)):
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      frame.pts, frame.time_base = start_ms + 40 * i, fractions.Fraction(1, 1000)
      container.mux(video.encode(frame))
    container.mux(video.encode(None))
    for begin_s, samples in pieces:
      for at in range(0, len(samples), 1600):
        pcm = np.round(samples[None, at : at + 1600] * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
        frame.sample_rate, frame.time_base = rate, fractions.Fraction(1, rate)
        frame.pts = round(begin_s * rate) + at
        container.mux(audio.encode(frame))
    container.mux(audio.encode(None))


@pytest.mark.parametrize("start_ms", [0, 400])
def test_gaps_and_overlaps_in_sound_do_not_move_what_follows(tmp_path, start_ms):
  path, sound, start_s = tmp_path / "gaps.mkv", chirp(0.5), start_ms / 1000
  # The second piece comes 0.3 s late, the third overlaps it by 0.1 s.
  sound_of([(0.0, sound), (0.8, sound), (1.2, sound)], path, start_ms=start_ms)
  back = media.read_audio(path)
  assert abs(len(back) / 16_000 + start_s - 1.7) < 0.02
  for begin_s in (0.8, 1.2):
    at = round((begin_s + 0.15 - start_s) * 16_000)  # past what overlaps
    piece = sound[2400:7000]
    near = back[at - 800 : at + len(piece) + 800]
    assert lag(piece, near) - 800 == pytest.approx(0, abs=500)  # SLIP_S
    assert np.corrcoef(piece, near[lag(piece, near) :][: len(piece)])[0, 1] > 0.98
  if not start_ms:
    assert np.abs(back[8300:12_500]).max() == 0


def test_reading_sound_ends_where_it_is_told_to(tmp_path):
  path = tmp_path / "film.mp4"
  media.write_video(path, moving(75), audio=chirp(3.0))
  part = media.read_audio(path, limit_s=1.0)
  assert len(part) == 16_000
  np.testing.assert_array_equal(part, media.read_audio(path)[:16_000])


def test_oblong_pixels_become_square(tmp_path):
  path = tmp_path / "dv.mkv"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg4", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    stream.codec_context.sample_aspect_ratio = fractions.Fraction(3, 2)
    put(container, stream, (av.VideoFrame.from_ndarray(f, format="rgb24") for f in moving(3)))
  info = media.probe(path)
  assert (info.width, info.height) == (96, 48)
  assert next(media.read_frames(path)).shape == (48, 96, 3)


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
