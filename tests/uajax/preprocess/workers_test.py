import os
import time

import numpy as np
import pytest

from uajax.errors import UserError
from uajax.preprocess import workers


def test_pieces_cover_every_run_and_look_no_farther():
  runs = [(0, 70), (80, 83)]
  pieces = workers.cut(runs, 512, around=1)
  assert [f for p in pieces for f in range(p.begin, p.end)] == [*range(70), *range(80, 83)]
  assert max(p.end - p.begin for p in pieces) * 512 * 512 * 3 <= workers.PIECE_BYTES
  for piece in pieces:
    assert any(a <= piece.first and piece.last <= b for a, b in runs)
  assert pieces[0].before == 0 and pieces[1].before == 1
  assert workers.cut([(0, 5)], 4096)[0].end == 4  # however large the pictures


def test_each_piece_gets_its_pictures():
  pieces = workers.cut([(3, 40), (50, 60)], 400, around=1)
  wanted = sorted({f for p in pieces for f in range(p.first, p.last)})
  numbered = ((f, np.full((2, 2, 3), f, np.uint8)) for f in wanted)
  for piece, images in workers.feed(numbered, pieces):
    assert images[:, 0, 0, 0].tolist() == list(range(piece.first, piece.last))


def test_a_damaged_result_counts_as_none(tmp_path):
  path = tmp_path / "0.npz"
  workers.save(path, a=np.arange(1000))
  found = workers.load(path)
  assert found is not None and found["a"][999] == 999
  path.write_bytes(path.read_bytes()[:-30])
  assert workers.load(path) is None
  assert workers.load(tmp_path / "1.npz") is None


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order(jobs):
  with workers.pool(jobs) as each:
    assert list(each(divmod, iter((n, 3) for n in range(9)))) == [divmod(n, 3) for n in range(9)]


def test_an_interrupt_does_not_wait_for_work_under_way():
  def tasks():
    yield (60,)
    yield (60,)
    time.sleep(3)  # until they are at it
    raise KeyboardInterrupt

  began = time.monotonic()
  with pytest.raises(KeyboardInterrupt), workers.pool(2) as each:
    list(each(time.sleep, tasks()))
  assert time.monotonic() - began < 30


def test_a_killed_process_is_said():
  with pytest.raises(UserError, match="was killed.*--jobs 1"), workers.pool(2) as each:
    list(each(os._exit, iter([(9,)])))
