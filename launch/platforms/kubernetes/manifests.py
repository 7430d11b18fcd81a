"""The Kubernetes objects of a run, as plain dictionaries: one function per kind of resource."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any

from distopt.config import RunConfig, dump_yaml
from distopt.launchers import CONFIG_VARIABLE, ECHO_VARIABLE, RENDEZVOUS_PORT, format_range

from ...plan import env_of_workers, worker_argv
from ..torchrun import FRESH_STORE, torchrun_argv

Manifest = dict[str, Any]

LABEL = "distopt.run"
KUEUE_LABEL = "kueue.x-k8s.io/queue-name"
HOME = "/tmp"  # the only folder besides volumes that a worker can write to
MPI_HOME = "/home/mpiuser"  # of the user that the image has for sshd (docker/cpu.Dockerfile)
CONFIG_IN_ENV = f"@{CONFIG_VARIABLE}"  # has `distopt train` read the configuration from a variable


def manifests(config: RunConfig) -> list[Manifest]:
    """Returns the objects to create, the one that stands for the run last."""
    return _KINDS[config.launch.kubernetes.kind](config)


# The kinds. All of them start the same command in the same pod: an agent as process 1, below it torchrun (or Horovod's
# or MPI's launcher), supervisors and workers. They differ in how pods find each other and in who starts them again. The
# pods of a Job and of a JobSet have stable names, and torchrun meets at the first one's; for the other kinds an
# operator sets variables or writes a hostfile.


def _job(config: RunConfig) -> list[Manifest]:
    """An Indexed Job, and the headless Service by which its pods find one another; no operator is needed."""
    address = f"{config.name}-0.{config.name}:{config.launch.port or RENDEZVOUS_PORT}"
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(config),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the rendezvous comes before readiness
            "selector": {LABEL: config.name},
            "ports": [{"name": "rendezvous", "port": config.launch.port or RENDEZVOUS_PORT}],
        },
    }

    pod = _pod(config, _torchrun_meeting_at(config, address), subdomain=config.name)
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(config),
        "spec": {**_indexed(config, pod), **_time_limit(config)},
    }
    return [service, job]


def _jobset(config: RunConfig) -> list[Manifest]:
    """A JobSet of one Indexed Job: when a pod fails for good, all start again."""
    address = f"{config.name}-workers-0-0.{config.name}:{config.launch.port or RENDEZVOUS_PORT}"
    pod = _pod(config, _torchrun_meeting_at(config, address))
    job = {**_indexed(config, pod), "backoffLimit": 0, **_time_limit(config)}

    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(config),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": config.name},
            "failurePolicy": {"maxRestarts": config.launch.max_restarts},
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": job}}],
        },
    }
    return [jobset]


def _trainjob(config: RunConfig) -> list[Manifest]:
    """A TrainJob with the fields that Kubeflow trainer 2.0 to 2.3 share; the runtime sets PET_* and owns the pods."""
    launch = config.launch
    trainer = {
        "image": launch.kubernetes.image,
        "command": _agent(config, _torchrun(config, [])),
        "env": _env(config),
        "numNodes": launch.num_hosts,
        "numProcPerNode": launch.workers,
        "resourcesPerNode": _resources(config),
    }
    trainjob = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(config),
        "spec": {"runtimeRef": {"name": launch.kubernetes.runtime}, "trainer": trainer},
    }
    return [trainjob]


def _pytorchjob(config: RunConfig) -> list[Manifest]:
    """A PyTorchJob: a master and the other nodes as workers; the operator tells torchrun where it is by PET_*."""
    launch = config.launch
    rendezvous = [
        "--nnodes=$(PET_NNODES)",
        "--node-rank=$(PET_NODE_RANK)",
        "--master-addr=$(PET_MASTER_ADDR)",
        "--master-port=$(PET_MASTER_PORT)",
    ]

    pod = _pod(config, _agent(config, _torchrun(config, rendezvous)), container="pytorch")
    replicas = {"Master": 1, **({"Worker": launch.num_hosts - 1} if launch.num_hosts > 1 else {})}
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(config),
        "spec": {
            "nprocPerNode": str(launch.workers),
            "runPolicy": _run_policy(config),
            "pytorchReplicaSpecs": {
                role: {"replicas": count, "restartPolicy": "OnFailure", "template": _without_restarts(pod)}
                for role, count in replicas.items()
            },
        },
    }
    return [job]


def _mpijob(config: RunConfig) -> list[Manifest]:
    """An MPIJob: a launcher with horovodrun or mpirun, workers with sshd; the operator makes a pair of keys per job."""
    launch = config.launch
    size = launch.num_hosts * launch.workers
    if config.reduce.backend == "horovod":
        command = ["horovodrun", "--gloo", "-np", str(size), "--hostfile", "/etc/mpi/hostfile"]
    else:
        passed = sorted({entry["name"] for entry in _env(config)})
        command = [
            *("mpirun", "-n", str(size), "--hostfile", "/etc/mpi/hostfile"),
            *("--bind-to", "none", "--map-by", "slot"),
            *(option for name in passed for option in ("-x", name)),
        ]

    # The launcher starts ranks through the sshd of the workers and computes nothing itself, so it needs no GPU.
    launcher = _pod(config, _agent(config, [*command, *_worker(config)]), gpus=False)
    sshd = ["/usr/sbin/sshd", "-De", "-f", f"{MPI_HOME}/.sshd_config"]
    replicas = {"Launcher": (1, launcher), "Worker": (launch.num_hosts, _pod(config, sshd))}

    job = {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": _metadata(config),
        "spec": {
            "slotsPerWorker": launch.workers,
            "launcherCreationPolicy": "WaitForWorkersReady",
            "sshAuthMountPath": f"{MPI_HOME}/.ssh",
            "mpiImplementation": "OpenMPI",
            "runPolicy": {**_run_policy(config), "cleanPodPolicy": "Running"},
            "mpiReplicaSpecs": {
                role: {"replicas": count, "restartPolicy": "Never", "template": _without_restarts(pod)}
                for role, (count, pod) in replicas.items()
            },
        },
    }
    return [job]


_KINDS: Mapping[str, Callable[[RunConfig], list[Manifest]]] = {
    "job": _job,
    "jobset": _jobset,
    "trainjob": _trainjob,
    "pytorchjob": _pytorchjob,
    "mpijob": _mpijob,
}


# What the kinds share.


def _metadata(config: RunConfig) -> Manifest:
    queue = config.launch.kubernetes.queue
    labels = {LABEL: config.name, **({KUEUE_LABEL: queue} if queue else {})}
    return {"name": config.name, "namespace": config.launch.kubernetes.namespace, "labels": labels}


def _indexed(config: RunConfig, pod: Manifest) -> Manifest:
    hosts = config.launch.num_hosts
    return {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": config.launch.max_restarts,
        "template": pod,
    }


def _time_limit(config: RunConfig) -> Manifest:
    limit = config.launch.kubernetes.time_limit_s
    return {"activeDeadlineSeconds": limit} if limit else {}


def _run_policy(config: RunConfig) -> Manifest:
    return {"backoffLimit": config.launch.max_restarts, "cleanPodPolicy": "None", **_time_limit(config)}


def _torchrun_meeting_at(config: RunConfig, address: str) -> list[str]:
    """Returns the command of a node that finds the others by an address, where no operator sets variables."""
    rendezvous = [
        f"--nnodes={format_range(config.launch.host_counts)}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={address}",
        f"--rdzv-id={config.name}",
    ]
    return _agent(config, _torchrun(config, rendezvous), meet=address)


def _torchrun(config: RunConfig, rendezvous: list[str]) -> list[str]:
    return torchrun_argv(config, rendezvous, _worker(config), config.launch.kubernetes.python)


def _worker(config: RunConfig) -> list[str]:
    return [_literal(argument) for argument in worker_argv(config, config.launch.kubernetes.python, CONFIG_IN_ENV)]


def _agent(config: RunConfig, launcher: list[str], meet: str | None = None) -> list[str]:
    """Puts the agent in front: process 1 of a container ignores SIGTERM unless it handles it, and must reap orphans."""
    options = ["--meet", meet] if meet else []
    return [config.launch.kubernetes.python, "-m", "distopt.launch.worker.host_agent", *options, "--", *launcher]


def _env(config: RunConfig) -> list[Manifest]:
    """Returns the variables of the pods; secrets are references, and the configuration travels as a variable."""
    values = env_of_workers(config, **FRESH_STORE, **{ECHO_VARIABLE: "1"}, HOME=HOME)
    values[CONFIG_VARIABLE] = dump_yaml(config)
    secrets = config.launch.kubernetes.secrets
    return [
        *({"name": name, "value": _literal(value)} for name, value in values.items()),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret.secret, "key": secret.key}}}
            for name, secret in secrets.items()
        ),
    ]


def _literal(value: str) -> str:
    """Keeps Kubernetes from expanding `$(NAME)`; it takes two dollars for one, wherever they stand."""
    return value.replace("$", "$$")


def _resources(config: RunConfig, gpus: bool = True) -> Manifest:
    kubernetes = config.launch.kubernetes
    amounts = {"cpu": kubernetes.cpu, "memory": kubernetes.memory}
    if gpus and kubernetes.gpus:
        amounts[kubernetes.gpu_resource] = str(kubernetes.gpus)
    return {"requests": amounts, "limits": dict(amounts)}


def _health(config: RunConfig) -> Manifest:
    """Returns the probes of a worker that serves, and its port if it serves beyond the pod's loopback interface."""
    serve = config.serve
    kind = config.launch.kubernetes.kind
    # A worker of an MPIJob is an sshd until the launcher, which waits until workers are ready, starts ranks in it.
    if serve.port is None or kind == "mpijob":
        return {}

    # A kubelet's own HTTP probe comes from outside of the pod, so liveness is asked by a command within.
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(serve.host, serve.host)
    command = [config.launch.kubernetes.python, "-m", "distopt.launch.worker.health_probe", address, str(serve.port)]
    timing = {"periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3}
    probes: Manifest = {"livenessProbe": {"exec": {"command": command}, **timing}}

    if not ipaddress.ip_address(serve.host).is_loopback:
        probes["ports"] = [{"name": "serve", "containerPort": serve.port}]
        # Pods of a PyTorchJob find each other by a Service that names only ready pods, and are ready once they met.
        if kind != "pytorchjob":
            probes["readinessProbe"] = {"httpGet": {"path": "/readyz", "port": serve.port}, **timing}
    return probes


def _pod(
    config: RunConfig, command: list[str], container: str = "worker", subdomain: str | None = None, gpus: bool = True
) -> Manifest:
    """Returns a pod template whose processes have no privileges and can write only to volumes, /tmp and /dev/shm.

    It fulfils the `restricted` Pod Security Standard. Torch's data loaders and NCCL need /dev/shm, which is 64 MiB in a
    container unless it is a volume.
    """
    kubernetes = config.launch.kubernetes
    claims = dict.fromkeys(volume.claim for volume in kubernetes.volumes)  # one may be mounted at several paths
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": round(config.launch.grace_s) + 15,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": kubernetes.user,
            "runAsGroup": kubernetes.user,
            "fsGroup": kubernetes.user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [{"name": container, **_container(config, command, gpus)}],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            *({"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in claims),
        ],
    }

    optional = {
        "subdomain": subdomain,
        "serviceAccountName": kubernetes.service_account,
        "nodeSelector": dict(kubernetes.node_selector),
        "imagePullSecrets": [{"name": name} for name in kubernetes.image_pull_secrets],
    }
    spec |= {key: value for key, value in optional.items() if value}
    return {"metadata": {"labels": {LABEL: config.name}}, "spec": spec}


def _container(config: RunConfig, command: list[str], gpus: bool) -> Manifest:
    """Returns what a pod runs; all but its name."""
    kubernetes = config.launch.kubernetes
    return {
        "image": kubernetes.image,
        "command": command,
        # Supervisors write why their rank failed into the pod's status; where none could, the end of the log is there.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "env": _env(config),
        "resources": _resources(config, gpus),
        **_health(config),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": HOME},
            {"name": "shm", "mountPath": "/dev/shm"},
            *(
                {"name": volume.claim, "mountPath": volume.path, "readOnly": volume.read_only}
                for volume in kubernetes.volumes
            ),
        ],
    }


def _without_restarts(pod: Manifest) -> Manifest:
    """Leaves the restart policy to the operator's own field."""
    return {**pod, "spec": {key: value for key, value in pod["spec"].items() if key != "restartPolicy"}}
