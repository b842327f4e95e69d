"""The viewer: what it draws is the avatar, its clock keeps time, visitors do not disturb others.

Pages are visited by a websocket that says what a browser says first; the slow test has a browser.
"""

import io
import json
import shutil
import sys
import time
import types
import urllib.request

import jax
import numpy as np
import pytest
from PIL import Image

from tests.uajax import tiny_run
from tests.uajax.data import subject_folder
from uajax import export, media, runs, synthesize, view
from uajax.errors import UserError
from uajax.types import FPS
from uajax.view import page, stage

CALM = stage.Acting(None, 1.0, ())
FRONT = stage.Eye((1.0, 0, 0, 0), (0.0, 0, -0.3), 0.6, 1.5)
FILMED = stage.Look("picture", "face and mouth", True, False, FRONT)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp("view")
  subject_folder.make(path / "subject")
  return tiny_run.make(path / "run", path / "subject")


@pytest.fixture(scope="module")
def made(run):
  return view.Stage(run.path)


@pytest.fixture(scope="module")
def talk(made):
  return made.hear(speech(0.4), "speech")


def speech(seconds):
  t = np.arange(round(seconds * 16_000)) / 16_000
  return (0.3 * np.sin(2 * np.pi * 150 * t) * np.sin(2 * np.pi * 2 * t)).astype(np.float32)


def test_the_clock_keeps_time_through_pauses_and_scrubbing():
  clock = page.Clock(50)
  assert clock.frame(0.0) == 0 and not clock.running
  clock.play(10.0)
  assert clock.frame(10.39) == 9 and clock.frame(10.41) == 10 and clock.running
  assert clock.next_s(10.41) == pytest.approx(0.03, abs=1e-6)
  clock.stop(10.41)
  assert clock.frame(99.0) == 10
  clock.play(100.0, 40)
  assert clock.frame(100.2) == 45 and not clock.over(100.39)
  assert clock.frame(100.41) == 49 and clock.over(100.41)
  for frame in range(50):  # what was asked for is what is shown
    clock.stop(0.0, round(frame / FPS * FPS))
    assert clock.frame(0.0) == frame


def test_pictures_keep_their_shape_on_any_canvas():
  picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
  wide, tall = page.on_canvas(picture, 2.0), page.on_canvas(picture, 0.5)
  assert wide.shape == (4, 8, 3) and tall.shape == (4, 2, 3)
  np.testing.assert_array_equal(wide[:, 1:7], picture)
  np.testing.assert_array_equal(tall, picture[:, 2:4])


def test_the_free_camera_is_the_pages(made):
  turn = np.array([0.3, -0.5, 0.7, 0.2])
  eye = stage.Eye(tuple(2 * turn), (0.1, 0.2, -0.5), 0.7, 1.6)
  camera, width = stage.free_camera(eye, 100)
  assert width == 175  # steps of a quarter of the height
  viser = pytest.importorskip("viser")
  pose = viser.transforms.SO3(turn / np.linalg.norm(turn)).as_matrix()
  point = np.array([0.3, -0.1, 2.0])  # in the camera's axes
  world = pose @ point + eye.position
  np.testing.assert_allclose(camera.viewmat @ [*world, 1], [*point, 1], atol=1e-6)
  top = camera.K @ [0, -np.tan(0.35), 1]  # the upper edge of the canvas
  np.testing.assert_allclose(top, [87.5, 0, 1], atol=1e-4)
  for broken in ({"fov": float("nan")}, {"wxyz": (0, 0, 0, 0)}, {"position": (0, np.inf, 0)}):
    with pytest.raises(UserError, match="no camera"):
      stage.free_camera(eye._replace(**broken), 100)


@pytest.mark.slow
def test_as_filmed_it_is_what_synthesize_draws(made, talk):
  scenes = [synthesize.Scene(made.controls(talk, i, CALM), made.cameras[talk.poses[i]],
                             made.behind(talk.poses[i])) for i in (0, 7)]
  for i, want in zip((0, 7), synthesize.draw(made.avatar, scenes), strict=True):
    motion = made.move(made.controls(talk, i, CALM))
    picture = made.picture(motion, FILMED, talk.poses[i])
    np.testing.assert_array_equal(picture, want.image)
    doubt = made.picture(motion, FILMED._replace(show="uncertainty"), talk.poses[i])
    full = made._full["uncertainty"]
    np.testing.assert_array_equal(doubt, synthesize.colour(want.uncertainty, full))


def test_every_control_changes_the_picture(made, talk):
  draw = lambda acting=CALM, **look: made.picture(
    made.move(made.controls(talk, 3, acting)), FILMED._replace(**look), 0).astype(int)
  plain = draw()
  happy = stage.Acting("happy", 1.0, ())
  pictures = [
    plain, draw(happy), draw(happy._replace(intensity=0.4)),
    draw(stage.Acting(None, 1.0, (("AU45", 2.0),))),
    *(draw(show=show) for show in ("uncertainty", "attention to the voice")),
    draw(show="attention to the eyes"), draw(layers="face"), draw(layers="mouth"),
  ]  # fmt: skip
  for i, one in enumerate(pictures):
    for other in pictures[:i]:
      assert one.shape == plain.shape and (one != other).any()
  np.testing.assert_array_equal(draw(happy._replace(intensity=0.0)),
                                draw(stage.Acting("neutral", 1.0, ())))
  for acting, said in (
    (stage.Acting("cheerful", 1.0, ()), "'cheerful' is not known"),
    (stage.Acting("happy", 9.0, ()), "outside 0 to 2"),
    (stage.Acting(None, 1.0, (("AU01", float("nan")),)), "no number"),
    (stage.Acting(None, 1.0, (("AU45", 5.0),)), "outside 0 to 2"),
  ):
    with pytest.raises(UserError, match=said):
      made.controls(talk, 3, acting)


def test_the_browser_is_given_the_splats_that_are_drawn_here(made, talk):
  motion = made.move(made.controls(talk, 3, CALM))
  wide = motion.face.d_scale.at[0].set(1e4)  # than float16, in which viser sends them, can hold
  motion = motion._replace(face=motion.face._replace(d_scale=wide))
  free = FILMED._replace(filmed=False, splats=True)
  cloud, face = made.cloud(motion, free), made.cloud(motion, free._replace(layers="face"))
  assert cloud.centers.shape == (28, 3) and face.centers.shape == (14, 3)
  splats = made.avatar.face.splats
  np.testing.assert_allclose(face.centers, 100 * (splats.means + motion.face.d_mean)[:14],
                             rtol=1e-5)
  scales = 100 * jax.nn.softplus(splats.raw_scales + motion.face.d_scale)[:14]
  small = np.asarray(scales).max(axis=1) < 100
  axes = np.linalg.eigvalsh(face.covariances - 1e4 * made._blur * np.eye(3))[small]
  np.testing.assert_allclose(axes, np.sort(scales**2, axis=1)[small], rtol=2e-3, atol=1e-3)
  assert 5 < small.sum() < 14
  assert np.isfinite(face.covariances.astype(np.float16)).all()
  assert cloud.rgbs.min() >= 0 and cloud.rgbs.max() <= 1
  assert len(made.cloud(motion, free._replace(show="uncertainty")).centers) == 14
  # seen from elsewhere, harmonics show other colours
  behind = FRONT._replace(wxyz=(0.0, 0, 1, 0), position=(0.0, 0, 0.3))
  assert np.abs(made.cloud(motion, free._replace(eye=behind)).rgbs - cloud.rgbs).max() > 0.01


@pytest.mark.parametrize("name, content, said", [
  ("a.wav", b"", "a.wav is empty"),
  ("../../etc/x.wav", b"no sound at all", "x.wav is not a sound"),
  ("C:\\music\\<b>loud</b>.mp3", b"\x00" * 4000, "b_.mp3 is not a sound"),
  ("", b"RIFF" + b"\xff" * 40, "upload is"),
])  # fmt: skip
def test_uploads_are_checked_and_named_harmlessly(name, content, said):
  with pytest.raises(UserError, match=said) as caught:
    stage.read_upload(name, content)
  assert "tmp" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_sound_file_is_taken(tmp_path):
  media.write_wav(tmp_path / "x.wav", speech(0.3))
  name, sound = stage.read_upload("böse*.wav", (tmp_path / "x.wav").read_bytes())
  assert name == "böse_.wav"
  np.testing.assert_allclose(sound, speech(0.3), atol=1e-4)
  media.write_wav(tmp_path / "x.wav", np.zeros(9000, np.float32))
  with pytest.raises(UserError, match=r"^x.wav is silent"):
    stage.read_upload("x.wav", (tmp_path / "x.wav").read_bytes())


def visitor(viewer):
  """A connection that has told where its camera is, as a browser does first."""
  viser = pytest.importorskip("viser")
  import msgspec
  from websockets.sync.client import connect

  connection = connect(f"ws://127.0.0.1:{viewer.port}", max_size=None, close_timeout=1,
                       subprotocols=[f"viser-v{viser.__version__}"])
  connection.send(msgspec.msgpack.encode({
    "type": "ViewerCameraMessage", "wxyz": FRONT.wxyz, "position": FRONT.position, "fov": 0.6,
    "near": 0.01, "far": 1000.0, "image_height": 300, "image_width": 450,
    "look_at": (0.0, 0.0, 0.0), "up_direction": (0.0, -1.0, 0.0)}))  # fmt: skip
  return connection


def until(true, seconds=60.0):
  began = time.monotonic()
  while not true():
    assert time.monotonic() - began < seconds
    time.sleep(0.02)


def test_visitors_play_upload_and_fail_each_for_themselves(run, tmp_path):
  pytest.importorskip("viser")
  media.write_wav(tmp_path / "talk.wav", speech(0.4))
  with view.serve(run.path, audio=tmp_path / "talk.wav", port=0) as viewer:
    got = urllib.request.urlopen(f"http://127.0.0.1:{viewer.port}", timeout=20)
    assert got.status == 200 and b"<html" in got.read(2000)
    with visitor(viewer) as one, visitor(viewer) as other:
      until(lambda: len(viewer.visits) == 2)
      first, second = viewer.visits.values()
      until(lambda: all("splats drawn" in v._note.content for v in (first, second)))
      assert "talk.wav" in first._note.content and first._time.max == pytest.approx(9 / FPS)

      def shown(visit):
        return visit._shown[0][1], visit._shown[1]

      first._emotion.value = "happy"
      first.hold("AU45", 2.0)
      until(lambda: shown(first)[0] == stage.Acting("happy", 1.0, (("AU45", 2.0),)))
      assert shown(second)[0] == CALM
      first.release()
      until(lambda: shown(first)[0].units == ())
      second.seek(6)
      until(lambda: shown(second)[1] == 6)

      first.play()
      until(lambda: "audio/wav;base64" in first._player.content)
      assert "audio" not in second._player.content
      until(lambda: not first._clock.running)  # it ends by itself
      until(lambda: shown(first)[1] == 9)
      assert first._play.label == "Play" and not first._player.content

      media.write_wav(tmp_path / "other.wav", speech(0.4)[::-1])
      second.upload(types.SimpleNamespace(
        name="other.wav", content=(tmp_path / "other.wav").read_bytes()))
      until(lambda: "other.wav" in second._note.content and second._talk.name == "other.wav")
      assert first._talk.name == "talk.wav"
      first.upload(types.SimpleNamespace(name="text.wav", content=b"text"))
      assert "Failed" in first._note.content and "text.wav is" in first._note.content
      first.draw_ahead()
      until(lambda: len(first._drawn) == 10 and not first._ahead)
      assert first._prepare.label == "Draw ahead" and not first._bar.visible

      first._intensity.value = 1.5
      first._emotion.value = "as heard"
      second._splats.value = True
      until(lambda: second._cloud is not None and second._cloud.buffer.shape == (28, 8))
      assert second._cloud.visible
      second.client.camera._state.fov = float("nan")  # as a broken page might say
      second._show.value = "uncertainty"
      until(lambda: "no camera" in second._note.content)
      assert "Failed" not in first._note.content or "text.wav" in first._note.content
      types_seen = {part for connection in (one, other) for part in heard(connection)}
      assert {"BackgroundImageMessage", "GaussianSplatsMessage"} <= types_seen
    until(lambda: not viewer.visits)


def heard(connection):
  """The kinds of messages that came in."""
  import zstandard

  found = set()
  try:
    while True:
      raw = connection.recv(timeout=0.3)
      at = raw.find(b"\x28\xb5\x2f\xfd")  # messages are compressed
      text = zstandard.ZstdDecompressor().decompress(raw[at:], max_output_size=1 << 28) \
        if at >= 0 else raw
      found |= {name for name in ("BackgroundImageMessage", "GaussianSplatsMessage")
                if name.encode() in text}
  except TimeoutError:
    return found


def test_a_recording_is_exported_frame_by_frame(run, made, tmp_path):
  media.write_wav(tmp_path / "talk.wav", speech(0.4))
  talk = made.hear(stage.read_speech(tmp_path / "talk.wav"), "talk.wav")
  out = tmp_path / "frames"
  export.export(run.path, "ply", out, audio=tmp_path / "talk.wav", emotion="happy", intensity=0.5)
  names = sorted(path.name for path in out.iterdir())
  assert len(names) == 21 and names[:2] == ["cameras.json", "face_00000.ply"]
  said = json.loads((out / "cameras.json").read_text())
  assert (said["width"], said["height"], len(said["frames"])) == (40, 32, 10)
  np.testing.assert_allclose(said["frames"][7]["K"], made.cameras[talk.poses[7]].K)
  motion = made.move(made.controls(talk, 7, stage.Acting("happy", 0.5, ())))
  export.write_ply(tmp_path / "one.ply", made.avatar.face, motion.face)
  assert (tmp_path / "one.ply").read_bytes() == (out / "face_00007.ply").read_bytes()
  with pytest.raises(UserError, match="already holds something"):
    export.export(run.path, "ply", out, audio=tmp_path / "talk.wav")


def test_what_cannot_be_served_is_said_in_one_line(run, tmp_path, monkeypatch):
  def fails(said, **how):
    with pytest.raises(UserError, match=said) as caught, view.serve(run.path, **how):
      pass
    assert "\n" not in str(caught.value)

  (tmp_path / "no.wav").write_text("no sound")
  pytest.importorskip("viser")
  fails("is not a sound", audio=tmp_path / "no.wav")
  fails("--port 70000", port=70000)
  fails("--host 203.0.113.7 cannot be listened at", host="203.0.113.7")
  fails("--size 4", size=4)
  fails("is gone", subject=tmp_path / "lost")
  monkeypatch.setitem(sys.modules, "viser", None)
  fails("needs viser .* requirements-view.txt")


SKIN = np.array([0.85, 0.62, 0.52])
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# The background picture and the splats want WebGL; nothing may be asked of other machines.
FLAGS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-quic")  # fmt: skip


@pytest.fixture(scope="module")
def browser():
  playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
  path = next(filter(None, map(shutil.which, BROWSERS)), None)
  with playwright.sync_playwright() as started:
    try:
      opened = started.chromium.launch(executable_path=path, args=list(FLAGS))
    except playwright.Error as error:
      pytest.skip(f"no Chromium: install one, or `playwright install chromium` ({error.message})")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def person(tmp_path_factory):
  """A run whose avatar is a blob of skin."""
  path = tmp_path_factory.mktemp("person")
  subject_folder.make(path / "subject")
  run = tiny_run.make(path / "run", path / "subject")
  blob = tiny_run.avatar(1, splats=400)  # whose emotions look apart
  splats = blob.face.splats
  blob = tiny_run.with_splats(
    blob, means=1.3 * splats.means, raw_scales=0 * splats.raw_scales - 5.2,
    logit_opacities=0 * splats.logit_opacities + 2, sh_rest=0 * splats.sh_rest,
    sh_dc=np.broadcast_to((SKIN - 0.5) / 0.28209479, (400, 1, 3)).astype(np.float32))
  run.save(blob, {"step": np.zeros((), np.int32)}, runs.Progress(stage=3, step=0, total=8))
  return run


class Page:
  """A page in the browser, and all that it complained about."""

  def __init__(self, browser, url):
    self.page = browser.new_page(viewport={"width": 1000, "height": 640})
    self.complaints = []
    self.page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
    self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
    self.page.goto(url)
    self.wait("splats drawn")
    self.page.add_style_tag(content="[class*=Notification], [class*=Tooltip] {display: none}")

  def wait(self, text):
    self.page.get_by_text(text).first.wait_for(timeout=120_000)

  def canvas(self):
    """What the canvas shows once it has stood still for a second, float [h w 3] in 0..255."""
    box = self.page.locator("canvas").first.bounding_box()
    before, still = None, 0
    while still < 4:
      self.page.wait_for_timeout(250)
      now = np.asarray(Image.open(io.BytesIO(self.page.screenshot(clip=box))).convert("RGB"))
      still = still + 1 if before is not None and (now == before).all() else 0
      before = now
    return now.astype(float)

  def choose(self, label, value):
    self.page.get_by_label(label, exact=True).first.click()
    self.page.get_by_role("option", name=value, exact=True).click()

  def slide(self, at, key):
    thumb = self.page.get_by_role("slider").nth(at)
    thumb.focus()
    thumb.press(key)


def changed(a, b):
  return np.abs(a - b).max(axis=-1).mean()


@pytest.mark.slow
def test_in_a_browser(browser, person, tmp_path):
  pytest.importorskip("viser")
  media.write_wav(tmp_path / "talk.wav", speech(4.0))
  media.write_wav(tmp_path / "other.wav", speech(2.0))
  (tmp_path / "text.wav").write_text("no sound")
  with view.serve(person.path, audio=tmp_path / "talk.wav", port=0) as viewer:
    one = Page(browser, viewer.url)
    shown = one.canvas()

    (visit,) = viewer.visits.values()
    talk, acting, look = visit._talk, visit.acting(), visit.look()
    picture = visit.stage.picture(visit.stage.move(visit.stage.controls(talk, 0, acting)), look, 0)
    height, width, _ = shown.shape
    want = Image.fromarray(page.on_canvas(picture, width / height))
    want = np.asarray(want.resize((width, height), Image.Resampling.BILINEAR), float)
    assert changed(shown, want) < 8
    skin = lambda seen: (np.abs(seen - 255 * SKIN) < 30).all(axis=-1)
    middle = np.s_[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3]
    assert skin(shown)[middle].mean() > 0.9 and skin(shown).mean() < 0.7  # before its background

    other = Page(browser, viewer.url)
    untouched = other.canvas()
    assert changed(shown, untouched) < 2

    one.choose("Emotion", "happy")
    happy = one.canvas()
    assert changed(happy, shown) > 1
    one.slide(1, "Home")  # no intensity
    assert changed(one.canvas(), happy) > 1
    one.slide(1, "End")
    strong = one.canvas()
    assert changed(strong, happy) > 0.5
    one.page.get_by_text("Action units").click()
    one.page.wait_for_timeout(500)
    one.slide(7, "End")
    assert changed(one.canvas(), strong) > 0.2

    one.page.get_by_role("button", name="Play", exact=True).click()
    one.page.wait_for_function("document.querySelector('audio')?.currentTime > 0.5")
    moving = one.page.screenshot()
    one.page.get_by_role("button", name="Pause", exact=True).click()
    assert moving and 0 < visit._clock.frame(0.0) < 99
    one.slide(0, "Home")
    one.choose("Show", "uncertainty")
    assert skin(one.canvas()).mean() < 0.05
    one.choose("Show", "picture")

    one.choose("Emotion", "as heard")  # moves splats less far
    one.choose("Layers", "face")  # the browser sorts both layers together
    one.choose("Camera", "free: drag to turn")
    one.page.wait_for_timeout(500)
    one.wait("splats drawn")
    free = one.canvas()
    one.page.get_by_label("Splats in the browser").check()
    one.wait("splats moved")
    splats = one.canvas()
    assert changed(splats, free) < 0.3 * changed(np.full_like(free, 255), free)
    one.page.mouse.move(width // 2, height // 2)
    one.page.mouse.down()
    one.page.mouse.move(width // 2 + 150, height // 2 + 40, steps=5)
    one.page.mouse.up()
    assert changed(one.canvas(), splats) > 2

    upload = one.page.locator("input[type=file]").first
    upload.set_input_files(tmp_path / "text.wav")
    one.wait("text.wav is not a sound")
    upload.set_input_files(tmp_path / "other.wav")
    one.wait("other.wav, 2s")
    assert changed(other.canvas(), untouched) == 0
    # viser gives the bounds of its splats to nobody: three.js complains of that, once
    told = [text for text in one.complaints if "computeBoundingSphere" not in text]
    assert not told and not other.complaints
