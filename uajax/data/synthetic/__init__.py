"""A procedural talking person with known truth, made without any outside asset.

`make` writes a subject folder; `perform` and `render_frames` give the same in memory;
`corpus` speaks without being filmed, for training speech networks.
"""

from uajax.data.synthetic.performance import (
  AU_NAMES,
  EMOTIONS,
  EXPRESSION_NAMES,
  HELD_OUT_EMOTION,
  Line,
  Performance,
  Person,
  corpus,
  default_script,
  expression,
  held_out_script,
  perform,
)
from uajax.data.synthetic.portrait import Film, mouth_opening, render_frames
from uajax.data.synthetic.subject import make, training_frames

__all__ = [
  "AU_NAMES", "EMOTIONS", "EXPRESSION_NAMES", "HELD_OUT_EMOTION", "Film", "Line", "Performance",
  "Person", "corpus", "default_script", "expression", "held_out_script", "make", "mouth_opening",
  "perform", "render_frames", "training_frames",
]  # fmt: skip
