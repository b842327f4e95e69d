"""The command line: what it says, to whom, and with which exit status."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
import wave

import pytest

from uajax import cli, config
from uajax.errors import Stopped, UserError


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
  monkeypatch.setenv("UAJAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))


def call(capsys, *words):
  """Exit status, stdout, stderr of `uajax WORDS`."""
  status = cli.main([str(word) for word in words])
  said = capsys.readouterr()
  return status, said.out, said.err


WRONG = [
  ([], "Missing subcommand"),
  (["dance"], "Unrecognized options: dance"),
  (["train"], "Missing from uajax train"),
  (["train", "S"], "--workdir"),
  (["train", "S", "--workdir", "R", "--face.steps", "many"], "--face.steps"),
  (["train", "S", "--workdir", "R", "--face.stepz", "3"], "--face.stepz"),
  (["train", "S", "--workdir", "R", "--preset", "huge"], "'huge'"),
  (["train", "S", "--workdir", "R", "--preset"], "expected one argument"),
  (["train", "S", "--workdir", "R", "--preset", "demo", "--experiment", "x.py"], "exclude"),
  (["train", "S", "--workdir", "R", "--process", "0"], "all three or none"),
  (["synthesize", "R", "--audio", "a.wav"], "--out"),
  (["synthesize", "R", "--audio", "a", "--out", "b", "--poses", "often"], "'often'"),
  (["synthesize", "R", "--audio", "a", "--out", "b", "--emotion", "sad",
    "--emotion-reference", "c"], "exclude"),
  (["evaluate"], "either RUN or both"),
  (["evaluate", "--pred", "a.mp4"], "either RUN or both"),
  (["evaluate", "R", "--pred", "a.mp4", "--truth", "b.mp4"], "either RUN or both"),
  (["export", "R", "--format", "obj", "--out", "x"], "'obj'"),
  (["extract", "S", "--wav2vec2", "W"], "--size paper"),
  (["view"], "RUN"),
  (["sweep"], "Missing from uajax sweep"),
  (["sweep", "--out", "S", "experiments/members.py"], "experiment file comes first"),
  (["sweep", "experiments/members.py"], "needs subject folders"),
  (["sweep", "experiments/members.py", "S", "--face.stepz", "3"], "--face.stepz"),
  (["sweep", "experiments/members.py", "S", "--resource", "TPU"], "TPU=4"),
  (["sweep", "experiments/members.py", "S", "--trials", "0"], "1 or more"),
]  # fmt: skip


@pytest.mark.parametrize("words, said", WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_use_is_one_line_and_status_2(capsys, words, said):
  status, out, err = call(capsys, *words)
  assert status == 2 and not out
  assert err.startswith("uajax: ") and err.count("\n") == 1 and said in err


def test_help_names_every_command_and_every_setting(capsys):
  status, out, _ = call(capsys, "--help")
  assert status == 0
  for name in cli.COMMANDS:
    assert name in out
    status, text, err = call(capsys, name, "--help")
    assert status == 0 and "usage: uajax " + name in text and not err
  assert "--face.densify.grad-threshold" in call(capsys, "train", "--help")[1]


def test_overrides_start_from_the_preset(tmp_path):
  words = ["train", "S", "--workdir", "R", "--preset", "demo", "--face.steps", "7", "--seed", "3"]
  command = cli.parse(words)
  want = config.demo()
  assert command.config == dataclasses.replace(
    want, seed=3, face=dataclasses.replace(want.face, steps=7)
  )
  assert cli.parse(["train", "S", "--workdir", "R"]).config == config.quick()
  assert cli.parse(["train", "S", "--workdir", "R", "--preset=paper"]).config == config.paper()
  path = tmp_path / "mine.py"
  path.write_text(
    "import dataclasses\nfrom uajax import config\n"
    "def get_config():\n  return dataclasses.replace(config.demo(), batch=5)\n"
  )
  words = ["train", "S", "--workdir", "R", "--experiment", str(path), "--scene-m", "0.3"]
  assert cli.parse(words).config == dataclasses.replace(config.demo(), batch=5, scene_m=0.3)


@pytest.mark.parametrize(
  "text, said",
  [
    (None, "no experiment file"),
    ("x = 1", "get_config"),
    ("def get_config():\n  return 3", "gives a int"),
    ("def get_config(:", "SyntaxError"),
    ("raise ValueError('two\\nlines')", "ValueError: two lines"),
  ],
)
def test_a_bad_experiment_file_is_one_line(capsys, tmp_path, text, said):
  path = tmp_path / "bad.py"
  if text is not None:
    path.write_text(text)
  status, _, err = call(capsys, "train", "S", "--workdir", "R", "--experiment", path)
  assert status == 1 and said in err and err.count("\n") == 1 and "bad.py" in err


def test_sweeps_say_what_they_lack(capsys, tmp_path, monkeypatch):
  path = tmp_path / "mine.py"
  path.write_text("from uajax import config\ndef get_config():\n  return config.demo()\n")
  missing = lambda name: None if name == "ray" else object()
  with monkeypatch.context() as patch:
    patch.setattr("importlib.util.find_spec", missing)
    status, _, err = call(capsys, "sweep", path, tmp_path)
  assert status == 1 and "pip install 'uajax[sweep]'" in err and err.count("\n") == 1
  monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
  assert "no experiment file" in call(capsys, "sweep", tmp_path / "other.py", tmp_path)[2]
  for words, said in (
    ([tmp_path / "nowhere"], "no subject folder"), ([tmp_path], "nothing to vary"),
    ([tmp_path, "--over", "face.step=1"], "did you mean face.steps"),
    ([tmp_path, "--over", "seed=1,x"], "cannot be 'x'"),
  ):  # fmt: skip
    status, _, err = call(capsys, "sweep", path, *words, "--out", tmp_path / "sweep")
    assert status == 1 and said in err and err.count("\n") == 1
    assert not (tmp_path / "sweep").exists(), "what fails at once leaves nothing"


BAD = [
  (["synthesize", "nowhere", "--audio", "a.wav", "--out", "o.mp4"], "nowhere"),
  (["evaluate", "nowhere"], "nowhere"),
  (["export", "nowhere", "--format", "npz", "--out", "o.npz"], "nowhere"),
  (["export", "nowhere", "--format", "stablehlo", "--out", "o"], "nowhere does not exist"),
  (["train", "nowhere", "--workdir", "run"], "nowhere"),
  (["extract", "nowhere"], "nowhere"),
  (["preprocess", "nowhere.mp4", "--out", "subject"], "nowhere.mp4"),
  (["evaluate", "--pred", "nowhere.mp4", "--truth", "b.mp4"], "nowhere.mp4"),
  (["import-official", "nowhere.pth", "--out", "run"], "nowhere.pth"),
  (["synthetic", "person", "--seconds", "0"], "0.0 s"),
]


@pytest.mark.parametrize("words, said", BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, words, said):
  monkeypatch.chdir(tmp_path)
  status, out, err = call(capsys, *words)
  assert status == 1 and not out
  assert err.startswith("uajax: ") and err.count("\n") == 1 and said in err, err
  assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


def test_runs_of_other_versions_are_refused(capsys, tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  wav = tmp_path / "a.wav"
  with wave.open(str(wav), "wb") as file:
    file.setparams((1, 2, 16_000, 0, "NONE", ""))
    file.writeframes(bytes(3200))
  for content in ('{"version": 99}', "{", "[]"):
    (run / "run.json").write_text(content)
    status, _, err = call(capsys, "synthesize", run, "--audio", wav, "--out", tmp_path / "o.mp4")
    assert status == 1 and err.count("\n") == 1 and str(run) in err, err
  assert not (tmp_path / "o.mp4").exists()


class Failing:
  """A command that fails in a given way."""

  def __init__(self, error):
    self.error = error

  def run(self):
    raise self.error


FAILURES = [
  (UserError("wrong thing: right thing"), 1, "wrong thing: right thing"),
  (OSError(errno.ENOSPC, "No space left on device", "run/x"), 1, "disk is full writing run/x"),
  (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 1, "no permission for /root/x"),
  (ModuleNotFoundError("No module named 'av'", name="av"), 1, "package av is not installed"),
  (RuntimeError("RESOURCE_EXHAUSTED: 9 GB\nand more"), 1, "out of memory"),
  (ZeroDivisionError("division\nby zero"), 1, "a fault of uajax"),
  (KeyboardInterrupt(), 130, "interrupted"),
  (Stopped("stopped by SIGTERM after step 3", signal.SIGTERM), 143, "after step 3"),
  (Stopped("stopped by SIGINT after step 3", signal.SIGINT), 130, "after step 3"),
]


@pytest.mark.parametrize("error, want, said", FAILURES, ids=lambda v: type(v).__name__)
def test_every_failure_is_one_line(capsys, monkeypatch, error, want, said):
  monkeypatch.setattr(cli, "parse", lambda _: Failing(error))
  status, out, err = call(capsys, "demo")
  assert status == want and not out and err.count("\n") == 1 and said in err
  status, _, err = call(capsys, "demo", "--debug")
  assert status == want and ("Traceback" in err) == (want == 1)


def test_the_doctor_fails_only_where_something_is_broken(capsys, monkeypatch):
  from uajax import doctor

  findings = [doctor.Finding("ok", "a", "well"), doctor.Finding("warn", "b", "so so", "do this")]
  monkeypatch.setattr(doctor, "examine", lambda: findings)
  status, out, _ = call(capsys, "doctor")
  assert status == 0 and out.splitlines()[1].endswith("so so; do this")
  findings.append(doctor.Finding("fail", "c", "broken", "mend it"))
  assert call(capsys, "doctor")[0] == 1


def test_settings_of_preprocessing_are_those_of_the_pipeline():
  from uajax.preprocess import pipeline

  ours = {field.name for field in dataclasses.fields(cli.Preprocess)}
  assert {f.name for f in dataclasses.fields(pipeline.Settings)} - {"looks"} <= ours


def test_help_of_the_module_is_quick_and_loads_nothing_heavy():
  code = (
    "import sys; from uajax.cli import main; status = main(['--help']);"
    "print([m for m in ('jax', 'numpy', 'librosa', 'av', 'flax') if m in sys.modules]);"
    "sys.exit(status)"
  )
  began = time.monotonic()
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stdout[-300:]
  assert time.monotonic() - began < 10  # 0.3 s on an idle machine


def test_as_a_program():
  words = [sys.executable, "-m", "uajax", "export", "R"]
  done = subprocess.run(words, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout


def test_a_reader_that_has_read_enough_is_no_failure():
  code = ("import sys, types\nfrom uajax import cli\n"
          "talk = lambda: print('word\\n' * 100_000) or 0\n"
          "cli.parse = lambda words: types.SimpleNamespace(run=talk)\n"
          "sys.exit(cli.main([]))\n")
  talking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
  assert talking.stdout and talking.stderr
  assert talking.stdout.readline() == "word\n"
  talking.stdout.close()
  assert talking.stderr.read() == ""
  assert talking.wait(timeout=60) == 141
