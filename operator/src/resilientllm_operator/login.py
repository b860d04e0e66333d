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

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TOKEN = _SERVICE_ACCOUNT / "token"


def login(settings: kopf.OperatorSettings, logger: Any = None, **_: Any) -> Any:
    """A ``kopf.ConnectionInfo``. Raises ``kopf.LoginError`` where there are no credentials."""
    if not _in_cluster():
        # Through the official client, which also knows the credential plugins of cloud providers.
        return kopf.login_via_client(settings=settings, logger=logger or logging.getLogger(__name__))
    # Not kopf's own login: it looks up a name, and the operator should not need the cluster's DNS to work.
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    return kopf.ConnectionInfo(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        ca_path=str(_SERVICE_ACCOUNT / "ca.crt"),
        token=_TOKEN.read_text().strip(),
        default_namespace=(_SERVICE_ACCOUNT / "namespace").read_text().strip(),
    )


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
        return {"Authorization": f"Bearer {_TOKEN.read_text().strip()}"} if _in_cluster() else fixed

    return KubeClient(info.server, tls, headers)


def _in_cluster() -> bool:
    return "KUBECONFIG" not in os.environ and _TOKEN.exists()
