"""A LightningModule that knows nothing of distopt trains on several workers as on one."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from pyro.infer import Trace_ELBO

from distopt.backends import current
from distopt.infer import SVI, everywhere, gather_local
from distopt.infer.capture.step_gradients import StepGradients
from distopt.lightning import DistoptStrategy
from distopt.lightning.strategy import _keeps_its_model
from distopt.optim import Adam, DistributedOptimizer
from tests.lightning.plans import (
    NUM_ROWS,
    SviPlan,
    TorchPlan,
    X,
    batch_sized_model,
    fit,
    global_model,
    loader,
    local_model,
    state_values,
    store_values,
    trainer,
)
from tests.workers import RankFailed, world

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of much that is meant here
MODELS = {"global": global_model, "batch-sized": batch_sized_model, "local": local_model}


def on_all(num_workers: int, body: Any, *args: Any) -> list[Any]:
    return [body(*args)] if num_workers == 1 else world("torch_dist", num_workers).run(body, *args)


def near(expected: dict[str, list[float]], rel: float = 1e-9) -> dict[str, Any]:
    return {name: pytest.approx(values, rel=rel, abs=1e-12) for name, values in expected.items()}


# An SVI that somebody steps in a LightningModule.


def _run_svi(
    model: str, home: str, split: str, batch_size: int, options: dict[str, Any], noisy: bool = False
) -> tuple[dict[str, list[float]], list[float], list[list[float]]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    plan = SviPlan(MODELS[model], home, noisy=noisy, **options)
    fit(trainer(current().world_size, split), plan, loader(batch_size))
    assert type(plan.scheduler) is pyro.optim.lr_scheduler.PyroLRScheduler
    return store_values(), plan.losses, plan.seen


HOMES = ["init", "train start", "first step", "replaced", "no svi"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("home", "num_workers"), [*((home, 2) for home in HOMES), ("init", 3)])
def test_batches_that_are_split_give_the_steps_of_one_process_wherever_the_svi_is_made(
    home: str, num_workers: int
) -> None:
    case = ("global", home, "batches", 7, {})
    expected, losses, rows = _run_svi(*case)
    results = on_all(num_workers, _run_svi, *case)
    for values, others, _ in results:
        assert values == results[0][0]
        if home != "no svi":  # of which nothing weighs shares of 3 and 4 rows
            assert values == near(expected)
            assert others == pytest.approx(losses, rel=1e-9)

    # 23 rows in batches of 7, 7, 7 and 2: the last one cannot be split, and is read whole by each rank.
    for epoch in range(3):
        seen = [row for _, _, epochs in results for row in epochs[epoch]]
        whole = rows[epoch][21:]
        assert sorted(seen) == sorted([*rows[epoch][:21], *whole * num_workers])
        assert sorted(rows[epoch]) == list(range(NUM_ROWS))
    assert rows[0] != rows[1]


class SignDescent(torch.optim.Optimizer):
    """An optimizer of a user: a step of one length for each element, shorter each time."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["steps"] = state.get("steps", 0) + 1
                param.data -= group["lr"] / state["steps"] * param.grad.sign()


def _run_own_class_twice() -> list[dict[str, list[float]]]:
    """Trains a plan twice in one process, each time by a trainer of its own; its parameters after each."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    plan = SviPlan()
    plan.svi = pyro.infer.SVI(global_model, plan._guide, pyro.optim.PyroOptim(SignDescent, {"lr": 0.2}), Trace_ELBO())
    ends = []
    for _ in range(2):
        fit(trainer(current().world_size), plan, loader(7))
        ends.append(store_values())
    return ends


@pytest.mark.parametrize("num_workers", [2, 3])
def test_users_own_optimizer_class_and_a_second_training_in_the_same_process_give_the_steps_of_one(
    num_workers: int,
) -> None:
    expected = _run_own_class_twice()
    assert expected[0] != expected[1]
    for ends in on_all(num_workers, _run_own_class_twice):
        assert ends == [near(each) for each in expected]


@pytest.mark.parametrize("model", ["batch-sized", "local"])
def test_model_whose_plate_is_the_batch_and_one_with_a_latent_variable_for_each_row_train_as_on_one_worker(
    model: str,
) -> None:
    case = (model, "init", "batches", 9, {"num_rows": NUM_ROWS} if model == "local" else {})
    expected, losses, _ = _run_svi(*case)
    for num_workers in (2, 3):
        for values, others, _ in on_all(num_workers, _run_svi, *case):
            assert values == near(expected)
            assert others == pytest.approx(losses, rel=1e-9)


def test_batches_that_are_dealt_give_the_steps_of_one_process_with_larger_batches() -> None:
    expected, losses, rows = _run_svi("global", "init", "batches", 8, {})
    results = on_all(2, _run_svi, "global", "init", "deal", 4, {})
    for values, others, _ in results:
        assert values == near(expected)
        assert others == pytest.approx(losses, rel=1e-9)
    assert [sorted(a + b) for a, b in zip(*(seen for *_, seen in results), strict=True)] == [
        sorted(each) for each in rows
    ]


class DistoptPlan(SviPlan):
    """Steps an SVI of distopt, whose steps may be captured."""

    capture: Any = "off"

    def _make(self) -> None:
        self.svi = SVI(self._model, self._guide, self.scheduler, Trace_ELBO(), capture=self.capture)


def _run_distopts_svi(capture: str, split: str) -> tuple[dict[str, list[float]], int]:
    pyro.clear_param_store()
    plan = DistoptPlan(home="first step")
    plan.capture = capture
    fit(trainer(current().world_size, split), plan, loader(8, shuffle=False, rows=slice(16)))
    return store_values(), 0 if plan.svi.captured is None else plan.svi.captured.num_captured


def test_svi_of_distopt_may_be_captured_where_each_rank_reads_whole_batches() -> None:
    expected, _ = _run_distopts_svi("off", "batches")
    assert _run_distopts_svi("graph", "batches") == (expected, 3), "of 6 steps one is eager, and two are recorded"
    for values, num_captured in on_all(2, _run_distopts_svi, "graph", "none"):
        assert values == near(expected) and num_captured == 3


def _run_pyros_svi(capture: str) -> tuple[dict[str, list[float]], list[float], list[int]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    made: list[StepGradients] = []

    def make(*args: Any) -> StepGradients:
        made.append(StepGradients(*args))
        return made[-1]

    # 23 rows in batches of 10, 10 and 3: those of 10 are split, and the last is read as it is by each of two ranks.
    plan = SviPlan(local_model, noisy=True, num_rows=NUM_ROWS)
    with patch("distopt.infer.everywhere.StepGradients", make):
        fit(trainer(current().world_size, max_epochs=7, options={"capture": capture}), plan, loader(10))
    return store_values(), plan.losses, [each.captured.num_captured for each in made if each.captured is not None]


def test_plan_of_pyros_svi_may_be_captured_where_batches_are_split() -> None:
    for num_workers in (1, 2):
        eager = on_all(num_workers, _run_pyros_svi, "off")
        captured = on_all(num_workers, _run_pyros_svi, "graph")
        for (expected, losses, _), (values, others, counts) in zip(eager, captured, strict=True):
            assert (values, others) == (expected, losses) and len(losses) == 21
            # Of 21 steps the first, and the 8th and 16th, and two of each shape are eager or recorded.
            assert len(counts) == 1 and counts[0] >= 12


@pytest.mark.parametrize("capture", ["off", "graph"])
@pytest.mark.parametrize("make", [pyro.optim.Adam, lambda args: DistributedOptimizer(Adam(args))])
def test_svi_of_distopt_is_refused_where_its_loss_would_need_the_weights_of_shares(capture: Any, make: Any) -> None:
    plan = DistoptPlan(home="first step")
    svi = SVI(global_model, plan._guide, make({"lr": 0.1}), Trace_ELBO(), capture=capture)

    def find_plates(svi: Any, args: Any, kwargs: Any) -> list[str]:
        assert not _keeps_its_model(svi, "batches", 2)
        return []

    with everywhere(find_plates=find_plates), pytest.raises(TypeError, match=r"split='batches'.*Step a pyro.infer.SVI"):
        svi.step(X, torch.arange(NUM_ROWS))
    assert _keeps_its_model(svi, "batches", 1) and _keeps_its_model(svi, "rows", 2)


def test_noise_is_each_ranks_own_unless_it_is_shared_and_the_same_in_a_second_run() -> None:
    case = ("local", "init", "batches", 8, {"num_rows": NUM_ROWS}, True)
    first = on_all(2, _run_svi, *case)
    assert first[0][0] == first[1][0]
    assert first == on_all(2, _run_svi, *case)


def _run_to_posterior(seeds: list[int]) -> list[list[float]]:
    """A guide that draws, trained until its rate is nearly 0: all of its parameters, for each seed."""
    ends = []
    for seed in seeds:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        plan = SviPlan(local_model, noisy=True, num_rows=NUM_ROWS)
        fit(trainer(current().world_size, max_epochs=50), plan, loader(12))
        values = store_values()
        assert [(name, len(value)) for name, value in values.items()] == POSTERIOR
        ends.append([each for value in values.values() for each in value])
    return ends


POSTERIOR = [
    (f"AutoNormal.{kind}.{name}", 1 if name == "loc" else NUM_ROWS)
    for kind in ("locs", "scales")
    for name in ("loc", "z")
]


@pytest.mark.slow
def test_posterior_of_several_workers_is_that_of_one_within_monte_carlo_error() -> None:
    one = torch.tensor(_run_to_posterior(list(range(6))), dtype=torch.float64)
    # Of all rows alike: six runs are too few for the variance of each.
    sizes = [size for _, size in POSTERIOR]
    variance = torch.cat([each.mean().expand(len(each)) for each in one.var(0).split(sizes)])
    for num_workers in (2, 3):
        first, *others = on_all(num_workers, _run_to_posterior, [20, 21, 22])
        assert all(other == first for other in others)
        error = (variance / len(one) + variance / len(first)).sqrt()
        several = torch.tensor(first, dtype=torch.float64)
        assert ((several.mean(0) - one.mean(0)).abs() / error).max() < 4


SIZES = {2: (8, 15), 3: (4, 12, 7)}


def my_rows() -> slice:
    sizes = SIZES.get(current().world_size, (NUM_ROWS,))
    start = sum(sizes[: current().rank])
    return slice(start, start + sizes[current().rank])


def _run_rows(batch_size: int) -> tuple[dict[str, list[float]], int, list[float]]:
    pyro.clear_param_store()
    rows = my_rows()
    plan = SviPlan(local_model, num_rows=rows.stop - rows.start)
    fit(
        trainer(current().world_size, "rows", options={"plates": "rows"}),
        plan,
        loader(batch_size, rows=rows, shuffle=batch_size < NUM_ROWS),
    )
    local = {name: value.tolist() for name, value in gather_local("z").items()}
    return {"loc": store_values()["AutoDelta.loc"]} | local, plan.global_step, plan.seen[0]


@pytest.mark.parametrize("num_workers", [2, 3])
def test_uneven_rows_of_each_rank_train_as_all_rows_on_one_worker(num_workers: int) -> None:
    expected, _, _ = _run_rows(NUM_ROWS)
    for values, num_steps, _ in on_all(num_workers, _run_rows, NUM_ROWS):
        assert values == near(expected)
        assert num_steps == 3


def test_uneven_rows_are_cut_into_equally_many_batches_and_each_is_read_once_in_an_epoch() -> None:
    results = on_all(3, _run_rows, 2)
    assert [num_steps for _, num_steps, _ in results] == [6] * 3  # of 4 rows, the fewest, two batches in an epoch
    assert [sorted(seen) for *_, seen in results] == [list(range(size)) for size in SIZES[3]]
    assert results[0][0] == results[1][0] == results[2][0]


# Plain torch: by Lightning, or by hand.


def _run_torch(how: str, options: dict[str, Any]) -> dict[str, list[float]]:
    torch.manual_seed(current().rank)
    plan = TorchPlan(how)
    fit(trainer(current().world_size, **options), plan, loader(7))
    return state_values(plan)


CASES = [
    ("automatic", {}),
    ("automatic", {"gradient_clip_val": 0.05}),
    ("automatic", {"accumulate_grad_batches": 3}),
    ("manual_backward", {}),
    ("backward", {}),
]


@pytest.mark.parametrize(("how", "options"), CASES)
def test_torch_optimizers_step_by_the_gradient_of_the_whole_batch(how: str, options: dict[str, Any]) -> None:
    expected = _run_torch(how, options)
    for num_workers in (2, 3):
        results = on_all(num_workers, _run_torch, how, options)
        assert all(values == results[0] for values in results)
        assert results[0] == near(expected, 1e-7)


class TwoLoaders(TorchPlan):
    """Reads a batch of each of two loaders in a step; the shorter one starts again."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[list[int]]] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append([[], []])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for rows, (_, index) in zip(self.seen[-1], batch, strict=True):
            rows += index.tolist()
        return super().training_step(batch[0], batch_idx) + 0.3 * super().training_step(batch[1], batch_idx)


def _run_two_loaders() -> tuple[dict[str, list[float]], list[list[list[int]]]]:
    torch.manual_seed(5)
    plan = TwoLoaders()
    fit(trainer(current().world_size), plan, [loader(6, rows=slice(13)), loader(5)])
    return state_values(plan), plan.seen


def test_several_loaders_of_a_step_give_the_numbers_of_one_worker_and_the_shorter_starts_again() -> None:
    expected, rows = _run_two_loaders()
    for epoch in rows:  # 13 rows in 6, 6 and 1, and then 6 and 6 in another order; 23 rows in 5 batches
        assert sorted(epoch[0][:13]) == list(range(13)) and len(epoch[0]) == 25
        assert sorted(epoch[1]) == list(range(23))
        assert epoch[0][:12] != epoch[0][13:]
    for num_workers in (2, 3):
        for values, _ in on_all(num_workers, _run_two_loaders):
            assert values == near(expected, 1e-7)


class TwoLoadersOfSvi(SviPlan):
    """Steps an SVI by the batches of two loaders over the same rows, given by name."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        assert batch["a"][1].tolist() != batch["b"][1].tolist(), "each has an order of its own"
        self.losses.append(self.svi.step(torch.cat([batch["a"][0], batch["b"][0]]), batch["a"][1], batch["b"][1]))
        self.optimizers().step()


def twice(model: Any) -> Any:
    """Returns a model of the rows of two batches."""

    def both(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 10.0))
        for name, rows, index in (("a", x[: len(first)], first), ("b", x[len(first) :], second)):
            plate = pyro.plate(name, NUM_ROWS, subsample=index) if model == "global" else pyro.plate(name, len(rows))
            with plate:
                pyro.sample(f"x-{name}", dist.Normal(loc, 1.0), obs=rows)

    return both


def _run_two_loaders_of_svi(model: str) -> tuple[dict[str, list[float]], list[float]]:
    pyro.clear_param_store()
    plan = TwoLoadersOfSvi(twice(model))
    fit(trainer(current().world_size, max_epochs=2), plan, {"a": loader(8), "b": loader(7)})
    return store_values(), plan.losses


def test_svi_reads_several_loaders_as_on_one_worker_if_its_plates_say_how_many_rows_there_are() -> None:
    expected, losses = _run_two_loaders_of_svi("global")
    for values, others in on_all(2, _run_two_loaders_of_svi, "global"):
        assert values == near(expected) and others == pytest.approx(losses, rel=1e-9)
    refused = r"plates a, b of the model are as large as a batch.* 2 loaders"
    with pytest.raises(RankFailed, match=refused):  # the world has ended then, as a failed run has
        on_all(2, _run_two_loaders_of_svi, "batch-sized")


# Validation.


def _run_validation(batch_norm: bool) -> tuple[list[float], int, dict[str, list[float]]]:
    torch.manual_seed(5 + current().rank)
    plan = TorchPlan(batch_norm=batch_norm)
    stopping = EarlyStopping("validated", min_delta=2e-2, patience=1)
    fit(trainer(current().world_size, max_epochs=30, callbacks=[stopping]), plan, loader(8), loader(6, shuffle=False))
    return plan.validated, plan.current_epoch, state_values(plan)


@pytest.mark.slow
def test_validation_numbers_and_the_epoch_at_which_training_stops_are_those_of_one_worker() -> None:
    expected, epoch, _ = _run_validation(False)
    assert 1 < epoch < 29
    for num_workers in (2, 3):
        for validated, stopped, _ in on_all(num_workers, _run_validation, False):
            assert validated == pytest.approx(expected, rel=1e-7)
            assert stopped == epoch


def test_batch_statistics_are_equal_on_all_ranks_in_each_validation_and_at_the_end() -> None:
    first, second = on_all(2, _run_validation, True)
    assert first == second


# What cannot be right is refused.


class GrowingPlan(SviPlan):
    """Reads more rows in each epoch."""

    def train_dataloader(self) -> Any:
        return loader(4, rows=slice(5 * (1 + self.current_epoch)))


def test_loader_that_lightning_reloads_is_the_one_whose_shares_count() -> None:
    pyro.clear_param_store()
    plan = GrowingPlan()
    fit(trainer(1, reload_dataloaders_every_n_epochs=1), plan)
    assert [sorted(rows) for rows in plan.seen] == [[*range(5)], [*range(10)], [*range(15)]]


def test_automatic_optimization_of_split_rows_is_refused_with_what_to_write() -> None:
    with pytest.raises(ValueError, match="LightningModule leaves the step to Lightning"):
        fit(trainer(1, "rows", options={"plates": "rows"}), TorchPlan(), loader())


def _run_loader_of_the_user() -> list[int]:
    mine = loader(8)
    fit(trainer(current().world_size, max_epochs=1), TorchPlan(), mine)
    return sorted(len(batch[0]) for batch in mine)


def test_loader_of_the_user_is_as_before() -> None:
    assert on_all(2, _run_loader_of_the_user) == [[7, 8, 8]] * 2


def test_unknown_arguments_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="split='cells': expected 'batches', 'deal', 'rows', 'none'"):
        DistoptStrategy("cells")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start_method='spawn': expected 'popen', 'fork' or None"):
        DistoptStrategy(start_method="spawn")  # type: ignore[arg-type]
