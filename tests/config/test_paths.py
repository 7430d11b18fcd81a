"""Paths of a configuration: `~` is expanded, URLs are taken where they can be used and refused elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distopt.config import dump_yaml, parse_config
from tests.config.sources import MINIMAL, problems

SCRIPT = "name: run\nscript: train.py\n"


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://b/r", "memory://run", "S3A://b/r", "s3:/bucket/run"])
def test_url_for_a_run_directory_is_refused_with_the_key_that_takes_it(url):
    (problem,) = problems(MINIMAL + f"run_dir: {url}")
    assert f"run_dir: found the URL {url}, expected a folder" in problem
    scheme, _, rest = url.partition(":")
    assert problem.endswith(f"checkpoint.directory: {scheme}://{rest.lstrip('/')}")
    assert "run_dir: found the URL" in problems(MINIMAL, f"run_dir={url}")[0]


def test_checkpoints_may_go_to_a_url_or_another_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for directory, expected in [
        ("null", Path("runs/flights/checkpoints")),
        ("s3://bucket/run", "s3://bucket/run"),
        ("~/kept", Path("/home/me/kept")),
    ]:
        config = parse_config(MINIMAL + f"checkpoint: {{directory: '{directory}'}}".replace("'null'", "null"))
        assert config.checkpoints() == expected
        assert parse_config(dump_yaml(config)) == config


@pytest.mark.parametrize(
    "key",
    [
        "run_dir: {}",
        "checkpoint: {{directory: {}}}",
        "checkpoint: {{resume: {}}}",
        "launch: {{ssh: {{config: {}}}}}",
        "launch: {{ssh: {{known_hosts: {}}}}}",
        "launch: {{hostfile: {}}}",
    ],
)
def test_path_is_expanded_as_by_a_shell_and_neither_empty_nor_of_an_unknown_user(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text("host\n")
    text = dump_yaml(parse_config(MINIMAL + key.format("'~/x'")))
    assert "~" not in text and (str(tmp_path / "x") in text or "hosts:\n  - host" in text)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    assert dump_yaml(parse_config(MINIMAL + key.format("'${oc.env:SCRATCH}/x'"))) == text
    assert "for the environment variable write ${oc.env:SCRATCH}" in problems(MINIMAL + key.format("'${SCRATCH}/x'"))[0]
    assert "'' , expected" in problems(MINIMAL + key.format("''"))[0].replace("'',", "'' ,")
    assert "expected a path" in problems(MINIMAL + key.format("'  '"))[0]
    assert "~nobody-here is not known here" in problems(MINIMAL + key.format("~nobody-here/x"))[0]
    assert "spaces around it; write s3://b/r" in problems(MINIMAL + key.format("' s3://b/r'"))[0]
    assert "a chain of URLs, expected one" in problems(MINIMAL + key.format("'simplecache::s3://b/r'"))[0]
    assert "is written ${oc.env:NAME} here" in problems(MINIMAL + key.format("'$SCRATCH/x'"))[0]
    assert "control characters are not allowed in a path" in problems(MINIMAL + key.format('"a\\tb"'))[0]


@pytest.mark.parametrize("key", ["script: {}", "launch: {{hostfile: {}}}", "launch: {{ssh: {{config: {}}}}}"])
def test_url_for_a_file_is_refused(key):
    text = "name: run\n" + ("" if key.startswith("script") else "script: train.py\n") + key
    assert "found the URL s3://b/x, expected a path of a file system" in problems(text.format("s3://b/x"))[0]
    assert "expected a path: write /b/x" in problems(text.format("file:///b/x"))[0]


@pytest.mark.parametrize("key", ["checkpoint.directory", "checkpoint.resume"])
def test_url_for_checkpoints_that_lacks_a_slash_is_refused_with_the_url(key):
    assert problems(SCRIPT, f"{key}=s3:/bucket/run") == [
        f"command line: {key}: found s3:/bucket/run, which has one slash; write s3://bucket/run for the URL"
    ]


def test_folder_that_is_called_tilde_stays_one():
    config = parse_config(SCRIPT + "run_dir: ./~")
    assert config.run_dir == Path("~") and parse_config(dump_yaml(config)) == config


def test_script_in_the_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_config("name: run\nscript: ~/train.py").script == os.path.join("/home/me", "train.py")
