"""`python -m tests.pyro_suite [PYTEST ARGUMENTS]`: Pyro's own tests over distopt.optim, compared with pyro.optim.

Without arguments it runs Pyro's tests of optimizers and of SVI. PYRO_TESTS names a checkout or a git repository of Pyro
where its repository cannot be cloned.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.pyro_suite.compare import differences, expected_failures, outcomes
from tests.pyro_suite.source import NoSource

# Everything of tests/infer that makes an optimizer. MCMC has none of its own.
SELECTION = (
    "tests/optim",
    "tests/infer/test_valid_models.py",
    "tests/infer/test_abstract_infer.py",
    "tests/infer/test_autoguide.py",
    "tests/infer/test_csis.py",
    "tests/infer/test_elbo_mapdata.py",
    "tests/infer/test_enum.py",
    "tests/infer/test_gradient.py",
    "tests/infer/test_inference.py",
    "tests/infer/test_jit.py",
    "tests/infer/test_multi_sample_elbos.py",
    "tests/infer/test_predictive.py",
    "tests/infer/test_svgd.py",
    "tests/infer/autoguide",
    "tests/infer/reparam",
)


def main(selection: list[str]) -> int:
    """Runs and compares; returns 0 when distopt changes nothing."""
    with tempfile.TemporaryDirectory(prefix="pyro-suite-") as scratch:
        try:
            plain, ours = outcomes(selection or SELECTION, Path(scratch))
        except NoSource as error:
            print(f"test-pyro: {error}", file=sys.stderr)
            return 1
    problems = differences(plain, ours, expected_failures())
    counts = Counter(outcome.partition(":")[0] for outcome in ours.values())
    print("over distopt.optim: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    for test, outcome in sorted(plain.items()):
        if outcome.partition(":")[0] in ("failure", "error"):
            print(f"fails over pyro.optim, too: {test}: {outcome}")
    if not ours:
        print("test-pyro: no test was selected", file=sys.stderr)
        return 1
    print("\n".join(problems) or f"{len(ours)} tests, none of which is worse than over pyro.optim")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
