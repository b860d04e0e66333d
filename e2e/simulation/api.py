"""An administrator's client of a lone control plane: JSON in, JSON out."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import tempfile
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any, Self

import aiohttp

Json = dict[str, Any]

CUSTOM = "apis/resilientllm.dev/v1alpha1"
_AUTHORITY = "certificate-authority-data"
_PATIENCE = 20
_MERGE_PATCH = "application/merge-patch+json"


class Refused(Exception):
    """The API server answered with an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:500]}")
        self.status = status


class AdminApi:
    def __init__(self, kubeconfig: Path) -> None:
        """``kubeconfig``: one that was written by :mod:`e2e.cluster.pki`, with its certificates inside."""
        config = json.loads(kubeconfig.read_text())
        self.server: str = config["clusters"][0]["cluster"]["server"]
        self.trust = ssl.create_default_context(cadata=_decoded(config["clusters"][0]["cluster"], _AUTHORITY))
        """Knows the API server, and nobody's credentials."""
        self.tls = _tls(config)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self.tls, limit=100))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, path: str, **params: str) -> Json:
        return await self._ask("GET", path, params=params)

    async def items(self, path: str, **params: str) -> list[Json]:
        return list((await self.get(path, **params))["items"])

    async def watch(self, path: str, version: str) -> AsyncIterator[Json]:
        """Events from a resource version on, until the API server ends the watch."""
        params = {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version}
        timeout = aiohttp.ClientTimeout(total=None, connect=10)
        # Beside the others, whose number is limited; an event may be longer than the lines that aiohttp reads.
        async with self._session.get(f"{self.server}/{path}", params=params, timeout=timeout) as answer:
            rest = b""
            async for chunk in answer.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield json.loads(line)

    async def create(self, path: str, obj: Json) -> Json:
        return await self._ask("POST", path, obj)

    async def patch(self, path: str, change: Json) -> Json:
        return await self._ask("PATCH", path, change, content_type=_MERGE_PATCH)

    async def delete(self, path: str, grace_seconds: int | None = None) -> Json:
        options = {} if grace_seconds is None else {"gracePeriodSeconds": grace_seconds}
        return await self._ask("DELETE", path, options)

    async def _ask(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        params: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Json:
        for attempt in count(1):
            try:
                return await self._ask_once(method, path, body, params, content_type)
            except Refused as refused:
                # An API server that has just begun to serve a kind asks for patience.
                if refused.status != 429 or attempt == _PATIENCE:
                    raise
            await asyncio.sleep(1)
        raise AssertionError("count ends only by an answer or an error")

    async def _ask_once(
        self, method: str, path: str, body: Json | None, params: dict[str, str] | None, content_type: str
    ) -> Json:
        async with self._session.request(
            method,
            f"{self.server}/{path}",
            params=params,
            data=json.dumps(body) if body is not None else None,
            headers={"Content-Type": content_type},
            timeout=aiohttp.ClientTimeout(total=60),
        ) as answer:
            text = await answer.text()
            if answer.status >= 400:
                raise Refused(answer.status, text)
            return dict(json.loads(text))


def _tls(config: Json) -> ssl.SSLContext:
    user = config["users"][0]["user"]
    context = ssl.create_default_context(cadata=_decoded(config["clusters"][0]["cluster"], _AUTHORITY))
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = Path(folder) / "certificate", Path(folder) / "key"
        certificate.write_text(_decoded(user, "client-certificate-data"))
        key.write_text(_decoded(user, "client-key-data"))
        context.load_cert_chain(certificate, key)
    return context


def _decoded(entries: Json, name: str) -> str:
    return base64.b64decode(entries[name]).decode()
