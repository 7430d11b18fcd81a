"""The configuration that tests of Kubernetes start from, for each kind of run."""

from __future__ import annotations

from distopt.config import parse_config

BASE = """
name: flights
task: distopt.examples.flights:Flights
run_dir: /runs/flights
data: {global_batch: 4096}
launch:
  platform: kubernetes
  workers: 2
  nodes: 2
  env: {GREETING: "it's $(HOSTNAME); $x"}
  kubernetes:
    image: registry.example/distopt:1
    gpus: 2
    volumes: [{claim: runs, path: /runs}, {claim: data, path: /data, read_only: true}]
    secrets: {HUB_TOKEN: {secret: hub, key: token}}
    queue: research
"""
MORE = {"job": ["launch.kubernetes.service_account=trainer", "launch.kubernetes.node_selector={pool: gpu, zone: 1}",
                "launch.kubernetes.time_limit_s=3600", "launch.kubernetes.image_pull_secrets=[registry]"],
        "mpijob": ["reduce.backend=horovod"]}  # fmt: skip
KINDS = ["job", "jobset", "trainjob", "pytorchjob", "mpijob"]


def config_of(kind: str, *more: str):
    return parse_config(BASE, [f"launch.kubernetes.kind={kind}", *MORE.get(kind, []), *more])
