"""Keeps a caretaker for every ResilientLLM, and the store that they all look at."""

from __future__ import annotations

import asyncio
import logging

import aiohttp
from resilientllm_api.crd import KIND, PLURAL

from resilientllm_operator.actions import Manifest
from resilientllm_operator.caretaker import Caretaker
from resilientllm_operator.kube import ApiError, KubeClient
from resilientllm_operator.names import NAME_LABEL, SELECTOR
from resilientllm_operator.store import Store

logger = logging.getLogger(__name__)

RELIST_SECONDS = 30.0
"""How long a deletion that a broken watch has missed may stay unnoticed."""
CRD_POLL_SECONDS = 2.0
WATCHED = {KIND: "", "Pod": SELECTOR, "Service": SELECTOR, "EndpointSlice": SELECTOR}
"""What is watched, and the label selector."""


class Controller:
    def __init__(self, kube: KubeClient, namespace: str | None) -> None:
        """``namespace``: the only one to look after; None for all."""
        self._kube = kube
        self._namespace = namespace
        self._store = Store(self._changed)
        self._caretakers: dict[tuple[str, str], tuple[Caretaker, asyncio.Task[None]]] = {}
        self._synced = False

    def seen(self, kind: str, event_type: str | None, obj: Manifest) -> None:
        """A watch event."""
        if event_type == "DELETED":
            self._store.remove(kind, obj)
        else:
            self._store.put(kind, obj)

    async def wait_for_crd(self) -> None:
        """Returns when ResilientLLM objects can be listed."""
        while True:
            try:
                await self._kube.list(KIND, self._namespace)
                return
            except ApiError as error:
                if error.code == 404:
                    logger.warning("the CRD %s is not installed yet: kubectl apply -k manifests/base", PLURAL)
                else:
                    logger.warning("cannot list %s yet: %s", PLURAL, error)
            except (aiohttp.ClientError, TimeoutError) as error:
                logger.warning("the API server does not answer yet: %s", error or type(error).__name__)
            await asyncio.sleep(CRD_POLL_SECONDS)

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                try:
                    await self._relist()
                except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                    logger.warning("could not list: %s", str(error) or type(error).__name__)
                await asyncio.sleep(RELIST_SECONDS if self._synced else CRD_POLL_SECONDS)
        finally:
            await self._stop()

    async def _relist(self) -> None:
        for kind, selector in WATCHED.items():
            objects, version = await self._kube.list(kind, self._namespace, selector)
            self._store.replace(kind, objects, version)
        if not self._synced:
            # Only now: an object whose pods are not known yet would be taken for one without pods.
            self._synced = True
            for obj in self._store.all(KIND):
                self._changed(KIND, obj)

    def _changed(self, kind: str, obj: Manifest) -> None:
        if not self._synced:
            return
        metadata = obj["metadata"]
        name = metadata["name"] if kind == KIND else metadata.get("labels", {}).get(NAME_LABEL)
        key = (metadata["namespace"], name)
        known = self._caretakers.get(key)
        if known is not None and not known[1].done():
            known[0].wake()
        current = self._store.get(KIND, *key)
        if current is None:
            return
        if known is None or known[1].done():
            caretaker = Caretaker(self._kube, self._store, *key, uid=current["metadata"]["uid"])
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
