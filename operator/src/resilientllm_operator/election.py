"""Keeps this replica's part in the election: reads the Lease, writes it, and says when that changes who may act.

The ``kubernetes`` package has an election, too. It blocks a thread, reads the clock of the day, which may be set back,
and never gives a lease back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Self

import aiohttp

from resilientllm_operator import telemetry
from resilientllm_operator.kube import ApiError, KubeClient
from resilientllm_operator.lease import Candidate, Record, Terms
from resilientllm_operator.names import MANAGER

logger = logging.getLogger(__name__)

JITTER = 0.2
"""Replicas that were started together shall not look together for ever."""
GIVE_BACK_SECONDS = 3.0
"""For the last write of a process that was told to end."""


def clock() -> float:
    """Seconds that also pass while the machine sleeps, which those of ``time.monotonic`` do not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def unique_name() -> str:
    """The pod's name, and which of its lives this is."""
    return f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"


class Election:
    """``async with`` it: takes part until the block ends, and gives the lease back then."""

    def __init__(
        self,
        kube: KubeClient,
        namespace: str,
        name: str,
        on_change: Callable[[bool], None],
        candidate: Candidate | None = None,
    ) -> None:
        """``on_change`` is called with whether this replica leads now."""
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._on_change = on_change
        self._me = candidate or Candidate(unique_name())
        self._led = False
        self._task: asyncio.Task[None] | None = None

    @property
    def leads(self) -> bool:
        """Whether this replica may act at this very moment."""
        return self._me.leads(clock())

    @property
    def leader(self) -> str:
        """The name of the replica that holds the lease, as far as is known; empty if nobody does."""
        return self._me.seen.holder if self._me.seen else ""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="election")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        with contextlib.suppress(ApiError, aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(GIVE_BACK_SECONDS):
                await self._give_back()

    async def _run(self) -> None:
        terms = self._me.terms
        failing = False
        while True:
            try:
                async with asyncio.timeout(terms.act_seconds / 2):
                    await self._look_and_write()
                failing = False
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                level = logging.DEBUG if failing else logging.WARNING
                logger.log(level, "could not read or renew the lease: %s", str(error) or type(error).__name__)
                failing = True
            self._tell()
            pause = terms.retry_seconds * (1 + JITTER * random.random())
            if self._led:
                # Not later than the moment from which this replica may not act: its caretakers end then.
                pause = min(pause, max(self._me.seconds_to_act(clock()), 0.0))
            await asyncio.sleep(pause)

    async def _look_and_write(self) -> None:
        if not self.leads:
            # A holder knows what it wrote, and learns from a conflict if somebody else did since.
            found = await self._kube.get("Lease", self._namespace, self._name)
            self._me = self._me.observe(record_of(found) if found else None, clock())
        wanted = self._me.decide(clock(), datetime.now(UTC))
        if wanted is not None:
            await self._write(wanted)

    async def _write(self, record: Record) -> None:
        begun = clock()
        manifest = manifest_of(record, self._namespace, self._name)
        try:
            if record.version:
                written = await self._kube.update("Lease", manifest)
            else:
                written = await self._kube.create("Lease", manifest)
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            found = await self._kube.get("Lease", self._namespace, self._name)
            self._me = self._me.observe(record_of(found) if found else None, clock())
        else:
            self._me = self._me.wrote(record_of(written), begun)

    async def _give_back(self) -> None:
        record = self._me.give_back(datetime.now(UTC))
        if record is not None:
            self._me = replace(self._me, renewed_at=None)
            self._tell()
            await self._kube.update("Lease", manifest_of(record, self._namespace, self._name))
            logger.info("gave the lease back")

    def _tell(self) -> None:
        leads = self.leads
        telemetry.LEADER.set(leads)
        if leads != self._led:
            self._led = leads
            what = "holds the lease, and acts" if leads else "does not hold the lease any more, and does nothing"
            logger.info("%s %s (%s/%s)", self._me.name, what, self._namespace, self._name)
            self._on_change(leads)


def record_of(lease: dict[str, Any]) -> Record:
    """Another program's lease, or a person's, may lack anything."""
    spec = lease.get("spec", {})
    long_ago = "1970-01-01T00:00:00Z"
    return Record(
        holder=spec.get("holderIdentity") or "",
        duration_seconds=spec.get("leaseDurationSeconds") or Terms().duration_seconds,
        acquired=datetime.fromisoformat(spec.get("acquireTime") or long_ago),
        renewed=datetime.fromisoformat(spec.get("renewTime") or long_ago),
        transitions=spec.get("leaseTransitions") or 0,
        version=lease["metadata"]["resourceVersion"],
    )


def manifest_of(record: Record, namespace: str, name: str) -> dict[str, Any]:
    version = {"resourceVersion": record.version} if record.version else {}
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/name": "resilientllm", "app.kubernetes.io/managed-by": MANAGER},
            **version,
        },
        "spec": {
            **({"holderIdentity": record.holder} if record.holder else {}),
            "leaseDurationSeconds": record.duration_seconds,
            "acquireTime": _micro(record.acquired),
            "renewTime": _micro(record.renewed),
            "leaseTransitions": record.transitions,
        },
    }


def _micro(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
