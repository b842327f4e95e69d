"""A visitor's page: its controls, and the thread that draws for it.

Time is the clock's: frames that cannot be drawn in time are left out. Drawn pictures are kept as
long as nothing else is asked for, so that a slow machine can draw ahead and play afterwards.

Axes: h w pixels, s samples.
"""

import base64
import collections
import concurrent.futures
import functools
import io
import logging
import math
import re
import statistics
import threading
import time
import wave
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import numpy as np
from jaxtyping import Float32, UInt8

from uajax import direction
from uajax.avatar import Deformation
from uajax.errors import UserError
from uajax.progress import duration
from uajax.types import ACTION_UNITS, FPS, SAMPLE_RATE_HZ
from uajax.view.stage import (
  CENTIMETRE,
  MOST_S,
  WHITE,
  Acting,
  Eye,
  Layers,
  Look,
  Show,
  Stage,
  Talk,
  read_upload,
)

SOUND_S = 60.0  # of sound that a message carries to the page
QUALITY = 92  # of JPEG pictures
SMALL = 256  # side of a picture, px, below which it travels as PNG
MOST_KEPT = 256 << 20  # bytes of pictures kept for a visitor

Seen = Literal["as filmed", "free: drag to turn"]
AS_HEARD = "as heard"
Hearing = concurrent.futures.Future[Talk]

_log = logging.getLogger("uajax")


class Clock:
  """Which frame it is: stands, or runs from a place at `FPS`. Seconds are the caller's clock's."""

  def __init__(self, frames: int):
    self.frames, self._at, self._began_s = frames, 0.0, cast(float | None, None)

  @property
  def running(self) -> bool:
    return self._began_s is not None

  def frame(self, now_s: float) -> int:
    return min(int(self._place(now_s)), self.frames - 1)

  def over(self, now_s: float) -> bool:
    return self._place(now_s) >= self.frames

  def next_s(self, now_s: float) -> float:
    """Until the frame changes."""
    place = self._place(now_s)
    return (math.floor(place) + 1 - place) / FPS

  def play(self, now_s: float, frame: int | None = None) -> None:
    self._at = self._place(now_s) if frame is None else float(frame)
    self._began_s = now_s

  def stop(self, now_s: float, frame: int | None = None) -> None:
    self._at = self._place(now_s) if frame is None else float(frame)
    self._began_s = None

  def _place(self, now_s: float) -> float:
    gone_s = 0.0 if self._began_s is None else max(now_s - self._began_s, 0.0)
    # 1e-6: a place that was set comes back, whatever floats make of it.
    return min(max(self._at + gone_s * FPS + 1e-6, 0.0), float(self.frames))


class Visit:
  """One visitor's page: its controls, and the thread that draws for it."""

  def __init__(self, client: Any, stage: Stage, first: Hearing):
    self.client, self.stage = client, stage
    self._talk: Talk | None = None
    self._clock = Clock(1)
    self._changing = threading.RLock()  # the clock and the recording
    self._wake, self._over = threading.Event(), threading.Event()
    self._held: dict[str, float] = {}
    self._drawn: dict[int, bytes] = {}  # JPEG pictures of what is asked for now
    self._kept = 0  # bytes of them
    self._drawn_for: Any = None
    self._moved: tuple[Any, Deformation] | None = None  # the last motion, while a camera turns
    self._shown: Any = None
    self._took: collections.deque[float] = collections.deque([0.0], maxlen=5)  # s, lately
    self._told: dict[str, str] = {}
    self._sounds_until = 0  # the frame up to which the page has been given sound
    self._ahead = False
    self._ahead_since: tuple[int, float] | None = None  # frames there were then, and the time
    self._cloud: Any = None
    self._build()
    self._await(first, "the first recording", None)
    self._thread = threading.Thread(target=self._work, name="visit", daemon=True)
    self._thread.start()

  def close(self) -> None:
    self._over.set()
    self._wake.set()

  def _build(self) -> None:
    gui, stage = self.client.gui, self.stage
    gui.configure_theme(show_logo=False, show_share_button=False, control_width="medium")
    gui.set_panel_label(stage.name)
    gui.main_panel.dock_right()  # floating it would hide a part of the picture
    self._note = gui.add_markdown("")
    self._bar = gui.add_progress_bar(0, visible=False, animated=True)
    with gui.add_folder("Speech"):
      self._upload = gui.add_upload_button("Another recording", mime_type="audio/*,video/*")
      self._play = gui.add_button("Play")
      self._time = gui.add_slider("Time, s", 0.0, 1.0, 1 / FPS, 0.0)
      self._sounds = gui.add_checkbox("Sound", True)
      self._prepare = gui.add_button(
        "Draw ahead", hint="Draws all frames as they are asked for now, to be played smoothly.")
    with gui.add_folder("Emotion"):
      self._emotion = gui.add_dropdown(
        "Emotion", (AS_HEARD, *stage.emotions), initial_value=AS_HEARD)
      self._intensity = gui.add_slider("Intensity", 0.0, 2.0, 0.05, 1.0)
    with gui.add_folder("Look"):
      self._show = gui.add_dropdown("Show", get_args(Show))
      self._layers = gui.add_dropdown("Layers", get_args(Layers))
      self._seen = gui.add_dropdown("Camera", get_args(Seen))
      self._splats = gui.add_checkbox(
        "Splats in the browser", False, hint="Your browser draws, from wherever you look.")
    with gui.add_folder("Action units", expand_by_default=False):
      gui.add_markdown("As in the film, until moved.")
      self._units = {name: gui.add_slider(name, 0.0, direction.STRONGEST[name], 0.1, 0.0)
                     for name in ACTION_UNITS}
      self._release = gui.add_button("As in the film")
    self._player = gui.add_html("")
    for handle in (self._emotion, self._intensity, self._show, self._layers, self._seen,
                   self._splats):
      handle.on_update(lambda _: self._wake.set())
    for name, slider in self._units.items():
      slider.on_update(functools.partial(self._hold, name))
    self._release.on_click(lambda _: self.release())
    self._time.on_update(self._scrub)
    self._play.on_click(lambda _: self.stop() if self._clock.running else self.play())
    self._prepare.on_click(lambda _: self.draw_ahead())
    self._sounds.on_update(lambda _: self._silence())
    self._upload.on_upload(lambda event: self.upload(event.target.value))
    self.client.camera.on_update(lambda _: self._wake.set())

  # What the visitor does.

  def play(self) -> None:
    with self._changing:
      if self._talk is None:
        return
      now_s = time.monotonic()
      self._clock.play(now_s, 0 if self._clock.over(now_s + 1 / FPS) else None)
      self._sounds_until = 0
      self._play.label = "Pause"
    self._wake.set()

  def stop(self, frame: int | None = None) -> None:
    with self._changing:
      self._clock.stop(time.monotonic(), frame)
      self._play.label = "Play"
      self._silence()
    self._wake.set()

  def seek(self, frame: int) -> None:
    with self._changing:
      now_s = time.monotonic()
      frame = min(max(frame, 0), self._clock.frames - 1)
      if self._clock.running:
        self._clock.play(now_s, frame)
        self._sounds_until = 0
      else:
        self._clock.stop(now_s, frame)
    self._wake.set()

  def hold(self, name: str, value: float) -> None:
    """Sets an action unit by hand."""
    self._held[name] = value
    self._wake.set()

  def release(self) -> None:
    """Leaves all action units to the film."""
    self._held = {}
    for slider in self._units.values():
      slider.value = 0.0
    self._held = {}
    self._wake.set()

  def upload(self, file: Any) -> None:
    """Hears an uploaded file (name, content), and shows it when it is heard."""
    try:
      name, sound = read_upload(file.name, file.content)
    except UserError as error:
      self._tell(error=str(error))
      return
    self._await(in_thread(lambda: self.stage.hear(sound, name)), name,
                self.stage.expected_s(sound))

  def draw_ahead(self) -> None:
    self._turn_ahead(not self._ahead)
    self._wake.set()

  def _hold(self, name: str, event: Any) -> None:
    if event.client is not None:  # the visitor, not `release`
      self.hold(name, float(event.target.value))

  def _scrub(self, event: Any) -> None:
    if event.client is not None and math.isfinite(event.target.value):
      self.seek(round(event.target.value * FPS))

  def _turn_ahead(self, on: bool) -> None:
    self._ahead, self._ahead_since = on, None
    self._prepare.label = "Stop drawing ahead" if on else "Draw ahead"
    self._bar.visible = on

  def _silence(self) -> None:
    self._player.content = ""
    self._sounds_until = 0
    self._wake.set()

  def _await(self, hearing: Hearing, name: str,
             expected_s: float | None) -> None:
    """Takes the recording on when it is heard; until then the page says how long it may take."""
    began_s = time.monotonic()
    self._hearing = hearing

    def heard(future: Hearing) -> None:
      if future is not self._hearing or self._over.is_set():
        return  # another came later
      try:
        talk = future.result()
      except Exception as error:
        self._tell(hearing="", error=_line(error))
      else:
        self._take(talk)

    def say() -> None:
      while not (hearing.done() or self._over.is_set() or hearing is not self._hearing):
        gone_s = time.monotonic() - began_s
        left = f", about {duration(expected_s - gone_s)} left" if expected_s else ""
        self._tell(hearing=f"listening to {_plain(name)} for {duration(gone_s)}{left}", error="")
        self._bar.value = min(100 * gone_s / expected_s, 99) if expected_s else 100
        self._bar.visible = True
        self._over.wait(0.5)
      self._bar.visible = self._ahead

    if not hearing.done():
      threading.Thread(target=say, name="hearing", daemon=True).start()
    hearing.add_done_callback(heard)

  def _take(self, talk: Talk) -> None:
    with self._changing:
      self.stop()
      self._talk, self._clock = talk, Clock(talk.frames)
      self._time.max = max((talk.frames - 1) / FPS, 1 / FPS)
      self._time.value = 0.0
    cut = f", the first {duration(MOST_S)} of it" if len(talk.sound) >= MOST_S * SAMPLE_RATE_HZ \
      else ""
    self._tell(hearing="", error="",
               talk=f"**{_plain(talk.name)}**, {duration(talk.frames / FPS)}{cut}")
    self._wake.set()

  # What the thread does.

  def _work(self) -> None:
    while not self._over.is_set():
      try:
        wait_s = self.step()
      except Exception as error:
        if self._over.is_set():
          return
        if not isinstance(error, UserError):
          _log.warning("the viewer could not draw: %s", _line(error), exc_info=error)
        self._tell(error=_line(error))
        self._turn_ahead(False)
        self.stop()
        self._shown, wait_s = None, None
        self._wake.clear()  # `stop` woke; the visitor shall
      if self._wake.wait(wait_s):
        self._wake.clear()

  def step(self) -> float | None:
    """Does the most urgent thing. Returns the seconds until there is another, None: when woken."""
    talk, now_s = self._talk, time.monotonic()
    if talk is None:
      return None
    acting, look = self.acting(), self.look()
    # What takes long to draw is drawn for the moment when it will be there.
    clock = self._clock
    early_s = statistics.median(self._took) if clock.running else 0.0
    frame = clock.frame(now_s + early_s)
    if clock.running:
      self._sound(talk, now_s)
    asked = (id(talk), acting, look)
    compiling = self.stage.is_new(look)
    if asked != self._drawn_for:
      self._drawn, self._kept, self._drawn_for, self._ahead_since = {}, 0, asked, None
      if compiling:
        self._tell(error="", drawn="getting ready to draw at this size")
    if (asked, frame) != self._shown:
      self._present(talk, frame, acting, look)
      self._shown = asked, frame
      self._time.value = frame / FPS
      self._tell(error="", drawn=self._speed(look, compiling))
      if compiling:
        self._took.pop()  # no measure of the frames to come
    if clock.running:
      if clock.over(time.monotonic()):
        self.stop(talk.frames - 1)
        return 0.0
      return max(clock.next_s(time.monotonic()), 0.001)
    if self._ahead and not look.splats:
      return self._draw_one(talk, acting, look)
    return None

  def acting(self) -> Acting:
    named = None if self._emotion.value == AS_HEARD else str(self._emotion.value)
    return Acting(named, float(self._intensity.value) if named else 1.0,
                  tuple(sorted(self._held.items())))

  def look(self) -> Look:
    camera = self.client.camera
    show, layers = self._show.value, self._layers.value
    if show not in get_args(Show) or layers not in get_args(Layers):
      raise UserError("the page asks for what there is not: load it again")
    splats = bool(self._splats.value)
    filmed = self._seen.value == get_args(Seen)[0] and not splats
    if filmed:  # wherever the visitor looks from
      eye = Eye((1, 0, 0, 0), (0, 0, 0), 1.0, float(camera.aspect))
    else:
      eye = Eye(tuple(map(float, camera.wxyz)), tuple(map(float, camera.position)),
                float(camera.fov), float(camera.aspect))
    return Look(show, layers, filmed, splats, eye)

  def _motion(self, talk: Talk, frame: int, acting: Acting) -> Deformation:
    key = id(talk), frame, acting
    if self._moved is None or self._moved[0] != key:
      self._moved = key, self.stage.move(self.stage.controls(talk, frame, acting))
    return self._moved[1]

  def _present(self, talk: Talk, frame: int, acting: Acting, look: Look) -> None:
    scene = self.client.scene
    if look.splats:
      began_s = time.monotonic()
      cloud = self.stage.cloud(self._motion(talk, frame, acting), look)
      self._took.append(time.monotonic() - began_s)
      if self._cloud is None:
        self._cloud = scene.add_gaussian_splats("/splats", *cloud, scale=CENTIMETRE)
      else:
        self._cloud.set_gaussians(*cloud)
      self._cloud.visible = True
      scene.set_background_image(None)
      return
    picture = self._picture(talk, frame, acting, look)
    # viser's JPEG halves the chroma's size, which shows where pixels are drawn large.
    form = "png" if picture.size < 3 * SMALL**2 else "jpeg"
    with self.client.atomic():
      scene.set_background_image(on_canvas(picture, look.eye.aspect), form, jpeg_quality=QUALITY)
      if self._cloud is not None:
        self._cloud.visible = False

  def _picture(self, talk: Talk, frame: int, acting: Acting, look: Look) -> np.ndarray:
    from PIL import Image as Pictures

    if frame in self._drawn:
      self._took.append(0.0)
      return np.asarray(Pictures.open(io.BytesIO(self._drawn[frame])))
    began_s = time.monotonic()
    picture = self.stage.picture(self._motion(talk, frame, acting), look, int(talk.poses[frame]))
    self._took.append(time.monotonic() - began_s)
    kept = io.BytesIO()
    Pictures.fromarray(picture).save(kept, "JPEG", quality=QUALITY, subsampling=0)
    self._drawn[frame] = kept.getvalue()
    self._kept += len(self._drawn[frame])
    while self._kept > MOST_KEPT:
      self._kept -= len(self._drawn.pop(next(iter(self._drawn))))  # the oldest
    return picture

  def _draw_one(self, talk: Talk, acting: Acting, look: Look) -> float | None:
    """Draws the next frame ahead; 0 while there is one."""
    missing = next((i for i in range(talk.frames) if i not in self._drawn), None)
    if missing is None or self._kept > 0.95 * MOST_KEPT:
      self._turn_ahead(False)
      self._tell(drawn="all frames are drawn: play" if missing is None else
                 f"{len(self._drawn)} frames are drawn, no more can be kept")
      return None
    if self._ahead_since is None:
      self._ahead_since = len(self._drawn), time.monotonic()
      self._tell(drawn=f"drawing {talk.frames - len(self._drawn)} frames ahead")
    self._picture(talk, missing, acting, look)
    done, (count, began_s) = len(self._drawn), self._ahead_since
    each_s = (time.monotonic() - began_s) / (done - count)
    self._bar.value = 100 * done / talk.frames
    self._tell(drawn=f"drawn ahead: {done} of {talk.frames}, "
                     f"{duration(each_s * (talk.frames - done))} left")
    return 0.0

  def _speed(self, look: Look, compiling: bool) -> str:
    if not self._took[-1]:
      return "from memory"
    count = sum(int(alive.sum()) for alive in self.stage.alive)
    what = "moved" if look.splats else "drawn"
    return f"{count} splats {what}" + (
      "" if compiling else f" in {1000 * self._took[-1]:.0f} ms")

  def _sound(self, talk: Talk, now_s: float) -> None:
    """Gives the page the sound from here on, a stretch at a time."""
    frame = self._clock.frame(now_s)
    if not self._sounds.value or frame < self._sounds_until:
      return
    begin = frame * SAMPLE_RATE_HZ // FPS
    piece = talk.sound[begin : begin + round(SOUND_S * SAMPLE_RATE_HZ)]
    self._sounds_until = frame + math.ceil(len(piece) * FPS / SAMPLE_RATE_HZ)
    self._player.content = (  # a new name each time: the same words would not begin anew
      f'<audio autoplay id="s{time.monotonic_ns()}" src="data:audio/wav;base64,{wav64(piece)}">'
      "</audio>")

  def _tell(self, **lines: str) -> None:
    """Changes lines of the note: hearing, error, talk, drawn; "" leaves one out."""
    self._told |= lines
    said = [self._told.get(name, "") for name in ("error", "hearing", "talk", "drawn")]
    if said[0]:
      said[0] = f"**Failed:** {_plain(said[0])}"
    content = "\n\n".join(filter(None, said))
    if content != self._note.content:
      self._note.content = content


def on_canvas(picture: UInt8[np.ndarray, "h w 3"], aspect: float) -> UInt8[np.ndarray, "h v 3"]:
  """The picture cut or widened with white to the canvas's shape, which would else distort it."""
  height, width, _ = picture.shape
  wanted = max(round(height * min(max(aspect, 0.2), 5.0)), 1)
  if wanted <= width:
    left = (width - wanted) // 2
    return picture[:, left : left + wanted]
  left = (wanted - width) // 2
  return np.pad(picture, ((0, 0), (left, wanted - width - left), (0, 0)), constant_values=WHITE)


def wav64(samples: Float32[np.ndarray, " s"]) -> str:
  """A 16-bit WAV file in base64."""
  file = io.BytesIO()
  with wave.open(file, "wb") as out:
    out.setnchannels(1)
    out.setsampwidth(2)
    out.setframerate(SAMPLE_RATE_HZ)
    out.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
  return base64.b64encode(file.getvalue()).decode("ascii")


def in_thread(work: Callable[[], Talk]) -> Hearing:
  future: Hearing = concurrent.futures.Future()

  def run() -> None:
    try:
      future.set_result(work())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=run, name="listening", daemon=True).start()
  return future


def _line(error: BaseException) -> str:
  text = " ".join(str(error).split())[:300]
  return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _plain(text: str) -> str:
  """Without what Markdown would take for markup."""
  return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)
