"""Takes care of one ResilientLLM: observe, decide, dispatch, again and again.

A round runs whenever something changed, in the cluster or with an engine, and now and then (:mod:`pace`), because some
things are a matter of time. No round waits for an engine. It shares nothing with kopf's handlers, whose retries wait
for up to minutes.
"""

from __future__ import annotations

import asyncio
import logging
import random
from base64 import b64decode
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
from pydantic import ValidationError
from resilientllm_api.crd import KIND

from resilientllm_operator import telemetry
from resilientllm_operator.actions import Action, Manifest, WriteStatus
from resilientllm_operator.budgets import budget_essence
from resilientllm_operator.conditions import unreadable
from resilientllm_operator.decide import decide
from resilientllm_operator.dispatch import Dispatcher
from resilientllm_operator.engines import EngineAddress, EngineHttp, Engines
from resilientllm_operator.kube import ApiError, KubeClient
from resilientllm_operator.names import Role, budget_name, slice_name, token_secret_name
from resilientllm_operator.observe import is_controlled_by, owner_of, view_object, view_pods, view_status
from resilientllm_operator.pace import is_settled, pause_seconds, spread
from resilientllm_operator.permit import NotPermitted, Permit
from resilientllm_operator.pods import TOKEN_KEY
from resilientllm_operator.routing import endpoints_essence, service_essence
from resilientllm_operator.store import Store
from resilientllm_operator.world import NodeView, ObjectView, Owner, PodView, World

logger = logging.getLogger(__name__)

MIN_PAUSE_SECONDS = 0.05
"""Events come in bursts; one round answers a whole burst."""
MAX_BACKOFF_SECONDS = 10.0
TOKEN_IS_FRESH = timedelta(seconds=60)
REFUSAL_IS_FRESH = timedelta(seconds=60)


class Caretaker:
    def __init__(
        self,
        kube: KubeClient,
        store: Store,
        namespace: str,
        name: str,
        uid: str,
        nodes: Mapping[str, NodeView],
        permit: Permit = lambda: None,
        http: EngineHttp | None = None,
        turn: AbstractAsyncContextManager[Any] | None = None,
    ) -> None:
        """``nodes``: all nodes as they are, by name; it changes with them. ``turn``: held for each round."""
        self.uid = uid
        self._nodes = nodes
        self._kube = kube
        self._store = store
        self._namespace = namespace
        self._name = name
        self._wake = asyncio.Event()
        self._settled = False
        self._last_view: ObjectView | None = None
        self._permit = permit
        self._dispatcher = Dispatcher(kube, store, namespace, name, uid, permit)
        self._http = http
        self._turn = turn or nullcontext()
        self._engines: Engines | None = None
        self._token: str | None = None
        self._token_owner = Owner.NOBODY
        self._token_read = datetime.min.replace(tzinfo=UTC)

    def wake(self) -> None:
        """Something of this object has changed."""
        self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled, or the object is gone."""
        failures = quiet = 0
        telemetry.RECOVERIES.begin(self._namespace, self._name)
        try:
            while True:
                async with self._turn:
                    obj = self._store.get(KIND, self._namespace, self._name)
                    if obj is None or obj["metadata"]["uid"] != self.uid:
                        return
                    self._wake.clear()
                    done = await self._round_survives(obj)
                failures = failures + 1 if done is None else 0
                quiet = quiet + 1 if done == 0 else 0
                await asyncio.sleep(MIN_PAUSE_SECONDS if not failures else min(2**failures / 4, MAX_BACKOFF_SECONDS))
                await self._pause(spread(pause_seconds(quiet, self._settled), random.random()))
        finally:
            self._forget_metrics()
            self._dispatcher.close()
            if self._engines is not None:
                await self._engines.close()

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._wake.wait(), seconds)
        except TimeoutError:
            return

    async def _round_survives(self, obj: Manifest) -> int | None:
        """One round: how many actions it took, or None if it failed.

        A failure is logged and counted, and the next round begins from the world again.
        """
        with telemetry.ROUND_SECONDS.time():
            try:
                done = await self._round(obj)
            except NotPermitted:
                telemetry.ROUNDS.labels("held").inc()
                return 0
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                what = str(error) or type(error).__name__
                logger.warning("%s/%s: the API server did not do it: %s", self._namespace, self._name, what)
                telemetry.ROUNDS.labels("error").inc()
                return None
            except Exception:
                # A defect of ours in the care for one object must not end the care for all others.
                logger.exception("%s/%s: a round failed unexpectedly", self._namespace, self._name)
                telemetry.ROUNDS.labels("defect").inc()
                return None
        telemetry.ROUNDS.labels("ok").inc()
        return done

    async def _round(self, raw: Manifest) -> int:
        if (why := self._permit()) is not None:
            raise NotPermitted(why)
        try:
            obj = self._view(raw)
        except ValidationError as error:
            return await self._report_unreadable(raw, error)
        if not obj.deleting:
            await self._read_token()
        world = self._observe(obj)
        self._settled = is_settled(obj.status, obj.generation)
        actions = decide(world, _now())
        telemetry.OBJECTS.put(self._namespace, self._name, obj.spec.instances, obj.status)
        for action in actions:
            telemetry.DECISIONS.labels(type(action).__name__).inc()
        for action in actions:
            await self._perform(action)
            if isinstance(action, WriteStatus):
                telemetry.OBJECTS.put(self._namespace, self._name, obj.spec.instances, action.status)
                telemetry.RECOVERIES.note(self._namespace, self._name, obj.status, action.status)
        return len(actions)

    async def _perform(self, action: Action) -> None:
        with telemetry.acting(action):
            await self._dispatcher.perform(action, self._engines)

    def _forget_metrics(self) -> None:
        telemetry.OBJECTS.forget(self._namespace, self._name)
        if self._store.get(KIND, self._namespace, self._name) is None:
            telemetry.RECOVERIES.forget(self._namespace, self._name)

    def _view(self, raw: Manifest) -> ObjectView:
        """Raises ValidationError for a spec that this version cannot read."""
        before = self._last_view
        if before is not None and before.resource_version == raw["metadata"]["resourceVersion"]:
            return before
        view = self._last_view = view_object(raw)
        if before is not None and before.spec == view.spec:
            view.spec_hashes.update(before.spec_hashes)
        return view

    def _observe(self, obj: ObjectView) -> World:
        pods = view_pods(self._store.of("Pod", self._namespace, self._name), self.uid)
        self._listen_to_engines(obj, pods)
        service = self._store.get("Service", self._namespace, self._name)
        endpoints = self._store.get("EndpointSlice", self._namespace, slice_name(self._name))
        fresh = {name: it for name, it in self._dispatcher.refusals.items() if _now() - it.at < REFUSAL_IS_FRESH}
        self._dispatcher.refusals = fresh
        return World(
            object=obj,
            pods=pods,
            nodes=self._nodes,
            engines=self._engines.views if self._engines else {},
            token=self._token_owner,
            service_owner=owner_of(service, self.uid),
            service=service_essence(service) if service else None,
            endpoints_owner=owner_of(endpoints, self.uid),
            endpoints=endpoints_essence(endpoints) if endpoints else None,
            budgets=self._budgets(obj),
            refusals=dict(fresh),
        )

    def _budgets(self, obj: ObjectView) -> dict[str, Manifest | None]:
        names = (budget_name(self._name, stage) for stage in (None, *range(obj.spec.stages)))
        known = {name: self._store.get("PodDisruptionBudget", self._namespace, name) for name in names}
        return {
            name: budget_essence(budget) if is_controlled_by(budget, self.uid) else None
            for name, budget in known.items()
            if budget is not None
        }

    def _listen_to_engines(self, obj: ObjectView, pods: tuple[PodView, ...]) -> None:
        if self._engines is None:
            return
        addresses = [
            EngineAddress(pod.uid, pod.ip) for pod in pods if pod.slot.role is Role.ENGINE and pod.ip and not pod.ended
        ]
        remembered = {
            each.verified.split("/")[0]: each.verified for each in obj.status.instances if each.verified is not None
        }
        self._engines.keep(addresses, remembered)

    async def _read_token(self) -> None:
        """The token that engines know us by. Read from time to time: the Secret may be deleted, or replaced."""
        if self._token is not None and _now() - self._token_read < TOKEN_IS_FRESH:
            return
        secret = await self._kube.get("Secret", self._namespace, token_secret_name(self._name))
        self._token_read = _now()
        self._token_owner = owner_of(secret, self.uid)
        token = None
        if secret is not None and is_controlled_by(secret, self.uid):
            token = b64decode(secret.get("data", {}).get(TOKEN_KEY, "")).decode() or None
        if token != self._token:
            if self._engines is not None:
                await self._engines.close()
            self._token = token
            self._engines = Engines(token, self.wake, self._http) if token else None

    async def _report_unreadable(self, raw: Manifest, error: ValidationError) -> int:
        before = view_status(raw)
        words = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        after = unreadable(before, raw["metadata"].get("generation", 1), words, _now())
        if after == before:
            return 0
        await self._perform(WriteStatus(after, raw["metadata"]["resourceVersion"]))
        return 1


def _now() -> datetime:
    return datetime.now(UTC)
