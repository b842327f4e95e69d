"""From where the head is seen in each frame of a film, and what is behind it.

A pose is a training frame's: its camera, the torso that goes with it, its brows. The walk goes to
and fro over the clip. The recut is a video texture: it leaves the clip where another place looks
alike, at moments drawn at random, so that nothing returns in order; there both places play on for
the better part of a second while one gives way to the other. No pose is made that the clip has not
shown (but for what lies between two alike), and the torso is always that of the pose.

A free camera goes about the head on top of that (orbit) or instead (path). The torso is a picture:
it does not turn.

Axes: n training frames, f frames of the film, p points times two coordinates.
"""

import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial.transform import Rotation, Slerp

from uajax.errors import UserError
from uajax.types import FPS, Camera

TORN = 3  # frames missing between two training frames that the eye takes for a jump
BLEND = 20  # frames in which one place of the clip gives way to another
LEAST, MOST = 30, 110  # frames between two such
LOOKAHEAD = 6.0  # frames for which a difference of speed counts: it becomes one of place
CHOICES = 12  # of the most alike places, from which one is drawn
HEAD_M = 0.08  # half the size of a head
ORBIT_S = 8.0  # that the camera takes from the middle to both sides and back
MOST_BYTES, MOST_KEYS = 2**26, 400_000  # of a camera path


class Course(NamedTuple):
  """Which training frames lend their pose to each frame of a film."""

  main: Int[np.ndarray, " f"]
  other: Int[np.ndarray, " f"]
  share: Float[np.ndarray, " f"]  # of `other`, 0..1; mostly 0

  def mix(self, rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "f d"]:
    share = self.share[:, None].astype(rows.dtype)
    return rows[self.main] * (1 - share) + rows[self.other] * share


def stretches(ids: Int[np.ndarray, " n"]) -> list[tuple[int, int]]:
  """Begin and end of the stretches of training frames in which the head does not jump."""
  torn = np.flatnonzero(np.diff(ids) > TORN) + 1
  return [*zip([0, *map(int, torn)], [*map(int, torn), len(ids)], strict=True)]


def walk(frames: int, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " f"]:
  """Which training frame lends its pose to each frame of the film: to and fro without a jump.

  Args:
    frames: length of the film.
    ids: frame numbers of the training frames in the source video, rising. Where some are
      missing the head would jump, so that the walk stays inside the longest whole stretch.

  Returns:
    indices into the training frames; neighbours differ by at most 1.
  """
  begin, end = max(stretches(ids), key=lambda stretch: stretch[1] - stretch[0])
  count = end - begin
  if count == 1:
    return np.full(frames, begin)
  place = np.arange(frames) % (2 * count - 2)
  return begin + np.where(place < count, place, 2 * count - 2 - place)


def steady(frames: Int[np.ndarray, " f"]) -> Course:
  """The course of frames taken as they are."""
  return Course(frames, frames, np.zeros(len(frames)))


def recut(
  frames: int,
  ids: Int[np.ndarray, " n"],
  cameras: list[Camera],
  centre: Float[np.ndarray, " 3"],
  rng: np.random.Generator,
  loudness: tuple[Float[np.ndarray, " n"], Float[np.ndarray, " f"]] | None = None,
) -> Course:
  """A course that does not return to where it was in the same order.

  Every run lasts 1.2 to 4.4 s, forward or backward, then goes over to another place that looks
  alike and moves alike, unless it was seen a moment ago.

  Args:
    ids, cameras: of the training frames.
    centre: of the head, in the world's metres.
    loudness: dB of the clip's and of the film's frames; where the clip's head moves more as the
      voice gets louder, the film's does too.
  """
  points = _seen(cameras, centre)
  parts = [(begin, end) for begin, end in stretches(ids) if end - begin >= 2 * (BLEND + LEAST)]
  if not parts:
    return steady(walk(frames, ids))
  speed = np.zeros_like(points)
  room = np.full((2, len(ids)), -1)  # frames left ahead, forward and backward
  for begin, end in parts:
    speed[begin:end] = np.gradient(points[begin:end], axis=0)
    room[0, begin:end] = end - 1 - np.arange(begin, end)
    room[1, begin:end] = np.arange(begin, end) - begin
  unlike = _unlike(points, speed, loudness)
  spread = float(np.sqrt(np.mean(np.var(np.concatenate([points[b:e] for b, e in parts]), axis=0))))
  worn = np.zeros(len(ids))  # how lately each frame was seen, 1 now
  enough = 2 * BLEND + LEAST
  main, other, share = np.empty(frames, np.int64), np.empty(frames, np.int64), np.zeros(frames)
  begin, end = max(parts, key=lambda part: part[1] - part[0])
  at, way = begin, 1
  done = 0
  ease = np.arange(1, BLEND + 1) / (BLEND + 1)
  ease = ease**2 * (3 - 2 * ease)
  targets = np.array([(j, sign) for k, sign in enumerate((1, -1))
                      for j in np.flatnonzero(room[k] >= enough)]).reshape(-1, 2)
  if not len(targets):
    return steady(walk(frames, ids))
  while done < frames:
    left = int(room[0 if way > 0 else 1, at])
    leave = np.arange(LEAST, min(MOST, left - BLEND + 1) + 1, 3)
    middles = at + way * (leave + BLEND // 2)
    meets = targets[:, 0] + targets[:, 1] * (BLEND // 2)
    # Alike in place and in speed, in the middle of the blend.
    a = np.concatenate([points[middles], LOOKAHEAD * way * speed[middles]], axis=1)
    b = np.concatenate([points[meets], LOOKAHEAD * targets[:, 1:] * speed[meets]], axis=1)
    apart = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    cost = np.sqrt(np.maximum(apart, 0) / points.shape[1])
    cost += 0.5 * spread * worn[np.clip(meets + targets[:, 1] * LEAST, 0, len(ids) - 1)][None]
    cost += spread * unlike(targets, done + leave)
    same = (targets[None, :, 1] == way) & (np.abs(meets[None] - middles[:, None]) < LEAST)
    cost[same] = np.inf  # that would be to go on
    best = np.argpartition(cost.ravel(), min(CHOICES, cost.size - 1))[:CHOICES]
    best = best[np.isfinite(cost.ravel()[best])]
    if len(best):
      worth = np.exp(-(cost.ravel()[best] - cost.ravel()[best].min()) / (0.05 * spread + 1e-9))
      pick = np.unravel_index(rng.choice(best, p=worth / worth.sum()), cost.shape)
      run, (to, turn) = int(leave[pick[0]]), map(int, targets[pick[1]])
    else:  # nothing but what follows: turn about where the stretch ends
      run, to, turn = left - BLEND + 1, at + way * left, -way
    taken = at + way * np.arange(run + BLEND)
    taken = taken[: frames - done]
    main[done : done + len(taken)] = other[done : done + len(taken)] = taken
    blend = slice(done + run, min(done + run + BLEND, frames))
    count = max(blend.stop - blend.start, 0)
    if count:
      other[blend] = to + turn * np.arange(count)
      share[blend] = ease[:count]
    worn *= math.exp(-(run + BLEND) / (20 * FPS))
    worn[taken] = 1
    done += run + BLEND
    at, way = to + turn * BLEND, turn
  return Course(main, other, share)


def _seen(cameras: list[Camera], centre: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "n p"]:
  """Where the corners of a cube about the head fall in each frame's picture, px."""
  signs = np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T
  corners = np.concatenate([centre + HEAD_M * signs, np.ones((8, 1))], axis=1)
  views = np.stack([np.asarray(camera.viewmat, np.float64) for camera in cameras])
  focal = np.stack([np.asarray(camera.K, np.float64) for camera in cameras])
  inside = np.einsum("nij,pj->npi", views, corners)[..., :3]
  flat = np.einsum("nij,npj->npi", focal, inside)
  return (flat[..., :2] / np.maximum(flat[..., 2:], 1e-3)).reshape(len(cameras), -1)


def follows(
  loudness: Float[np.ndarray, " n"], moving: Float[np.ndarray, " n"]
) -> float:
  """How much the head moves with the voice: their correlation, 0 where it may be chance."""
  if min(loudness.std(), moving.std()) < 1e-6:
    return 0.0
  found = float(np.corrcoef(loudness, moving)[0, 1])
  independent = len(loudness) / (2 * FPS)  # both are smoothed over a second
  return found if found > max(2 / math.sqrt(independent), 0.2) else 0.0


def _smooth(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
  """Means over a second."""
  ones = np.ones(min(FPS, len(values)))
  return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _unlike(points, speed, loudness):
  """How badly a place's movement fits the voice when it is reached, in the clip's deviations."""
  moving = _smooth(np.sqrt(np.mean(np.square(speed), axis=1)))
  share, wanted = 0.0, np.zeros(1)
  if loudness is not None:
    heard, spoken = (_smooth(np.asarray(values, np.float64)) for values in loudness)
    share = follows(heard, moving)
    wanted = (spoken - spoken.mean()) / max(float(spoken.std()), 1e-9)
  moves = (moving - moving.mean()) / max(float(moving.std()), 1e-9)

  def cost(targets, at):
    if not share:
      return 0.0
    ahead = np.clip(targets[:, 0] + targets[:, 1] * LEAST, 0, len(moves) - 1)
    asked = wanted[np.clip(at + LEAST, 0, len(wanted) - 1)]
    return share * np.abs(moves[ahead][None] - share * asked[:, None])

  return cost


def between(one: Camera, other: Camera, share: float) -> Camera:
  """A camera on the way from one to the other, a share of 0..1; both of one picture size."""
  if not share:
    return one
  pair: list[Any] = [np.asarray(one.viewmat, np.float64), np.asarray(other.viewmat, np.float64)]
  viewmat: Any = np.eye(4)
  turns = Rotation.from_matrix(np.stack([view[:3, :3] for view in pair]))
  viewmat[:3, :3] = Slerp([0, 1], turns)(share).as_matrix()
  viewmat[:3, 3] = pair[0][:3, 3] * (1 - share) + pair[1][:3, 3] * share
  K: Any = np.asarray(one.K) * (1 - share) + np.asarray(other.K) * share
  return Camera(viewmat.astype(np.float32), K.astype(np.float32))


def orbit(camera: Camera, degrees: float, time_s: float, centre: Float[np.ndarray, " 3"]) -> Camera:
  """The camera gone about the head's vertical axis, from side to side, `degrees` to each."""
  angle = math.radians(degrees) * math.sin(2 * math.pi * time_s / ORBIT_S)
  move = np.eye(4)
  move[:3, :3] = Rotation.from_rotvec([0, angle, 0]).as_matrix()
  move[:3, 3] = centre - move[:3, :3] @ centre
  viewmat: Any = (np.asarray(camera.viewmat, np.float64) @ move).astype(np.float32)
  return camera._replace(viewmat=viewmat)


def turned_degrees(cameras: list[Camera]) -> float:
  """How far the head turns in a clip, from its mean to the side that it turns to most."""
  turns = Rotation.from_matrix(np.stack([np.asarray(c.viewmat)[:3, :3] for c in cameras]))
  away = (turns.mean().inv() * turns).as_rotvec(degrees=True)  # in the head's own axes
  return float(np.abs(away[:, 1]).max())


class Path(NamedTuple):
  """Cameras at rising times."""

  times_s: Float[np.ndarray, " k"]
  cameras: list[Camera]

  def at(self, time_s: float) -> Camera:
    """The camera at a time; before the first and after the last it stands still."""
    right = int(np.searchsorted(self.times_s, time_s))
    if right == 0 or right == len(self.cameras):
      return self.cameras[min(right, len(self.cameras) - 1)]
    begin_s, end_s = self.times_s[right - 1 : right + 1]
    share = float((time_s - begin_s) / (end_s - begin_s))
    return between(self.cameras[right - 1], self.cameras[right], share)


def read_path(
  path: str | os.PathLike, width: int, height: int, usual: Float[np.ndarray, "3 3"]
) -> Path:
  """A camera path from JSON, as `uajax export --format ply --audio` writes it among others.

      {"width": 512, "height": 512,
       "frames": [{"time_s": 0, "viewmat": [4 x 4], "K": [3 x 3]}, ...]}

  viewmat goes from the world (metres; x to the person's left, y up, z out of the face) to the
  camera (x right, y down, z forward); K is in pixels of a picture of that width and height.
  Without time_s frames follow at 25 a second; without K and size the clip's camera is taken.

  Args:
    width, height: of the film.
    usual: the K where none is given.

  Raises:
    UserError: no such file, no JSON, or a camera that cannot be.
  """
  path = pathlib.Path(path)
  try:
    if path.stat().st_size > MOST_BYTES:
      raise UserError(f"{path} is larger than {MOST_BYTES >> 20} MiB: it is no camera path")
    said = json.loads(path.read_text(encoding="utf-8-sig"))
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}): give a camera path") from None
  except (ValueError, RecursionError) as error:
    line = " ".join(str(error).split())
    raise UserError(f"{path} is no JSON ({line}): see `uajax.poses.read_path`") from None
  frames = said.get("frames") if isinstance(said, dict) else None
  if not isinstance(frames, list) or not 0 < len(frames) <= MOST_KEYS:
    raise UserError(f'{path} has no list "frames" of 1 to {MOST_KEYS} cameras: give one')
  size = _numbers([said.get("width", width), said.get("height", height)], (2,), f"{path}: size")
  if not (size >= 1).all():
    raise UserError(f"{path}: width and height must be positive numbers of pixels")
  grown = np.diag([width / size[0], height / size[1], 1.0])
  times, cameras = [], []
  for i, frame in enumerate(frames):
    where = f"{path}, frame {i}"
    if not isinstance(frame, dict) or "viewmat" not in frame:
      raise UserError(f'{where} has no "viewmat": give [4, 4] numbers, world to camera')
    view: Any = _numbers(frame["viewmat"], (4, 4), f"{where}, viewmat")
    turn = view[:3, :3]
    if (np.abs(turn @ turn.T - np.eye(3)).max() > 1e-3 or np.linalg.det(turn) < 0
        or np.abs(view[3] - [0, 0, 0, 1]).max() > 1e-6):
      raise UserError(f"{where}: viewmat is no rotation and shift: its rows must be orthonormal, "
                      "right-handed, the last one 0 0 0 1")
    lens: Any = np.asarray(usual, np.float64)
    if "K" in frame:
      lens = _numbers(frame["K"], (3, 3), f"{where}, K")
      if min(lens[0, 0], lens[1, 1]) <= 0 or np.abs(lens[2] - [0, 0, 1]).max() > 1e-6:
        raise UserError(f"{where}: K must hold positive focal lengths, its last row 0 0 1")
      lens = grown @ lens
    times.append(float(_numbers(frame.get("time_s", i / FPS), (), f"{where}, time_s")))
    cameras.append(Camera(view.astype(np.float32), lens.astype(np.float32)))
  if (np.diff(times) <= 0).any():
    late = int(np.argmax(np.diff(times) <= 0)) + 1
    raise UserError(f"{path}, frame {late}: time_s must rise from frame to frame")
  return Path(np.array(times), cameras)


def _numbers(said: Any, shape: tuple[int, ...], where: str) -> Float[np.ndarray, "..."]:
  try:
    numbers = np.array(said, np.float64)
  except (TypeError, ValueError):
    numbers = np.full((), np.nan)
  if numbers.shape != shape or not np.isfinite(numbers).all():
    wanted = list(shape) if shape else "one number"
    raise UserError(f"{where} must be finite numbers {wanted}".replace("numbers one", "one"))
  return numbers
