"""Kubernetes: a Job that needs no operator, or the resources of JobSet and Kubeflow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import yaml

from distopt.config import RunConfig, dump_yaml
from distopt.launchers import CONFIG_FILE

from ...findings import Finding
from ...plan import Plan
from ...run_dir import RUNS
from ..base import Platform, check_gpus
from .admission import check_env, check_pod, check_resources
from .job import KubernetesJob
from .manifests import KUEUE_LABEL, manifests
from .pods import LABEL
from .trainjob import check_trainjob

# Pods are named after their run, with the role and index that operators append; a host name has at most 63 characters.
MAX_NAME = 50
MAX_PORT = 65535
_SERVICE_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")  # RFC 1035: pods find one another by a Service of this name
MANIFEST = "manifest.yaml"


# What kubectl's reader of YAML may take for a number, a boolean or a time where PyYAML sees text: `1e3`, `0o17`, `y`.
_AMBIGUOUS = re.compile(r"[-+]?[._0-9].*|[yYnN]", re.DOTALL)


class _PlainDumper(yaml.SafeDumper):
    """Writes what is used twice twice: anchors are hard to read, and tools that patch YAML lose them."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Returns the node of a text, with quotes where another reader may take it for something else."""
        style = "'" if _AMBIGUOUS.fullmatch(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_PlainDumper.add_representer(str, _PlainDumper.represent_str)


class KubernetesPlatform(Platform):
    """Creates the objects of a run through the Kubernetes API."""

    finds_hosts = True

    def check(self, config: RunConfig) -> Iterator[Finding]:
        """Yields what keeps the run from being one of pods."""
        kubernetes = config.launch.kubernetes
        if kubernetes.image is None:
            yield Finding("launch.kubernetes.image", "missing", "name an image that has distopt and your code")
        if not _SERVICE_NAME.fullmatch(config.name) or len(config.name) > MAX_NAME:
            rule = f"Kubernetes takes a-z, 0-9 and dashes, first a letter, at most {MAX_NAME}"
            yield Finding("name", f"found {config.name!r}", rule)
        if config.launch.hosts:
            yield Finding("launch.hosts", "Kubernetes finds the hosts itself", "set launch.nodes to their number")
        if config.launch.secrets:
            yield Finding("launch.secrets", "pods read Kubernetes Secrets", "use launch.kubernetes.secrets")

        if config.launch.max_preemptions:
            yield Finding(
                "launch.max_preemptions",
                f"found {config.launch.max_preemptions}, but Kubernetes counts no disruptions of pods",
                "set null, which allows any number, or 0, which counts them as restarts",
            )

        if config.serve.port is not None and config.serve.port + config.launch.workers - 1 > MAX_PORT:
            yield Finding(
                "serve.port",
                f"found {config.serve.port}, but {config.launch.workers} workers of a pod serve from it on",
                f"set {MAX_PORT + 1 - config.launch.workers} or less",
            )

        yield from check_gpus(config, "launch.kubernetes.gpus", kubernetes.gpus)
        yield from self._check_backend(config)
        if config.launch.min_hosts is not None and kubernetes.kind not in ("job", "jobset"):
            yield Finding(
                "launch.min_hosts",
                f"a {kubernetes.kind} cannot continue with fewer hosts",
                "remove it, or set launch.kubernetes.kind=job",
            )
        yield from check_resources(config)
        yield from check_env(config)
        yield from check_pod(config)
        for label, instead in {LABEL: "remove it", KUEUE_LABEL: "set launch.kubernetes.queue"}.items():
            if label in kubernetes.labels:
                yield Finding(f"launch.kubernetes.labels.{label}", "distopt sets this label itself", instead)
        if kubernetes.kind == "trainjob":
            yield from check_trainjob(config)

    def check_machine(self, config: RunConfig) -> Iterator[Finding]:
        """Yields that the client is not installed."""
        if find_spec("kubernetes") is None:
            yield Finding("launch.platform", "the Kubernetes client is missing", "`pip install 'distopt[kubernetes]'`")

    def _check_backend(self, config: RunConfig) -> Iterator[Finding]:
        kind = config.launch.kubernetes.kind
        backend = config.reduce.backend
        if kind == "mpijob" and backend not in ("horovod", "mpi"):
            yield Finding(
                "reduce.backend",
                f"found {backend}, but an mpijob starts workers of horovod or mpi",
                "set one of them",
            )
        if kind != "mpijob" and backend in ("horovod", "mpi"):
            yield Finding(
                "reduce.backend",
                f"{backend} needs launch.kubernetes.kind=mpijob, found {kind}",
                "set one of the two",
            )

    def plan(self, config: RunConfig) -> Plan:
        """Renders the manifest; `distopt launch` creates its objects through the API, as `kubectl create -f` would.

        The plan has no commands, and its files are the record here: pods get their configuration from a ConfigMap.
        """
        text = yaml.dump_all(manifests(config), Dumper=_PlainDumper, sort_keys=False, width=120)
        note = "created through the Kubernetes API, as `kubectl create -f` would"
        kubernetes = config.launch.kubernetes
        if kubernetes.kind == "trainjob" and kubernetes.trainer_version is None:
            note += "; volumes and the user of its pods are those of the ClusterTrainingRuntime"

        record = self.record_dir(config)
        manifest = record / MANIFEST
        return Plan(
            "kubernetes",
            (),
            {record / CONFIG_FILE: dump_yaml(config), manifest: text},
            notes=(note,),
            document=manifest,
        )

    def job(self, config: RunConfig) -> KubernetesJob:
        """Returns the run on the cluster, submitted or not."""
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
