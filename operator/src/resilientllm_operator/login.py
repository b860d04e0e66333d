"""Credentials for the API server: the pod's ServiceAccount, or a kubeconfig in development.

kopf and our own client use the same ones. kopf asks again when the API server says 401; our client reads the
ServiceAccount's token at every request, because the kubelet renews the file.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import kopf

from resilientllm_operator.kube import KubeClient

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TOKEN = _SERVICE_ACCOUNT / "token"

Login = Callable[[], Any]
"""Makes a ``kopf.ConnectionInfo`` with fresh credentials."""


def choose(kubeconfig: Path | None) -> Login:
    """The way to log in here. Raises ``kopf.LoginError`` where there is none."""
    if kubeconfig is not None:
        if not kubeconfig.is_file():
            raise kopf.LoginError(f"--kubeconfig: expected a kubeconfig file, found none at {kubeconfig}")
        return lambda: _from_kubeconfig(kubeconfig)
    if _TOKEN.exists() and "KUBERNETES_SERVICE_HOST" in os.environ:
        return _from_service_account
    raise kopf.LoginError("expected to run in a pod with a ServiceAccount, found no token: pass --kubeconfig FILE")


def for_kopf(login: Login, trace: aiohttp.TraceConfig) -> Any:
    """A session that kopf watches with, and that we see through."""
    info = login()
    return kopf.AiohttpSession(
        server=info.server,
        default_namespace=info.default_namespace,
        aiohttp_session=aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=_tls(info) or True, limit=0),
            headers=info.as_http_headers(),
            trace_configs=[trace],
        ),
    )


def connect(login: Login, trace: aiohttp.TraceConfig) -> KubeClient:
    info = login()
    fixed: Mapping[str, str] = info.as_http_headers()

    def headers() -> Mapping[str, str]:
        return {"Authorization": f"Bearer {_token()}"} if login is _from_service_account else fixed

    return KubeClient(info.server, _tls(info), headers, [trace])


def own_namespace(login: Login) -> str | None:
    """The namespace of the pod that this runs in; None outside of one."""
    return str(login().default_namespace) if login is _from_service_account else None


def _tls(info: Any) -> ssl.SSLContext | None:
    context: ssl.SSLContext | None = info.as_ssl_context() if info.server.startswith("https") else None
    return context


def _from_service_account() -> Any:
    # Not kopf's own login: it looks up a name, and the operator should not need the cluster's DNS to work.
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    return kopf.ConnectionInfo(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        ca_path=str(_SERVICE_ACCOUNT / "ca.crt"),
        token=_token(),
        default_namespace=(_SERVICE_ACCOUNT / "namespace").read_text().strip(),
    )


def _from_kubeconfig(file: Path) -> Any:
    """Through the official client, which also runs the credential plugins of cloud providers."""
    import kubernetes.client  # Slow to import, and not needed in a pod.
    import kubernetes.config

    config = kubernetes.client.Configuration()
    kubernetes.config.load_kube_config(config_file=str(file), client_configuration=config)
    header = config.get_api_key_with_prefix("BearerToken") or config.get_api_key_with_prefix("authorization")
    return kopf.ConnectionInfo(
        server=config.host,
        ca_path=config.ssl_ca_cert,
        insecure=not config.verify_ssl,
        token=header.removeprefix("Bearer ") if header else None,
        certificate_path=config.cert_file,
        private_key_path=config.key_file,
    )


def _token() -> str:
    return _TOKEN.read_text().strip()
