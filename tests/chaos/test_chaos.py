"""Runs that are disturbed at random lose nothing, leave nothing behind, say how they ended, and end as undisturbed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from distopt.launch.platforms.mpi import find_mpirun
from tests.chaos.disturbed import Disturbed, run_undisturbed
from tests.chaos.schedule import KINDS, PENDING, RUNNERS, draw, enabled_kinds

NUM_QUICK, NUM_SLOW = 20, 300
QUICK_EVENTS, SLOW_EVENTS = 1, 4  # of a schedule, at most; few keep the quick test within minutes
QUICK_STEPS, SLOW_STEPS = 100, 260  # of a run: an event comes at most 60 steps into a life
NUM_AT_ONCE = 2  # they wait as much as they compute


def available_runners() -> tuple[str, ...]:
    missing = {"horovodrun"} if find_spec("horovod") is None else set()
    missing |= {"mpirun"} if find_mpirun() is None else set()
    return tuple(runner for runner in RUNNERS if runner not in missing)


def chosen_seeds(count: int) -> list[int]:
    """Returns the seeds to play: those of DISTOPT_CHAOS_SEEDS, or the first ones."""
    chosen = os.environ.get("DISTOPT_CHAOS_SEEDS")
    return [int(seed) for seed in chosen.split(",")] if chosen else list(range(count))


def kinds_here() -> tuple[str, ...]:
    """Returns the kinds to draw from; without root there is no disk to fill."""
    return tuple(kind for kind in enabled_kinds() if kind != "disk-full" or os.geteuid() == 0)


def play_all(seeds: list[int], folder: Path, max_events: int, num_steps: int) -> None:
    """Plays each seed, a few at a time, and prints what it was."""
    undisturbed, kinds, runners = folder / "undisturbed", kinds_here(), available_runners()
    run_undisturbed(undisturbed, "local", num_steps)

    def play(seed: int) -> Disturbed:
        of_seed = folder / str(seed)
        of_seed.mkdir()
        run = Disturbed(draw(seed, kinds, runners, max_events), of_seed, undisturbed, num_steps)
        run.play()
        print("\n".join(run.history), flush=True)
        return run

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        failed = [run for run in pool.map(play, seeds) if run.problems]
    summary = [f"{run.schedule}: {'; '.join(run.problems)}" for run in failed]
    assert not failed, "\n\n".join([*summary, *(run.report() for run in failed)])


@pytest.mark.timeout(1200)
def test_runs_disturbed_at_random_end_as_the_undisturbed_one(tmp_path):
    play_all(chosen_seeds(NUM_QUICK), tmp_path, QUICK_EVENTS, QUICK_STEPS)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_many_runs_disturbed_at_random_end_as_the_undisturbed_one(tmp_path):
    play_all(chosen_seeds(NUM_SLOW), tmp_path, SLOW_EVENTS, SLOW_STEPS)


def test_schedule_follows_from_its_seed_and_every_kind_comes_up():
    assert draw(7, tuple(KINDS)) == draw(7, tuple(KINDS))
    drawn = [draw(seed, tuple(KINDS)) for seed in range(NUM_SLOW)]
    assert {event.kind for schedule in drawn for event in schedule.events} == set(KINDS)
    assert {schedule.runner for schedule in drawn} == set(RUNNERS)
    assert PENDING.keys() <= KINDS.keys()


def test_kinds_are_chosen_by_the_environment_and_an_unknown_one_is_refused(monkeypatch):
    monkeypatch.setenv("DISTOPT_CHAOS_KINDS", "all")
    assert enabled_kinds() == tuple(KINDS)
    monkeypatch.setenv("DISTOPT_CHAOS_KINDS", "kill,pause")
    assert enabled_kinds() == ("kill", "pause")
    monkeypatch.setenv("DISTOPT_CHAOS_KINDS", "kil")
    with pytest.raises(ValueError, match="kil"):
        enabled_kinds()
