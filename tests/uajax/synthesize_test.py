"""From speech to film: poses that go on, blinks, frames that are the avatar's, length and sound."""

import dataclasses
import functools
import json
import shutil
from typing import Any

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.uajax import tiny_run
from tests.uajax.data import subject_folder
from tests.uajax.speech import tiny_model
from uajax import direction, gallery, media, provenance, synthesize
from uajax.blinks import EYES
from uajax.data import folder
from uajax.errors import UserError
from uajax.priors import extract
from uajax.speech import encoders, features
from uajax.types import Speech


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  path = tmp_path_factory.mktemp("synthesize") / "subject"
  subject_folder.make(path)
  return path


def test_every_frame_is_drawn_once_in_order(subject):
  avatar, source = tiny_run.avatar(), folder.Source(subject, "train")
  frames = list(source)
  scenes = [synthesize.Scene(f.controls, f.camera, f.background) for f in frames]
  drawn = list(synthesize.draw(avatar, scenes))
  assert len(drawn) == 10 > synthesize.CHUNK and drawn[0].image.dtype == np.uint8
  for i in (0, 7, 9):
    (alone,) = synthesize.draw(avatar, [scenes[i]])
    np.testing.assert_array_equal(alone.image, drawn[i].image)
    assert (alone.image != frames[i].background).any()  # the head is seen
    assert alone.uncertainty.max() > 0
  assert (drawn[0].image != drawn[9].image).any()
  assert not list(synthesize.draw(avatar, []))


def test_a_diverged_avatar_is_not_drawn(subject):
  made = tiny_run.avatar()
  broken = tiny_run.with_splats(made, sh_dc=made.face.splats.sh_dc.at[0].set(jnp.nan))
  with pytest.raises(UserError, match="diverged"):
    next(synthesize.draw(broken, []))


def test_reading_ahead_keeps_order_and_passes_errors_on():
  assert list(synthesize.ahead(lambda x: 2 * x, range(50), depth=3)) == list(range(0, 100, 2))
  with pytest.raises(ZeroDivisionError):
    list(synthesize.ahead(lambda x: 1 // x, [1, 0]))


def test_uncertainty_goes_from_black_to_bright():
  row = synthesize.colour(np.linspace(0, 2, 9)[None, :], 1.0)
  assert row[0, 0].tolist() == [0, 0, 0] and (row[0, 4:] == row[0, 4]).all()
  assert (np.diff(row[0, :5].astype(int).sum(-1)) > 0).all()


def frames_of(count):
  for i in range(count):
    yield synthesize.Drawn(np.full((16, 16, 3), 5 * i, np.uint8), np.full((16, 16), 0.1 * i))


def test_two_films_from_one_stream(tmp_path):
  films = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
  synthesize._write_both(media.write_video, films, frames_of(40))
  assert [media.probe(film).frames for film in films] == [40, 40]


def test_neither_film_remains_when_either_fails(tmp_path):
  def breaking():
    yield from frames_of(30)
    raise UserError("the stream broke")

  films = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
  with pytest.raises(UserError, match="the stream broke"):
    synthesize._write_both(media.write_video, films, breaking())
  assert not list(tmp_path.iterdir())
  (tmp_path / "b.mp4").mkdir()
  with pytest.raises(UserError, match="is a folder"):
    synthesize._write_both(media.write_video, films, frames_of(60))
  assert [p.name for p in tmp_path.iterdir()] == ["b.mp4"]


@pytest.fixture(scope="module")
def run(subject):
  return tiny_run.make(subject.parent / "run", subject)


def speech(seconds, rate=16_000):
  t = np.arange(round(seconds * rate)) / rate
  return (0.3 * np.sin(2 * np.pi * 150 * t) * np.sin(2 * np.pi * 2 * t)).astype(np.float32)


def pictures(path):
  return np.stack(list(media.read_frames(path))).astype(float)


def test_a_film_is_as_long_as_the_speech_and_sounds_like_it(run, tmp_path):
  sound = speech(1.47)
  media.write_wav(tmp_path / "in.wav", sound)
  out, doubt = tmp_path / "new" / "out.mp4", tmp_path / "doubt.mp4"
  made = synthesize.synthesize(run.path, tmp_path / "in.wav", out, uncertainty=doubt)
  assert made.frames == 37 and media.probe(out).frames == 37 == media.probe(doubt).frames
  assert not media.probe(doubt).has_audio or media.probe(doubt).duration_s < 1.6
  heard = media.read_audio(out)
  assert abs(len(heard) - 37 * 640) <= 640
  shared = min(len(heard), len(sound))
  assert np.corrcoef(heard[:shared], sound[:shared])[0, 1] > 0.95  # in place, not late
  assert sorted(p.name for p in tmp_path.iterdir()) == ["doubt.mp4", "in.wav", "new"]
  for film in (out, doubt):
    verdict = provenance.verify(film)
    assert verdict.holds and verdict.synthesis["run"] == run.path.name
    assert verdict.synthesis["consent"] == "no note that the person agreed"


def test_emotion_and_background_show(run, tmp_path):
  wav = tmp_path / "in.wav"
  media.write_wav(wav, speech(0.4))

  def film(**how):
    synthesize.synthesize(run.path, wav, tmp_path / "out.mp4", blinks=False, **how)
    return pictures(tmp_path / "out.mp4")

  calm, happy = film(emotion="neutral"), film(emotion="Happy", intensity=1.0)
  assert calm.shape == (10, 32, 40, 3) and np.abs(happy - calm).max() > 10
  white = film(emotion_reference=wav, background="white")
  share = lambda film: (film > 240).all(axis=-1).mean()
  assert share(white) > 0.1 > share(calm)


def test_a_gif_shows_emotions_side_by_side(run, tmp_path, capsys):
  wav, out = tmp_path / "in.wav", tmp_path / "emotions.gif"
  media.write_wav(wav, speech(0.4))
  words = [str(run.path), "--audio", str(wav), "--out"]
  assert gallery.main([*words, str(out)]) == 0 and "happy, neutral" in capsys.readouterr().out
  with Image.open(out) as gif:
    assert gif.n_frames == 5 and gif.info["duration"] == 80
    gif.seek(2)
    shown = np.asarray(gif.convert("RGB"), float)
  happy, neutral = shown[18:50, 4:44], shown[18:50, 48:88]
  assert np.abs(happy - neutral).max() > 10
  synthesize.synthesize(run.path, wav, tmp_path / "film.mp4", emotion="happy")
  film = pictures(tmp_path / "film.mp4")
  gaps = [np.abs(shown - film[4]).mean() for shown in (happy, neutral)]
  assert gaps[0] < 0.5 * gaps[1], gaps
  assert provenance.verify(out).holds
  assert gallery.main([*words, "emotions.png"]) == 1 and ".gif" in capsys.readouterr().err


def test_a_script_and_action_units_reach_the_avatar_while_they_hold(run, tmp_path, monkeypatch):
  wav = tmp_path / "in.wav"
  media.write_wav(wav, speech(2.0))
  (tmp_path / "script.csv").write_text("from,to,emotion,intensity,AU04\n1,,happy,1,5\n")
  draw = synthesize.draw

  def controls(**how):
    """Of every frame (not of the film, in which the encoder mixes frames)."""
    seen = []

    def watched(avatar, scenes, **settings):
      return draw(avatar, (seen.append(scene.controls) or scene for scene in scenes), **settings)

    monkeypatch.setattr(synthesize, "draw", watched)
    synthesize.synthesize(run.path, wav, tmp_path / "out.mp4", emotion="neutral", **how)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *seen)

  plain, directed = controls(), controls(script=tmp_path / "script.csv")
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:25], b[:25]), plain, directed)
  assert (np.abs(directed.emotion - plain.emotion).max(1)[31:] > 0.1).all()
  np.testing.assert_allclose(directed.action_units[31:44, 1], 5)
  np.testing.assert_array_equal(directed.action_units[:, EYES], plain.action_units[:, EYES])
  lifted = controls(action_units={"AU01": 4.0})
  np.testing.assert_allclose(lifted.action_units[:, 0], 4)


def test_what_is_heard_in_pieces_keeps_its_neighbours_and_its_time():
  rng = np.random.default_rng(0)
  leaves: list[Any] = [rng.normal(size=(11, *shape)).astype(np.float32)
                       for shape in ((16, 80), (64,), (64,), (128,))]
  whole = Speech(*leaves)
  pieces = [Speech(*(leaf[a:b] for leaf in whole)) for a, b in ((0, 2), (2, 3), (3, 11))]
  span = direction.Span(0.1, 0.35, "happy", 1.0, {})
  feel = functools.partial(direction.feel, [span], resolve=lambda name, x: np.full(128, 9.0))
  rows = list(synthesize.heard_rows(pieces, feel))
  assert len(rows) == 11
  for i, row in enumerate(rows):
    np.testing.assert_array_equal(row.audio, features.neighbouring(np.asarray(whole.audio), i))
    np.testing.assert_array_equal(row.f_tone, whole.f_tone[i])
  np.testing.assert_array_equal(np.stack([row.emotion for row in rows]),
                                feel(np.asarray(whole.emotion)))


def test_one_command_says_several_recordings_from_cameras_of_ones_own(run, tmp_path, monkeypatch):
  """The films differ in length; what is drawn sees the head from where the path says."""
  seen, draw = [], synthesize.draw

  def watched(avatar, scenes, **settings):
    return draw(avatar, (seen.append(scene.camera) or scene for scene in scenes), **settings)

  monkeypatch.setattr(synthesize, "draw", watched)
  recordings = [(tmp_path / f"{i}.wav", tmp_path / f"{i}.mp4") for i in range(2)]
  for (wav, _), seconds in zip(recordings, (0.2, 0.4), strict=True):
    media.write_wav(wav, speech(seconds))
  films = synthesize.synthesize_all(run.path, recordings, orbit=20.0, seed=3)
  assert [film.frames for film in films] == [5, 10] == [
    media.probe(out).frames for _, out in recordings]
  orbited = [camera.viewmat for camera in seen[5:]]
  frames = [{"viewmat": view.tolist()} for view in orbited]
  (tmp_path / "path.json").write_text(json.dumps({"frames": frames}))
  seen.clear()
  synthesize.synthesize(run.path, *recordings[1], camera=tmp_path / "path.json")
  np.testing.assert_allclose([camera.viewmat for camera in seen], orbited)
  seen.clear()
  synthesize.synthesize(run.path, *recordings[1], movement="generated")
  turned = [np.abs(a.viewmat - b).max() for a, b in zip(seen, orbited, strict=True)]
  assert turned[0] < 1e-6 and min(turned[2:]) > 1e-3  # the orbit begins in the clip's view


def test_a_film_without_background_is_clear_where_the_head_is_not(run, tmp_path):
  media.write_wav(tmp_path / "in.wav", speech(0.4))
  made = synthesize.synthesize(
    run.path, tmp_path / "in.wav", tmp_path / "out.mov", background="alpha", blinks=False)
  with av.open(str(made.path)) as container:
    shown = np.stack([f.to_ndarray(format="rgba") for f in container.decode(video=0)])
  assert shown.shape == (10, 32, 40, 4) and len(media.read_audio(made.path)) == 6400
  assert provenance.verify(made.path).holds
  opacity = shown[..., 3:] / 255.0
  assert opacity.min() == 0 and opacity.max() > 0.9
  # Laid over white it is the film on white.
  synthesize.synthesize(
    run.path, tmp_path / "in.wav", tmp_path / "out.mp4", background="white", blinks=False)
  over = shown[..., :3] * opacity + 255 * (1 - opacity)
  assert np.abs(over - pictures(tmp_path / "out.mp4")).mean() < 6
  assert np.abs(255 - pictures(tmp_path / "out.mp4")).mean() > 20


def spoil(tmp_path):
  silent, nothing, text = tmp_path / "silent.wav", tmp_path / "none.wav", tmp_path / "text.wav"
  media.write_wav(silent, np.zeros(16_000, np.float32))
  media.write_wav(nothing, np.zeros(0, np.float32))
  text.write_text("no sound at all")
  media.write_wav(tmp_path / "good.wav", speech(0.2))
  good = tmp_path / "good.wav"
  yield silent, {}, "silent"
  yield nothing, {}, "none.wav"
  yield text, {}, "not a sound"
  yield tmp_path / "lost.wav", {}, "does not exist"
  yield good, {"emotion": "furious"}, "happy, neutral"
  yield good, {"emotion": "happy", "intensity": 9.0}, "intensity"
  (tmp_path / "s.csv").write_text("from,emotion\n0,furious\n")
  yield good, {"script": tmp_path / "s.csv"}, "happy, neutral"
  yield good, {"emotion_reference": silent}, "silent"
  yield good, {"subject": tmp_path / "moved"}, "--subject"
  yield good, {"uncertainty": tmp_path / "out.mp4"}, "named twice"
  yield good, {"uncertainty": tmp_path / "out.avi"}, "does not end in .mp4"
  yield good, {"background": "alpha"}, "does not end in .mov"
  yield good, {"orbit": 10.0, "camera": good}, "exclude each other"
  yield good, {"orbit": 360.0}, "0 to 180 degrees"
  yield good, {"camera": good}, "is no JSON"


def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path):
  cases = list(spoil(tmp_path))
  before = sorted(tmp_path.iterdir())
  for audio, how, words in cases:
    with pytest.raises(UserError, match=words) as caught:
      synthesize.synthesize(run.path, audio, tmp_path / "out.mp4", **how)
    assert "\n" not in str(caught.value)
  assert sorted(tmp_path.iterdir()) == before


def test_uncertainty_that_nothing_ties_to_errors_is_said_to_be_so(run, subject, tmp_path, caplog):
  motion = dataclasses.replace(tiny_run.MOTION, calibrated=False)
  old = tiny_run.make(tmp_path / "old", subject, motion=motion)
  media.write_wav(tmp_path / "in.wav", speech(0.2))
  for made, said in ((run, 0), (old, 1)):
    with pytest.raises(UserError, match="happy, neutral"):  # found after that, before the film
      synthesize.synthesize(made.path, tmp_path / "in.wav", tmp_path / "out.mp4",
                            emotion="furious", uncertainty=tmp_path / "map.mp4")
    assert caplog.text.count("is not calibrated") == said


def test_eight_kilohertz_stereo_is_heard(run, tmp_path):
  import wave

  pcm = (speech(0.5, 8_000) * 32767).astype("<i2")
  with wave.open(str(tmp_path / "s.wav"), "wb") as file:
    file.setnchannels(2)
    file.setsampwidth(2)
    file.setframerate(8_000)
    file.writeframes(np.repeat(pcm, 2).tobytes())
  made = synthesize.synthesize(run.path, tmp_path / "s.wav", tmp_path / "o.mp4")
  assert made.frames == 13 and made.duration_s == 0.52


def test_speech_is_heard_as_the_subject_was(subject, tmp_path):
  """A run on HuBERT features: with the same weights, with windows made elsewhere, with neither."""
  weights, own = tmp_path / "weights", tmp_path / "subject"
  tiny_model.write(weights)
  shutil.copytree(subject, own)
  folder.make_windows(own, "hubert", weights)
  motion = dataclasses.replace(tiny_run.MOTION, audio_channels=tiny_model.HIDDEN, audio_width=2)
  run = tiny_run.make(tmp_path / "run", own, motion=motion, audio="hubert")
  shutil.copy(own / "extractors" / "aud_hu.json", run.extractors)
  media.write_wav(tmp_path / "in.wav", speech(0.4))
  say = lambda out, **given: synthesize.synthesize(
    run.path, tmp_path / "in.wav", tmp_path / out, background="black", **given)  # fmt: skip
  say("a.mp4")
  sound = media.read_audio(tmp_path / "in.wav")
  listen = encoders.make("hubert", weights).windows
  windows = extract.hear(extract.load(run.extractors), sound, 10, listen=listen).audio
  np.save(tmp_path / "windows.npy", windows)
  say("b.mp4", audio_windows=tmp_path / "windows.npy")
  np.testing.assert_array_equal(pictures(tmp_path / "a.mp4"), pictures(tmp_path / "b.mp4"))
  np.save(tmp_path / "windows.npy", np.zeros_like(windows[:-2]))
  say("c.mp4", audio_windows=tmp_path / "windows.npy")
  assert (pictures(tmp_path / "a.mp4") != pictures(tmp_path / "c.mp4")).any()
  np.save(tmp_path / "windows.npy", np.zeros((30, 2, tiny_model.HIDDEN)))
  with pytest.raises(UserError, match="has 30 windows, the recording lasts 10 frames"):
    say("d.mp4", audio_windows=tmp_path / "windows.npy")
  tiny_model.write(weights, seed=1)
  with pytest.raises(UserError, match="was heard with hubert"):
    say("d.mp4")
  shutil.rmtree(weights)
  with pytest.raises(UserError, match="is gone: give their new place with --audio-weights"):
    say("d.mp4")
