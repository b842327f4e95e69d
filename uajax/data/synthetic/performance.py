"""A script performed: one timeline of phones from which sound, lips, feeling and head all follow.

Sound is sampled at 16 kHz and the face at 25 fps from the same tracks, so they agree by
construction. Frame i shows the instant (i + 0.5) / 25 s, the middle of its exposure.
Axes: f frames, s steps of 5 ms, n samples, p phones, m mouth controls, u action units.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from uajax.data.synthetic import language, voice
from uajax.data.synthetic.language import MOUTH_CONTROLS, PHONES, SILENCE
from uajax.errors import UserError
from uajax.types import EXPRESSION, FPS, SAMPLE_RATE_HZ

EMOTIONS = ("neutral", "happy", "sad", "angry", "surprised")
AU_NAMES: tuple[str, ...] = (
  "AU01", "AU02", "AU04", "AU05", "AU06", "AU07", "AU12", "AU15", "AU23", "AU25", "AU26", "AU45",
)  # fmt: skip
SPOKEN_AUS = ("AU25", "AU26")  # that follow the mouth; the others show what is felt
EXPRESSION_NAMES = MOUTH_CONTROLS + SPOKEN_AUS
HELD_OUT_EMOTION = ("happy", 0.6)

# What each emotion does at intensity 1, in OpenFace's 0..5.
_FACES: dict[str, dict[str, float]] = {
  "neutral": {},
  "happy": {"AU06": 3.2, "AU12": 4.2, "AU07": 0.8},
  "sad": {"AU01": 3.6, "AU04": 1.8, "AU15": 3.8, "AU07": 0.6},
  "angry": {"AU04": 4.4, "AU07": 3.2, "AU23": 3.2, "AU05": 0.6},
  "surprised": {"AU01": 3.4, "AU02": 4.2, "AU05": 3.8},
}


class _Manner(NamedTuple):
  """How an emotion at intensity 1 changes the voice and the bearing."""

  pitch: float = 1.0
  range: float = 1.0
  tempo: float = 1.0
  loudness: float = 1.0
  tilt_db: float = 0.0
  formants: float = 1.0  # a smile shortens the vocal tract
  jaw: float = 1.0
  gape: float = 0.0  # added to the jaw
  nod_rad: float = 0.0  # positive looks down


_MANNERS = {
  "neutral": _Manner(),
  "happy": _Manner(1.28, 1.7, 1.06, 1.15, -2.0, 1.06, 1.05, 0.02, -0.02),
  "sad": _Manner(0.86, 0.45, 0.84, 0.55, 7.0, 0.97, 0.80, 0.0, 0.07),
  "angry": _Manner(1.16, 1.3, 1.12, 1.70, -6.0, 0.99, 1.10, 0.0, 0.04),
  "surprised": _Manner(1.50, 1.9, 1.02, 1.20, -1.0, 1.02, 1.10, 0.13, -0.05),
}
_LEAD_S, _TAIL_S = 0.10, 0.12  # of silence about a line
# Width of the raised cosine that turns targets into movement: the lips' own pace, in seconds.
_PACE_S = (0.105, 0.14, 0.15, 0.05, 0.08, 0.06, 0.08, 0.09)


@dataclasses.dataclass(frozen=True)
class Person:
  """Who it is: `seed` draws looks, proportions and voice; the picture is square."""

  seed: int = 0
  size_px: int = 128
  supersampling: int = 2  # samples a pixel's side


@dataclasses.dataclass(frozen=True)
class Line:
  """One sentence in one emotional setting.

  `text` holds words of `language`; empty, words are drawn by `seed` until `seconds` are full.
  `seconds` (None: as long as the words take) is filled up with silence. `units` are action units
  of AU_NAMES and what is added to each, beyond what is felt: a brow raised for no reason.
  """

  text: str = ""
  seed: int = 0
  emotion: str = "neutral"
  intensity: float = 1.0
  seconds: float | None = 1.5
  units: tuple[tuple[str, float], ...] = ()


class Performance(NamedTuple):
  """All that is heard and done. AU25 and AU26 follow from the mouth; the others lead the face."""

  wav: Float[np.ndarray, " n"]  # float32 in [-1, 1], n = f * 640
  phones: tuple[tuple[str, float, float], ...]  # symbol, start, end in seconds, without gaps
  pose: Float[np.ndarray, "f 6"]  # pitch (down), yaw (to image right), roll in rad; x y z in metres
  mouth: Float[np.ndarray, "f m"]  # MOUTH_CONTROLS, 0..1
  au: Float[np.ndarray, "f u"]  # AU_NAMES, 0..5
  emotion: Int[np.ndarray, " f"]  # index into EMOTIONS
  intensity: Float[np.ndarray, " f"]  # 0..1, easing between lines
  blink: Float[np.ndarray, " f"]  # 0 open .. 1 shut, AU45 / 2


def default_script(seconds: float, seed: int = 0) -> tuple[Line, ...]:
  """Short lines in changing settings that fill `seconds` exactly.

  The last line is neutral like the first, so that a validation tail of one eleventh shows
  what training has shown. Never in it: `HELD_OUT_EMOTION` (happy at 0.6) and its neighbours
  (happy between 0.4 and 0.9), and the words of `language.HELD_OUT_WORDS`.
  """
  count = max(1, round(seconds / 1.5))
  strong = [("happy", 1.0), ("sad", 1.0), ("angry", 1.0), ("surprised", 1.0)]
  weak = [("happy", 0.35), ("angry", 0.5), ("sad", 0.5), ("surprised", 0.5)]
  settings = [("neutral", 1.0)]
  while len(settings) < count - 1:
    settings += [*strong, weak[0], weak[1], ("neutral", 1.0), *strong, weak[2], weak[3]]
  settings = [*settings[: max(count - 1, 1)], ("neutral", 1.0)][-count:]
  # whole frames a line; the last takes what rounding left
  total = round(seconds * FPS)
  ends = [round(total * (k + 1) / count) for k in range(count)]
  starts = [0, *ends[:-1]]
  lengths = [(end - start) / FPS for start, end in zip(starts, ends, strict=True)]
  chosen = _texts(lengths, [_tempo(*setting) for setting in settings], seed)
  return tuple(
    Line(chosen[k], seed * 1000 + k, emotion, intensity, lengths[k])
    for k, (emotion, intensity) in enumerate(settings)
  )


def held_out_script(seed: int = 0) -> tuple[Line, ...]:
  """About four seconds that training never showed.

  New are every word (`language.HELD_OUT_WORDS`) and the emotional setting, happy at intensity
  0.6: training knows happy only at 1.0 and 0.35.
  """
  emotion, intensity = HELD_OUT_EMOTION
  texts = (
    "maybe robot family wave",
    "yes keep simple shadow game",
    "follow about banana paper zoo",
  )
  text = texts[seed % len(texts)] + " " + texts[(seed + 1) % len(texts)]
  return (Line(text, seed, emotion, intensity, None),)


def perform(person: Person, script: Sequence[Line], seed: int = 0) -> Performance:
  """Performs `script`; the same arguments give the same bits. Raises UserError on a bad line."""
  if not script:
    raise UserError("the script is empty: give at least one Line")
  rng = np.random.default_rng([7, person.seed, seed])
  spoken = [_schedule(line) for line in script]
  timeline: list[tuple[str, float, float, bool]] = []  # symbol, start, end, stressed
  spans = []
  clock = 0.0
  for phones, seconds in spoken:
    spans.append((clock, clock + seconds))
    at = clock
    for symbol, duration, stressed in phones:
      timeline.append((symbol, at, at + duration, stressed))
      at += duration
    clock += seconds
    if clock - at > 1e-9:
      timeline.append((SILENCE, at, clock, False))
  frames = round(clock * FPS)
  steps = frames * round(1 / FPS / voice.STEP_S)
  step_s = (np.arange(steps) + 0.5) * voice.STEP_S
  frame_s = (np.arange(frames) + 0.5) / FPS

  line_of = np.clip(
    np.searchsorted([end for _, end in spans], step_s, side="right"), 0, len(spans) - 1
  )
  manner = _smooth(_manner_tracks(script)[line_of], 0.30)
  faces = _smooth(_face_tracks(script)[line_of], 0.40)
  intensity = _smooth(np.array([line.intensity for line in script])[line_of][:, None], 0.30)[:, 0]
  which = np.array([EMOTIONS.index(line.emotion) for line in script])[line_of]

  stress = np.zeros(steps)
  for _, start, end, stressed in timeline:
    if stressed:
      stress += np.exp(-0.5 * ((step_s - 0.5 * (start + end)) / 0.07) ** 2)
  mouth = _mouth_track(timeline, step_s, manner, frames)
  tract = _tract_track(person, timeline, step_s, manner, stress, spans)
  rng_voice, rng_body = rng.spawn(2)
  wav = voice.speak(tract, rng_voice, stature=_stature(person))
  wav = np.tanh(0.22 * wav) + 2e-4 * rng_voice.standard_normal(len(wav))  # with the room's hush
  wav = (np.round(wav * 32768) / 32768).astype(np.float32)  # as a file of 16 bits holds it

  at = lambda track: _sample(track, step_s, frame_s)  # noqa: E731
  mouth_f = np.clip(at(mouth), 0, 1)
  blink = _blinks(frames, rng_body)
  au = np.clip(at(faces), 0, 5)
  wander = 1 + 0.08 * _wander(frames, 1.5, rng_body)
  accent = at(stress[:, None])[:, 0]
  column = AU_NAMES.index
  au *= wander[:, None]
  au[:, column("AU01")] += 0.5 * accent
  au[:, column("AU02")] += 0.7 * accent
  jaw, close, part, tuck = (
    mouth_f[:, MOUTH_CONTROLS.index(k)] for k in ("jaw", "close", "part", "tuck")
  )
  au[:, column("AU25")] = 5 * (jaw + 0.3 * part) * (1 - close) * (1 - 0.7 * tuck)
  au[:, column("AU26")] = 5 * jaw
  shut = au[:, column("AU45")].clip(0, 2)  # asked for by a line
  au[:, column("AU45")] = np.maximum(2 * blink, shut)
  pose = _bearing(frames, at(manner)[:, _Manner._fields.index("nod_rad")], accent, rng_body)
  return Performance(
    wav=wav,
    phones=tuple((symbol, start, end) for symbol, start, end, _ in timeline),
    pose=pose,
    mouth=mouth_f,
    au=np.clip(au, 0, 5),
    emotion=at_nearest(which, step_s, frame_s),
    intensity=np.clip(at(intensity[:, None])[:, 0], 0, 1),
    blink=au[:, column("AU45")] / 2,
  )


def expression(performance: Performance) -> Float[np.ndarray, "f 64"]:
  """What a tracker would say of the speaking face: EXPRESSION_NAMES first, roughly unit variance,
  then zeros.

  What is felt is left out. It lasts for seconds, a Lip Expert hears 200 ms, and guesses that
  flicker would reach the face as content; feeling has its own way, the distilled emotion.
  """
  mouth = (performance.mouth - 0.2) / 0.25
  kept = [AU_NAMES.index(name) for name in SPOKEN_AUS]
  units = (performance.au[:, kept] - 0.8) / 1.3
  code = np.concatenate([mouth, units], axis=1)
  return np.pad(code, ((0, 0), (0, EXPRESSION - code.shape[1]))).astype(np.float32)


def corpus(
  seed: int, utterances: int, seconds: float = 3.0, *, person: Person | None = None
) -> Iterator[tuple[np.ndarray, int, float, np.ndarray]]:
  """Speech with its truth for training speech networks: no picture is made.

  Nonsense words by many speakers (or one `person`) in every emotion at any intensity. Yields
  (wav float32 [n], index into EMOTIONS, intensity 0..1, expression float32 [f 64]).
  """
  rng = np.random.default_rng([11, seed])
  for _ in range(utterances):
    speaker = person or Person(seed=int(rng.integers(1 << 31)))
    label = int(rng.integers(len(EMOTIONS)))
    intensity = float(rng.uniform(0.25, 1.0))
    line = Line("", int(rng.integers(1 << 31)), EMOTIONS[label], intensity, seconds)
    spoken = perform(speaker, (line,), int(rng.integers(1 << 31)))
    yield spoken.wav, label, intensity, expression(spoken)


# --- time -------------------------------------------------------------------------------------


def _texts(lengths_s: Sequence[float], tempos: Sequence[float], seed: int) -> list[str]:
  """Sentences that fit, whose words bring in unheard phones first: a short script covers all."""
  rng = np.random.default_rng([3, seed])
  vocabulary = list(language.TRAINING_WORDS)
  queue: list[str] = []
  unheard: set[str] = set()
  texts = []
  for length, tempo in zip(lengths_s, tempos, strict=True):
    text, room = [], 1.08 * (length - _LEAD_S - _TAIL_S)
    while True:
      queue = queue or [vocabulary[k] for k in rng.permutation(len(vocabulary))]
      unheard = unheard or set(PHONES) - {SILENCE}
      costs = [_typical_s(language.TRAINING_WORDS[word]) / tempo for word in queue]
      fitting = [k for k, cost in enumerate(costs) if cost <= room]
      if not fitting:
        break
      gains = [len(unheard & set(language.TRAINING_WORDS[queue[k]])) for k in fitting]
      chosen = fitting[int(np.argmax(gains))]
      room -= costs[chosen]
      unheard -= set(language.TRAINING_WORDS[queue[chosen]])
      text.append(queue.pop(chosen))
    texts.append(" ".join(text))
  return texts


def _typical_s(word: Sequence[str]) -> float:
  return 1.15 * sum(PHONES[p].seconds for p in word)


def _tempo(emotion: str, intensity: float) -> float:
  return 1 + intensity * (_MANNERS[emotion].tempo - 1)


def _schedule(line: Line) -> tuple[list[tuple[str, float, bool]], float]:
  """Phones with durations and stress, and how long the line takes with its silence."""
  if line.emotion not in EMOTIONS:
    raise UserError(f"no emotion {line.emotion!r}: choose of {', '.join(EMOTIONS)}")
  if not 0 <= line.intensity <= 1:
    raise UserError(f"intensity {line.intensity} is outside 0..1: give a share of full strength")
  for name, value in line.units:
    if name not in AU_NAMES or name in SPOKEN_AUS:
      asked = ", ".join(unit for unit in AU_NAMES if unit not in SPOKEN_AUS)
      raise UserError(f"{name!r} cannot be asked of a line: choose of {asked}")
    if not 0 <= value <= 5:
      raise UserError(f"{name} of {value} is outside 0..5: give OpenFace's strength")
  if line.seconds is not None and line.seconds * FPS < 1:
    raise UserError(f"a line of {line.seconds} s is shorter than a frame: give 0.04 s or more")
  rng = np.random.default_rng([5, line.seed])
  tempo = _tempo(line.emotion, line.intensity)
  words = language.spell(line.text) if line.text.strip() else None
  lead, tail = _LEAD_S, _TAIL_S
  budget = np.inf if line.seconds is None else line.seconds - lead - tail
  phones: list[tuple[str, float, bool]] = []
  used = 0.0
  for word in words if words is not None else iter(lambda: language.invent(rng), None):
    timed = _timed(word, tempo, rng)
    length = sum(duration for _, duration, _ in timed)
    if words is None and used + length > budget:
      break
    phones += timed
    used += length
    if words is None and not np.isfinite(budget):
      raise UserError("a line needs a text or a number of seconds: give one")
  if used > max(budget, 0):
    squeeze = used / max(budget, 1e-9)
    if squeeze > 1.5:
      raise UserError(
        f"{line.text!r} takes {used + lead + tail:.1f} s and has {line.seconds} s: give it more"
      )
    phones = [(symbol, duration / squeeze, stressed) for symbol, duration, stressed in phones]
    used = budget
  seconds = line.seconds if line.seconds is not None else lead + used + tail
  seconds = np.ceil(seconds * FPS - 1e-6) / FPS  # lines begin on frames
  return [(SILENCE, min(lead, seconds), False), *phones], float(seconds)


def _timed(word: tuple[str, ...], tempo: float, rng) -> list[tuple[str, float, bool]]:
  stressed = False
  timed = []
  for k, symbol in enumerate(word):
    duration = PHONES[symbol].seconds * 1.12 / tempo * rng.uniform(0.92, 1.08)
    accent = symbol in language.VOWELS and not stressed
    stressed |= accent
    if accent:
      duration *= 1.12
    if symbol in language.VOWELS and k and word[k - 1] in language.VOWELS:
      duration *= 0.7  # the second half of a diphthong
    timed.append((symbol, duration, accent))
  return timed


def _smooth(track: np.ndarray, width_s: float) -> np.ndarray:
  """Raised-cosine mean over `width_s`, ends held. [s c]."""
  half = max(1, round(width_s / voice.STEP_S / 2))
  kernel = 1 + np.cos(np.pi * np.arange(-half, half + 1) / (half + 1))
  kernel /= kernel.sum()
  padded = np.pad(track, ((half, half), (0, 0)), mode="edge")
  out = np.empty_like(track, dtype=float)
  for c in range(track.shape[1]):
    out[:, c] = np.convolve(padded[:, c], kernel, mode="valid")
  return out


def _sample(track, step_s, frame_s) -> np.ndarray:
  return np.stack([np.interp(frame_s, step_s, track[:, c]) for c in range(track.shape[1])], axis=1)


def at_nearest(track, step_s, frame_s) -> np.ndarray:
  return track[np.clip(np.searchsorted(step_s, frame_s), 0, len(track) - 1)]


# --- tracks -----------------------------------------------------------------------------------


def _manner_tracks(script) -> np.ndarray:
  rows = []
  for line in script:
    full, plain = np.array(_MANNERS[line.emotion]), np.array(_Manner())
    rows.append(plain + line.intensity * (full - plain))
  return np.stack(rows)


def _face_tracks(script) -> np.ndarray:
  rows = np.zeros((len(script), len(AU_NAMES)))
  for k, line in enumerate(script):
    for name, value in _FACES[line.emotion].items():
      rows[k, AU_NAMES.index(name)] = value * line.intensity
    for name, value in line.units:
      rows[k, AU_NAMES.index(name)] += value
  return rows


def _mouth_track(timeline, step_s, manner, frames) -> np.ndarray:
  target = np.zeros((len(step_s), len(MOUTH_CONTROLS)))
  for k, (symbol, start, end, _) in enumerate(timeline):
    phone = PHONES[symbol]
    # a stop lets go at its burst; `h` and the burst take the shape of what follows
    following = PHONES[timeline[k + 1][0]].mouth if k + 1 < len(timeline) else phone.mouth
    shape = np.array(phone.mouth)
    if symbol == "h":
      shape = 0.8 * np.array(following)
    held = start + (end - start) * (phone.closure or 1.0)
    target[(step_s >= start) & (step_s < held)] = shape
    target[(step_s >= held) & (step_s < end)] = following
  track = np.concatenate(
    [_smooth(target[:, c : c + 1], width) for c, width in enumerate(_PACE_S)], axis=1
  )
  jaw = MOUTH_CONTROLS.index("jaw")
  field = _Manner._fields.index
  track[:, jaw] = track[:, jaw] * manner[:, field("jaw")] + manner[:, field("gape")]
  return track


def _tract_track(person, timeline, step_s, manner, stress, spans) -> voice.Tract:
  steps = len(step_s)
  formants = np.zeros((steps, 3))
  amplitudes = np.zeros((steps, 3))  # voicing, breath, hiss
  hiss_hz = np.full((steps, 2), 4000.0)
  for k, (symbol, start, end, _) in enumerate(timeline):
    phone = PHONES[symbol]
    following = PHONES[timeline[k + 1][0]] if k + 1 < len(timeline) else phone
    here = (step_s >= start) & (step_s < end)
    formants[here] = following.formants_hz if symbol == "h" else phone.formants_hz
    if phone.closure:
      burst = here & (step_s >= start + (end - start) * phone.closure)
      amplitudes[here & ~burst] = (phone.voicing, 0, 0)
      decay = np.exp(-(step_s[burst] - step_s[burst][0]) / 0.012) if burst.any() else 1.0
      amplitudes[burst, 0] = 0.4 * phone.voicing
      amplitudes[burst, 1] = phone.breath
      amplitudes[burst, 2] = phone.hiss * decay
      formants[burst] = 0.5 * (np.array(phone.formants_hz) + np.array(following.formants_hz))
    else:
      amplitudes[here] = (phone.voicing, phone.breath, phone.hiss)
    hiss_hz[here] = phone.hiss_hz
  formants = _smooth(formants, 0.06)
  amplitudes = _smooth(amplitudes, 0.02)

  field = _Manner._fields.index
  melody = 0.16 * (stress - 0.35)
  for start, end in spans:
    here = (step_s >= start) & (step_s < end)
    x = (step_s[here] - start) / (end - start)
    melody[here] -= 0.16 * (x - 0.5)  # declination
  rise = manner[:, field("gape")] / _MANNERS["surprised"].gape  # a surprised voice ends high
  for _, end in spans:
    melody += 0.25 * rise.clip(0, 1) * np.exp(-0.5 * ((step_s - (end - 0.3)) / 0.15) ** 2)
  f0 = _pitch_hz(person) * manner[:, field("pitch")] * np.exp(melody * manner[:, field("range")])
  loud = manner[:, field("loudness")] * (0.85 + 0.25 * stress.clip(0, 1))
  return voice.Tract(
    f0_hz=f0,
    formants_hz=formants * manner[:, field("formants")][:, None],
    voicing=amplitudes[:, 0] * loud,
    breath=amplitudes[:, 1] * loud,
    hiss=amplitudes[:, 2] * loud,
    hiss_hz=hiss_hz,
    tilt_db=3 + manner[:, field("tilt_db")],
  )


def _pitch_hz(person: Person) -> float:
  return float(np.random.default_rng([13, person.seed]).uniform(105, 210))


def _stature(person: Person) -> float:
  """Higher voices come with shorter tracts."""
  return float(np.interp(_pitch_hz(person), [105, 210], [1.0, 0.87]))


def _blinks(frames: int, rng) -> np.ndarray:
  shape = np.array([0.35, 0.95, 1.0, 0.7, 0.3])
  blink = np.zeros(frames + len(shape))
  at = int(rng.integers(8, 30))
  while at < frames:
    blink[at : at + len(shape)] = np.maximum(blink[at : at + len(shape)], shape)
    at += int(rng.integers(35, 85))
  return blink[:frames]


def _wander(frames: int, slowest_s: float, rng) -> np.ndarray:
  """A smooth random walk about zero with unit variance over long times."""
  t = np.arange(frames) / FPS
  periods = slowest_s * np.array([1.0, 1.7, 3.1]) * rng.uniform(0.85, 1.15, 3)
  phases = rng.uniform(0, 2 * np.pi, 3)
  waves = np.sin(2 * np.pi * t[:, None] / periods[None, :] + phases[None, :])
  return waves @ np.array([0.6, 0.8, 1.0])


def _bearing(frames: int, nod_rad, accent, rng) -> np.ndarray:
  pose = np.zeros((frames, 6))
  pose[:, 0] = 0.028 * _wander(frames, 1.6, rng) + nod_rad + 0.02 * accent
  pose[:, 1] = 0.055 * _wander(frames, 1.9, rng)
  pose[:, 2] = 0.022 * _wander(frames, 2.3, rng)
  pose[:, 3] = 0.0030 * _wander(frames, 2.0, rng) + 0.02 * pose[:, 1]
  pose[:, 4] = 0.0018 * _wander(frames, 1.8, rng)
  pose[:, 5] = 0.0040 * _wander(frames, 2.6, rng)
  return pose


assert SAMPLE_RATE_HZ % FPS == 0  # so that f frames hold a whole number of samples
