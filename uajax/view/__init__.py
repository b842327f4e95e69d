"""A window to look through: the avatar of a run in the browser, talking, seen from anywhere.

Each visitor has a page of their own: a recording, an emotion, action units, a camera. What is
shown is drawn here, with the rasteriser that trained it, and sent as pictures; or the splats of
the moment are sent, and the visitor's browser draws them. Drawing, hearing and the page run in
threads of their own, so that the page answers while something is computed.
"""

import contextlib
import io
import math
import os
import pathlib
import socket
import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from uajax.errors import UserError
from uajax.types import SAMPLE_RATE_HZ
from uajax.view.page import Visit, in_thread
from uajax.view.stage import Stage, read_speech

__all__ = ["Stage", "Viewer", "Visit", "serve"]

OPENING_S = 20  # of training speech, which is said where nothing else is given


class Viewer:
  """A page that is being served; `close` it."""

  def __init__(self, server: Any, host: str):
    self._server = server
    self.visits: dict[int, Visit] = {}
    shown = "localhost" if host in ("0.0.0.0", "::", "127.0.0.1") else host
    self.port: int = server.get_port()
    self.url = f"http://{shown}:{self.port}"

  def wait(self) -> None:
    """For ever; Ctrl-C ends it."""
    threading.Event().wait()

  def close(self) -> None:
    for visit in list(self.visits.values()):
      visit.close()
    with _quiet():
      self._server.stop()


@contextlib.contextmanager
def serve(
  run_path: str | os.PathLike,
  *,
  audio: str | os.PathLike | None = None,
  subject: str | os.PathLike | None = None,
  audio_weights: str | os.PathLike | None = None,
  size: int | None = None,
  host: str = "127.0.0.1",
  port: int = 8080,
) -> Iterator[Viewer]:
  """Serves the page of a run as long as the context lasts.

  Args:
    run_path: a run folder.
    audio: what the avatar says at first; None: the beginning of its training speech.
    subject: the subject folder, if it is no longer where it was when training.
    audio_weights: folder of the audio encoder's weights, if it is no longer where it was.
    size: height of the drawn pictures in pixels; None: as filmed.
    host: the address to listen at; 0.0.0.0 lets other machines in, without any password.
    port: if it is taken, the next that is free.

  Raises:
    UserError: viser lacks; the run, the recording or the address cannot be used.
  """
  try:
    import viser
  except ImportError as error:
    raise UserError(f"the viewer needs viser ({error.name or 'viser'} is missing): pip install "
                    "-r requirements-view.txt") from None
  _require_address(host, port)
  sound = None if audio is None else read_speech(audio)
  stage = Stage(run_path, subject=subject, audio_weights=audio_weights, size=size)
  if sound is None:
    audio = stage.source.path / "aud.wav"
    sound = read_speech(audio)[: OPENING_S * SAMPLE_RATE_HZ]
  name, given = pathlib.Path(cast(os.PathLike, audio)).name, sound
  first = in_thread(lambda: stage.hear(given, name))
  with _quiet():
    server = viser.ViserServer(host=host, port=port, verbose=False)
  viewer = Viewer(server, host)

  def refuse(verbose: bool = True) -> None:
    """A page could else have viser publish the avatar through a tunnel to its own server."""

  server.request_share_url = refuse
  _face_the_avatar(server, stage)

  @server.on_client_connect
  def _(client: Any) -> None:
    viewer.visits[client.client_id] = Visit(client, stage, first)
    if client.client_id not in server.get_clients():
      leave(client)  # before the page was built

  @server.on_client_disconnect
  def leave(client: Any) -> None:
    visit = viewer.visits.pop(client.client_id, None)
    if visit is not None:
      visit.close()

  try:
    yield viewer
  finally:
    viewer.close()


def _face_the_avatar(server: Any, stage: Stage) -> None:
  """Every visitor begins where the film's camera stands, and turns about the head."""
  camera = stage.cameras[0]
  pose = np.linalg.inv(np.asarray(camera.viewmat, np.float64))
  head = np.asarray(stage.avatar.face.splats.means)[stage.alive[0]].mean(0)
  server.scene.set_up_direction(tuple(-pose[:3, 1]))
  server.initial_camera.position = pose[:3, 3]
  server.initial_camera.look_at = head
  server.initial_camera.up = -pose[:3, 1]
  server.initial_camera.fov = 2 * math.atan(stage.height / 2 / float(camera.K[1, 1]))
  server.scene.world_axes.visible = False


def _require_address(host: str, port: int) -> None:
  """viser tries a thousand ports at an address that is none."""
  if not 0 <= port <= 65535:
    raise UserError(f"--port {port} is no port: choose 1024 to 65535")
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, kind, protocol) as trial:
      trial.bind(address)
  except (OSError, UnicodeError) as error:
    reason = error.strerror if isinstance(error, OSError) else "no name"
    raise UserError(f"--host {host} cannot be listened at ({reason}): choose 127.0.0.1, 0.0.0.0 or "
                    "an address of this machine") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """viser prints a frame about its addresses, whatever it is told."""
  with contextlib.redirect_stdout(io.StringIO()):
    yield
