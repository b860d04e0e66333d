"""A replica and its Lease, with a stand-in for the API server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from resilientllm_operator.election import Election, manifest_of, record_of
from resilientllm_operator.kube import ApiError, KubeClient
from resilientllm_operator.lease import Candidate, Record, Terms

from tests.operator.test_lease import DATE

QUICK = Terms(duration_seconds=1, act_seconds=0.6, retry_seconds=0.05)


class Api(KubeClient):
    """Keeps one Lease, and can be away."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.away = False
        self.version = 0

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        self._answer()
        return deepcopy(self.lease)

    async def create(self, kind: str, manifest: dict[str, Any]) -> dict[str, Any]:
        self._answer()
        if self.lease is not None:
            raise ApiError(409, "AlreadyExists", "")
        return self._keep(manifest)

    async def update(self, kind: str, manifest: dict[str, Any]) -> dict[str, Any]:
        self._answer()
        if self.lease is None:
            raise ApiError(404, "NotFound", "")
        if manifest["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "")
        return self._keep(manifest)

    @property
    def holder(self) -> str | None:
        return self.lease["spec"].get("holderIdentity") if self.lease else None

    def _answer(self) -> None:
        if self.away:
            raise TimeoutError

    def _keep(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        self.lease = deepcopy(manifest)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return deepcopy(self.lease)


class Replica:
    def __init__(self, api: Api, name: str) -> None:
        self.told: list[bool] = []
        self.election = Election(api, "system", "lease", self.told.append, Candidate(name, QUICK))


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.01)


def test_one_of_two_leads_and_the_other_follows_at_once_when_it_ends() -> None:
    async def run() -> None:
        api = Api()
        first, second = Replica(api, "first"), Replica(api, "second")
        async with second.election:
            async with first.election:
                await until(lambda: first.election.leads or second.election.leads)
                leader, other = (first, second) if first.election.leads else (second, first)
                assert (leader.told, other.told) == ([True], [])
                assert api.holder == leader.election.leader
            # Whoever led, the first has ended now.
            await until(lambda: second.election.leads)
            assert first.told in ([], [True, False])
            assert not first.election.leads
        assert api.holder is None

    asyncio.run(run())


def test_a_holder_that_cannot_renew_stops_before_another_may_begin() -> None:
    async def run() -> None:
        api = Api()
        replica = Replica(api, "me")
        async with replica.election:
            await until(lambda: replica.election.leads)
            api.away = True
            await until(lambda: replica.told == [True, False])
            assert not replica.election.leads
            api.away = False
            await until(lambda: replica.told == [True, False, True])

    asyncio.run(run())


def test_a_lease_that_a_person_deleted_is_made_again() -> None:
    async def run() -> None:
        api = Api()
        replica = Replica(api, "me")
        async with replica.election:
            await until(lambda: replica.election.leads)
            api.lease = None
            await until(lambda: api.holder == "me" and replica.election.leads)

    asyncio.run(run())


def test_who_is_robbed_of_the_lease_stops() -> None:
    async def run() -> None:
        api = Api()
        replica = Replica(api, "me")
        async with replica.election:
            await until(lambda: replica.election.leads)
            assert api.lease is not None
            api._keep(api.lease | {"spec": api.lease["spec"] | {"holderIdentity": "robber"}})
            await until(lambda: replica.told == [True, False])
        assert api.holder == "robber", "only what is ours is given back"

    asyncio.run(run())


@pytest.mark.parametrize("holder", ["me", ""])
def test_a_record_survives_its_manifest(holder: str) -> None:
    record = Record(holder, 15, DATE, DATE, transitions=2, version="5")
    assert record_of(manifest_of(record, "system", "lease")) == record


def test_a_lease_without_anything_is_read() -> None:
    assert record_of({"metadata": {"resourceVersion": "1"}}).holder == ""
