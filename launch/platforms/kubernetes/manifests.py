"""The Kubernetes objects of a run, as plain dictionaries: one function per kind of resource."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from distopt.config import RunConfig, dump_yaml
from distopt.launchers import CONFIG_FILE, CONFIG_VARIABLE, RENDEZVOUS_PORT, USAGE_ERROR, format_range

from ...plan import worker_argv
from ..torchrun import torchrun_argv
from .pods import LABEL, Manifest, container_name, env_entries, literal, pod_template, resources, selector
from .trainjob import trainjob_spec

KUEUE_LABEL = "kueue.x-k8s.io/queue-name"
MPI_HOME = "/home/mpiuser"  # of the user that the image has for sshd (docker/cpu.Dockerfile)
CONFIG_IN_ENV = f"@{CONFIG_VARIABLE}"  # has `distopt train` read the configuration from a variable


def manifests(config: RunConfig) -> list[Manifest]:
    """Returns the objects to create, the one that stands for the run last."""
    kubernetes = config.launch.kubernetes
    return [
        _config_map(config),
        *([_network_policy(config)] if kubernetes.network_policy else []),
        *([_disruption_budget(config)] if kubernetes.disruption_budget else []),
        *_KINDS[kubernetes.kind](config),
    ]


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

    pod = pod_template(config, _torchrun_meeting_at(config, address), subdomain=config.name)
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(config),
        "spec": {**_indexed(config, pod), **_time_limit(config), **_ttl(config)},
    }
    return [service, job]


def _jobset(config: RunConfig) -> list[Manifest]:
    """A JobSet of one Indexed Job: when a pod fails for good, all start again."""
    address = f"{config.name}-workers-0-0.{config.name}:{config.launch.port or RENDEZVOUS_PORT}"
    pod = pod_template(config, _torchrun_meeting_at(config, address))
    job = {**_indexed(config, pod), "backoffLimit": 0, **_time_limit(config)}

    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(config),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": config.name},
            "failurePolicy": {"maxRestarts": config.launch.max_restarts, "rules": [_NOT_RESTARTED]},
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": job}}],
            **_ttl(config),
        },
    }
    return [jobset]


def _trainjob(config: RunConfig) -> list[Manifest]:
    """A TrainJob; the runtime sets PET_* and owns the pods, as far as its release has no fields for them."""
    launch = config.launch
    command = _agent(config, _torchrun(config, []))
    trainer = {
        "image": launch.kubernetes.image,
        "command": command,
        "env": env_entries(config),
        "numNodes": launch.num_hosts,
        "numProcPerNode": launch.workers,
        "resourcesPerNode": resources(config),
    }
    trainjob = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(config),
        "spec": trainjob_spec(config, trainer, command),
    }
    return [trainjob]


def _pytorchjob(config: RunConfig) -> list[Manifest]:
    """A PyTorchJob: a master and the other nodes as workers; the operator tells torchrun where it is by PET_*.

    Its policy `ExitCode` would end the job at an error that would come again, but starts pods again without a limit
    (kubeflow/trainer, issue 2045), also those that memory has killed, where `OnFailure` keeps to `backoffLimit`.
    """
    launch = config.launch
    rendezvous = [
        "--nnodes=$(PET_NNODES)",
        "--node-rank=$(PET_NODE_RANK)",
        "--master-addr=$(PET_MASTER_ADDR)",
        "--master-port=$(PET_MASTER_PORT)",
    ]

    pod = pod_template(config, _agent(config, _torchrun(config, rendezvous)), container=container_name(config))
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
        passed = sorted({entry["name"] for entry in env_entries(config)})
        command = [
            *("mpirun", "-n", str(size), "--hostfile", "/etc/mpi/hostfile"),
            *("--bind-to", "none", "--map-by", "slot"),
            *(option for name in passed for option in ("-x", name)),
        ]

    # The launcher starts ranks through the sshd of the workers and computes nothing itself, so it needs no GPU.
    launcher = pod_template(config, _agent(config, [*command, *_worker(config)]), gpus=False)
    sshd = ["/usr/sbin/sshd", "-De", "-f", f"{MPI_HOME}/.sshd_config"]
    replicas = {"Launcher": (1, launcher), "Worker": (launch.num_hosts, pod_template(config, sshd))}

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
    kubernetes = config.launch.kubernetes
    queue = {KUEUE_LABEL: kubernetes.queue} if kubernetes.queue else {}
    annotations = {"annotations": dict(kubernetes.annotations)} if kubernetes.annotations else {}
    return {
        "name": config.name,
        "namespace": kubernetes.namespace,
        "labels": {**kubernetes.labels, LABEL: config.name, **queue},
        **annotations,
    }


# A pod gets its configuration in a variable, and not as a file: a TrainJob of the first releases can mount nothing.


def _config_map(config: RunConfig) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(config),
        "data": {CONFIG_FILE: dump_yaml(config)},
    }


def _network_policy(config: RunConfig) -> Manifest:
    """The rendezvous of torch and the services of Horovod ask for no password, so only the run's pods may connect."""
    serve = config.serve
    last = None if serve.port is None else serve.port + config.launch.workers - 1
    served = [{"ports": [{"protocol": "TCP", "port": serve.port, "endPort": last}]}] if last is not None else []
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(config),
        "spec": {
            "podSelector": selector(config),
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": selector(config)}]}, *served],
        },
    }


def _disruption_budget(config: RunConfig) -> Manifest:
    pods = config.launch.num_hosts + (config.launch.kubernetes.kind == "mpijob")
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(config),
        "spec": {"minAvailable": pods, "selector": selector(config)},
    }


# A preemption, a drained node or a taint is no failure of the run; a configuration that is refused is refused again.
_NOT_COUNTED: Manifest = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
_REFUSED: Manifest = {
    "action": "FailJob",
    "onExitCodes": {"containerName": "worker", "operator": "In", "values": [USAGE_ERROR]},
}
_NOT_RESTARTED: Manifest = {
    "name": "refused",
    "action": "FailJobSet",
    "onJobFailureReasons": ["PodFailurePolicy"],
}


def _indexed(config: RunConfig, pod: Manifest) -> Manifest:
    hosts = config.launch.num_hosts
    return {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": config.launch.max_restarts,
        "podFailurePolicy": {"rules": [*([] if config.launch.max_preemptions == 0 else [_NOT_COUNTED]), _REFUSED]},
        "template": pod,
    }


def _time_limit(config: RunConfig) -> Manifest:
    limit = config.launch.kubernetes.time_limit_s
    return {"activeDeadlineSeconds": limit} if limit else {}


def _ttl(config: RunConfig) -> Manifest:
    ttl = config.launch.kubernetes.ttl_s
    return {} if ttl is None else {"ttlSecondsAfterFinished": ttl}


def _run_policy(config: RunConfig) -> Manifest:
    limits = {**_time_limit(config), **_ttl(config)}
    return {"backoffLimit": config.launch.max_restarts, "cleanPodPolicy": "None", **limits}


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
    return torchrun_argv(config, rendezvous, _worker(config), literal(config.launch.kubernetes.python))


def _worker(config: RunConfig) -> list[str]:
    return [literal(argument) for argument in worker_argv(config, config.launch.kubernetes.python, CONFIG_IN_ENV)]


def _agent(config: RunConfig, launcher: list[str], meet: str | None = None) -> list[str]:
    """Puts the agent in front: process 1 of a container ignores SIGTERM unless it handles it, and must reap orphans."""
    options = [*(["--meet", meet] if meet else []), "--run-dir", literal(str(config.run_dir))]
    python = literal(config.launch.kubernetes.python)
    return [python, "-m", "distopt.launch.worker.host_agent", *options, "--", *launcher]


def _without_restarts(pod: Manifest) -> Manifest:
    """Leaves the restart policy to the operator's own field."""
    return {**pod, "spec": {key: value for key, value in pod["spec"].items() if key != "restartPolicy"}}
