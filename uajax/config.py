"""Every knob of an experiment, typed. Frozen and hashable, so jit can close over it.

Defaults are the paper's (method.md §0, C, D) where they are sound; a comment names the
official behaviour a field can bring back.
"""

import dataclasses
from typing import Literal

Audio = Literal["mel", "phones", "deepspeech", "esperanto", "hubert", "wav2vec2"]  # speech.encoders
Modality = Literal["audio", "content", "style", "emotion"]  # what an ensemble goes by


@dataclasses.dataclass(frozen=True)
class Planes:
  """A tri-plane encoder (method.md C.1)."""

  features: int = 16  # channels a plane
  resolution: int = 64  # of the coarsest scale
  multiples: tuple[int, ...] = (1, 2, 4, 8)  # of `resolution`, one a scale
  bound: float = 0.15  # metres; positions in [-bound, bound]^3


@dataclasses.dataclass(frozen=True)
class Motion:
  """The uncertainty-aware deformation field (method.md C.2 to C.6)."""

  audio_channels: int = 80  # d of the audio windows; training takes it and the width from them
  audio_width: int = 16  # w
  audio_code: int = 32
  planes: Planes = Planes()
  emotion_planes: Planes = Planes(features=64, multiples=(1, 2, 4))
  # The paper's ablation: without content and style (Prior Extraction), without emotion (Emotion
  # Distillation). The mouth has no emotion anyway; audio must be among them.
  modalities: tuple[Modality, ...] = ("audio", "content", "style", "emotion")
  # Whether members say how sure they are, and modalities count accordingly. Without, members'
  # answers are averaged and the modalities' joined: the layer after them learns to weigh them.
  uncertainty: bool = True
  members: int = 10  # T, ensemble members a modality
  hidden: int = 64
  latent: int = 48  # D
  features: int = 64  # of the fused code that the heads read
  ddof: int = 1  # of the members' spread: 1 as the official code, 0 the law of total variance
  log_var_limit: float = 10.0  # log-variances are clipped to +-this (official: not at all, Q3)
  ajar: float = 0.1  # slope of the eyes' gate below zero, to 1 above (official 0)
  # Whether what the eyes' gate lets through of the action units reaches the heads by itself, too
  # (official: not). Fused with what is heard it is one voice among many that tell the frame as
  # well, and where lids seldom move the attention's penalties shut the gate before it is needed.
  acts: bool = True
  blink_gain: float = 1.0  # on AU45: what is seldom seen must count for more (official 1)
  # Whether the fused variance is scaled, splat by splat, to the error that pictures show, and grows
  # with sound that is unlike the training's: nothing else ties it to anything (official: not, Q14).
  # Learnt in the fuse stage, when what moves rests, and without a say in that.
  calibrated: bool = True
  still_heads: bool = True  # heads start at zero motion (official: rotation and scale jump, Q11)

  @property
  def calibrates(self) -> bool:
    """Whether there is a variance to calibrate."""
    return self.calibrated and self.uncertainty


@dataclasses.dataclass(frozen=True)
class Model:
  motion: Motion = Motion()
  audio: Audio = "mel"  # which aud_*.npy of the subject


@dataclasses.dataclass(frozen=True)
class Densify:
  """Growth and pruning inside fixed slots (method.md D.2)."""

  start: int = 500  # first step after which it may happen
  every: int = 100
  until: int = 45_000
  grad_threshold: float = 2e-4  # mean screen-space gradient (NDC units) that calls for more splats
  split_size: float = 0.005  # of the scene: larger splats split, smaller ones are cloned
  prune_size: float = 0.1  # of the scene: larger ones go, once motion is on
  min_opacity: float = 0.05  # at step 0 ...
  min_opacity_rise: float = 0.25  # ... and this much more at `until`
  slots: int = 32_768  # capacity to begin with: a step costs what its slots cost, used or not
  max_slots: int = 262_144  # slots grow up to this; beyond it growth is dropped and counted


@dataclasses.dataclass(frozen=True)
class Rates:
  """Learning rates of Adam (method.md C.7, D.2); decays of AdamW."""

  means: float = 1.6e-4  # times the scene's size, log-linear to ...
  means_end: float = 1.6e-6
  means_steps: int = 45_000
  sh_dc: float = 2.5e-3
  sh_rest: float = 1.25e-4
  opacity: float = 0.05
  scale: float = 3e-3
  rotation: float = 1e-3
  planes: float = 5e-3
  planes_decay: float = 0.0  # official: AdamW's default 0.01, fading unvisited cells (Q7)
  network: float = 5e-4
  doubt: float = 5e-3  # of what calibrates the uncertainty
  attention: float = 2.5e-3  # of the audio windows
  attention_decay: float = 1e-4
  halve_by: int = 40_000  # motion rates fall to 1/2 here, then to 1/10 at `end` (Q10: no jump)
  end: int = 50_000


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights of the loss terms (method.md D.3, D.4)."""

  ssim: float = 0.2
  lips: float = 0.2  # the mean error in the lip square once more: small, and it talks (official 0)
  # Likewise in the box of eyes and brows (official 0). More calls for more splats there: 0.4 took a
  # third more of them in all on a real clip, whose held-out picture was no better for it.
  eyes: float = 0.1
  motion: float = 1e-5
  alpha: float = 1e-3
  doubt: float = 1e-3  # how unlikely the error is, given the uncertainty; fuse, if `calibrated`
  eye_attention_on_lips: float = 1e-4
  attention_on_hair: float = 1e-4
  lpips_lips: float = 0.01
  lpips: float = 0.2


@dataclasses.dataclass(frozen=True)
class Stage:
  """One of the three trainings: which layer, how long, what happens when (method.md D.0)."""

  name: Literal["mouth", "face", "fuse"]
  steps: int = 50_000
  warm_steps: int = 3_000  # static splats before; motion from here on
  ensemble_from: int = 15_000  # one random member a modality before, all of them fused after
  # Probability that a modality says nothing at a step, each on its own, while members are asked
  # singly: what one could say is not left to the others for good (official 0).
  silence: float = 0.0
  noise: float = 0.0  # share of the frames heard through white noise, of mel windows (official 0)
  # Deviation of the noise on content, style and emotion at every step (official 0). In a short clip
  # each of them tells a frame by its name, and would be taken for what only the sound, or an action
  # unit, says in another: lips that hang on the emotion, eyes that shut at known words alone.
  vague: float = 0.0
  splats: int = 2_000  # to begin with
  splats_extent: float = 0.1  # metres: drawn in [-extent, extent]^3 ...
  carve: bool = True  # ... where masks see the layer, in its colours (official: all, grey)
  sh_every: int = 1_000  # steps between SH degrees
  guide_until: int = 40_000  # guided sampling ends here (0: never)
  guide_every: int = 15
  shut: float = 0.2  # share of guided training that looks at shut eyes (official: see `sampling`)
  hair_until: int = 46_000  # hair counts in one step of `hair_every` only, until here
  hair_every: int = 7
  lpips_from: int = 47_000
  freeze_from: int = 1_000_000_000  # geometry and motion rest from here on
  densify: Densify = Densify()
  rates: Rates = Rates()
  weights: Weights = Weights()


MOUTH = Stage(
  "mouth", splats=10_000, guide_until=39_000, guide_every=7, hair_until=0, lpips_from=49_000,
  freeze_from=49_000, densify=Densify(slots=16_384),
  rates=Rates(halve_by=39_000, end=49_000), weights=Weights(lpips=0.5))
FACE = Stage("face", vague=0.3, densify=Densify(until=49_000, grad_threshold=5e-4))
FUSE = Stage(
  "fuse", steps=10_000, warm_steps=0, ensemble_from=0, silence=0.0, noise=0.0, vague=0.0,
  guide_until=0, hair_until=0, lpips_from=5_000, densify=Densify(until=0),
  weights=Weights(lpips=0.5))


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A whole training; `preset` makes the usual ones."""

  model: Model = Model()
  mouth: Stage = MOUTH
  face: Stage = FACE
  fuse: Stage = FUSE
  scene_m: float = 0.2  # the scene's size (official: 1.1 x the spread of the cameras, Q31)
  batch: int = 1  # frames a step
  # What a layer in training stands before. A new colour each step can only be shown by being
  # transparent; before the official green, splats turn green where the picture has a hole.
  backdrop: Literal["random", "green"] = "random"
  seed: int = 0
  log_every: int = 100
  picture_every: int = 2_500
  save_every: int = 5_000
  keep: int = 3  # checkpoints

  def stages(self) -> tuple[Stage, Stage, Stage]:
    return self.mouth, self.face, self.fuse


def shorten(stage: Stage, steps: int, **changes) -> Stage:
  """The same stage in `steps` steps: every point of its schedule moves in proportion."""
  ratio = steps / stage.steps
  scale = lambda n: round(n * ratio)
  densify, rates = stage.densify, stage.rates
  return dataclasses.replace(
    stage, steps=steps,
    **{"warm_steps": scale(stage.warm_steps), "ensemble_from": scale(stage.ensemble_from),
       "sh_every": max(scale(stage.sh_every), 1), "guide_until": scale(stage.guide_until),
       "hair_until": scale(stage.hair_until), "lpips_from": scale(stage.lpips_from),
       "freeze_from": min(scale(stage.freeze_from), 1_000_000_000),
       "densify": dataclasses.replace(
         densify, start=scale(densify.start), until=scale(densify.until)),
       "rates": dataclasses.replace(
         rates, means_steps=max(scale(rates.means_steps), 1), halve_by=scale(rates.halve_by),
         end=scale(rates.end))} | changes)


def paper() -> Experiment:
  """50k mouth, 50k face and 10k fuse steps: the published schedule."""
  return Experiment()


def quick() -> Experiment:
  """A tenth of the published steps at higher rates: minutes on one GPU."""
  rates = dict(network=1e-3, means=4.8e-4)
  fine = Planes(resolution=32)  # to 1.2 mm: what so few steps can fill
  motion = Motion(
    planes=fine, emotion_planes=dataclasses.replace(fine, features=64, multiples=(1, 2, 4)))
  return Experiment(
    model=Model(motion=motion),
    mouth=_with_rates(_with_slots(shorten(MOUTH, 3_000, splats=2_000), 4_096, 2), **rates),
    face=_with_rates(_with_slots(shorten(FACE, 8_000, splats=4_000, guide_every=3), 16_384, 2),
                     **rates),
    fuse=shorten(FUSE, 1_000),
    picture_every=2_000, save_every=4_000)


def demo() -> Experiment:
  """Small networks, few splats: minutes on two CPU cores at 128 px."""
  planes = Planes(features=8, resolution=48, multiples=(1, 2, 4))  # to 1.6 mm: lips must part
  motion = Motion(
    planes=planes, emotion_planes=dataclasses.replace(planes, multiples=(1,)),
    members=3, hidden=32, latent=12, features=32)
  rates = dict(network=3e-3, attention=4e-3, planes=1e-2, means=1.6e-3, means_end=1.6e-5)
  return Experiment(
    model=Model(motion=motion),
    mouth=_with_rates(_with_slots(shorten(MOUTH, 800, splats=600), 1_024, 0, every=50), **rates),
    face=_with_rates(_with_slots(shorten(
      FACE, 3_000, splats=1_500, guide_every=3,
      weights=dataclasses.replace(FACE.weights, eyes=0.4)), 3_072, 0, every=50), **rates),
    fuse=shorten(FUSE, 200),
    log_every=50, picture_every=800, save_every=800)


def _with_rates(stage: Stage, **rates) -> Stage:
  return dataclasses.replace(stage, rates=dataclasses.replace(stage.rates, **rates))


def _with_slots(stage: Stage, slots: int, doublings: int, **changes) -> Stage:
  densify = dataclasses.replace(
    stage.densify, slots=slots, max_slots=slots << doublings, **changes)
  return dataclasses.replace(stage, densify=densify)


PRESETS = {"demo": demo, "quick": quick, "paper": paper}


def preset(name: str) -> Experiment:
  """The experiment called `name`: "demo", "quick" or "paper"; KeyError for any other."""
  return PRESETS[name]()
