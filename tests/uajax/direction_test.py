"""Stage directions: what is written is what happens, when it is to happen, and nothing else."""

import json

import numpy as np
import pytest

from uajax import direction
from uajax.errors import UserError
from uajax.types import ACTION_UNITS

ROWS = [{"from": 1, "to": 2, "emotion": "happy", "intensity": 0.5}, {"from": 1.5, "au04": 3}]


def test_json_and_csv_say_the_same(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps(ROWS))
  (tmp_path / "a.csv").write_text("from, to, emotion, intensity, AU04\n1,2,happy,0.5,\n1.5,,,,3\n")
  spans = direction.read(tmp_path / "a.json")
  assert spans == direction.read(tmp_path / "a.csv")
  assert spans[0][:4] == (1, 2, "happy", 0.5) and spans[1].units == {"AU04": 3.0}


def test_spans_hold_inside_and_nowhere_else(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps(ROWS))
  spans = direction.read(tmp_path / "a.json")
  rng = np.random.default_rng(0)
  heard, units = rng.normal(size=(75, 128)), rng.uniform(size=(75, 6))
  asked = []

  def resolve(name, intensity):
    asked.append((name, intensity))
    return np.full(128, 7.0, np.float32)

  felt, acted = direction.feel(spans, heard, resolve), direction.act(spans, units)
  assert asked == [("happy", 0.5)]
  np.testing.assert_allclose(felt[:25], heard[:25], rtol=1e-6)
  np.testing.assert_allclose(felt[50:], heard[50:], rtol=1e-6)
  np.testing.assert_allclose(felt[31:44], 7, rtol=1e-6)  # eased in and out over 0.24 s
  brow = ACTION_UNITS.index("AU04")
  np.testing.assert_allclose(acted[:37, brow], units[:37, brow], rtol=1e-6)
  np.testing.assert_allclose(acted[44:, brow], 3, rtol=1e-6)  # until the film's end
  rest = [i for i in range(6) if i != brow]
  np.testing.assert_allclose(acted[:, rest], units[:, rest], rtol=1e-6)
  steps = np.abs(np.diff(direction.weight(spans[0], 75)))
  assert 0 < steps.max() < 0.3, "no jump"


def test_later_spans_count_and_the_whole_film_is_one(tmp_path):
  spans = [direction.whole_film(direction.units_of(["AU45=0", "au01=2"])),
           direction.Span(1, 2, None, 1, {"AU01": 5.0})]
  acted = direction.act(spans, np.ones((75, 6), np.float32))
  assert not acted[:, ACTION_UNITS.index("AU45")].any()
  lifted = acted[:, ACTION_UNITS.index("AU01")]
  assert lifted[0] == 2 == lifted[-1] and lifted[37] == 5


@pytest.mark.parametrize("name,text,said", [
  ("a.json", "[", "neither JSON nor CSV"),
  ("a.json", "{}", "holds no list of spans"),
  ("a.json", "[]", "holds 0 spans"),
  ("a.json", '[{"from": 2, "to": 1, "AU04": 1}]', "span 1: it lasts from 2 to 1 s"),
  ("a.json", '[{"from": 0, "to": 1}]', "asks for nothing"),
  ("a.json", '[{"from": 0, "intensity": 1, "AU04": 1}]', "intensity of no emotion"),
  ("a.json", '[{"from": 0, "AU12": 1}]', "known are AU01, AU04"),
  ("a.json", '[{"from": 0, "AU04": 9}]', "AU04 of 9 is outside 0 to 5"),
  ("a.json", '[{"from": NaN, "AU04": 1}]', "from: nan is no number"),
  ("a.json", '[{"from": 0, "emotion": 3}]', "emotion 3 is no name"),
  ("a.csv", "emotion\nhappy\n", "names no column from or to"),
  ("a.csv", "from,to,AU04\n0,1\n", "not as many cells"),
  ("a.csv", "from,to,AU04\n0,1,strong\n", "AU04: 'strong' is no number"),
])
def test_what_cannot_be_is_one_line(tmp_path, name, text, said):
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError) as caught:
    direction.read(tmp_path / name)
  assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
  with pytest.raises(UserError, match="cannot be read"):
    direction.read(tmp_path / "none.json")
