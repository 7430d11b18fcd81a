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


# Every key that a kind can express, beyond those above.
POD_KEYS = """launch.kubernetes={
  kind: KIND, image: registry.example/distopt:1, cpu: 8, requests: {cpu: 500m}, gpus: 2, priority_class: high,
  resources: {rdma/hca_shared_devices_a: 1, ephemeral-storage: 20Gi}, limits: {cpu: null, memory: 8Gi},
  volumes: [{claim: runs, path: /runs}, {claim: runs, path: /code, sub_path: code, read_only: true},
            {config_map: site, path: /etc/site, read_only: true}, {empty_dir: 10Gi, path: /cache},
            {ephemeral: 100Gi, storage_class: fast, path: /scratch}, {host_path: /mnt/nvme, path: /nvme}],
  tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}], host_network: true, ttl_s: 600,
  affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [
    {matchExpressions: [{key: gpu, operator: In, values: [a100]}]}]}}},
  topology_spread: [{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule}],
  labels: {team: vision}, annotations: {owner.example/mail: me@lab.example}, service_account: trainer,
  node_selector: {pool: gpu}, image_pull_secrets: [registry], time_limit_s: 3600,
  init_containers: [{name: fetch, command: [python, -m, fetch], env: [{name: SOURCE, value: here}]}],
  network_policy: true, disruption_budget: true, secrets: {HUB_TOKEN: {secret: hub, key: token}},
  pod: {runtimeClassName: nvidia, automountServiceAccountToken: null, containers: [
    {name: CONTAINER, tty: true, env: [{name: EXTRA, value: "1"}]}]}}"""
TRAINJOB_KEYS = """launch.kubernetes={
  kind: trainjob, trainer_version: "2.3", image: registry.example/distopt:1, labels: {team: vision}, gpus: 2,
  annotations: {owner.example/mail: me@lab.example}, service_account: trainer, node_selector: {pool: gpu},
  tolerations: [{key: nvidia.com/gpu, operator: Exists}], affinity: {podAntiAffinity: {}}, time_limit_s: 3600,
  image_pull_secrets: [registry], network_policy: true, disruption_budget: true,
  volumes: [{claim: runs, path: /runs}, {empty_dir: 1Gi, path: /cache}]}"""
CONTAINERS = {"job": "worker", "jobset": "worker", "pytorchjob": "pytorch", "mpijob": "worker"}
EVERYTHING = {
    "trainjob": [TRAINJOB_KEYS],
    **{kind: [POD_KEYS.replace("KIND", kind).replace("CONTAINER", name)] for kind, name in CONTAINERS.items()},
}
