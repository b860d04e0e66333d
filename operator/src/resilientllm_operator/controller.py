"""Keeps a caretaker for every ResilientLLM, and the store that they all look at."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import aiohttp
from resilientllm_api.crd import KIND, PLURAL

from resilientllm_operator import telemetry
from resilientllm_operator.actions import Manifest
from resilientllm_operator.caretaker import Caretaker
from resilientllm_operator.engines import EngineHttp
from resilientllm_operator.freshness import Freshness
from resilientllm_operator.kube import ApiError, KubeClient
from resilientllm_operator.names import NAME_LABEL, SELECTOR
from resilientllm_operator.observe import essence, view_node
from resilientllm_operator.store import Key, Store
from resilientllm_operator.whereabouts import Whereabouts
from resilientllm_operator.world import NodeView

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""Between two looks at how fresh the view is."""
CRD_POLL_SECONDS = 2.0
REMIND_SECONDS = 60.0
"""Between two lines of the log about standing still: kopf's own about the same trouble come every other second."""
ROUNDS = 128
"""At a time. Who waits has decided nothing yet: the manifests of a thousand objects would be 200 MB, and old when their
turn comes."""
WATCHED = {
    KIND: "",
    "Node": "",
    "Pod": SELECTOR,
    "Service": SELECTOR,
    "EndpointSlice": SELECTOR,
    "PodDisruptionBudget": SELECTOR,
}
"""What is watched, and the label selector. Nodes only if the operator may see them."""


class Controller:
    def __init__(
        self,
        kube: KubeClient,
        namespace: str | None,
        freshness: Freshness | None = None,
        leads: Callable[[], bool] = lambda: True,
    ) -> None:
        """``namespace``: the only one to look after; None for all. ``leads``: whether this replica has the lease."""
        self._kube = kube
        self._namespace = namespace
        self._freshness = freshness or Freshness(WATCHED)
        self._leads = leads
        self._held_said_at: float | None = None
        """When the log was told last that nothing is done; None while something may be."""
        self._list_error = ""
        self._http = EngineHttp()
        self._turns = asyncio.Semaphore(ROUNDS)
        self._store = Store(self._changed, essence)
        self._whereabouts = Whereabouts()
        self._nodes: dict[str, NodeView] = {}
        """All nodes, read once for all caretakers. Stays empty if the operator may not see them."""
        self.watched = WATCHED
        self._caretakers: dict[tuple[str, str], tuple[Caretaker, asyncio.Task[None]]] = {}
        self._synced = False

    def seen(self, kind: str, event_type: str | None, obj: Manifest) -> None:
        """A watch event."""
        self._freshness.heard(kind, time.monotonic())
        if event_type == "DELETED":
            self._store.remove(kind, obj)
        else:
            self._store.put(kind, obj)

    async def wait_for_crd(self) -> None:
        """Returns when ResilientLLM objects can be listed, and it is known whether nodes can."""
        while True:
            try:
                async for _ in self._kube.pages(KIND, self._namespace):
                    break
                await self._look_for_nodes()
                return
            except ApiError as error:
                if error.code == 404:
                    logger.warning("the CRD %s is not installed yet: kubectl apply -k manifests/base", PLURAL)
                else:
                    logger.warning("cannot list %s yet: %s", PLURAL, error)
            except (aiohttp.ClientError, TimeoutError) as error:
                logger.warning("the API server does not answer yet: %s", error or type(error).__name__)
            await asyncio.sleep(CRD_POLL_SECONDS)

    async def _look_for_nodes(self) -> None:
        """An operator of one namespace may lack rights in the cluster: it works, and knows less."""
        if not await self._kube.may_list("Node"):
            self.watched = {kind: selector for kind, selector in WATCHED.items() if kind != "Node"}
            self._freshness.forget("Node")
            logger.warning(
                "may not list nodes: cordons, taints and conditions of nodes are not seen, and stages move away from "
                "a node only when they are lost. Bind the ClusterRole resilientllm-operator-nodes to change that."
            )

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                self._tell_freshness()
                try:
                    await self._relist()
                    self._list_error = ""
                except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                    self._list_error = f"; could not list: {str(error) or type(error).__name__}"
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            await self._stop()

    def lead(self, leads: bool) -> None:
        """This replica has got the lease, or does not have it any more. Then watches go on, and nothing else does."""
        if leads:
            self._take_care()
        else:
            for _, task in self._caretakers.values():
                task.cancel()

    def may_not_act(self) -> str | None:
        """Why nothing may be changed now; None if it may."""
        return self._freshness.stale(time.monotonic()) if self._leads() else "another replica has the lease"

    async def _relist(self) -> None:
        """Sets right what no watch vouches for."""
        for kind in self._freshness.due(time.monotonic()):
            begun = time.monotonic()
            listed, as_of = set[Key](), 0
            async for objects, version in self._kube.pages(kind, self._namespace, self.watched[kind]):
                listed |= {self._store.put(kind, obj) for obj in objects}
                as_of = version
            self._store.keep_only(kind, listed, as_of)
            self._freshness.listed(kind, begun)
        if not self._synced and self._freshness.stale(time.monotonic()) is None:
            # Only now: an object whose pods are not known yet would be taken for one without pods.
            self._synced = True
            self._take_care()

    def _take_care(self) -> None:
        for obj in self._store.all(KIND):
            self._object_changed((obj["metadata"]["namespace"], obj["metadata"]["name"]))

    def _tell_freshness(self) -> None:
        """Lines in the log as long as a leader has to stand still, and one when it need not any more."""
        now = time.monotonic()
        for kind in self.watched:
            telemetry.VIEW_AGE.labels(kind).set(self._freshness.age(kind, now))
        held = self._freshness.stale(now) if self._leads() and self._synced else None
        telemetry.HELD.set(held is not None)
        said_at = self._held_said_at
        if held is None:
            self._held_said_at = None
            if said_at is not None and self._leads():
                logger.info("the view of the cluster is right again")
                self._take_care()
        elif said_at is None or now - said_at >= REMIND_SECONDS:
            self._held_said_at = now
            logger.warning("does nothing until the view of the cluster is right again: %s%s", held, self._list_error)

    def _changed(self, kind: str, obj: Manifest) -> None:
        if kind == "Node":
            self._node_changed(obj["metadata"]["name"])
            return
        metadata = obj["metadata"]
        if kind == "Pod":
            exists = self._store.get(kind, metadata["namespace"], metadata["name"]) is not None
            (self._whereabouts.put if exists else self._whereabouts.remove)(obj)
        name = metadata["name"] if kind == KIND else metadata.get("labels", {}).get(NAME_LABEL)
        self._object_changed((metadata["namespace"], name))

    def _node_changed(self, name: str) -> None:
        node = self._store.get("Node", "", name)
        before = self._nodes.pop(name, None)
        if node is not None:
            self._nodes[name] = view_node(node)
        if self._nodes.get(name) != before:  # Most events of nodes are heartbeats.
            for key in self._whereabouts.objects_on(name):
                self._object_changed(key)

    def _object_changed(self, key: tuple[str, str]) -> None:
        if not self._synced or not self._leads():
            return
        known = self._caretakers.get(key)
        if known is not None and not known[1].done():
            known[0].wake()
        current = self._store.get(KIND, *key)
        if current is None:
            return
        if known is None or known[1].done():
            uid = current["metadata"]["uid"]
            caretaker = Caretaker(
                self._kube, self._store, *key, uid, self._nodes, self.may_not_act, self._http, self._turns
            )
            task = asyncio.create_task(caretaker.run(), name=f"caretaker {key[0]}/{key[1]}")
            # The object may have been deleted and made again while the old caretaker was on its way out.
            task.add_done_callback(lambda _: self._ended(key))
            self._caretakers[key] = (caretaker, task)

    def _ended(self, key: tuple[str, str]) -> None:
        self._caretakers.pop(key, None)
        current = self._store.get(KIND, *key)
        if current is not None and self._synced:
            self._changed(KIND, current)

    async def _stop(self) -> None:
        self._synced = False
        tasks = [task for _, task in self._caretakers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()
