"""Kubernetes: a Job that needs no operator, or the resources of JobSet and Kubeflow."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import yaml

from distopt.config import RunConfig, dump_yaml
from distopt.config.launch import DNS_LABEL
from distopt.launchers import CONFIG_FILE

from ...plan import Plan
from ...run_dir import RUNS
from ..base import Platform
from .job import KubernetesJob
from .manifests import manifests

MAX_NAME = 50  # operators append roles and indices, and a host name ends at 63


class KubernetesPlatform(Platform):
    """Submits the run's objects through the Kubernetes API, and follows them there."""

    finds_hosts = True

    def problems(self, config: RunConfig) -> list[str]:
        """Returns what keeps the run from being submitted."""
        wanted = config.launch.kubernetes
        problems = []
        if find_spec("kubernetes") is None:
            problems.append("launch.platform: the Kubernetes client is missing; `pip install 'distopt[kubernetes]'`")
        if wanted.image is None:
            problems.append("launch.kubernetes.image: missing; name an image that has distopt and your code")
        if not re.match(DNS_LABEL, config.name) or len(config.name) > MAX_NAME:
            problems.append(f"name: found {config.name!r}; Kubernetes takes a-z, 0-9 and dashes, at most {MAX_NAME}")
        if config.launch.hosts:
            problems.append("launch.hosts: Kubernetes finds the hosts itself; set launch.nodes to their number")
        if config.launch.secrets:
            problems.append("launch.secrets: pods read secrets from Secrets; use launch.kubernetes.secrets")
        if 0 < wanted.gpus < config.launch.workers:
            problems.append(
                f"launch.workers: {config.launch.workers} on each host, but launch.kubernetes.gpus is {wanted.gpus}; "
                "each worker needs one"
            )
        return problems + self._backend(config) + self._run_directory(config) + self._operator(config)

    def _backend(self, config: RunConfig) -> list[str]:
        kind, backend = config.launch.kubernetes.kind, config.reduce.backend
        if kind == "mpijob" and backend not in ("horovod", "mpi"):
            return [f"reduce.backend: found {backend}, but an mpijob starts workers of horovod or mpi; set one of them"]
        if kind != "mpijob" and backend in ("horovod", "mpi"):
            return [f"reduce.backend: {backend} needs launch.kubernetes.kind=mpijob, found {kind}"]
        return []

    def _run_directory(self, config: RunConfig) -> list[str]:
        path = PurePosixPath(config.run_dir)
        writable = [volume.path for volume in config.launch.kubernetes.volumes if not volume.read_only]
        if any(path.is_relative_to(volume) for volume in writable):
            return []
        return [
            f"run_dir: {path} lies on no writable volume of the pods, so checkpoints would be lost; "
            f"name one in launch.kubernetes.volumes, and a run_dir below its path"
        ]

    def _operator(self, config: RunConfig) -> list[str]:
        """Returns what a TrainJob cannot say in the fields that Kubeflow trainer 2.0 to 2.3 share."""
        wanted = config.launch.kubernetes
        if wanted.kind != "trainjob":
            return []
        unsaid = {
            "service_account": wanted.service_account,
            "node_selector": wanted.node_selector,
            "time_limit_s": wanted.time_limit_s,
            "image_pull_secrets": wanted.image_pull_secrets,
        }
        return [
            f"launch.kubernetes.{key}: a trainjob takes it from its ClusterTrainingRuntime; set it there"
            for key, value in unsaid.items()
            if value
        ]

    def plan(self, config: RunConfig) -> Plan:
        """Renders the manifest; it is applied through the API, as `kubectl create -f` would."""
        text = yaml.safe_dump_all(manifests(config), sort_keys=False, width=120)
        note = "created through the Kubernetes API, as `kubectl create -f` would"
        if config.launch.kubernetes.kind == "trainjob":
            note += "; volumes and the user of its pods are those of the ClusterTrainingRuntime"
        record = self.record_dir(config)
        files = {record / CONFIG_FILE: dump_yaml(config), record / "manifest.yaml": text}
        return Plan("kubernetes", (), files, notes=(note,))

    def job(self, config: RunConfig) -> KubernetesJob:
        """Returns the run on the cluster, whether it has been submitted or not."""
        return KubernetesJob(config, manifests(config))

    def record_dir(self, config: RunConfig) -> Path:
        """Returns a folder in `runs/`: the run directory is on a volume of the cluster."""
        return RUNS / config.name

    def ranks(self, config: RunConfig) -> range:
        """Returns the numbers of the nodes: a pod's log has the output of all its ranks."""
        return range(config.launch.num_hosts)

    def image(self, config: RunConfig) -> str | None:
        """Returns the image of the pods."""
        return config.launch.kubernetes.image or "the image of the pods"
