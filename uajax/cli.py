"""The command `uajax`: parses, calls, says what came of it, and nothing else.

One frozen dataclass a command: its fields are the arguments, their comments the help, `run`
does the work and returns the exit status. Heavy modules are imported in `run`, so that help
and wrong use answer at once.
"""

import argparse
import contextlib
import dataclasses
import errno
import importlib.util
import io
import logging
import os
import pathlib
import re
import select
import sys
import time
import traceback
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from uajax import cache, config
from uajax.errors import Stopped, UserError

Path = pathlib.Path
Preset = Literal["demo", "quick", "paper"]


class WrongUse(Exception):
  """Arguments that parse but do not go together. Exit status 2."""


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Turn a video of one talking person into a subject folder (resumable)."""

  video: Positional[Path]  # any video that FFmpeg can read: one person, speaking, all the time
  out: Path  # the subject folder to make
  size: int | None = None  # side of the square pictures in pixels (default: the video's, up to 512)
  limit_s: float | None = None  # only the first so many seconds
  av_offset: int | None = None  # frames by which the sound is late (default: estimated)
  focal_px: float | None = None  # focal length of the cut-out picture, if known
  parser: bool = True  # use the 19-class face parser where it is at hand
  jobs: int | None = None  # processes (default: the cores, as memory allows); all find the same

  def run(self) -> int:
    from uajax.preprocess import pipeline, workers

    settings = pipeline.Settings(
      size=self.size,
      limit_s=self.limit_s,
      av_offset=self.av_offset,
      focal_px=self.focal_px,
      parser=self.parser,
      jobs=workers.usual_jobs() if self.jobs is None else self.jobs,
    )
    pipeline.run(self.video, self.out, settings)
    print(f"subject folder: {self.out}; next: uajax extract {self.out}")
    return 0


@dataclasses.dataclass(frozen=True)
class Extract:
  """Priors and emotion of every frame: trains or loads the extractors, writes the features."""

  subject: Positional[Path]  # a subject folder
  size: Literal["small", "paper"] = "small"  # of the networks; paper: as published, wants a GPU
  wav2vec2: Path | None = None  # folder with Hugging Face wav2vec2 weights, with --size paper
  audio: config.Audio = "mel"  # what the avatar hears; train with the same --model.audio
  audio_weights: Path | None = None  # Hugging Face folder, with --audio hubert or wav2vec2
  seed: int = 0

  def run(self) -> int:
    if self.wav2vec2 is not None and self.size != "paper":
      raise WrongUse("--wav2vec2 belongs to --size paper: give both or none")
    if self.audio_weights is not None and self.audio not in ("hubert", "wav2vec2"):
      raise WrongUse("--audio-weights belongs to --audio hubert or wav2vec2: give both or none")
    from uajax.data import folder
    from uajax.priors import extract

    settings = dataclasses.replace(
      extract.PAPER if self.size == "paper" else extract.SMALL,
      wav2vec2=str(self.wav2vec2 or ""),
      seed=self.seed,
    )
    folder.make_windows(self.subject, self.audio, self.audio_weights)
    extractors = extract.train(self.subject, settings)
    for note in extractors.provenance.get("notes", ()):
      print(f"note: {note}")
    choice = "" if self.audio == "mel" else f" --model.audio {self.audio}"
    print(f"features in {self.subject}; next: uajax train {self.subject} --workdir RUN{choice}")
    return 0


@dataclasses.dataclass(frozen=True)
class Train:
  """Train the three stages on a subject; continues where the run folder stands."""

  subject: Positional[Path]  # a subject folder, features extracted
  workdir: Path  # the run folder: made, or continued
  config: Annotated[config.Experiment, arg(name="")]
  preset: Preset = "quick"  # demo: CPU, minutes; quick: a GPU, minutes; paper: as published
  experiment: Path | None = None  # a Python file with get_config() -> Experiment, not a preset
  consent: str | None = None  # "Jane Doe agreed on ...", kept in the subject folder; else asked for
  frames: Literal["auto", "resident", "streamed"] = "auto"  # on the device, or read as it goes
  coordinator: str | None = None  # HOST:PORT of the first of several processes that train as one,
  processes: int | None = None  # how many there are,
  process: int | None = None  # and which of them this is, from 0
  distributed: bool = False  # several processes that Slurm, MPI or a TPU pod know of

  def run(self) -> int:
    which = (self.coordinator, self.processes, self.process)
    if None in which and which != (None, None, None):
      raise WrongUse("--coordinator, --processes and --process go together: give all three or none")
    from uajax import consent, hosts, lpips
    from uajax.train import loop

    several = self.distributed or self.coordinator is not None
    with hosts.joined(*which) if several else contextlib.nullcontext():
      try:
        perceptual = lpips.load()
      except UserError:
        perceptual = None  # the loop says what follows from that
      if hosts.is_first():
        consent.see_to(self.subject, self.consent, _ask if _is_terminal() else None)
      loop.train(
        self.subject, self.workdir, self.config, perceptual=perceptual, frames=self.frames
      )
      if hosts.is_first():
        print(f"run folder: {self.workdir}; next: uajax evaluate {self.workdir}")
    return 0


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Train variants of an experiment over devices and hosts; continues where the folder stands."""

  experiment: Positional[Path]  # a Python file with get_config(), and space() or sweep() to vary
  subjects: Positional[tuple[Path, ...]]  # subject folders: every one is tried
  config: Annotated[config.Experiment, arg(name="")]
  out: Path | None = None  # the folder of the sweep: made, or continued (default: sweeps/NAME)
  over: tuple[str, ...] = ()  # settings to vary besides: face.densify.slots=1024,2048 seed=0,1
  search: Literal["grid", "random", "optuna"] = "grid"
  trials: int | None = None  # how many (default: the whole grid, or 20)
  search_seed: int = 0  # of random and optuna
  metric: str = "held_out_psnr_db"  # what is best: this, or a column of metrics.jsonl
  mode: Literal["max", "min"] = "max"  # whether large or small is good
  stopping: Literal["none", "asha", "median"] = "none"  # of trials that do worse than others
  grace: int = 50  # per cent of its steps that every trial may train
  retries: int = 3  # of a trial whose process died
  retry_failed: bool = False  # run those again that failed when the command ran before
  gpus_per_trial: float | None = None  # or a fraction (default: 1 where there are any)
  cpus_per_trial: float | None = None  # (default: 1 beside a GPU, else all)
  at_once: int | None = None  # no more trials at a time (default: as many as there is room for)
  resource: tuple[str, ...] = ()  # a trial's, by the name that Ray has for it: TPU=4
  address: str | None = None  # of a Ray cluster to join (default: this machine alone)
  dashboard: bool = False  # have Ray show itself in the browser

  def run(self) -> int:
    amounts = [entry.partition("=") for entry in self.resource]
    if any(not name or not amount.isdecimal() or not int(amount) for name, _, amount in amounts):
      raise WrongUse(f"--resource {' '.join(self.resource)}: give NAME=NUMBER, such as TPU=4")
    for name, value, least in (
      ("trials", self.trials, 1), ("at-once", self.at_once, 1), ("grace", self.grace, 1),
      ("retries", self.retries, 0),
      ("gpus-per-trial", self.gpus_per_trial, 0), ("cpus-per-trial", self.cpus_per_trial, 0),
    ):  # fmt: skip
      if value is not None and not least <= value < float("inf"):
        raise WrongUse(f"--{name} {value}: give {least} or more")
    if self.grace > 100:
      raise WrongUse(f"--grace {self.grace}: give per cent, 1 to 100")
    if not self.subjects:
      raise WrongUse("sweep needs subject folders: uajax sweep EXPERIMENT.py SUBJECT ...")
    from uajax.sweep import search, space, trials

    search.require("ray")
    module = _run_file(self.experiment)
    wanted = space.of_module(
      module, _config_of(module, self.experiment), self.config, self.subjects, self.over
    )
    search.check(wanted, self.search)
    out = self.out or Path("sweeps") / self.experiment.stem
    told = {"search": self.search, "search_seed": self.search_seed}
    trials.open_sweep(out, told | {"metric": self.metric, "mode": self.mode} | wanted.encode())
    with trials.held(out):
      proposals = search.Proposals(
        out, wanted, self.search, count=self.trials, seed=self.search_seed,
        metric=self.metric, mode=self.mode, retry_failed=self.retry_failed,
      )  # fmt: skip
      from uajax.sweep import on_ray

      on_ray.run(
        out,
        proposals,
        on_ray.Settings(
          cpus=self.cpus_per_trial,
          gpus=self.gpus_per_trial,
          resources={name: float(amount) for name, _, amount in amounts},
          address=self.address,
          at_once=self.at_once,
          dashboard=self.dashboard,
          stopping=self.stopping,
          grace=self.grace,
          retries=self.retries,
        ),
        self.metric,
        self.mode,
      )
      table = trials.write_results(out, list(proposals.axes), self.metric, self.mode)
    print(trials.as_markdown(table), end="")
    best = table[0]
    if best["state"] != "finished":
      return _fail(f"no trial of {out} finished: see the reasons in {out / 'results.md'}", 1)
    print(f"table: {out / 'results.md'}; next: uajax evaluate {out / best['run']}")
    return 0


@dataclasses.dataclass(frozen=True)
class Synthesize:
  """Make the person of a run say recordings, as films with sound."""

  run_path: Annotated[Positional[Path], arg(metavar="RUN")]  # a run folder
  audio: tuple[Path, ...]  # speech: any sound or video files
  # the .mp4 to write (.mov for background alpha); of several recordings a folder for films that
  # are called as they are
  out: Path
  emotion: str | None = None  # a name; a wrong one lists those known. None: as it sounds
  intensity: float = 1.0  # of the named emotion: 0 none, 1 full
  emotion_reference: Path | None = None  # take the emotion of this recording
  # the head moves to and fro over the training clip, or as recut from it, never twice the same
  poses: Literal["clip", "generated"] = "clip"
  blinks: bool = True  # as often and as fast as the person's, or open eyes
  # spans as .json or .csv: from, to (seconds), emotion, intensity, AU01 AU04 AU05 AU06 AU07 AU45
  script: Path | None = None
  au: tuple[str, ...] = ()  # action units of the whole film, 0..5 (AU45 0..2): AU01=2 AU04=0
  audio_weights: Path | None = None  # of the audio encoder, if they were moved since `extract`
  audio_windows: Path | None = None  # .npy made elsewhere of this audio, for DeepSpeech runs
  uncertainty: Path | None = None  # a second .mp4: how unsure the motion is, pixel by pixel
  # behind the head: the clip's torso and background, a colour, or nothing (ProRes 4444 in .mov)
  background: Literal["image", "black", "white", "green", "alpha"] = "image"
  orbit: float | None = None  # the camera goes about the head so many degrees to each side
  camera: Path | None = None  # .json of cameras, such as `export --format ply --audio` writes
  mark: str | None = None  # a line of text to be seen in every picture
  provenance: bool = True  # a signed C2PA manifest that says: synthesised, by what, from which run
  subject: Path | None = None  # where the subject folder lies now, if it was moved
  seed: int = 0  # of blinks and generated poses

  def run(self) -> int:
    if self.emotion and self.emotion_reference:
      raise WrongUse("--emotion and --emotion-reference exclude each other: give one of them")
    if not self.audio:
      raise WrongUse("--audio names no file: give a recording of speech")
    from uajax import direction, synthesize

    outs = [self.out]
    if len(self.audio) > 1:
      if self.out.suffix.lower() in (".mp4", ".mov") or self.out.is_file():
        raise WrongUse(f"--out {self.out} is one film: of several recordings give a folder")
      suffix = ".mov" if self.background == "alpha" else ".mp4"
      outs = [self.out / f"{audio.stem}{suffix}" for audio in self.audio]
    films = synthesize.synthesize_all(
      self.run_path,
      list(zip(self.audio, outs, strict=True)),
      emotion=self.emotion,
      intensity=self.intensity,
      emotion_reference=self.emotion_reference,
      audio_weights=self.audio_weights,
      audio_windows=self.audio_windows,
      movement=self.poses,
      blinks=self.blinks,
      script=self.script,
      action_units=direction.units_of(self.au),
      uncertainty=self.uncertainty,
      subject=self.subject,
      background=self.background,
      orbit=self.orbit,
      camera=self.camera,
      mark=self.mark,
      provenance=self.provenance,
      seed=self.seed,
    )
    also = f", uncertainty in {self.uncertainty}" if self.uncertainty else ""
    for made in films:
      print(f"{made.path}: {made.frames} frames, {made.duration_s:.2f} s{also}")
    return 0


@dataclasses.dataclass(frozen=True)
class Verify:
  """Read a film's manifest: what made it, and whether it was changed since."""

  film: Positional[Path]

  def run(self) -> int:
    from uajax import provenance

    verdict = provenance.verify(self.film)
    print(f"made by      {verdict.maker}")
    for name, value in verdict.synthesis.items():
      if value is not None:
        print(f"{name:12} {value}")
    trust = "on a trust list" if verdict.trusted else "on no trust list: anyone can make such a one"
    print(f"signed by    {verdict.signer} (certificate {trust})")
    if verdict.holds:
      print("unchanged since it was signed")
      return 0
    return _fail(f"{self.film} was changed, or its signature is false: {verdict.faults[0]}", 1)


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Measure a run on frames it has not seen, or one film against another."""

  run_path: Annotated[Positional[Path | None], arg(metavar="RUN")] = None  # a run folder
  split: Literal["val", "train"] = "val"  # which frames of its subject
  out: Path | None = None  # the report to write (default: RUN/evaluation_SPLIT.json)
  pred: Path | None = None  # instead of RUN: a film ...
  truth: Path | None = None  # ... and what it should look like
  subject: Path | None = None  # where the subject folder lies now, if it was moved
  pictures_only: bool = False  # leave out what reads faces: LMD, action units, E-FID, trembling

  def run(self) -> int:
    films = (self.pred, self.truth)
    if (self.run_path is None) == (films == (None, None)) or films.count(None) == 1:
      raise WrongUse("evaluate needs either RUN or both --pred A.mp4 and --truth B.mp4")
    from uajax import evaluate

    if self.run_path is not None:
      report = evaluate.evaluate(
        self.run_path, self.split, self.out, subject=self.subject, pictures_only=self.pictures_only
      )
    else:
      assert self.pred is not None and self.truth is not None
      report = evaluate.compare(
        self.pred, self.truth, self.out, pictures_only=self.pictures_only
      )
    print(evaluate.summarize(report))
    return 0


@dataclasses.dataclass(frozen=True)
class View:
  """Show the person of a run in the browser: talking, feeling and turned about as you like."""

  run_path: Annotated[Positional[Path], arg(metavar="RUN")]  # a run folder
  audio: Path | None = None  # speech: any sound or video file (default: of its training)
  size: int | None = None  # height of the pictures drawn, px; fewer are drawn sooner
  host: str = "127.0.0.1"  # 0.0.0.0 lets all who reach this machine in: there is no password
  port: int = 8080  # or the next that is free
  audio_weights: Path | None = None  # of the audio encoder, if they were moved since `extract`
  subject: Path | None = None  # where the subject folder lies now, if it was moved

  def run(self) -> int:
    from uajax import view

    with view.serve(
      self.run_path,
      audio=self.audio,
      subject=self.subject,
      audio_weights=self.audio_weights,
      size=self.size,
      host=self.host,
      port=self.port,
    ) as viewer, contextlib.suppress(KeyboardInterrupt):
      print(f"open {viewer.url} in a browser; Ctrl-C ends it", flush=True)
      viewer.wait()
    return 0


@dataclasses.dataclass(frozen=True)
class Export:
  """Write the avatar of a run for other programs."""

  run_path: Annotated[Positional[Path], arg(metavar="RUN")]  # a run folder
  # ply: splats at rest, one file a layer; stablehlo: a program that draws frames, for jax alone
  format: Literal["npz", "ply", "safetensors", "stablehlo"]
  out: Path  # the file to write (ply of both layers: NAME_face.ply and NAME_mouth.ply)
  layer: Literal["both", "face", "mouth"] = "both"  # of a ply
  size: int = 512  # side of the pictures that a stablehlo program draws, px
  audio: Path | None = None  # of a ply: --out is a folder then, the splats of every frame in it
  emotion: str | None = None  # with --audio: a name. None: as it sounds
  intensity: float = 1.0  # of the named emotion: 0 none, 1 full
  pace: bool = True  # of a stablehlo: compile it, to say how fast it draws here

  def run(self) -> int:
    if self.audio is not None and self.format != "ply":
      raise WrongUse("--audio belongs to --format ply: give both or none")
    if self.emotion is not None and self.audio is None:
      raise WrongUse("--emotion belongs to --audio: give both or none")
    from uajax import export
    from uajax.progress import duration

    began_s = time.monotonic()
    paths = export.export(
      self.run_path, self.format, self.out, layer=self.layer, size=self.size, audio=self.audio,
      emotion=self.emotion, intensity=self.intensity,
    )  # fmt: skip
    took = duration(time.monotonic() - began_s)
    for path in paths:
      files = [*path.iterdir()] if path.is_dir() else [path]
      many = f"{len(files)} files, " if path.is_dir() else ""
      print(f"{path} ({many}{sum(file.stat().st_size for file in files) / 1e6:.1f} MB)")
    print(f"written in {took}", flush=True)
    if self.format == "stablehlo" and self.pace:
      import jax

      each_s = export.pace(paths[0])
      print(f"draws a frame in {1000 * each_s:.1f} ms here ({jax.default_backend()})")
    return 0


@dataclasses.dataclass(frozen=True)
class ImportOfficial:
  """Turn an official UA-3DTalk or TalkingGaussian checkpoint into a run folder."""

  checkpoint: Positional[Path]  # chkpnt_fuse_latest.pth
  out: Path  # the run folder to make
  subject: Path | None = None  # the subject folder it was trained on, for synthesize and evaluate

  def run(self) -> int:
    from uajax import interop, runs

    runs.adopt(self.out, interop.load_official(self.checkpoint), self.checkpoint, self.subject)
    print("its uncertainty is not calibrated: nothing ties it to errors or to noise")
    print(f"run folder: {self.out}; next: uajax export {self.out} --format npz --out avatar.npz")
    return 0


@dataclasses.dataclass(frozen=True)
class Synthetic:
  """Make a procedural talking person with known truth, as a subject folder."""

  out: Positional[Path]  # the subject folder to make
  seconds: float = 12.0  # of film
  size: int = 128  # side of the pictures in pixels
  seed: int = 0  # of looks, voice, words and movements

  def run(self) -> int:
    from uajax.data import synthetic

    person = synthetic.Person(seed=self.seed, size_px=self.size)
    synthetic.make(self.out, person, seconds=self.seconds, seed=self.seed)
    print(f"subject folder: {self.out}; next: uajax extract {self.out}")
    return 0


@dataclasses.dataclass(frozen=True)
class Demo:
  """From nothing to a talking video of a procedural person, on any CPU in minutes."""

  out: Path = Path("demo")  # the folder for the film, the pictures and the report
  seed: int = 0

  def run(self) -> int:
    from uajax import demo

    print(demo.summarize(self.out, demo.run(self.out, seed=self.seed)))
    return 0


@dataclasses.dataclass(frozen=True)
class Fetch:
  """Download pretrained files by name, each checked against its SHA-256."""

  names: Positional[tuple[str, ...]]  # as `uajax doctor` calls them

  def run(self) -> int:
    from uajax.preprocess import weights

    known = [entry.name for entry in weights.KNOWN]
    for name in self.names:
      if name not in known:
        raise WrongUse(f"no pretrained file {name}: known are {', '.join(known)}")
    for name in self.names:
      print(weights.fetch(name))
    return 0


@dataclasses.dataclass(frozen=True)
class Doctor:
  """Say what this machine can do and what is missing, each with its remedy."""

  def run(self) -> int:
    from uajax import doctor

    findings = doctor.examine()
    for finding in findings:
      print(finding)
    return 0 if doctor.healthy(findings) else 1


COMMANDS: dict[str, type] = {
  "preprocess": Preprocess,
  "extract": Extract,
  "train": Train,
  "sweep": Sweep,
  "synthesize": Synthesize,
  "verify": Verify,
  "evaluate": Evaluate,
  "view": View,
  "export": Export,
  "import-official": ImportOfficial,
  "synthetic": Synthetic,
  "demo": Demo,
  "fetch": Fetch,
  "doctor": Doctor,
}

DESCRIPTION = """Emotional 3D talking faces from Gaussians.

Every command answers --help. Errors come in one line; --debug anywhere adds the traceback.
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command. Returns the exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted,
  141 nobody reads on, 143 terminated.
  """
  words = list(sys.argv[1:] if argv is None else argv)
  debug = "--debug" in words
  words = [word for word in words if word != "--debug"]
  logging.basicConfig(level=logging.WARNING, format="uajax: %(message)s")
  cache.keep_compiled()
  try:
    command = parse(words)
    status = command.run()
    sys.stdout.flush()
    return status
  except SystemExit as stop:  # --help
    return stop.code if isinstance(stop.code, int) else 0
  except WrongUse as error:
    return _fail(str(error), 2)
  except Stopped as stop:
    return _fail(str(stop), 128 + stop.signal)
  except KeyboardInterrupt:
    resumes = words[:1] in (["train"], ["sweep"], ["preprocess"], ["extract"])
    left = "the same command goes on from here" if resumes else "nothing half-written is left"
    return _fail(f"interrupted: {left}", 130)
  except Exception as error:
    if isinstance(error, BrokenPipeError) and _unread():
      return 141
    if debug:
      traceback.print_exc()
    return _fail(explain(error), 1)


def _unread() -> bool:
  """Whether nobody reads what is printed any more, as behind `| head`; then it goes nowhere."""
  if not hasattr(select, "poll"):
    return False
  out = select.poll()
  out.register(sys.stdout.fileno(), 0)
  if not any(event & (select.POLLERR | select.POLLHUP) for _, event in out.poll(0)):
    return False
  with open(os.devnull, "w") as nowhere:
    os.dup2(nowhere.fileno(), sys.stdout.fileno())  # Python flushes once more at its end
  return True


def parse(words: Sequence[str]) -> Any:
  """The command that `words` ask for, with its arguments.

  Raises:
    WrongUse: what does not parse, in one line.
    UserError: an experiment file that cannot be used.
    SystemExit: after printing help.
  """
  commands = None
  for name, kind in COMMANDS.items():
    default = {}
    if kind is Train:
      first = words[:1] == ["train"]
      default["default"] = _train_defaults(words[1:] if first else [])
    if kind is Sweep:
      first = words[:1] == ["sweep"]
      default["default"] = _sweep_defaults(words[1:] if first else [])
    entry = Annotated[kind, subcommand(name, **default)]  # pyright: ignore[reportInvalidTypeForm]
    commands = entry if commands is None else commands | entry  # pyright: ignore
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      return tyro.cli(  # pyright: ignore[reportCallIssue]
        commands, prog="uajax", description=DESCRIPTION, args=list(words)  # pyright: ignore
      )
  except SystemExit as stop:
    if stop.code in (0, None):
      sys.stderr.write(said.getvalue())
      raise
    raise WrongUse(_flatten(said.getvalue())) from None


def explain(error: BaseException) -> str:
  """One line for any failure, with the remedy where one is known."""
  text = " ".join(str(error).split())
  if isinstance(error, UserError):
    return text
  if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
    where = f" writing {error.filename}" if error.filename else ""
    return f"the disk is full{where}: make room and run the same command again"
  if isinstance(error, PermissionError):
    return f"no permission for {error.filename}: choose a place you may write to"
  if isinstance(error, ModuleNotFoundError):
    return f"the package {error.name} is not installed: run `make setup`, then `uajax doctor`"
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
    return f"out of memory ({text[:120]}): close other programs or choose a smaller experiment"
  if isinstance(error, OSError):
    return f"{text} (try again, or with --debug for the traceback)"
  text = text if len(text) <= 300 else text[:300] + " ..."
  return f"{type(error).__name__}: {text} (a fault of uajax: --debug shows where)"


def load_experiment(path: Path) -> config.Experiment:
  """Runs a Python file and returns what its `get_config()` gives.

  Raises:
    UserError: no such file, it fails, or it gives something else.
  """
  return _config_of(_run_file(path), path)


def _run_file(path: Path) -> types.ModuleType:
  if not path.is_file():
    raise UserError(f"no experiment file {path}: give a Python file with get_config()")
  spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise UserError(f"{path} is not a Python file: its name must end in .py")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise _failing(path, error) from error
  return module


def _config_of(module: types.ModuleType, path: Path) -> config.Experiment:
  try:
    made = module.get_config()
  except Exception as error:
    raise _failing(path, error) from error
  if not isinstance(made, config.Experiment):
    kind = type(made).__name__
    raise UserError(f"get_config() of {path} gives a {kind}: return a uajax.config.Experiment")
  return made


def _failing(path: Path, error: Exception) -> UserError:
  line = " ".join(f"{type(error).__name__}: {error}".split())
  return UserError(f"experiment {path} fails with {line}: mend the file")


def _train_defaults(words: Sequence[str]) -> Train:
  """What `--field value` overrides start from: the preset or the experiment file."""
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
  first.add_argument("--preset")
  first.add_argument("--experiment", type=Path)
  try:
    known, _ = first.parse_known_args(words)
  except argparse.ArgumentError as error:
    raise WrongUse(f"{error} (uajax train --help)") from None
  if known.preset and known.experiment:
    raise WrongUse("--preset and --experiment exclude each other: give one of them")
  if known.experiment:
    experiment = load_experiment(known.experiment)
  else:
    # A name that is not a preset is refused by the second pass, which knows the choices.
    experiment = config.PRESETS.get(known.preset, config.quick)()
  return Train(subject=tyro.MISSING, workdir=tyro.MISSING, config=experiment)


def _sweep_defaults(words: Sequence[str]) -> Sweep:
  """What overrides start from: the experiment file, which comes first."""
  asks = not words or any(word in ("-h", "--help") for word in words)
  if not asks and words[0].startswith("-"):
    raise WrongUse("the experiment file comes first: uajax sweep EXPERIMENT.py SUBJECT ...")
  experiment = config.quick() if asks else load_experiment(Path(words[0]))
  return Sweep(experiment=tyro.MISSING, subjects=(), config=experiment)


def _flatten(box: str) -> str:
  """tyro's framed message as one line."""
  lines = [re.sub(r"[─━╭╮╰╯│┃├┤]+", " ", line).strip() for line in box.splitlines()]
  line = "; ".join(line for line in lines if line)
  return line.replace(":;", ":").replace(",;", ",") or "wrong use: see uajax --help"


def _is_terminal() -> bool:
  """Whether somebody is there to answer a question."""
  return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def _ask(question: str) -> str:
  """The user's answer; empty at the end of input."""
  sys.stderr.write(question)
  sys.stderr.flush()
  return sys.stdin.readline()


def _fail(line: str, status: int) -> int:
  clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a line of progress may stand there
  sys.stderr.write(f"{clear}uajax: {line}\n")
  return status


if __name__ == "__main__":
  sys.exit(main())
