"""A client of the Kubernetes API: the few verbs that the operator needs, over aiohttp.

kopf watches; it does not offer a client for writing. This one is small, asynchronous, and short of patience: a
request that waits for minutes would hold up the round that might save an instance.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Self
from urllib.parse import quote

import aiohttp
from resilientllm_api.crd import API_VERSION, PLURAL

from resilientllm_operator.actions import Manifest
from resilientllm_operator.names import MANAGER
from resilientllm_operator.permit import NotPermitted, Permit

_TIMEOUT = aiohttp.ClientTimeout(total=10, connect=3)
_WRITE_TIMEOUT = aiohttp.ClientTimeout(total=4, connect=3)
"""A write that was begun under the lease ends before another replica may take it (:mod:`lease`)."""
REQUESTS = 32
"""At a time."""
PAGE = 100
"""Objects in one answer of a list. All pods of a large cluster at once would hold up all else, and fill the memory."""

RESOURCES = {
    "ResilientLLM": (f"apis/{API_VERSION}", PLURAL),
    "Pod": ("api/v1", "pods"),
    "Secret": ("api/v1", "secrets"),
    "Service": ("api/v1", "services"),
    "EndpointSlice": ("apis/discovery.k8s.io/v1", "endpointslices"),
    "PodDisruptionBudget": ("apis/policy/v1", "poddisruptionbudgets"),
    "Event": ("apis/events.k8s.io/v1", "events"),
    "Node": ("api/v1", "nodes"),
    "Lease": ("apis/coordination.k8s.io/v1", "leases"),
}
CLUSTER_SCOPED = {"Node"}


class ApiError(Exception):
    """The API server's refusal, in its own words."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message


class KubeClient:
    """One session with an API server. ``headers`` is asked at every request: tokens in pods are renewed hourly."""

    def __init__(
        self,
        server: str,
        tls: ssl.SSLContext | None,
        headers: Callable[[], Mapping[str, str]],
        traces: Sequence[aiohttp.TraceConfig] = (),
    ) -> None:
        self.permit: Permit = lambda: None
        """Asked when a write is about to go out, not when somebody begins to wait for its turn."""
        self._server = server.rstrip("/")
        self._headers = headers
        # Turns are given here and not by aiohttp, whose time limits would begin with the wait for one. The lease has
        # no need of one: it must not wait until a thousand objects have been written to.
        self._turns = asyncio.Semaphore(REQUESTS)
        connector = aiohttp.TCPConnector(ssl=tls if tls is not None else True, limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, trace_configs=list(traces))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """The object, or None if there is none of this name."""
        try:
            return await self._request("GET", _path(kind, namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def pages(
        self, kind: str, namespace: str | None, selector: str = ""
    ) -> AsyncIterator[tuple[list[Manifest], int]]:
        """All objects, some at a time, and the resource version at which they were all."""
        params = {"limit": str(PAGE)} | ({"labelSelector": selector} if selector else {})
        while True:
            page = await self._request("GET", _path(kind, namespace), params=params)
            yield page["items"], int(page["metadata"]["resourceVersion"])
            if not page["metadata"].get("continue"):
                return
            params["continue"] = page["metadata"]["continue"]

    async def may_list(self, kind: str) -> bool:
        """Whether objects of a kind may be listed, in all namespaces where they have any."""
        try:
            await self._request("GET", _path(kind, None), params={"limit": "1"})
        except ApiError as error:
            if error.code == 403:
                return False
            raise
        return True

    async def create(self, kind: str, manifest: Manifest) -> Manifest:
        path = _path(kind, manifest["metadata"]["namespace"])
        return await self._request("POST", path, params={"fieldManager": MANAGER}, body=manifest)

    async def update(self, kind: str, manifest: Manifest) -> Manifest:
        """Replaces the object, if it still has the manifest's resource version. Raises ApiError 409 otherwise."""
        metadata = manifest["metadata"]
        path = _path(kind, metadata["namespace"], metadata["name"])
        return await self._request("PUT", path, params={"fieldManager": MANAGER}, body=manifest)

    async def apply(self, kind: str, manifest: Manifest, subresource: str = "") -> Manifest:
        """Server-side apply. ``force``: what is ours to say, nobody else says."""
        metadata = manifest["metadata"]
        path = _path(kind, metadata["namespace"], metadata["name"])
        return await self._request(
            "PATCH",
            f"{path}/{subresource}" if subresource else path,
            params={"fieldManager": MANAGER, "force": "true"},
            body=manifest,
            content_type="application/apply-patch+yaml",
        )

    async def delete(
        self, kind: str, namespace: str, name: str, uid: str, grace_seconds: int | None = None
    ) -> Manifest | None:
        """Deletes this very object, and returns it if it takes time to end.

        One that is gone already, or another of the same name, is left as it is.
        """
        options: Manifest = {"preconditions": {"uid": uid}}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            result = await self._request("DELETE", _path(kind, namespace, name), body=options)
        except ApiError as error:
            if error.code in (404, 409):
                return None
            raise
        return result if result.get("kind") == kind else None

    async def _request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = "application/json",
    ) -> Manifest:
        if path.startswith(RESOURCES["Lease"][0]):
            return await self._send(method, path, params, body, content_type)
        async with self._turns:
            if method != "GET" and (why := self.permit()) is not None:
                raise NotPermitted(why)
            return await self._send(method, path, params, body, content_type)

    async def _send(
        self, method: str, path: str, params: Mapping[str, str] | None, body: Manifest | None, content_type: str
    ) -> Manifest:
        async with self._session.request(
            method,
            f"{self._server}/{path}",
            params=params,
            data=json.dumps(body) if body is not None else None,
            headers={**self._headers(), "Content-Type": content_type, "Accept": "application/json"},
            timeout=_TIMEOUT if method == "GET" else _WRITE_TIMEOUT,
        ) as response:
            text = await response.text()
            if response.status < 400:
                return dict(json.loads(text))
            raise _error(response.status, text)


def _path(kind: str, namespace: str | None, name: str | None = None) -> str:
    root, plural = RESOURCES[kind]
    scope = f"/namespaces/{quote(namespace)}" if namespace is not None and kind not in CLUSTER_SCOPED else ""
    return f"{root}{scope}/{plural}" + (f"/{quote(name)}" if name is not None else "")


def _error(code: int, text: str) -> ApiError:
    try:
        status: dict[str, Any] = json.loads(text)
        return ApiError(code, status.get("reason", ""), status.get("message", ""))
    except (ValueError, AttributeError):
        return ApiError(code, "", text[:500])
