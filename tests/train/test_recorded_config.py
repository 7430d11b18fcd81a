"""What is recorded of a run's configuration, and which changes of it a resume accepts."""

from __future__ import annotations

import inspect
import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args, get_origin

import pyro
import pytest
import torch
import yaml
from pydantic import ValidationError

from distopt.checkpoint import ConfigMismatchError
from distopt.checkpoint.cli import describe
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.reader import read_manifest
from distopt.checkpoint.restore import check_config
from distopt.checkpoint.storage.base import open_storage
from distopt.config import RunConfig, differences, dump_yaml, load_config
from distopt.config.base import Section
from distopt.config.compare import ABSENT, ADDED_LATER, MAY_CHANGE
from distopt.launch.checks import _check_recorded_config
from distopt.train.recorded_config import recorded_config
from tests.train.runs import config, parameters, run_here


def test_environment_is_not_recorded_anywhere(tmp_path):
    path = config(tmp_path, launch={"workers": 1, "env": {"GREETING": "confidential"}}, train={"num_steps": 1})
    assert "env" not in recorded_config(load_config(path))["launch"]
    run_here(path)
    folders = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert folders
    assert not any(b"confidential" in file.read_bytes() for folder in folders for file in folder.iterdir())
    lines = list(describe(str(folders[0])))
    start = lines.index("  config:") + 1
    recorded = "\n".join(itertools.takewhile(lambda line: line.startswith("    "), lines[start:]))
    assert yaml.safe_load(recorded) == recorded_config(load_config(path, ["reduce.backend=single"]))


@pytest.fixture
def saved(tmp_path):
    """A run of two steps that has ended."""
    path = config(tmp_path, train={"num_steps": 2}, checkpoint={"every_steps": 1})
    run_here(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The parameters of a run of three steps that was never stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pyro.clear_param_store()
    run_here(config(folder, train={"num_steps": 3}))
    return parameters(folder / "run")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "change",
    [
        ("reduce.op=sum", "reduce.op: 'average' in the checkpoint, 'sum' now"),
        ("reduce.compression=bf16", "reduce.compression: 'none' in the checkpoint, 'bf16' now"),
        ("reduce.power_sgd_rank=3", "reduce.power_sgd_rank: 2 in the checkpoint, 3 now"),
        ("optim.name=AdamW", "optim.name: 'Adam' in the checkpoint, 'AdamW' now"),
        ("seed=2", "seed: 1 in the checkpoint, 2 now"),
    ],
    ids=lambda change: change[0],
)
def test_change_of_what_is_computed_is_refused_on_resume(change, saved, capsys):
    override, message = change
    run_here(saved, override, status=1)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        "reduce.bucket_mib=1 reduce.overlap=true reduce.drift_every_steps=1 reduce.timeout_s=60 name=other",
        "checkpoint.keep_last=5 log.every_steps=1",
        "data.prefetch=1",
        "train.capture=graph",
    ],
)
def test_change_of_where_and_how_long_a_run_computes_is_accepted_and_changes_no_number(
    change, saved, undisturbed, tmp_path, capsys
):
    run_here(saved, "train.num_steps=3", *change.split())
    assert "resuming from step 2" in capsys.readouterr().out
    resumed = parameters(tmp_path / "run")
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("change", ["optim.args.lr=0.1", "optim.clip.clip_norm=1.0", "optim.nonfinite=skip"])
def test_change_of_how_a_run_steps_from_there_is_accepted_on_resume(change, saved, capsys):
    """What becomes of it is in test_resume.py."""
    run_here(saved, "train.num_steps=3", change)
    assert "resuming from step 2" in capsys.readouterr().out


def test_backend_may_change(saved, tmp_path):
    recorded = recorded_config(load_config(saved, ["reduce.backend=horovod"]))
    assert recorded["reduce"]["backend"] == "horovod" and "reduce.backend" in MAY_CHANGE


def test_keys_that_came_later_are_recorded_only_if_they_change_something(tmp_path):
    """The default of each is the value that runs had before it was a key, so that old runs resume unchanged."""
    loaded = load_config(config(tmp_path))
    full, recorded = loaded.model_dump(mode="json"), recorded_config(loaded)
    for dotted, value in ADDED_LATER.items():
        section, _, key = dotted.partition(".")
        assert full[section].get(key, value) == value
        assert key not in recorded[section]


# Every key of the YAML: a value of it that differs from `every_key`'s, found by trial.

VALUES: list[Any] = [
    True,
    2,
    3,
    0.5,
    600,
    "shared",
    "sum",
    "mpi",
    "graph",
    "skip",
    "raise",
    "jobset",
    "kubernetes",
    "other:Other",
]
VALUES += [
    "127.0.0.2",
    "10:00",
    "/x",
    "a.b/c",
    {"X": "1"},
    {"X": {"secret": "a", "key": "b"}},
    ["a"],
    ["params"],
    [["a"]],
]
VALUES += [{"metric": "elbo", "mode": "max"}, [{"name": "mine:Logger"}], [{"claim": "a", "path": "/b"}]]
VALUES += ["none", "bf16", "cuda", "2.2", {"cpu": "2"}, ["--x"], ["END"], {"runtime": "pyxis", "image": "a"}]
UNSET = (
    "train.early_stopping",
    "checkpoint.keep_best",
    "launch.slurm.container",
)  # sections that the run lacks, which are set as a whole
NOT_OF_A_TASK = ("script", "script_args")  # a script saves its checkpoints itself
NOT_RECORDED = ("launch.hostfile", "launch.min_hosts")  # read into launch.hosts; needs launch.hosts


def every_key(section=RunConfig, prefix=""):
    for name, field in section.model_fields.items():
        inner = [each for each in (field.annotation, *get_args(field.annotation)) if inspect.isclass(each)]
        sections = [each for each in inner if issubclass(each, Section)]
        if sections and get_origin(field.annotation) not in (list, dict) and prefix + name not in UNSET:
            yield from every_key(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def with_another_value(before, key):
    *sections, name = key.split(".")
    for value in VALUES:
        keys = before.model_dump(mode="json")
        section = keys
        for each in sections:
            section = section[each]
        section[name] = value
        try:
            changed = RunConfig.model_validate(keys)
        except ValidationError:
            continue
        if changed != before:
            return changed
    raise AssertionError(f"no value of {key} was found that differs from that of the run")


@pytest.mark.sampled(40)
@pytest.mark.parametrize("key", [key for key in every_key() if key not in (*NOT_OF_A_TASK, *NOT_RECORDED)])
def test_key_with_another_value_is_refused_unless_it_says_where_or_how_long_to_run(key, tmp_path):
    """By the launcher, before anything is started, and by the checkpointer of each rank."""
    path = config(tmp_path, optim={"scheduler": {"name": "StepLR", "args": {"step_size": 1}}})
    before = load_config(path, ["train.validate_every_steps=6"])  # which sections of UNSET need
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000001/manifest.json").touch()
    (tmp_path / "run/config.yaml").write_text(dump_yaml(before))
    changed = with_another_value(before, key)
    accepted = any(f"{key}.".startswith(f"{each}.") for each in MAY_CHANGE)

    findings = list(_check_recorded_config(changed.model_copy(update={"run_dir": tmp_path / "run"})))
    assert [finding.severity for finding in findings] == ([] if accepted else ["failure"])
    assert accepted or f"\n    {key}" in findings[0].message

    manifest = Manifest(1, "", 0, 1, {}, None, recorded_config(before), {})
    with nullcontext() if accepted else pytest.raises(ConfigMismatchError, match=rf"\n  {key}\b"):
        check_config(manifest, recorded_config(changed), MAY_CHANGE, "a checkpoint")


# A checkpoint of format 3 is the oldest that loads. Its configuration has every key that there was.
FORMAT_3 = Path(__file__).parents[1] / "checkpoint" / "format_3"


@pytest.fixture(scope="module")
def recorded_in_format_3():
    return read_manifest(open_storage(FORMAT_3 / "one_rank"), "step-00000003").config


def test_run_of_an_older_version_is_compared_by_the_values_that_it_had(recorded_in_format_3):
    """A new key is listed in ADDED_LATER, or runs of older versions could no longer resume."""
    today = recorded_config(load_config(FORMAT_3 / "run.yaml"))
    assert list(differences(recorded_in_format_3, today, MAY_CHANGE)) == []


@pytest.mark.parametrize(
    "override",
    [
        "reduce.groups=[[AutoDelta.scale]]",
        "reduce.gradient_predivide_factor=2.0",
        "reduce.sparse_as_dense=true",
        "reduce.backward_passes_per_step=3",
    ],
)
def test_run_of_an_older_version_does_not_resume_with_another_value_of_a_newer_key(override, recorded_in_format_3):
    today = recorded_config(load_config(FORMAT_3 / "run.yaml", [override]))
    ((key, before, _),) = differences(recorded_in_format_3, today, MAY_CHANGE)
    assert key == override.partition("=")[0] and before is ABSENT
