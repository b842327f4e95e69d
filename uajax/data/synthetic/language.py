"""What is said: a small inventory of phones, how each sounds and looks, and words made of them.

The phones are the coarse classes that speech-driven faces are judged by (open and spread and
round vowels, lips that close, teeth on lip, teeth together, tongue up). Words are spelled with
them; `TRAINING_WORDS` and `HELD_OUT_WORDS` share none.
"""

from typing import NamedTuple

import numpy as np

from uajax.errors import UserError

MOUTH_CONTROLS = ("jaw", "width", "round", "close", "part", "tuck", "press", "tongue")


class Phone(NamedTuple):
  """How one phone sounds and looks when it is held."""

  seconds: float  # at ordinary tempo
  formants_hz: tuple[float, float, float]
  voicing: float  # amplitude of the glottal source, 0..1
  breath: float  # amplitude of noise through the formants
  hiss: float  # amplitude of frication noise
  hiss_hz: tuple[float, float]  # its centre and bandwidth
  mouth: tuple[float, ...]  # targets of MOUTH_CONTROLS, 0..1
  closure: float = 0.0  # leading part of the phone that is shut, then the burst


def _vowel(seconds, formants, jaw, width=0.0, rounding=0.0) -> Phone:
  return Phone(
    seconds, formants, 1.0, 0.012, 0.0, (4000, 4000), (jaw, width, rounding, 0, 0, 0, 0, 0.1)
  )


def _glide(seconds, formants, mouth, voicing=0.7) -> Phone:
  return Phone(seconds, formants, voicing, 0.008, 0.0, (4000, 4000), mouth)


def _stop(formants, voicing, hiss, hiss_hz, mouth) -> Phone:
  return Phone(0.120, formants, voicing, 0.05, hiss, hiss_hz, mouth, closure=0.76)


def _fricative(seconds, formants, voicing, hiss, hiss_hz, mouth) -> Phone:
  return Phone(seconds, formants, voicing, 0.0, hiss, hiss_hz, mouth)


# mouth targets: jaw, width, round, close, part, tuck, press, tongue
_LIPS = (0.10, 0.0, 0.0, 1.0, 0.0, 0.0, 0.25, 0.1)
_TIP = (0.18, 0.15, 0.0, 0.0, 0.25, 0.0, 0.0, 0.8)
_BACK = (0.30, 0.10, 0.0, 0.0, 0.10, 0.0, 0.0, 0.3)
_TEETH_ON_LIP = (0.10, 0.10, 0.0, 0.0, 0.30, 1.0, 0.0, 0.1)
_HISS = (0.07, 0.40, 0.0, 0.0, 0.60, 0.0, 0.0, 0.4)
_HUSH = (0.10, 0.0, 0.60, 0.0, 0.55, 0.0, 0.0, 0.4)

SILENCE = "sil"
PHONES: dict[str, Phone] = {
  SILENCE: Phone(0.12, (500, 1450, 2450), 0.0, 0.0, 0.0, (4000, 4000), (0.0,) * 8),
  "a": _vowel(0.125, (740, 1180, 2500), 0.95, 0.10),
  "ae": _vowel(0.125, (680, 1700, 2450), 0.80, 0.45),
  "e": _vowel(0.110, (500, 1850, 2550), 0.52, 0.55),
  "i": _vowel(0.110, (300, 2250, 2950), 0.24, 0.90),
  "o": _vowel(0.120, (500, 880, 2450), 0.55, 0.0, 0.70),
  "u": _vowel(0.115, (330, 900, 2250), 0.22, 0.0, 1.0),
  "@": _vowel(0.070, (510, 1450, 2450), 0.38, 0.10),
  "m": _glide(0.090, (250, 1000, 2200), _LIPS, 0.45),
  "n": _glide(0.080, (270, 1500, 2500), _TIP, 0.45),
  "l": _glide(0.080, (350, 1050, 2750), (0.36, 0.15, 0.0, 0.0, 0.1, 0.0, 0.0, 1.0)),
  "r": _glide(0.080, (420, 1250, 1650), (0.24, 0.0, 0.45, 0.0, 0.1, 0.0, 0.0, 0.5)),
  "w": _glide(0.080, (310, 700, 2250), (0.14, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.1)),
  "j": _glide(0.075, (280, 2250, 3000), (0.18, 0.65, 0.0, 0.0, 0.25, 0.0, 0.0, 0.6)),
  "p": _stop((250, 800, 2100), 0.0, 0.30, (900, 1500), _LIPS),
  "b": _stop((250, 800, 2100), 0.16, 0.20, (800, 1400), _LIPS),
  "t": _stop((280, 1750, 2650), 0.0, 0.35, (4500, 2500), _TIP),
  "d": _stop((280, 1750, 2650), 0.16, 0.22, (4000, 2500), _TIP),
  "k": _stop((280, 1900, 2300), 0.0, 0.32, (2000, 800), _BACK),
  "g": _stop((280, 1900, 2300), 0.16, 0.20, (1900, 800), _BACK),
  "f": _fricative(0.105, (300, 1100, 2100), 0.0, 0.10, (6000, 6000), _TEETH_ON_LIP),
  "v": _fricative(0.085, (300, 1100, 2100), 0.40, 0.05, (6000, 6000), _TEETH_ON_LIP),
  "s": _fricative(0.110, (300, 1700, 2600), 0.0, 0.26, (5800, 1800), _HISS),
  "z": _fricative(0.090, (300, 1700, 2600), 0.35, 0.15, (5600, 1800), _HISS),
  "sh": _fricative(0.115, (300, 1900, 2400), 0.0, 0.30, (2900, 1200), _HUSH),
  "h": Phone(0.060, (510, 1450, 2450), 0.0, 0.18, 0.0, (4000, 4000), (0.45, 0.1, 0, 0, 0, 0, 0, 0)),
}
VOWELS = ("a", "ae", "e", "i", "o", "u", "@")
CONSONANTS = tuple(name for name in PHONES if name not in VOWELS and name != SILENCE)


def _words(table: str) -> dict[str, tuple[str, ...]]:
  entries = (entry.split(":") for entry in table.replace("\n", ";").split(";") if entry.strip())
  return {word.strip(): tuple(spelling.split()) for word, spelling in entries}


TRAINING_WORDS = _words("""
  hello: h @ l o; we: w i; you: j u; my: m a i; name: n e i m; people: p i p @ l
  begin: b i g i n; good: g u d; day: d e i; make: m e i k; music: m j u z i k; very: v e r i
  fast: f ae s t; sun: s @ n; shine: sh a i n; happy: h ae p i; summer: s @ m @ r; river: r i v @ r
  water: w o t @ r; open: o p @ n; window: w i n d o; yellow: j e l o; busy: b i z i
  father: f a d @ r; voice: v o i s; market: m a r k @ t; table: t e i b @ l; lamp: l ae m p
  move: m u v; fish: f i sh; zebra: z i b r a; hope: h o p; five: f a i v; mama: m a m a
  puppy: p @ p i; cake: k e i k; garden: g a r d @ n; shoe: sh u; wash: w o sh; lazy: l e i z i
  bubble: b @ b @ l; love: l @ v; room: r u m; apple: ae p @ l; far: f a r; look: l u k
""")
HELD_OUT_WORDS = _words("""
  maybe: m e i b i; family: f ae m @ l i; robot: r o b o t; wave: w e i v; shadow: sh ae d o
  simple: s i m p @ l; about: @ b a u t; follow: f o l o; game: g e i m; keep: k i p; zoo: z u
  yes: j e s; paper: p e i p @ r; banana: b @ n ae n @; marvel: m a r v @ l; rush: r @ sh
""")
_LEXICON = TRAINING_WORDS | HELD_OUT_WORDS


def spell(text: str) -> list[tuple[str, ...]]:
  """Known words to their phones; UserError names the first unknown word."""
  words = text.lower().split()
  for word in words:
    if word not in _LEXICON:
      raise UserError(
        f"the procedural voice has no word {word!r}: use words of "
        "uajax.data.synthetic.language.TRAINING_WORDS or HELD_OUT_WORDS"
      )
  return [_LEXICON[word] for word in words]


def invent(rng: np.random.Generator) -> tuple[str, ...]:
  """A nonsense word of one to three syllables, so that a corpus meets every neighbourhood."""
  phones: list[str] = []
  for _ in range(int(rng.integers(1, 4))):
    phones.append(str(rng.choice(CONSONANTS)))
    phones.append(str(rng.choice(VOWELS)))
    if rng.random() < 0.35:
      phones.append(str(rng.choice(CONSONANTS)))
  return tuple(phones)
