"""Certificates and kubeconfigs: who may speak to whom in the cluster.

Two authorities, as upstream recommends: one for clients and servers, one for the API aggregator, so
that no ordinary client certificate can pass for the aggregator's.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from .commands import run
from .layout import API_ADDRESS, API_PORT, API_SERVICE_ADDRESS, Layout, NodePlan

_DAYS = "30"
_MAIN, _FRONT_PROXY = "ca", "front-proxy-ca"


@dataclass(frozen=True)
class Certificate:
    name: str
    common_name: str
    organization: str = ""
    server_names: tuple[str, ...] = ()
    """What a server answers to; a certificate without any is a client's."""
    authority: str = _MAIN

    @property
    def subject(self) -> str:
        return (f"/O={self.organization}" if self.organization else "") + f"/CN={self.common_name}"

    @property
    def extensions(self) -> str:
        usage = "serverAuth" if self.server_names else "clientAuth"
        lines = ["basicConstraints=CA:FALSE", "keyUsage=digitalSignature,keyEncipherment", f"extendedKeyUsage={usage}"]
        if self.server_names:
            lines.append("subjectAltName=" + ",".join(self.server_names))
        return "\n".join(lines) + "\n"


def node_user(node: str) -> str:
    return f"kubelet-{node}"


def kubelet_server(node: str) -> str:
    return f"kubelet-server-{node}"


def certificates(nodes: tuple[NodePlan, ...]) -> list[Certificate]:
    """Every certificate of the cluster. The names are also those of the kubeconfigs made from them."""
    api_names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    api_names.append("kubernetes.default.svc.cluster.local")
    api_addresses = [str(API_ADDRESS), str(API_SERVICE_ADDRESS), "127.0.0.1"]
    api = [f"DNS:{name}" for name in api_names] + [f"IP:{address}" for address in api_addresses]
    wanted = [
        Certificate("apiserver", "kube-apiserver", server_names=tuple(api)),
        Certificate("admin", "admin", "system:masters"),
        Certificate("kubelet-client", "apiserver-kubelet-client", "system:masters"),
        Certificate("controller-manager", "system:kube-controller-manager"),
        Certificate("scheduler", "system:kube-scheduler"),
        Certificate("proxy", "system:kube-proxy"),
        Certificate("front-proxy-client", "front-proxy-client", authority=_FRONT_PROXY),
    ]
    for node in nodes:
        identity = f"system:node:{node.name}"
        names = (f"IP:{node.address}", f"DNS:{node.name}")
        wanted.append(Certificate(node_user(node.name), identity, "system:nodes"))
        wanted.append(Certificate(kubelet_server(node.name), identity, "system:nodes", server_names=names))
    return wanted


def make(layout: Layout) -> None:
    """Write all keys, certificates and kubeconfigs of a cluster."""
    folder = layout.pki
    folder.mkdir(mode=0o700)
    layout.kubeconfig("admin").parent.mkdir(mode=0o700)
    for authority in (_MAIN, _FRONT_PROXY):
        _authority(folder, authority)
    run("openssl", "genrsa", "-out", folder / "service-account.key", "2048")
    run("openssl", "rsa", "-in", folder / "service-account.key", "-pubout", "-out", folder / "service-account.pub")
    for certificate in certificates(layout.nodes):
        _certificate(folder, certificate)
    cluster_url = f"https://{API_ADDRESS}:{API_PORT}"
    users = ["admin", "controller-manager", "scheduler", "proxy", *(node_user(name) for name in layout.node_names)]
    for user in users:
        _write_private(layout.kubeconfig(user), kubeconfig(folder, user, cluster_url))
    _write_private(layout.host_kubeconfig, kubeconfig(folder, "admin", f"https://127.0.0.1:{layout.host_port}"))


def kubeconfig(pki: Path, user: str, server: str) -> str:
    """A kubeconfig that needs no other file. JSON is YAML, and needs no library to write."""

    def embedded(file: str) -> str:
        return base64.b64encode((pki / file).read_bytes()).decode()

    credentials = {
        "client-certificate-data": embedded(f"{user}.crt"),
        "client-key-data": embedded(f"{user}.key"),
    }
    cluster = {"server": server, "certificate-authority-data": embedded(f"{_MAIN}.crt")}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "resilientllm-e2e", "cluster": cluster}],
        "users": [{"name": user, "user": credentials}],
        "contexts": [{"name": user, "context": {"cluster": "resilientllm-e2e", "user": user}}],
        "current-context": user,
    }
    return json.dumps(content, indent=2) + "\n"


def _key(folder: Path, name: str) -> Path:
    key = folder / f"{name}.key"
    run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
    return key


def _authority(folder: Path, name: str) -> None:
    key = _key(folder, name)
    request = ("-x509", "-new", "-key", key, "-subj", f"/CN=resilientllm-e2e-{name}")
    run("openssl", "req", *request, "-days", _DAYS, "-out", folder / f"{name}.crt")


def _certificate(folder: Path, wanted: Certificate) -> None:
    key = _key(folder, wanted.name)
    request = run("openssl", "req", "-new", "-key", key, "-subj", wanted.subject)
    extensions = folder / f"{wanted.name}.extensions"
    extensions.write_text(wanted.extensions)
    signer = folder / wanted.authority
    run(
        *("openssl", "x509", "-req", "-CA", f"{signer}.crt", "-CAkey", f"{signer}.key", "-CAcreateserial"),
        *("-days", _DAYS, "-extfile", extensions, "-out", folder / f"{wanted.name}.crt"),
        stdin=request,
    )


def _write_private(file: Path, content: str) -> None:
    file.touch(mode=0o600)
    file.write_text(content)
