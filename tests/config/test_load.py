"""From YAML and overrides to a RunConfig, or to one error that names every mistake and its fix."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt.config import ConfigError, dump_yaml, load_config, parse_config
from tests.config.sources import MINIMAL, SOURCE, problems


def test_dumped_config_reads_back_equal():
    config = parse_config(MINIMAL, ["optim.args={lr: 1e-3, betas: [0.9, 0.99]}", "launch.env={A: 1, B: 'é \"x\"'}"])
    assert parse_config(dump_yaml(config)) == config


@pytest.mark.parametrize("override", [[], ["seed=1"]])
def test_values_reach_the_worker_as_the_launcher_has_read_them(override):
    values = (
        "{a: .inf, b: -.inf, c: '1e-3', d: '010', e: yes, f: 2001-01-01, g: 1:30, h: 123456789012345678901234567890, "
        r"i: {1: x, 0x10: y}, j: '\${name}', k: '\\\\\${a}', l: '\${oc.env:HF_TOKEN}', "
        r'm: "\u2028\x85\ufeff\ud83d\ude00\\", n: null, o: -0.0, p: "null", q: "true"}'
    )
    read = parse_config(MINIMAL + f"task_args: {values}", override)
    worker = parse_config(dump_yaml(read))
    assert repr(worker) == repr(read)  # tells types
    first = {key: read.task_args[key] for key in "aceil"}
    assert first == {"a": math.inf, "c": "1e-3", "e": "yes", "i": {1: "x", 16: "y"}, "l": "${oc.env:HF_TOKEN}"}


@given(st.text(alphabet="\\\\${}a:'\" ,."))
def test_text_is_never_interpolated_a_second_time(text):
    config = parse_config(MINIMAL).model_copy(update={"task_args": {"x": text}})
    assert parse_config(dump_yaml(config), ["seed=1"]).task_args == {"x": text}


def test_arguments_and_variables_are_text_as_it_is_written():
    text = "name: run\nscript: s.py\nseed: 1\nlaunch: {env: {A: 010, B: 1.0}}\n"
    text += "script_args: [--lr, 1.10, 010, true, 1e3, '${seed}']"
    config = parse_config(text, ["launch.env.C=1_0", "launch.env.D=off"])
    assert config.script_args == ["--lr", "1.10", "010", "true", "1e3", "1"]
    assert config.launch.env == {"A": "010", "B": "1.0", "C": "1_0", "D": "off"}
    assert parse_config(text, ["script_args=[3, 0.50]"]).script_args == ["3", "0.50"]
    assert "script_args.0: found 'a\\x00'" in problems('name: run\nscript: s.py\nscript_args: ["a\\0"]')[0]


def test_values_as_json_tell_infinity_nan_and_null_apart():
    args = "task_args: {a: .inf, b: .nan, c: null, d: {1: x}}"
    assert parse_config(MINIMAL + args).as_json()["task_args"] == {
        "a": "Infinity",
        "b": "NaN",
        "c": None,
        "d": {"1": "x"},
    }


def test_overrides_replace_keys_and_are_typed_as_yaml():
    config = parse_config(
        MINIMAL, ["train.num_steps=7", "optim.args.lr=1e-3", "launch.hosts=[a, b]", "data.global_batch=null"]
    )
    assert config.train.num_steps == 7
    assert config.optim.args == {"lr": 0.001}
    assert config.launch.hosts == ["a", "b"]
    assert config.data.global_batch is None


def test_interpolation_sees_overrides():
    config = parse_config(MINIMAL + "run_dir: /data/${name}/${seed}\n", ["seed=5"])
    assert str(config.run_dir) == "/data/flights/5"


def test_unknown_key_is_answered_in_the_form_of_the_style_guide():
    assert problems(MINIMAL + "reduce: {bucket_mb: 3}") == [
        "configs/flights.yaml: reduce.bucket_mb: unknown key. Did you mean reduce.bucket_mib? "
        "Known: backend, backward_passes_per_step, bucket_mib, compression, drift_every_steps, "
        "gradient_predivide_factor, groups, op, overlap, power_sgd_rank, sparse_as_dense, timeout_s."
    ]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("bucket_mib: 3", "bucket_mib: unknown key. Did you mean reduce.bucket_mib?"),
        (
            "optim: {scheduler: {name: StepLR, nam: x}}",
            "optim.scheduler.nam: unknown key. Did you mean optim.scheduler.name?",
        ),
        ("train: {num_steps: many}", "train.num_steps: found 'many' (str), expected an integer."),
        ("train: {num_steps: true}", "train.num_steps: found True (bool), expected an integer."),
        ("seed: '3'", "seed: found '3' (str), expected an integer."),
        ("launch: {workers: 0}", "launch.workers: found 0 (int), expected a number greater than or equal to 1."),
        ("script: ''", "script: found '', expected a path"),
        ("launch: {platform: torchrn}", "Did you mean torchrun?"),
        ("train: {loss: TraceELBO}", "Did you mean Trace_ELBO?"),
        ("optim: {name: Adamm}", "SGD, SparseAdam or module:Name of your own code, such as mypackage.module:MyClass."),
        ("optim: {name: Adamm}", "Did you mean Adam?"),
        ("optim: {name: os:system}", "optim.name: found os:system, but os belongs to Python's standard library"),
        ("optim: {scheduler: {name: Exponential}}", "Did you mean ExponentialLR?"),
        ("log: {loggers: mine:A}", "log.loggers: found 'mine:A' (str), expected a list."),
        (
            "log: {loggers: [mine:A, mine]}",
            "log.loggers.1.name: found 'mine' (str), expected one of mlflow, trackio, wandb or module:Name of your own",
        ),
        (
            "log: {loggers: [{name: mine:A, nam: x}]}",
            "log.loggers.0.nam: unknown key. Did you mean log.loggers.0.name?",
        ),
        ("checkpoint: {resume: [1]}", "checkpoint.resume: found [1] (list), expected an integer or a string."),
        ("script: train.py", "found both of task and script"),
        ("script_args: [a]", "found script_args without script"),
        ("launch: {env: {A: [1]}}", "launch.env.A: found [1] (list), expected a string."),
        ("launch: {hosts: [true]}", "launch.hosts.0: found True (bool), expected a string. Put it in quotes."),
        ("launch: {hosts: [7]}", "launch.hosts.0: found 7 (int), expected a string. Put it in quotes."),
        ("launch: {env: {API_KEY: x}}", "launch.secrets: [API_KEY]"),
        ("seed: ${oc.env:HF_TOKEN}", "name it in launch.secrets: [HF_TOKEN]"),
        ("seed: ${nowhere.at.all}", "seed: Interpolation key 'nowhere.at.all' not found"),
        ("train:", "train: found nothing (null), expected a mapping."),
        ("name: again", "line 3, column 1: the key 'name' appears twice"),
        ("optim: {args: {lr: .nan}, clip: {clip_norm: .inf}}", "optim.clip.clip_norm: found inf (float)"),
    ],
)
def test_mistake_names_file_key_found_and_expected(yaml, message):
    (problem,) = problems(MINIMAL + yaml)
    assert problem.startswith(SOURCE + ": ")
    assert message in problem


@pytest.mark.parametrize(("yaml", "message"), [("name: 7", "name: found 7 (int)"), ("seed: 1", "name: missing")])
def test_mistake_in_the_name_is_no_mistake_in_the_folder_that_follows_from_it(yaml, message):
    (problem,) = problems(f"{yaml}\nscript: train.py")
    assert f"{SOURCE}: {message}" in problem


@pytest.mark.parametrize(("time", "expected"), [("30", "30"), ("1:30:00", "1:30:00"), ("2-12", "2-12"), ("'90'", "90")])
def test_time_limit_is_read_as_sbatch_reads_it(time, expected):
    config = parse_config(MINIMAL + f"launch: {{slurm: {{time: {time}}}}}")
    assert config.launch.slurm.time == expected
    assert parse_config(dump_yaml(config)) == config


def test_all_mistakes_come_at_once_and_those_of_the_command_line_say_so():
    mistakes = problems(MINIMAL + "sed: 1\nlog: {every_steps: -1}", "launch.wokers=2", "train.num_steps=x")
    assert len(mistakes) == 4
    assert [text for text in mistakes if text.startswith("command line: ")] == [
        text for text in mistakes if "wokers" in text or "num_steps" in text
    ]


@pytest.mark.parametrize("override", ["seed", "=1", "--seed=1", "a b=1", "launch.hosts=[a"])
def test_override_that_is_none_is_quoted(override):
    (problem,) = problems(MINIMAL, override)
    assert problem.startswith(f"{override!r} on the command line: ")


def test_missing_file_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "flights.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"flihgts\.yaml: no such file\. Did you mean .*flights\.yaml\?"):
        load_config(tmp_path / "flihgts.yaml")


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.integers() | st.lists(st.integers()), max_size=4))
def test_any_mapping_gives_a_config_or_a_config_error(raw):
    import yaml

    try:
        parse_config(yaml.safe_dump(raw))
    except ConfigError as error:
        assert error.problems
