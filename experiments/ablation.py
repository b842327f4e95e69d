r"""What do Prior Extraction (P), Emotion Distillation (E) and Uncertainty (U) each bring?

    uajax sweep experiments/ablation.py demo/subject data/may
    uajax train data/may --workdir runs/may_PE --preset paper \
      --model.motion.modalities audio content style emotion --model.motion.no-uncertainty \
      --model.motion.members 1

The rows of the paper's table on one person. The baseline is TalkingGaussian's motion: it hears the
audio and the action units and nothing else. P adds content and style, E the emotion. Without U one
network a modality answers for certain and a linear layer joins the answers; with it ensembles
answer and a product of Gaussians fuses them.

The first command is the quick schedule's, for one GPU of 16 GB: `sweeps/ablation/results.md` and
`.csv` hold a row each with PSNR, LPIPS and mouth LMD of held-out frames (the latter two need
`uajax fetch lpips_alex.npz face_landmarker.task`); the same command goes on with what is left. The
second is one row of another preset. `ablation_demo.py` has the rows small enough for two CPU cores.
"""

import dataclasses
from collections.abc import Iterator

from uajax import config

P: tuple[config.Modality, ...] = ("content", "style")
E: tuple[config.Modality, ...] = ("emotion",)
ROWS = {"baseline": ((), False), "P": (P, False), "E": (E, False), "P+U": (P, True),
        "P+E+U": (P + E, True)}


def row(base: config.Experiment, name: str) -> config.Experiment:
  """`base` with what one of ROWS leaves of it."""
  added, uncertainty = ROWS[name]
  motion = base.model.motion
  motion = dataclasses.replace(
    motion, modalities=("audio", *added), uncertainty=uncertainty,
    members=motion.members if uncertainty else 1)
  return dataclasses.replace(base, model=dataclasses.replace(base.model, motion=motion))


def get_config() -> config.Experiment:
  return config.quick()


def sweep() -> Iterator[tuple[str, config.Experiment]]:
  for name in ROWS:
    yield name, row(get_config(), name)
