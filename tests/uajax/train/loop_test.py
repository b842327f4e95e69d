"""Three stages of a few steps on a tiny subject: everything that happens in a long run happens."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.uajax.data import subject_folder
from tests.uajax.lpips_test import made_up_lpips
from uajax import config, runs
from uajax.data import folder, loader
from uajax.errors import Stopped, UserError
from uajax.train import ahead, bench, loop, outlook, slots
from uajax.train.step import enter

ROOT = pathlib.Path(__file__).resolve().parents[3]


def experiment(steps: int = 8) -> config.Experiment:
  planes = config.Planes(features=4, resolution=4, multiples=(1,))
  motion = config.Motion(planes=planes, emotion_planes=planes, members=2, hidden=4, latent=4,
                         features=4)

  def small(stage, slots, most, **changes):
    densify = dataclasses.replace(stage.densify, start=1, every=2, until=6, slots=slots,
                                  max_slots=most, grad_threshold=1e-9, prune_size=10.0,
                                  min_opacity=0.0, min_opacity_rise=0.0)
    return dataclasses.replace(config.shorten(stage, steps, splats=24), guide_every=2,
                               lpips_from=steps, densify=densify, **changes)

  # Each program takes long to compile: every phase once, the growth of slots once.
  fuse = dataclasses.replace(config.FUSE, steps=4, lpips_from=0)
  return config.Experiment(
    model=config.Model(motion=motion),
    mouth=small(config.MOUTH, 32, 48, warm_steps=2, ensemble_from=2),
    face=small(config.FACE, 64, 64, warm_steps=0, ensemble_from=steps), fuse=fuse,
    log_every=2, picture_every=8, save_every=2)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  path = tmp_path_factory.mktemp("subjects") / "tiny"
  subject_folder.make(path)
  return path


@pytest.fixture(scope="module")
def trained(subject, tmp_path_factory):
  """With programs compiled ahead, which runs below are compared with that had none."""
  made = []

  class Remembered(ahead.Ahead):
    def __init__(self, *args, **settings):
      super().__init__(*args, **settings)
      made.append(self)

  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(loop, "Ahead", Remembered)
    run = train(subject, tmp_path_factory.mktemp("runs") / "whole", ahead=True)
  assert made[0].used >= 3, "of four programs, the first of which could not be foreseen"
  return run


def train(subject, path, frames="resident", **settings):
  return loop.train(subject, path, experiment(), perceptual=made_up_lpips(), source="folder",
                    frames=frames, **settings)


def test_the_picture_of_an_avatar_is_drawn_by_the_program_foreseen_for_its_shapes(subject):
  clip = loader.open_source(subject, "train", source="folder")
  shown, avatar = loop.Shown(clip[0]), loop._begin(loop.fit_audio(experiment(), clip), clip)
  foreseen = shown.drawing(jax.eval_shape(lambda: avatar))
  assert ahead._key(foreseen) == ahead._key(shown.drawing(avatar))


def leaves(run):
  avatar = run.avatar()
  return jax.tree.leaves((avatar.face, avatar.mouth))


def test_a_run_trains_grows_and_reports(trained):
  rows = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
  assert [row["total"] for row in rows] == list(range(2, 21, 2))
  assert all(np.isfinite(row["loss"]) and row["skipped"] == 0 for row in rows)
  mouth = [row["mouth_splats"] for row in rows if row["stage"] == "mouth"]
  assert mouth[0] > 24 and mouth[-1] > 32, "splats grow, and past the first 32 slots"
  assert len(list((trained.path / "pictures").glob("*.png"))) == 3
  seen = {row["total"]: row["held_out_psnr_db"] for row in rows if "held_out_psnr_db" in row}
  assert list(seen) == [8, 16, 20] and all(0 < db < 60 for db in seen.values())
  assert list((trained.path / "tensorboard").glob("events.*"))
  assert "complete" in trained.progress()
  assert all(np.isfinite(leaf).all() for leaf in leaves(trained))


def test_each_stage_trains_its_own_part_only(trained, subject):
  clip = loader.open_source(subject, "train", source="folder")
  begun = loop._begin(loop.fit_audio(experiment(), clip), clip)
  avatar = trained.avatar()
  moved = lambda a, b: [(np.asarray(x) != np.asarray(y)).any() for x, y in zip(
    jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
  assert any(moved(begun.face.motion, avatar.face.motion))
  assert any(moved(begun.mouth.motion, avatar.mouth.motion))
  # The fuse stage learns how far to trust all that, and leaves it as it is.
  before, _, at = trained.read(16)
  assert at.stage == 2 and at.step == 0
  assert not any(moved(before.mouth.motion, avatar.mouth.motion))
  for name, part in avatar.face.motion.items():
    learns = name in ("doubt_head", "familiar")
    assert any(moved(before.face.motion[name], part)) == learns, name
    assert not learns or not any(moved(begun.face.motion[name], before.face.motion[name])), name


def test_training_a_finished_run_again_changes_nothing(trained, subject):
  before = leaves(trained)
  again = train(subject, trained.path)
  for a, b in zip(before, leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)


def test_other_settings_do_not_touch_a_run(trained, subject):
  other = dataclasses.replace(experiment(), seed=1)
  with pytest.raises(UserError, match="other settings .*seed 0 -> 1"):
    loop.train(subject, trained.path, other, source="folder")


def test_killed_twice_and_resumed_the_bits_are_those_of_an_unbroken_run(trained, subject, tmp_path):
  """SIGKILL in the mouth stage and in the face stage, at a time nobody chose."""
  path = tmp_path / "killed"
  code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
          "from tests.uajax.train.loop_test import train\n"
          f"train({str(subject)!r}, {str(path)!r})\n")
  for wanted in (2, 12):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 240
    while _newest(path) < wanted and child.poll() is None and time.monotonic() < deadline:
      time.sleep(0.05)
    assert child.poll() is None, "it should still be training"
    child.send_signal(signal.SIGKILL)
    child.wait()
  resumed = train(subject, path)
  for a, b in zip(leaves(trained), leaves(resumed), strict=True):
    np.testing.assert_array_equal(a, b)
  totals = [json.loads(line)["total"]
            for line in (path / "metrics.jsonl").read_text().splitlines()]
  assert totals == list(range(2, 21, 2)), "no line is lost or doubled"


def test_resumed_within_the_fuse_stage_what_calibrates_doubt_has_the_bits_of_an_unbroken_run(
    trained, subject, tmp_path):
  path = tmp_path / "cut"
  shutil.copytree(trained.path, path)
  shutil.rmtree(path / "checkpoints" / "20")
  begun = runs.open_run(path).avatar()
  resumed = train(subject, path)
  assert (begun.face.motion["doubt_head"]["second"]["bias"]
          != resumed.avatar().face.motion["doubt_head"]["second"]["bias"]).any()
  assert same(trained, resumed)


def test_slots_that_nothing_lives_in_are_given_up():
  tiny = experiment()
  whole = bench.dummy(tiny, 300, 100)
  alive = jnp.arange(512) % 7 == 0  # 74 of 512
  whole = whole.replace(face=whole.face.replace(alive=alive & whole.face.alive))
  state = enter(tiny.face, whole)
  mu = jax.tree.map(lambda leaf: jnp.arange(float(leaf.size)).reshape(leaf.shape),
                    state.opt["splats"])
  programs = ahead.Ahead(active=False)
  fitted = slots.give_up_spare(
    tiny.face, state.replace(opt=state.opt | {"splats": mu}), programs)
  layer, before = fitted.avatar.face, whole.face.alive
  assert layer.alive.shape == (128,) == fitted.stats.grad.shape
  np.testing.assert_array_equal(layer.splats.means[layer.alive], whole.face.splats.means[before])
  for few, many in zip(jax.tree.leaves(fitted.opt["splats"]), jax.tree.leaves(mu), strict=True):
    if many.ndim and len(many) == 512:
      np.testing.assert_array_equal(few[layer.alive], many[before])
  assert fitted.avatar.mouth is state.avatar.mouth
  assert slots.give_up_spare(tiny.face, fitted, programs) is fitted


def test_frames_read_from_disk_as_training_goes_give_the_same_bits(
    trained, subject, tmp_path, caplog):
  run = train(subject, tmp_path / "run", frames="streamed")
  assert "stay on disk" in caplog.text
  assert same(trained, run)
  assert metrics(run) == metrics(trained)


def metrics(run) -> list[dict]:
  """What was reported of each step, but for the time it took."""
  rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
  times = "step_ms", "compile_s", "aside_s"
  return [{name: value for name, value in row.items() if name not in times} for row in rows]


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(trained, tmp_path, caplog):
  path = tmp_path / "damaged"
  shutil.copytree(trained.path, path)
  run = runs.open_run(path)
  newest = max(int(p.name) for p in run.checkpoints.iterdir() if p.name.isdigit())
  for file in (run.checkpoints / str(newest) / "avatar").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  assert runs.open_run(path).avatar() is not None
  assert f"checkpoint {newest}" in caplog.text and "before" in caplog.text


def same(a, b) -> bool:
  return all(map(np.array_equal, leaves(a), leaves(b)))


def at_total(monkeypatch, total: int, act):
  """Calls `act` when the line of metrics of that step is written."""
  write = loop.Journal.write

  def writes(journal, now, *rest):
    write(journal, now, *rest)
    if now == total:
      act()

  monkeypatch.setattr(loop.Journal, "write", writes)


def test_a_signal_stops_after_a_checkpoint_and_the_same_command_goes_on(
    trained, subject, tmp_path, monkeypatch):
  """At the end of a stage, where the next one has no state of training yet."""
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with monkeypatch.context() as patch:
    at_total(patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM after step 8 of 8 of the mouth stage") as stopped:
      train(subject, tmp_path / "run")
  assert stopped.value.signal == signal.SIGTERM
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
  assert _newest(tmp_path / "run") == 8
  assert same(trained, train(subject, tmp_path / "run"))


def test_a_second_signal_kills_at_once():
  code = ("import os, signal\n"
          "from uajax.train import loop\n"
          "with loop._heeded() as asked:\n"
          "  os.kill(os.getpid(), signal.SIGTERM)\n"
          "  print(asked, flush=True)\n"
          "  os.kill(os.getpid(), signal.SIGINT)\n"
          "  print('still here', flush=True)\n")
  child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert (child.returncode, child.stdout) == (-signal.SIGINT, f"[{signal.SIGTERM.value}]\n")


def glitch(monkeypatch, total: int):
  """Once, at that step, four steps have had no finite gradient."""
  run_steps, left = outlook.run_steps, [1]

  def glitches(*arrays, **settings):
    state, sums = run_steps(*arrays, **settings)
    if settings["stage"].name == "face" and int(state.step) == total - 8 and left:
      left.pop()
      state = state.replace(skipped=jnp.asarray(4))
    return state, sums

  monkeypatch.setattr(loop, "GIVE_UP_AFTER", 4)
  monkeypatch.setattr(outlook, "run_steps", glitches)


def test_training_that_diverges_goes_back_once_with_other_random_numbers(
    trained, subject, tmp_path, monkeypatch, caplog):
  glitch(monkeypatch, total=12)
  whole = train(subject, tmp_path / "whole")
  assert "complete" in whole.progress() and not same(trained, whole)
  assert ("no finite gradient in the last 4 steps before step 4 of the face stage: going back from "
          "step 12 to step 10") in caplog.text
  totals = [json.loads(line)["total"]
            for line in (whole.path / "metrics.jsonl").read_text().splitlines()]
  assert totals == list(range(2, 21, 2))

  glitch(monkeypatch, total=12)
  with monkeypatch.context() as patch:  # stopped after it went back: the checkpoint knows that
    at_total(patch, 14, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="SIGINT after step 6 of 8 of the face stage"):
      train(subject, tmp_path / "stopped")
  assert same(whole, train(subject, tmp_path / "stopped"))


def test_training_that_diverges_again_gives_up(subject, tmp_path, monkeypatch, caplog):
  """A clip that is not finite anywhere: the face cannot be learnt, from the first step on."""
  monkeypatch.setattr(loop, "GIVE_UP_AFTER", 2)
  numbers = folder.Source.numbers

  def spoilt(source, index):
    camera, controls, *boxes = numbers(source, index)
    return camera, jax.tree.map(lambda leaf: leaf * np.nan, controls), *boxes

  monkeypatch.setattr(folder.Source, "numbers", spoilt)
  with pytest.raises(UserError, match="diverged: no finite gradient.*once more.*rates"):
    train(subject, tmp_path / "run")
  assert caplog.text.count("going back") == 1


def test_a_run_goes_on_with_another_number_of_devices(trained):
  """Made with two, read with one: every bit of the state that training goes on from."""
  code = ("import jax\n"
          "from tests.uajax.train import loop_test\n"
          "from uajax import runs\n"
          "assert jax.device_count() == 1\n"
          f"print(loop_test.fingerprint(runs.open_run({str(trained.path)!r})))\n")
  child = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False,
    env=os.environ | {"PYTHONPATH": str(ROOT),
                      "XLA_FLAGS": "--xla_force_host_platform_device_count=1"})
  assert jax.device_count() == 2 and child.returncode == 0, child.stderr
  assert child.stdout.strip() == fingerprint(trained)


def fingerprint(run) -> str:
  """Of what training would go on from, at every checkpoint."""
  template = lambda avatar, at: loop._resume_template(avatar, run.experiment, at)
  digest = hashlib.sha256()
  for step in run.steps():
    for leaf in jax.tree.leaves(run.read(step, template)):
      digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def _newest(path: pathlib.Path) -> int:
  done = [int(p.name) for p in (path / "checkpoints").glob("*") if p.name.isdigit()]
  return max(done, default=0)

