"""Credentials for the API server: the pod's ServiceAccount, or a kubeconfig in development.

kopf and our own client use the same ones. kopf asks again when the API server says 401; our client reads the
ServiceAccount's token at every request, because the kubelet renews the file.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kopf

from resilientllm_operator.kube import KubeClient

_SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def login(settings: kopf.OperatorSettings, logger: Any = None, **_: Any) -> Any:
    """A ``kopf.ConnectionInfo``. Raises ``kopf.LoginError`` where there are no credentials."""
    if _in_cluster():
        return kopf.login_with_service_account(settings=settings, logger=logger)
    # Through the official client, which also knows the credential plugins of cloud providers.
    return kopf.login_via_client(settings=settings, logger=logger or logging.getLogger(__name__))


def use_kubeconfig(path: Path) -> None:
    """Lets :func:`login` read this file."""
    os.environ["KUBECONFIG"] = str(path)


def connect(settings: kopf.OperatorSettings) -> KubeClient:
    info = login(settings)
    if info is None:
        raise kopf.LoginError("found neither a ServiceAccount nor a kubeconfig: pass --kubeconfig FILE")
    tls: ssl.SSLContext | None = info.as_ssl_context() if info.server.startswith("https") else None
    fixed: Mapping[str, str] = info.as_http_headers()

    def headers() -> Mapping[str, str]:
        if not _in_cluster():
            return fixed
        return {"Authorization": f"Bearer {_SERVICE_ACCOUNT_TOKEN.read_text().strip()}"}

    return KubeClient(info.server, tls, headers)


def _in_cluster() -> bool:
    return "KUBECONFIG" not in os.environ and _SERVICE_ACCOUNT_TOKEN.exists()
