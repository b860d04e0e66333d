"""Whom this stage serves: home, a guest, and instances that it may have to serve. One state under one lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from resilientllm_worker.protocol.messages import PROTOCOL_VERSION, ReplicaHello, Stamp
from resilientllm_worker.replication import tcp
from resilientllm_worker.replication.sender import Replicator
from resilientllm_worker.stage.tenant import Tenant
from resilientllm_worker.tenancy.home import HomeBlocks
from resilientllm_worker.tenancy.pool import Pool

if TYPE_CHECKING:
    from resilientllm_worker.replication.channel import ReplicaChannel
    from resilientllm_worker.replication.store import BlockStore
    from resilientllm_worker.stage.model import KVCache, Model
    from resilientllm_worker.tenancy.blocks import Blocks


class Tenants:
    """Every method and attribute, and those of each tenant, under `changed`, except what never changes."""

    def __init__(self, model: Model, instance: int, stage: int, token: bytes) -> None:
        self.instance = instance
        """Home's number."""
        self.stage = stage
        self.place = f"stage {instance}.{stage}"
        """For people."""
        self.changed = threading.Condition()
        """Notified of whatever somebody may wait for: a step at hand, a tenant that left, an end."""
        self.guest: int | None = None
        """The instance that has the guest's blocks."""
        self.pool: Pool | None = None
        self.store: BlockStore | None = None
        """None: what this stage holds cannot be copied."""
        self._model = model
        self._token = token
        self._by_instance: dict[int, Tenant] = {}

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._by_instance.values())

    def of(self, instance: int) -> Tenant:
        """It has blocks from when the KV cache is there."""
        tenant = self._by_instance.get(instance)
        if tenant is None:
            tenant = self._by_instance[instance] = Tenant(instance, is_home=instance == self.instance)
        if tenant.blocks is None and self._model.kv is not None:
            self._give_blocks(tenant, self._model.kv)
        return tenant

    def has_room_for(self, tenant: Tenant) -> bool:
        """There are blocks for one guest at a time."""
        return tenant.is_home or self.guest in (None, tenant.instance)

    def needed_by(self) -> list[int]:
        return [tenant.instance for tenant in self if tenant.needed]

    def _give_blocks(self, tenant: Tenant, kv: KVCache) -> None:
        if self.pool is None:
            self.pool = Pool(kv.home_blocks, kv.pool_blocks)
            self.store = self._model.block_store()
        blocks: Blocks = HomeBlocks(kv.home_blocks) if tenant.is_home else self.pool.tenant(tenant.instance)
        tenant.blocks, store = blocks, self.store
        if store is None:
            return

        def hello(stamp: Stamp) -> ReplicaHello:
            return ReplicaHello(PROTOCOL_VERSION, tenant.instance, self.stage, stamp, store.layout, store.block_bytes)

        tenant.replicator = Replicator(store, self._connect_replicas, hello, lambda: blocks.sealed_count)

    def _connect_replicas(self, address: str, hello: ReplicaHello) -> ReplicaChannel:
        return tcp.connect(address, self._token, hello)
