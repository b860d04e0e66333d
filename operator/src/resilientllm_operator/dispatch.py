"""Dispatch: does to the world what was decided. Every action may be repeated; none waits for a later one."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from base64 import b64encode
from datetime import UTC, datetime

from resilientllm_api.crd import API_VERSION, KIND, ResilientLLMStatus

from resilientllm_operator import telemetry
from resilientllm_operator.actions import (
    Action,
    Announce,
    ApplyBudget,
    ApplyEndpoints,
    ApplyService,
    CreatePod,
    CreateToken,
    DeletePod,
    Manifest,
    PublishPlan,
    VerifyEngine,
    WriteStatus,
)
from resilientllm_operator.engines import EngineAddress, EngineError, Engines
from resilientllm_operator.kube import ApiError, KubeClient
from resilientllm_operator.names import MANAGER
from resilientllm_operator.permit import NotPermitted, Permit
from resilientllm_operator.pods import TOKEN_KEY
from resilientllm_operator.store import Store
from resilientllm_operator.world import Refusal

logger = logging.getLogger(__name__)

VERIFY_AGAIN_SECONDS = 1.0
PUBLISH_AGAIN_SECONDS = 3.0
"""An engine that starts takes its plan at once, and reports it when its scheduler runs."""
_REFUSED = {400, 403, 422}
"""Bad manifest, quota or policy: asking again at once changes nothing."""


class Dispatcher:
    """Carries out the actions of one object."""

    def __init__(
        self, kube: KubeClient, store: Store, namespace: str, name: str, uid: str, permit: Permit = lambda: None
    ) -> None:
        self._kube = kube
        self._permit = permit
        self._store = store
        self._namespace = namespace
        self._name = name
        self._uid = uid
        self._verifications: dict[str, asyncio.Task[None]] = {}
        self._publications: dict[str, asyncio.Task[None]] = {}
        self._published: dict[str, tuple[int, float]] = {}
        """By pod uid: the version that was taken last, and when (monotonic clock)."""
        self.refusals: dict[str, Refusal] = {}
        """Pods that the API server refuses to make, by name."""

    async def perform(self, action: Action, engines: Engines | None) -> None:
        """Raises ApiError or aiohttp's errors if the API server does not do it; the round ends then.

        Raises NotPermitted, and does nothing, if this replica may not act any more.
        """
        if (why := self._permit()) is not None:
            raise NotPermitted(why)
        match action:
            case CreatePod():
                await self._create_pod(action)
            case DeletePod(name, uid, why, grace_seconds):
                logger.info("%s/%s: deletes pod %s: %s", self._namespace, self._name, name, why)
                ending = await self._kube.delete("Pod", self._namespace, name, uid, grace_seconds)
                if ending is not None:
                    self._store.put("Pod", ending)
            case ApplyService(manifest):
                self._store.put("Service", await self._kube.apply("Service", manifest))
            case ApplyEndpoints(manifest):
                self._store.put("EndpointSlice", await self._kube.apply("EndpointSlice", manifest))
            case ApplyBudget(manifest):
                self._store.put("PodDisruptionBudget", await self._kube.apply("PodDisruptionBudget", manifest))
            case CreateToken(manifest):
                await self._create_token(manifest)
            case WriteStatus(status, version):
                await self._write_status(status, version)
            case Announce():
                await self._announce(action)
            case PublishPlan():
                if engines is not None:
                    self._publish(engines, action)
            case VerifyEngine():
                if engines is not None:
                    self._verify(engines, action)

    async def _write_status(self, status: ResilientLLMStatus, resource_version: str) -> None:
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            # The uid is a precondition: the status of a deleted object must not land on its namesake.
            "metadata": {
                "name": self._name,
                "namespace": self._namespace,
                "uid": self._uid,
                "resourceVersion": resource_version,
            },
            "status": status.model_dump(mode="json", by_alias=True, exclude_none=True),
        }
        self._store.put(KIND, await self._kube.apply(KIND, body, subresource="status"))

    def close(self) -> None:
        for task in (*self._verifications.values(), *self._publications.values()):
            task.cancel()

    async def _create_pod(self, action: CreatePod) -> None:
        try:
            self._store.put("Pod", await self._kube.create("Pod", action.manifest))
        except ApiError as error:
            if error.code in _REFUSED:
                logger.warning("%s/%s: pod %s is refused: %s", self._namespace, self._name, action.name, error)
                self.refusals[action.name] = Refusal(error.message, datetime.now(UTC))
            elif error.code != 409:  # Already there: the view was stale, and the name is the same by design.
                raise
        else:
            logger.info("%s/%s: made pod %s", self._namespace, self._name, action.name)
            self.refusals.pop(action.name, None)

    async def _create_token(self, manifest: Manifest) -> None:
        token = b64encode(secrets.token_hex(32).encode()).decode()
        try:
            await self._kube.create("Secret", {**manifest, "data": {TOKEN_KEY: token}})
        except ApiError as error:
            if error.code != 409:
                raise

    async def _announce(self, action: Announce) -> None:
        seed = "/".join((self._uid, action.about or str(time.time_ns()), action.reason, action.note))
        event = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{self._name}.{hashlib.sha256(seed.encode()).hexdigest()[:16]}",
                "namespace": self._namespace,
            },
            "eventTime": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "type": "Warning" if action.warning else "Normal",
            "reason": action.reason,
            "action": "Reconcile",
            "note": action.note[:1024],
            "reportingController": f"resilientllm.dev/{MANAGER}",
            "reportingInstance": MANAGER,
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": self._namespace,
                "name": self._name,
                "uid": self._uid,
            },
        }
        try:
            await self._kube.create("Event", event)
        except ApiError as error:
            if error.code == 409:
                return  # It was told already, and the operator ended before it wrote the status down.
            logger.warning("%s/%s: the event %s is refused: %s", self._namespace, self._name, action.reason, error)
        log = logger.warning if action.warning else logger.info
        log("%s/%s: %s: %s", self._namespace, self._name, action.reason, action.note)
        telemetry.TRANSITIONS.labels(action.reason).inc()

    def _publish(self, engines: Engines, action: PublishPlan) -> None:
        """Beside the rounds: an engine that hangs must not hold up the endpoints of the others."""
        running = self._publications.get(action.pod_uid)
        if running is None or running.done():
            self._publications[action.pod_uid] = asyncio.create_task(self._tell(engines, action))

    async def _tell(self, engines: Engines, action: PublishPlan) -> None:
        plan = action.plan
        version, at = self._published.get(action.pod_uid, (0, 0.0))
        if version == plan.version and time.monotonic() - at < PUBLISH_AGAIN_SECONDS:
            return
        try:
            await engines.publish(EngineAddress(action.pod_uid, action.ip), plan)
        except EngineError as error:
            # The next round tries again.
            logger.warning("%s/%s: %s", self._namespace, self._name, error)
            return
        if version != plan.version:
            where = f"{self._namespace}/{self._name}"
            logger.info("%s: plan %d is published to instance %d", where, plan.version, plan.instance)
        self._published[action.pod_uid] = (plan.version, time.monotonic())

    def _verify(self, engines: Engines, action: VerifyEngine) -> None:
        """One verification at a time for each engine, beside the rounds: it may take as long as a compilation."""
        running = self._verifications.get(action.pod_uid)
        if running is not None and not running.done():
            return

        async def verify() -> None:
            engine = EngineAddress(action.pod_uid, action.ip)
            if not await engines.verify(engine, action.incarnation, action.served_name):
                await asyncio.sleep(VERIFY_AGAIN_SECONDS)

        self._verifications[action.pod_uid] = asyncio.create_task(verify())
