"""TensorBoard event files, written without TensorFlow."""

import pathlib
import time

# protobuf makes these classes at import: no source declares them.
from tensorboard.compat.proto.event_pb2 import (
  Event,  # pyright: ignore[reportAttributeAccessIssue]
  SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.compat.proto.summary_pb2 import (
  Summary,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class Events:
  """Scalars and pictures under `path`, for `tensorboard --logdir`.

  Opening at `step` makes TensorBoard drop what an earlier, cut run wrote after it.
  """

  def __init__(self, path: pathlib.Path, step: int):
    self._writer = EventFileWriter(str(path))
    started = SessionLog(status=SessionLog.START)
    self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=started))

  def scalars(self, step: int, values: dict[str, float]) -> None:
    self._add(step, [Summary.Value(tag=name, simple_value=v) for name, v in values.items()])

  def image(self, step: int, name: str, png: bytes, shape: tuple[int, ...]) -> None:
    picture = Summary.Image(
      height=shape[0], width=shape[1], colorspace=shape[2], encoded_image_string=png)
    self._add(step, [Summary.Value(tag=name, image=picture)])

  def close(self) -> None:
    self._writer.close()

  def _add(self, step: int, values) -> None:
    self._writer.add_event(
      Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
