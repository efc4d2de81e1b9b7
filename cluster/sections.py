"""Configuration of `run`, `cluster` and `k8s`: where a run lives and what it may use."""

import re
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from data_service.object_store import s3_variables
from data_service.settings import Section

__all__ = ["ClusterConfig", "K8sConfig", "NodeConfig", "PodConfig", "RunSection", "S3Config", "SpotConfig"]


class S3Config(Section):
    """How `s3://` is reached, wherever the run reads or writes it. Secrets come from the environment or the profile."""

    endpoint_url: str | None = None
    """Address of the store, such as `https://s3.example:9000`; by default AWS_ENDPOINT_URL_S3, or else AWS itself."""
    region: str | None = Field(None, min_length=1)
    """Region of the buckets; by default the profile's, or AWS_DEFAULT_REGION."""
    profile: str | None = Field(None, min_length=1)
    """Profile of the AWS configuration files, which every machine of the run must have. It goes before the keys in
    AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""

    @field_validator("endpoint_url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{value!r} is not an address. Write it as https://HOST:PORT or http://HOST:PORT.")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "it holds a user name or a password. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
            )
        return value

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to reach `s3://` so."""
        return s3_variables(self.endpoint_url, self.region, self.profile)


class RunSection(Section):
    """Identity of the run."""

    name: str
    """Name of the run: its folder, and the default name of the served model."""
    storage: str = "./runs"
    """Folder (relative to the YAML file) or `s3://bucket/prefix` that every node can reach."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides initial weights and the order of rows."""
    s3: S3Config = S3Config()
    """How `s3://` is reached."""

    @field_validator("name")
    @classmethod
    def _name_is_a_label(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?", value):
            raise ValueError(
                f"{value!r} is not a run name. Use 1 to 47 lower-case letters, digits and dashes, "
                "starting and ending with a letter or digit."
            )
        return value


class NodeConfig(Section):
    """What a node offers."""

    slots: int = Field(1, ge=1)
    """Ranks a node holds."""
    cpus_per_slot: float = Field(1, gt=0)
    """Logical CPUs a rank takes."""
    gpus: int = Field(0, ge=0)
    """GPUs of a node; 0, or one for each slot."""

    @model_validator(mode="after")
    def _gpus_match(self) -> Self:
        if self.gpus not in (0, self.slots):
            raise ValueError(
                f"gpus={self.gpus} with slots={self.slots}: a rank drives one GPU. Set gpus to 0 or {self.slots}."
            )
        return self


class ClusterConfig(Section):
    """The machines."""

    address: str = "auto"
    """`auto` joins the Ray of this job or of RAY_ADDRESS, else starts local nodes; `local` always starts them;
    anything else is the address of a running Ray head, `host:port`."""
    nodes: int = Field(1, ge=1)
    """Nodes the run wants."""
    min_nodes: int = Field(1, ge=1)
    """Fewest nodes an elastic run goes on with."""
    node: NodeConfig = NodeConfig()
    """What each node offers."""
    elastic: bool = True
    """Go on with fewer nodes after a loss; otherwise the run fails."""
    wait_s: float = Field(600.0, ge=0)
    """How long to wait for missing slots on a cluster that is not local."""
    max_program_failures: int = Field(0, ge=0)
    """How often a run restarts after a rank failed by itself, with its node alive."""
    lease_s: float = Field(10.0, ge=2)
    """A node agent that hears nothing from the controller for this long ends its ranks and itself."""
    object_store_bytes: int = Field(128 * 2**20, ge=80 * 2**20)
    """Ray's object store on each local node."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes={self.min_nodes} exceeds nodes={self.nodes}. Lower min_nodes.")
        return self

    @property
    def total_slots(self) -> int:
        """Slots of all wanted nodes."""
        return self.nodes * self.node.slots


class PodConfig(Section):
    """Size of a pod."""

    cpus: int = Field(2, ge=1)
    """CPUs, requested and limited."""
    memory_bytes: int = Field(4 * 2**30, ge=2**29)
    """Memory, requested and limited."""


class SpotConfig(Section):
    """How Kubernetes nodes of the spot group are recognised."""

    node_selector: dict[str, str] = {}
    """Labels of spot nodes, as the cloud sets them. Without any there is no spot group."""
    toleration_key: str | None = None
    """Taint of spot nodes to tolerate."""


class K8sConfig(Section):
    """Rendering for KubeRay."""

    namespace: str = "stormjib"
    """Namespace of all objects."""
    image: str = "stormjib:latest"
    """Container image of head and workers; pin it by digest in production."""
    storage_claim: str | None = None
    """ReadWriteMany PersistentVolumeClaim mounted where `run.storage` points; not needed for `s3://`."""
    secret_env: str | None = None
    """Secret whose keys become environment variables (object-store credentials, the API key)."""
    spot: SpotConfig = SpotConfig()
    """The spot worker group."""
    head: PodConfig = PodConfig()
    """The head pod; ranks never run there."""
    data: PodConfig = PodConfig()
    """A pod of the CPU group."""
    data_nodes: int = Field(1, ge=1)
    """Pods of the CPU group that runs the data service."""
    slot_memory_bytes: int = Field(4 * 2**30, ge=2**29)
    """Memory of a worker pod for each of its slots, the object store apart."""
    replica_memory_bytes: int = Field(4 * 2**30, ge=2**29)
    """Memory of a pod that holds one engine replica."""
    termination_grace_s: int = Field(60, ge=30)
    """Grace period of the pods; longer than drain and snapshot."""
    serve_step: int | None = Field(None, ge=0)
    """Training step whose export the RayService serves; by default the highest there is when the application starts.
    Another step updates the RayService in place."""
    mode: Literal["train", "serve", "all"] = "all"
    """Which objects to render: the RayJob, the RayService, or both."""
