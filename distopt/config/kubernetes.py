"""The `launch.kubernetes` section: the pods of a run."""

from __future__ import annotations

from posixpath import normpath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from distopt.config.base import Section
from distopt.config.values import AS_TEXT, ENV_NAME, DnsLabel, Text

# What Kubernetes itself checks, in its own notation.
Object = dict[str, Any]

# The rules of Kubernetes for names and amounts (apimachinery: validation.go, quantity.go).
_SUBDOMAIN = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
_QUALIFIED = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
QUANTITY_PATTERN = r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)(m|k|[MGTPE]|[KMGTPE]i|[eE][+-]?[0-9]{1,2})?$"
RESOURCE_PATTERN = rf"^(cpu|memory|ephemeral-storage|hugepages-[0-9]+[KMG]i|{_SUBDOMAIN}/{_QUALIFIED})$"
NAME_PATTERN = rf"^{_SUBDOMAIN}$"
LABEL_KEY_PATTERN = rf"^({_SUBDOMAIN}/)?{_QUALIFIED}$"
LABEL_VALUE_PATTERN = rf"^({_QUALIFIED})?$"

Quantity = Annotated[Text, Field(pattern=QUANTITY_PATTERN)]
ResourceName = Annotated[str, Field(pattern=RESOURCE_PATTERN)]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=253)]
LabelKey = Annotated[str, Field(pattern=LABEL_KEY_PATTERN, max_length=317)]
LabelValue = Annotated[Text, Field(pattern=LABEL_VALUE_PATTERN)]


def _without_parents(path: str) -> str:
    if ".." in path.split("/"):
        raise ValueError(f"found {path!r}, expected a path without `..`")
    return path


def _mount_path(path: str) -> str:
    normal = "/" + normpath(_without_parents(path)).lstrip("/")
    if normal == "/":
        raise ValueError(f"found {path!r}, expected a folder below /")
    return normal


NoParents = AfterValidator(_without_parents)


class VolumeConfig(Section):
    """A volume that is mounted in every pod: one of `claim`, `config_map`, `empty_dir`, `ephemeral` and `host_path`."""

    path: Annotated[str, Field(pattern=r"^/[^:]*$"), AfterValidator(_mount_path)]
    """The path at which it is mounted."""
    claim: Name | None = None
    """The name of a PersistentVolumeClaim."""
    config_map: Name | None = None
    """The name of a ConfigMap, each key of which is a file."""
    empty_dir: Quantity | None = None
    """The size of a folder on the pod's node that ends with the pod, such as `10Gi`."""
    ephemeral: Quantity | None = None
    """The size of a volume that is made for each pod, and ends with it."""
    storage_class: Name | None = None
    """The storage class of an `ephemeral` volume; null is the cluster's default."""
    host_path: Annotated[str, Field(pattern=r"^/"), NoParents] | None = None
    """A folder of the node. Pods that have one are not *restricted*."""
    sub_path: Annotated[str, Field(pattern=r"^[^/]"), NoParents] | None = None
    """The folder of the volume to mount in place of all of it."""
    read_only: bool = False
    """Whether pods may only read it."""

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> VolumeConfig:
        kinds = ("claim", "config_map", "empty_dir", "ephemeral", "host_path")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none'} of {', '.join(kinds)}, expected one of them")
        if self.storage_class is not None and self.ephemeral is None:
            raise ValueError("storage_class: only an ephemeral volume has one; a claim has its own")
        return self


class SecretReference(Section):
    """A value in a Kubernetes Secret."""

    secret: Name
    """The Secret's name."""
    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    """The key within it."""


class KubernetesConfig(Section):
    """The pods of a run. Their root file system is read-only, and their user has no privileges."""

    kind: Literal["job", "jobset", "trainjob", "pytorchjob", "mpijob"] = "job"
    """`job` needs no operator, the other kinds JobSet or Kubeflow's trainer, training or MPI operator."""
    image: Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9._/:@-]*$")] | None = None
    """The image, with distopt and your code installed; required."""
    namespace: DnsLabel = "default"
    """The namespace."""
    context: str | None = None
    """The context of your kubeconfig; null uses the current one."""
    python: Annotated[str, Field(min_length=1)] = "python"
    """The image's Python."""
    cpu: Quantity = "1"
    """Processor cores of a pod, in Kubernetes' notation; the threads of its workers follow from them."""
    memory: Quantity = "4Gi"
    """Memory of a pod: a number of bytes, or one with a unit such as `M` or `Gi`."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of a pod."""
    gpu_resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")] = "nvidia.com/gpu"
    """The cluster's resource name for GPUs."""
    resources: dict[ResourceName, Quantity] = Field(default_factory=dict)
    """Further resources of a pod, such as `rdma/hca_shared_devices_a: 1` or `ephemeral-storage: 20Gi`."""
    requests: dict[ResourceName, Quantity] = Field(default_factory=dict)
    """What a pod requests where that differs from its limits, such as `cpu: 500m`."""
    limits: dict[ResourceName, Quantity | None] = Field(default_factory=dict)
    """Limits where they differ from `cpu` and `memory`; null is none, such as `cpu: null`."""
    volumes: list[VolumeConfig] = Field(default_factory=list)
    """Volumes for data and for the run directory, which must be on one that all pods can write to and that stays."""
    secrets: dict[str, SecretReference] = Field(default_factory=dict)
    """Environment variables of the workers with values from Secrets."""
    service_account: Name | None = None
    """The service account; its token is not mounted."""
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels that nodes must have."""
    tolerations: list[Object] = Field(default_factory=list)
    """Taints of nodes that pods tolerate, in Kubernetes' notation: `[{key: gpu, operator: Exists}]`."""
    affinity: Object = Field(default_factory=dict)
    """Affinity of pods to nodes and to one another, in Kubernetes' notation."""
    topology_spread: list[Object] = Field(default_factory=list)
    """Constraints on how pods spread, in Kubernetes' notation; without a `labelSelector` they mean the run's pods."""
    priority_class: Name | None = None
    """The priority class of pods."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Further labels of the run's objects and pods."""
    annotations: dict[LabelKey, Text] = Field(default_factory=dict)
    """Annotations of the run's objects and pods."""
    host_network: bool = False
    """Whether pods use the network of their node, as some RDMA devices need; such pods are not *restricted*."""
    init_containers: list[Object] = Field(default_factory=list)
    """Containers that run before the workers, in Kubernetes' notation. Image, volumes, resources and security context
    are by default those of the workers."""
    pod: Object = Field(default_factory=dict)
    """What else the pods' spec has, in Kubernetes' notation, merged into what distopt renders: lists whose items have a
    name (containers, volumes, env) item by item, null removes."""
    queue: DnsLabel | None = None
    """The Kueue local queue."""
    time_limit_s: Annotated[int, Field(ge=1)] | None = None
    """Seconds after which Kubernetes ends the run."""
    ttl_s: Annotated[int, Field(ge=0)] | None = None
    """Seconds after its end at which the run's objects are deleted; null keeps them until `distopt stop`."""
    network_policy: bool = False
    """Whether a NetworkPolicy lets only the run's own pods, and those who ask `serve.port`, connect to its pods."""
    disruption_budget: bool = False
    """Whether a PodDisruptionBudget keeps nodes of the run from being drained while it runs."""
    user: Annotated[int, Field(ge=1, le=2147483647)] = 1000
    """Numeric user and group id of the processes; never root."""
    image_pull_secrets: list[Name] = Field(default_factory=list)
    """Secrets with which the image is pulled."""
    runtime: DnsLabel = "torch-distributed"
    """The ClusterTrainingRuntime of a `trainjob`."""
    trainer_version: Annotated[Literal["2.0", "2.1", "2.2", "2.3"] | None, AS_TEXT] = None
    """The release of Kubeflow's trainer, by whose fields a `trainjob` describes its pods; null uses those that all
    releases share, which leave the pods to the runtime."""

    @field_validator("secrets")
    @classmethod
    def _name_variables(cls, secrets: dict[str, SecretReference]) -> dict[str, SecretReference]:
        for name in secrets:
            if not ENV_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of an environment variable")
        return secrets

    @field_validator("volumes")
    @classmethod
    def _have_different_paths(cls, volumes: list[VolumeConfig]) -> list[VolumeConfig]:
        paths = [volume.path for volume in volumes]
        repeated = next((path for path in paths if paths.count(path) > 1), None)
        if repeated is not None:
            raise ValueError(f"found two volumes with the path {repeated}, expected a path of its own for each")
        return volumes
