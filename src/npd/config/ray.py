"""Options of generations that are made on a Ray cluster."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from npd.config.base import Section

MOST_ACTORS = 65536
NATURAL = ("CPU", "GPU", "memory", "object_store_memory")


class RayConfig(Section):
    address: str | None = None
    """Cluster to join: HOST:PORT, or auto for the one that this machine is a node of. null: one of this machine alone is
    started, and stopped with the run."""
    actors: int | None = Field(default=None, ge=1, le=MOST_ACTORS)
    """Processes that make generations; those that no node has room for wait for one. null: as many as the cluster has room
    for, nodes that join later included; on this machine alone one for each GPU that does not train, or one."""
    num_gpus: float | None = Field(default=None, ge=0, le=1024)
    """GPUs of an actor, also a fraction; its models share them. null: 1 where the cluster has GPUs, else 0."""
    num_cpus: float | None = Field(default=None, ge=0, le=65536)
    """CPU cores of an actor. null: 1; on this machine alone, without GPUs, what the trainer leaves, divided among them."""
    resources: dict[str, float] = {}
    """Custom resources of an actor, such as {rollout: 1}: only nodes that were started with them take it."""
    memory: int | None = Field(default=None, ge=1, le=1 << 50)
    """Bytes of main memory that Ray sets aside for an actor: no node takes more of them than fit. null: none."""
    object_store_memory: int | None = Field(default=None, ge=80 << 20, le=1 << 50)
    """Bytes of the object store of a cluster that is started here; what does not fit is spilled to disk. null: Ray's own
    choice, 30% of the memory."""
    runtime_env: dict[str, Any] = {}
    """Ray's runtime environment of an actor, such as {conda: npd} or {pip: ["npd[ray]"]}; it has to hold this version of npd.
    """

    @field_validator("address")
    @classmethod
    def _reachable(cls, value: str | None) -> str | None:
        if value is not None and ("://" in value or (value != "auto" and ":" not in value)):
            raise ValueError(
                "must be HOST:PORT or auto: the trainer's machine has to be a node of the cluster itself (`ray start "
                "--address HOST:PORT`), as objects go from node to node"
            )
        return value

    @field_validator("resources")
    @classmethod
    def _custom(cls, value: dict[str, float]) -> dict[str, float]:
        for name, count in value.items():
            if name in NATURAL or not name:
                raise ValueError(f"names {name!r}, which num_cpus, num_gpus and memory are for")
            if not 0 < count <= 1e6 or (count > 1 and count != int(count)):
                raise ValueError(f"wants {count:g} of {name!r}; give a fraction of 1, or a whole number")
        return value

    @field_validator("num_gpus")
    @classmethod
    def _whole(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("must be a fraction of 1, or a whole number")
        return value

    @model_validator(mode="after")
    def _fits(self) -> RayConfig:
        if self.address is not None and self.object_store_memory is not None:
            raise ValueError(
                "object_store_memory is of a cluster that npd starts, but address names one that is there; it has what "
                "`ray start --object-store-memory` gave it"
            )
        if self.address is None and self.resources:
            raise ValueError("resources are of a cluster's nodes, but address names none; give address, or leave them out")
        return self
