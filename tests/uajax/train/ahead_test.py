"""Programs compiled ahead answer as those compiled when called, and only where they fit."""

import functools
import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uajax.train import ahead
from uajax.train.ahead import Ahead, Call


@functools.partial(jax.jit, static_argnames=("power",), donate_argnums=0)
def raised(x, shift, power):
  return {"sum": (x + shift["by"]) ** power}


def shape(*dims):
  return jax.ShapeDtypeStruct(dims, jnp.float32, weak_type=False)


def calls(powers, *arrays):
  return [Call(raised, dict(power=power), arrays) for power in powers]


def test_what_was_prepared_is_used_and_what_was_not_works():
  with Ahead(threads=1) as programs:
    shift = {"by": jnp.ones(())}
    programs.prepare(iter(calls((2, 3), shape(3), shift)))
    for each in programs._busy:
      each.result()
    before = raised._cache_size()
    np.testing.assert_array_equal(
      programs(Call(raised, dict(power=2), (jnp.arange(3.0), shift)))["sum"], [1, 4, 9])
    assert programs.used == 1 and raised._cache_size() == before
    for power, count in ((2, 4), (3, 3)):  # another shape, another static argument
      out = programs(Call(raised, dict(power=power), (jnp.ones(count), shift)))["sum"]
      np.testing.assert_array_equal(out, np.full(count, 2.0**power))
    assert programs.used == 1


def test_a_program_is_at_hand_once_it_is_compiled():
  hold = threading.Event()
  shift = {"by": jnp.ones(())}
  wanted, never = calls((2, 3), jnp.arange(3.0), shift)
  with Ahead(threads=1) as programs:
    compile_ = programs._compile
    programs._compile = lambda call: hold.wait() and compile_(call)
    programs.prepare([wanted])
    assert not programs.at_hand(wanted) and not programs.at_hand(never)
    hold.set()
    programs._busy[0].result()
    assert programs.at_hand(wanted) and not programs.at_hand(never)
    programs(never)
    assert programs.at_hand(calls((3,), jnp.arange(3.0), shift)[0])
  assert Ahead(active=False).at_hand(never), "there each compiles as it is called"


def test_functions_are_told_apart():
  same = jax.jit(lambda x, shift, power: {"sum": x}, static_argnames=("power",))
  with Ahead() as programs:
    x, shift = jnp.arange(3.0), {"by": jnp.ones(())}
    programs.prepare([Call(same, dict(power=2), (x, shift))])
    for function, expected in (same, [0, 1, 2]), (raised, [1, 4, 9]):
      answer = programs(Call(function, dict(power=2), (x, shift)))
      np.testing.assert_array_equal(answer["sum"], expected)
    assert programs.used == 1


def test_the_first_unknown_programs_are_prepared_and_no_more_than_threads_at_a_time(monkeypatch):
  hold = threading.Event()
  with Ahead(threads=2) as programs:
    compile_ = programs._compile
    monkeypatch.setattr(programs, "_compile", lambda *a: hold.wait(10) and compile_(*a))
    shift = {"by": jnp.zeros(())}
    programs(Call(raised, dict(power=2), (jnp.ones(2), shift)))
    programs.prepare(calls((2, 3, 4, 5), shape(2), shift))
    programs.prepare(calls((6,), shape(2), shift))  # busy: is not even read
    assert len(programs._programs) == 3
    hold.set()
    answer = programs(Call(raised, dict(power=3), (jnp.full(2, 2, jnp.float32), shift)))
    np.testing.assert_array_equal(answer["sum"], [8, 8])
    assert programs.used == 1


def test_a_program_that_does_not_compile_fails_where_it_is_called():
  with Ahead() as programs:
    wrong = {"of": jnp.ones(())}
    programs.prepare(calls((2,), shape(3), wrong))
    with pytest.raises(KeyError, match="by"):
      programs(Call(raised, dict(power=2), (jnp.ones(3), wrong)))


def test_what_is_settled_is_not_asked_again():
  shift = {"by": jnp.zeros(())}

  def upcoming():
    asked.append(True)
    yield from calls((2,), shape(2), shift)

  asked = []
  with Ahead(threads=2) as programs:
    for about in "first", "first", "second", "second":
      programs.prepare(upcoming(), about)
    assert len(asked) == 2


def test_time_spent_waiting_for_programs_is_told():
  with Ahead() as programs:
    shift = {"by": jnp.ones(())}
    programs(Call(raised, dict(power=7), (jnp.ones(5), shift)))
    once = programs.waited_s
    programs(Call(raised, dict(power=7), (jnp.ones(5), shift)))
    assert 0 < once == programs.waited_s


def test_threads_take_short_turns_while_programs_are_compiled_ahead():
  usual = sys.getswitchinterval()
  with Ahead():
    assert sys.getswitchinterval() < usual / 10
  assert sys.getswitchinterval() == pytest.approx(usual)
  with Ahead(active=False):
    assert sys.getswitchinterval() == pytest.approx(usual)


@pytest.mark.skipif(sys.platform != "linux", reason="threads share a priority elsewhere")
def test_threads_that_compile_give_way_to_the_one_that_trains():
  mine = os.getpriority(os.PRIO_PROCESS, 0)
  seen = []

  class Slow:
    def lower(self, x):
      seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
      return raised.lower(x, {"by": x}, power=2)

  with Ahead(threads=1) as programs:
    programs.prepare([Call(Slow(), {}, (jnp.ones(2),))])
    for each in programs._busy:
      each.result()
  assert seen == [min(mine + ahead.NICE, 19)] and os.getpriority(os.PRIO_PROCESS, 0) == mine


def test_options_that_this_compiler_does_not_know_are_left_out(monkeypatch):
  known = {"xla_cpu_enable_fast_math": False}
  options = known | {"xla_gpu_of_another_version": True}
  monkeypatch.setattr(ahead, "UNTUNED", {"cpu": options})
  given = []

  class Lowered:
    def __init__(self, lowered):
      self._lowered = lowered

    def compile(self, **options):
      given.append(options.get("compiler_options"))
      return self._lowered.compile(**options)

  x, shift = jnp.arange(3.0), {"by": jnp.ones(())}
  program = ahead.compiled(Lowered(raised.lower(x, shift, power=2)))  # pyright: ignore
  np.testing.assert_array_equal(program(x, shift)["sum"], [1, 4, 9])
  assert given == [options, known]
  ahead.compiled(Lowered(raised.lower(x, shift, power=3)), tuned=True)  # pyright: ignore
  assert given[2:] == [None]


def test_a_program_that_no_options_could_save_fails_as_ever(monkeypatch):
  monkeypatch.setattr(ahead, "UNTUNED", {"cpu": {"xla_cpu_enable_fast_math": False}})

  class Lowered:
    def compile(self, **options):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
    ahead.compiled(Lowered())  # pyright: ignore
