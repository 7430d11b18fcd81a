"""An admin's review: what checkov, which reads manifests for risks, says of rendered pods."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.kubernetes.test_pods import PODS, specs

CHECKOV = Path(__file__).parents[2] / ".venv" / "checkov" / "bin" / "checkov"

pytestmark = [
    pytest.mark.kubernetes,
    pytest.mark.skipif(not CHECKOV.exists(), reason="checkov is not installed: make test-kubernetes installs it"),
]

# What is the user's to decide, or cannot be otherwise.
ACCEPTED = {
    "CKV_K8S_15": "Image Pull Policy should be Always: the image of a run is the user's, by tag or digest",
    "CKV_K8S_21": "The default namespace should not be used: launch.kubernetes.namespace is the user's",
    "CKV_K8S_35": "Secrets as files: kubernetes.secrets gives variables of the environment, as libraries read them",
    "CKV_K8S_40": "A high UID: the user of the image, to whom the files of a run on a shared volume belong",
    "CKV_K8S_43": "Image should use digest: launch.kubernetes.image is the user's",
}


def objections(folder: Path, kind: str, *more: str) -> set[str]:
    """Returns the checks that pods of a kind fail; as those of jobs, of which no probe asks whether they serve."""
    pods = specs(kind, *more)
    jobs = [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": f"job-{number}", "namespace": "default"},
            "spec": {"template": {"spec": pod}},
        }
        for number, pod in enumerate(pods)
    ]
    (folder / "pods.yaml").write_text(yaml.safe_dump_all(jobs))
    options = ["--framework", "kubernetes", "--skip-download", "--output", "json"]
    done = subprocess.run([CHECKOV, "-d", folder, *options], capture_output=True, text=True, timeout=120)
    report = json.loads(done.stdout)
    assert report["summary"]["resource_count"] >= len(pods) and report["summary"]["passed"] > 20
    return {check["check_id"] for check in report["results"]["failed_checks"]}


@pytest.mark.parametrize("kind", PODS)
def test_pods_of_every_kind_pass_but_for_what_is_the_users_to_decide(kind, tmp_path):
    assert objections(tmp_path, kind) <= ACCEPTED.keys()


def test_what_is_accepted_is_still_objected_to_and_a_risk_that_a_user_takes_is_seen(tmp_path):
    assert objections(tmp_path, "job", "launch.kubernetes.host_network=true") == ACCEPTED.keys() | {"CKV_K8S_19"}
