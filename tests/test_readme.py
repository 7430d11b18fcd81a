"""README and docs show what runs: their scripts under every launcher, their YAML through the config, their links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distopt.config import load_config

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text()
SHARDED = (ROOT / "docs" / "sharded-latents.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2"],
    "horovodrun": [str(BIN / "horovodrun"), "--gloo", "-np", "2", sys.executable],
    "mpirun": [str(BIN / "mpirun"), "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable],
}


def block(language: str, page: str = README) -> str:
    """Returns the page's first block of that language; `tests/docs/test_blocks.py` runs them all."""
    return str(re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)[0])


def test_readme_says_what_it_is_and_then_the_two_commands_on_one_screen() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120
    assert "Pyro" in lines[2]
    first = "\n".join(lines[:12])
    assert "make train" in first and "make test" in first


def test_no_paragraph_of_the_readme_is_long() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for paragraph in prose.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if not line.startswith("|")]
        assert len(lines) <= 4, paragraph


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_that_are_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_script_is_short_and_has_no_branch_for_a_launcher() -> None:
    script = block("python")
    assert len(script.splitlines()) < 25
    assert not re.search(r"\bif\b.*(horovod|torchrun|mpi|rank)", script)


@pytest.mark.parametrize(
    "launcher",
    [pytest.param(each, marks=() if each in ("python", "horovodrun") else pytest.mark.slow) for each in LAUNCHERS],
)
def test_script_runs_unchanged_and_finds_the_mean(launcher: str, tmp_path: Path) -> None:
    if not Path(LAUNCHERS[launcher][0]).exists():
        pytest.skip(f"{launcher} is not installed; make setup-dev installs it")
    # The closed form: with a flat prior and unit noise, the posterior mean is the mean of the data. The script draws
    # other noise each time, and the last steps are around it by 0.006: so it gets a seed here.
    check = """
posterior = pyro.param("AutoNormal.locs.mean").item()
assert abs(posterior - data.mean().item()) < 0.02, (posterior, data.mean().item())
print(f"rank {worker.rank} of {worker.world_size} through {worker.name}: {posterior!r}", flush=True)
"""
    script = tmp_path / "script.py"
    script.write_text("import pyro\npyro.set_rng_seed(0)\n" + block("python") + check)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env = os.environ | root | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([*LAUNCHERS[launcher], str(script)], env=env, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    matches = re.findall(r"rank (\d) of (\d) through (\w+): ([-\d.e]+)", output)
    size = 1 if launcher == "python" else 2
    assert sorted(int(rank) for rank, *_ in matches) == list(range(size)), output
    assert {int(each[1]) for each in matches} == {size}
    assert {each[2] for each in matches} == {
        {"python": "single", "torchrun": "torch_dist"}.get(launcher, "horovod"),
    }
    assert len({each[3] for each in matches}) == 1, f"the replicas differ: {matches}"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_script_with_a_variable_per_cell_finds_its_posterior_by_shard_and_by_sharded_plate(
    launcher: str, tmp_path: Path
) -> None:
    text = block("python", SHARDED)
    if launcher == "python":  # the other way that the text names
        text = text.replace("shard\nfrom", "sharded_plate\nfrom").replace(
            'shard(published, plates="cells")', "published"
        )
        text = text.replace("with pyro.plate(", "with sharded_plate(")
        assert "sharded_plate(" in text and " shard(" not in text
    # The closed form under a flat prior: half way between the mean and the cell, with a variance of a half.
    check = """
expected = (cells[[0, 9_999]] + cells.mean()) / 2
assert torch.allclose(found["AutoNormal.locs.z"], expected, atol=0.15), (found, expected)
assert torch.allclose(found["AutoNormal.scales.z"], torch.tensor(0.5).sqrt(), atol=0.1), found
rows = {name: len(value) for name, value in pyro.get_param_store().items() if name.endswith(".z")}
assert set(rows.values()) == {10_000 // worker.world_size}, rows
print(f"rank {worker.rank} found them", flush=True)
"""
    script = tmp_path / "script.py"
    script.write_text(text + check)
    done = subprocess.run([*LAUNCHERS[launcher], str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("found them") == (1 if launcher == "python" else 2)


@pytest.mark.parametrize(
    "command",
    sorted({name for page in PAGES for name in re.findall(r"`distopt launch (configs/[\w./]+)", page.read_text())}),
)
def test_commands_of_the_examples_name_configs_that_ship(command: str) -> None:
    assert load_config(ROOT / command).task is not None


def test_yaml_is_short_and_every_key_is_known(tmp_path: Path) -> None:
    text = block("yaml")
    assert text == (ROOT / "configs" / "flights.yaml").read_text()
    assert len(text.splitlines()) < 30
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert load_config(file).launch.workers == 2
