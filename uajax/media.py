"""Sound and moving pictures: decoded onto the project's clock, encoded into files (PyAV).

Pictures come at an even rate by their timestamps, sound as 16 kHz mono on the same time
axis: sample 0 is heard with frame 0. Both follow the timestamps of the file all along, so that
neither gaps nor odd rates make them drift. Everything is streamed, so length costs no memory
(sound: 64 kB a second).

Axes: h w pixels, n samples.
"""

import array
import contextlib
import itertools
import logging
import math
import os
import pathlib
import tempfile
import wave
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from uajax.errors import UserError
from uajax.saving import aside
from uajax.types import FPS, SAMPLE_RATE_HZ

if TYPE_CHECKING:
  import av.container

# PyAV is imported where it is used: WAV files are read and written without it.

_LOG = logging.getLogger(__name__)

_SILENT = 1e-3  # peak amplitude below which nothing is heard (-60 dB)
_MISSING_S = 0.5  # what may lack at the end of a file before it counts as cut off
_SLIP_S = 0.03  # sound this far from where its timestamps put it is moved there
_GAP_S = 60.0  # timestamps that jump farther are damaged
_LARGEST_PX = 48_000_000  # of a picture: 8k, and some; decoders hold a dozen of them
_BAD_SHARE = 0.02  # of a stream's packets that may be damaged, and five more


class VideoInfo(NamedTuple):
  """What a video file says of itself."""

  width: int  # as displayed, after any rotation
  height: int
  fps: float  # average
  frames: int  # in the file; estimated where the container does not say
  duration_s: float
  has_audio: bool


def probe(path: str | os.PathLike) -> VideoInfo:
  """Reads the headers and the first frame.

  Raises:
    UserError: missing, not a video, or nothing of it can be decoded.
  """
  with _open(path) as container:
    stream = _video_stream(container, path)
    frame = _first(container, stream, path)
    width, height = _display_size(stream, frame)
    if round(frame.rotation / 90) % 2:
      width, height = height, width
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    duration_s = _duration_s(container, stream) or 0.0
    frames = stream.frames or round(duration_s * fps)
    return VideoInfo(width, height, fps, frames, duration_s, bool(container.streams.audio))


def read_frames(
  path: str | os.PathLike, *, fps: float = FPS
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
  """The pictures at an even `fps`: each tick shows the frame nearest in time.

  Upright, pixels square, all of the first one's size. Opens the file at once (so that a wrong
  one fails here) and decodes as it is iterated.

  Raises:
    UserError: missing, not a video; while iterating: cut off (with the number of frames read).
  """
  probe(path)
  return _ticks(path, fps)


def _ticks(path, fps) -> Iterator[np.ndarray]:
  with _open(path) as container:
    stream = _video_stream(container, path)
    usual_s = 1 / float(stream.average_rate or fps)
    tick, begin_s, shown, shown_s = 0, 0.0, None, 0.0
    size = (0, 0)

    def ticks_until(time_s: float) -> Iterator[np.ndarray]:
      nonlocal tick
      if tick / fps < time_s:
        picture = _picture(shown, size, path)  # converted once, and only if it is seen
        while tick / fps < time_s:
          yield picture
          tick += 1

    for frame in _decode(container, stream, path):
      time_s = frame.time if frame.time is not None else begin_s + shown_s + usual_s
      if shown is None:
        begin_s, size = time_s, _display_size(stream, frame)
      time_s -= begin_s
      if time_s - shown_s > _GAP_S:
        raise UserError(
          f"{path} is damaged: after {shown_s:.1f} s its timestamps jump by "
          f"{time_s - shown_s:.0f} s: re-encode it"
        )
      if shown is not None:
        yield from ticks_until((shown_s + time_s) / 2)
      shown, shown_s = frame, max(time_s, shown_s)
    if shown is not None:
      length_s = float(shown.duration * shown.time_base) if shown.duration else usual_s
      length_s = min(length_s, _GAP_S)
      yield from ticks_until((max(1, round((shown_s + length_s) * fps)) - 0.5) / fps)


def _display_size(stream, frame) -> tuple[int, int]:
  """Width and height of a stored frame once its pixels are square."""
  aspect = float(stream.sample_aspect_ratio or 1)
  if not 0.2 < aspect < 5:  # no camera's: a damaged header
    aspect = 1.0
  return max(round(frame.width * aspect), 1), frame.height


def _picture(frame, size: tuple[int, int], path) -> np.ndarray:
  """RGB, upright."""
  import av.error

  turns = round(frame.rotation / 90) % 4
  width, height = size
  try:
    if (frame.width, frame.height) != size:
      frame = frame.reformat(width=width, height=height, format="rgb24")
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
  except (av.error.FFmpegError, ValueError, MemoryError) as error:
    raise UserError(
      f"{path} holds pictures that cannot be converted ({frame.format.name}): re-encode it"
    ) from error


def read_audio(
  path: str | os.PathLike, rate: int = SAMPLE_RATE_HZ, *, limit_s: float = math.inf
) -> Float32[np.ndarray, " n"]:
  """The sound of a sound or video file: the mean of its channels at `rate`, in [-1, 1].

  In a video, sample 0 belongs to the first picture: sound that starts later is preceded by
  silence, sound before the first picture is cut. Gaps are filled with silence. With `limit_s`
  reading ends there.

  Raises:
    UserError: missing, no sound in it, 0 s long, cut off or not decodable.
  """
  samples = array.array("f")  # grows in place
  for chunk in _heard(path, rate):
    samples.frombytes(chunk.tobytes())
    if len(samples) >= limit_s * rate:
      del samples[math.ceil(limit_s * rate) :]
      break
  if not samples:
    raise UserError(f"{path} holds 0 s of sound: give a recording of speech")
  return np.frombuffer(samples, np.float32)


def map_audio(
  path: str | os.PathLike, rate: int = SAMPLE_RATE_HZ
) -> Float32[np.ndarray, " n"]:
  """As `read_audio`, but the samples lie in a temporary file that goes with the array."""
  with tempfile.TemporaryFile() as file:
    count = 0
    for chunk in _heard(path, rate):
      file.write(chunk.astype("<f4").tobytes())
      count += len(chunk)
    if not count:
      raise UserError(f"{path} holds 0 s of sound: give a recording of speech")
    file.flush()
    return np.memmap(file, "<f4", "r", shape=(count,))


def _heard(path: str | os.PathLike, rate: int) -> Iterator[Float32[np.ndarray, " n"]]:
  """The sound of a file, piece by piece; see `read_audio`."""
  with _open(path) as container:
    if not container.streams.audio:
      raise UserError(f"{path} holds no sound: give a file with an audio track")
    stream = container.streams.audio[0]
    _require_codec(stream, path)
    film = next(_moving(container), None)
    begin_s = None if film is None else _begin_s(path)
    yield from _placed(container, stream, path, rate, begin_s)


def _begin_s(path) -> float:
  """When the first picture that can be decoded is shown."""
  with _open(path) as container:
    frame = _first(container, _video_stream(container, path), path)
    return frame.time or 0.0


def _first(container, stream, path):
  """The first frame of a video stream."""
  frame = next(_decode(container, stream, path, check_end=False), None)
  if frame is None:
    raise UserError(f"{path} holds no picture that can be decoded: check or re-encode the file")
  return frame


def _placed(
  container, stream, path, rate: int, begin_s: float | None
) -> Iterator[Float32[np.ndarray, " n"]]:
  """Pieces of sound without gap or overlap, each where its timestamps put it.

  Sample 0 is at `begin_s`, or where the sound begins if that is None.
  """
  import av
  import av.error

  resampler, form = None, None
  due_s = 0.0  # when the next of the stream's samples is due
  written, skip, most = 0, 0, math.inf  # samples: given out, to leave out yet, to give out at most

  def take(frames) -> Iterator[np.ndarray]:
    nonlocal written, skip
    for out in frames:
      # "mono" would weigh channels by a surround matrix; their mean cannot clip. Interleaved: PyAV
      # reads beyond its arrays where more than eight channels lie apart.
      channels = out.to_ndarray().reshape(-1, out.layout.nb_channels)
      chunk = np.clip(np.nan_to_num(channels.mean(axis=1, dtype=np.float32)), -1, 1)
      left_out = min(skip, len(chunk))
      skip -= left_out
      chunk = chunk[left_out : int(min(left_out + most - written, len(chunk)))]
      written += len(chunk)
      yield chunk

  try:
    for frame in _decode(container, stream, path):
      shape = (frame.format.name, frame.layout.name, frame.sample_rate)
      time_s = due_s if frame.time is None else frame.time
      new = resampler is None
      if new:
        begin_s = time_s if begin_s is None else begin_s
        due_s = begin_s
        if stream.duration:  # codecs fill their last block; the container knows where sound ends
          end_s = time_s - begin_s + stream.duration * (stream.time_base or 0)
          most = max(math.ceil(end_s * rate), 1)
      if time_s - due_s > _GAP_S:
        raise UserError(
          f"{path} is damaged: the timestamps of its sound jump by {time_s - due_s:.0f} s: "
          "re-encode it"
        )
      if new or shape != form or abs(time_s - due_s) > _SLIP_S:
        if resampler is not None:
          yield from take(resampler.resample(None))
        apart = round((time_s - (begin_s or 0.0)) * rate) - written
        skip = max(-apart, 0)
        if apart > 0:
          written += apart
          yield np.zeros(apart, np.float32)
        resampler, form, due_s = av.AudioResampler(format="flt", rate=rate), shape, time_s
      assert resampler is not None
      yield from take(resampler.resample(frame))
      due_s += frame.samples / frame.sample_rate
    if resampler is not None:
      yield from take(resampler.resample(None))
  except (av.error.FFmpegError, ValueError, ZeroDivisionError) as error:
    raise UserError(f"{path} holds sound that cannot be decoded: re-encode the file") from error


def check_sound(path: str | os.PathLike) -> None:
  """Refuses files that hold no sound, by their headers."""
  with _open(path) as container:
    if not container.streams.audio:
      raise UserError(f"{path} holds no sound: give a file with an audio track")


def check_speech(samples: Float32[np.ndarray, " n"], path: str | os.PathLike) -> None:
  """Refuses sound in which nothing can be heard.

  Raises:
    UserError: 0 s long, not finite, or silent.
  """
  if samples.ndim != 1 or not samples.size:
    raise UserError(f"{path} holds 0 s of sound: give a recording of speech")
  if not np.isfinite(samples).all():
    raise UserError(f"{path} holds samples that are not finite: re-encode the file")
  if max(samples.max(), -samples.min()) < _SILENT:
    raise UserError(f"{path} is silent: give a recording of speech")


def write_video(
  path: str | os.PathLike,
  frames: Iterable[UInt8[np.ndarray, "h w c"]],
  fps: int = FPS,
  audio: Float32[np.ndarray, " n"] | None = None,
  rate: int = SAMPLE_RATE_HZ,
  quality: int = 16,
) -> int:
  """Writes an MP4 (H.264 yuv420p, AAC) that any player shows; returns the frame count.

  Frames of four channels, the last their opacity (colours not multiplied by it), make a QuickTime
  film (ProRes 4444, PCM) for editing programs, whose name should end in .mov.
  The sound is cut or filled with silence to the length of the pictures. Odd sizes are padded
  by repeating the last row or column. `quality` is x264's crf: lower is better, 0..51.
  The file appears when it is whole, or not at all.

  Raises:
    UserError: no frames, a full disk, a place that cannot be written.
    ValueError: a frame of another size or type than the first.
  """
  import av
  from av.video.reformatter import ColorRange, Colorspace

  count = 0
  with aside(path) as partial, contextlib.ExitStack() as stack:
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
      raise UserError(f"{path} was not written: there are no frames for it")
    clear = np.ndim(first) == 3 and np.shape(first)[2] == 4
    container = stack.enter_context(av.open(
      str(partial), "w", format="mov" if clear else "mp4", options={"movflags": "+faststart"}))
    picture = sound = None
    shape = (0, 0, 0)
    for frame in itertools.chain([first], frames):
      frame = np.asarray(frame)
      if picture is None:
        if frame.ndim != 3 or frame.shape[2] not in (3, 4):
          raise ValueError(f"frames are uint8 [h w 3] or [h w 4], not {frame.dtype} {frame.shape}")
        shape = frame.shape
        codec, options = ("prores_ks", {"profile": "4444", "alpha_bits": "8"}) if clear else (
          "libx264", {"crf": str(quality), "preset": "fast"})
        picture = container.add_stream(codec, rate=fps, options=options)
        picture.height, picture.width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
        picture.pix_fmt = "yuva444p10le" if clear else "yuv420p"
        coder = picture.codec_context
        coder.colorspace, coder.color_primaries, coder.color_trc = 1, 1, 1  # BT.709
        coder.color_range = ColorRange.MPEG
        if audio is not None:
          sound = _Sound(container, audio, rate, "pcm_s16le" if clear else "aac")
      if frame.shape != shape or frame.dtype != np.uint8:
        raise ValueError(f"frame {count} is {frame.dtype} {frame.shape}, the first was {shape}")
      even = np.pad(frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
      image = av.VideoFrame.from_ndarray(even, format="rgba" if clear else "rgb24").reformat(
        format=picture.pix_fmt, dst_colorspace=Colorspace.ITU709
      )
      image.pts = count
      container.mux(picture.encode(image))
      count += 1
      if sound is not None:
        sound.write_until(count / fps)
    assert picture is not None
    container.mux(picture.encode(None))
    if sound is not None:
      sound.close()
  return count


class _Sound:
  """A track written along with the pictures, so that both lie side by side in the file."""

  def __init__(self, container: "av.container.OutputContainer", samples, rate: int, codec: str):
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1:
      raise ValueError(f"audio is mono [n], not {samples.shape}")
    self._container, self._samples, self._rate, self._at = container, samples, rate, 0
    self._stream: Any = container.add_stream(codec, rate=rate, layout="mono")
    self._form = "fltp"
    if codec == "aac":
      self._stream.codec_context.bit_rate = 128_000
    else:
      self._form = "s16"

  def write_until(self, time_s: float) -> None:
    import av

    end = round(time_s * self._rate)
    chunk = self._samples[self._at : end]
    chunk = np.clip(np.pad(chunk, (0, end - self._at - len(chunk))), -1, 1)
    if self._form == "s16":
      chunk = np.round(32767 * chunk).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(chunk[None, :], format=self._form, layout="mono")
    frame.sample_rate, frame.pts = self._rate, self._at
    self._container.mux(self._stream.encode(frame))
    self._at = end

  def close(self) -> None:
    self._container.mux(self._stream.encode(None))


def write_wav(
  path: str | os.PathLike, samples: Float32[np.ndarray, " n"], rate: int = SAMPLE_RATE_HZ
) -> None:
  """Writes 16-bit mono PCM, whole or not at all. Samples in [-1, 1]; louder ones are clipped."""
  whole = np.clip(np.round(np.asarray(samples, np.float64) * 32768), -32768, 32767)
  with aside(path) as partial, wave.open(str(partial), "wb") as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(rate)
    file.writeframes(whole.astype("<i2").tobytes())


def read_wav(path: str | os.PathLike) -> tuple[Float32[np.ndarray, " n"], int]:
  """Samples and rate of a 16-bit PCM file such as `write_wav` makes, without PyAV.

  Channels are averaged. For files from anywhere else use `read_audio`.

  Raises:
    UserError: missing, or not 16-bit PCM.
  """
  _require_file(path)
  try:
    with wave.open(str(path), "rb") as file:
      if file.getsampwidth() != 2:
        raise wave.Error("not 16 bits a sample")
      rate, channels = file.getframerate(), file.getnchannels()
      pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
  except (wave.Error, EOFError) as error:
    raise UserError(f"{path} is not a 16-bit WAV file ({error}): re-encode it") from error
  pcm = pcm[: len(pcm) // channels * channels].reshape(-1, channels)
  return pcm.mean(axis=1, dtype=np.float32) / np.float32(32768), rate


def _require_file(path) -> None:
  path = pathlib.Path(path)
  if path.is_dir():
    raise UserError(f"{path} is a folder: give a sound or video file")
  if not path.is_file():
    raise UserError(f"{path} does not exist: check the name")
  if not path.stat().st_size:
    raise UserError(f"{path} is empty: give a sound or video file")


def _open(path) -> "av.container.InputContainer":
  import av
  import av.error

  _require_file(path)
  try:
    # A file whatever its name: "concat:" or "http:" in a name must not reach the protocols.
    container = av.open(f"file:{os.fspath(path)}", metadata_errors="ignore")
  except PermissionError as error:
    raise UserError(f"{path} cannot be read: check its permissions") from error
  except av.error.FFmpegError as error:
    raise UserError(
      f"{path} is not a sound or video file, or is cut off at its start or end: check the file"
    ) from error
  _require_whole_riff(path)
  return container


def _require_whole_riff(path) -> None:
  """WAV and AVI files state their size at their head; decoders pass over what lacks."""
  with open(path, "rb") as file:
    head = file.read(8)
  stated, there = int.from_bytes(head[4:8], "little") + 8, os.path.getsize(path)
  if head[:4] == b"RIFF" and there + 1024 < stated < 2**32 - 1:  # the largest: streamed, unknown
    raise UserError(
      f"{path} is cut off: it holds {there} of {stated} bytes: get the whole file or re-encode it"
    )


def _moving(container) -> Iterator:
  """The video streams that are no cover pictures."""
  from av.stream import Disposition

  for stream in container.streams.video:
    if not stream.disposition & Disposition.attached_pic:
      yield stream


def _video_stream(container, path):
  name = container.format.name
  stream = next(_moving(container), None)
  if stream is None or name.endswith("_pipe") or name in ("image2", "tty"):
    raise UserError(f"{path} is not a video: give a file with moving pictures")
  _require_codec(stream, path)
  if stream.width * stream.height > _LARGEST_PX:
    raise UserError(
      f"{path} has pictures of {stream.width} x {stream.height} pixels: scale it to 4k or less"
    )
  stream.thread_type = "AUTO"
  return stream


def _require_codec(stream, path) -> None:
  if stream.codec_context is None:
    raise UserError(
      f"{path} is damaged, or its {stream.type} of a kind that cannot be decoded: re-encode it"
    )


def _duration_s(container, stream) -> float | None:
  if stream.duration:
    return float(stream.duration * stream.time_base)
  return container.duration / 1e6 if container.duration else None


def _decode(container, stream, path, *, check_end: bool = True) -> Iterator:
  """Frames of one stream. Says so where the file ends before its header says.

  A few damaged packets, as broadcasts and phones leave them, are passed over.
  """
  import av.error

  count, reached_s, packets, bad = 0, 0.0, 0, 0
  last_s = 0.0  # where any of the file's streams ends

  def cut_off(found) -> UserError:
    unit = f"{count} frames" if stream.type == "video" else f"{reached_s:.1f} s of sound"
    return UserError(
      f"{path} is cut off or damaged{found}: {unit} could be read: "
      "get the whole file or re-encode it"
    )

  try:
    for packet in container.demux():
      if packet.pts is not None and packet.time_base:
        last_s = max(last_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
      if packet.stream.index != stream.index:
        continue
      packets += 1
      try:
        frames = packet.decode()
      except av.error.InvalidDataError:
        bad += 1
        if bad > 5 + _BAD_SHARE * packets:
          raise
        continue
      for frame in frames:
        count += 1
        if frame.time is not None:
          length_s = 0.0
          if stream.type == "audio":
            length_s = frame.samples / frame.sample_rate
          elif frame.duration:
            length_s = float(frame.duration * frame.time_base)
          reached_s = max(reached_s, frame.time + length_s)
        yield frame
  except (av.error.FFmpegError, MemoryError, IndexError) as error:
    raise cut_off("") from error  # IndexError: of PyAV, where streams appear midway
  if check_end:
    if stream.duration:
      whole_s = float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    else:  # a container's is that of its longest stream
      whole_s, reached_s = (container.duration or 0) / 1e6, last_s
    if whole_s - reached_s > max(_MISSING_S, 0.01 * whole_s):
      raise cut_off(f" after {reached_s:.1f} of {whole_s:.1f} s")
  if bad:
    _LOG.warning("%s: %d damaged pieces were passed over", path, bad)
