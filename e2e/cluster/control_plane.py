"""The control plane: etcd, API server, controller manager, scheduler, and the clients' kube-proxy.

It lives in the namespace of the switch and not on a node, so that tests may end any node. Its
services are pid 1's children there (`python -m e2e.cluster.control_plane <cluster folder>`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from .commands import run
from .layout import API_ADDRESS, API_PORT, POD_NETWORK, SERVICE_NETWORK, Layout
from .supervisor import Service, Supervisor, http_ok
from .timings import Timings

_ETCD = "http://127.0.0.1:2379"
_ETCD_PEER = "http://127.0.0.1:2380"
PROXY_HEALTH = "http://127.0.0.1:10256/healthz"


def api_server_ready_url() -> str:
    return f"https://{API_ADDRESS}:{API_PORT}/readyz"


def services(layout: Layout) -> list[Service]:
    authority = layout.pki / "ca.crt"
    api_ready = http_ok(api_server_ready_url(), authority)
    return [
        Service("etcd", _etcd(layout), ready=http_ok(f"{_ETCD}/health")),
        Service(
            "kube-apiserver",
            _api_server(layout, layout.timings),
            ready=api_ready,
            start_when=http_ok(f"{_ETCD}/health"),
        ),
        # Both leave with an error when the API server has not yet made the roles that they need.
        Service(
            "kube-controller-manager",
            _controller_manager(layout, layout.timings),
            ready=lambda: True,
            start_when=api_ready,
        ),
        Service("kube-scheduler", _scheduler(layout), ready=lambda: True, start_when=api_ready),
        Service("kube-proxy", _clients_proxy(layout), ready=http_ok(PROXY_HEALTH), start_when=api_ready),
    ]


def _etcd(layout: Layout) -> tuple[str, ...]:
    return (
        str(layout.binaries / "etcd"),
        "--name=only",
        f"--data-dir={layout.control_plane / 'etcd'}",
        f"--listen-client-urls={_ETCD}",
        f"--advertise-client-urls={_ETCD}",
        f"--listen-peer-urls={_ETCD_PEER}",
        f"--initial-advertise-peer-urls={_ETCD_PEER}",
        f"--initial-cluster=only={_ETCD_PEER}",
        "--log-level=warn",
        # The data is worthless after the cluster; waiting for the disk would only slow every write.
        "--unsafe-no-fsync",
    )


def _api_server(layout: Layout, timings: Timings) -> tuple[str, ...]:
    pki = layout.pki
    return (
        str(layout.binaries / "kube-apiserver"),
        f"--etcd-servers={_ETCD}",
        "--bind-address=0.0.0.0",
        f"--advertise-address={API_ADDRESS}",
        f"--secure-port={API_PORT}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        f"--client-ca-file={pki / 'ca.crt'}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki / 'service-account.pub'}",
        f"--service-account-signing-key-file={pki / 'service-account.key'}",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--kubelet-client-certificate={pki / 'kubelet-client.crt'}",
        f"--kubelet-client-key={pki / 'kubelet-client.key'}",
        f"--kubelet-certificate-authority={pki / 'ca.crt'}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--requestheader-client-ca-file={pki / 'front-proxy-ca.crt'}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        f"--proxy-client-cert-file={pki / 'front-proxy-client.crt'}",
        f"--proxy-client-key-file={pki / 'front-proxy-client.key'}",
        "--enable-aggregator-routing=true",
        "--allow-privileged=true",
        f"--default-unreachable-toleration-seconds={timings.toleration_seconds}",
        f"--default-not-ready-toleration-seconds={timings.toleration_seconds}",
    )


def _controller_manager(layout: Layout, timings: Timings) -> tuple[str, ...]:
    pki, config = layout.pki, layout.kubeconfig("controller-manager")
    return (
        str(layout.binaries / "kube-controller-manager"),
        *_identity(config),
        "--use-service-account-credentials",
        f"--service-account-private-key-file={pki / 'service-account.key'}",
        f"--root-ca-file={pki / 'ca.crt'}",
        f"--cluster-signing-cert-file={pki / 'ca.crt'}",
        f"--cluster-signing-key-file={pki / 'ca.key'}",
        f"--node-monitor-period={timings.node_monitor_seconds}s",
        f"--node-monitor-grace-period={timings.node_grace_seconds}s",
    )


def _scheduler(layout: Layout) -> tuple[str, ...]:
    return (str(layout.binaries / "kube-scheduler"), *_identity(layout.kubeconfig("scheduler")))


def _identity(config: Path) -> tuple[str, ...]:
    return (
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
        "--bind-address=127.0.0.1",
        # There is one of each: an election would only delay the start.
        "--leader-elect=false",
    )


def _clients_proxy(layout: Layout) -> tuple[str, ...]:
    """A kube-proxy for clients outside of the nodes, so that they reach Services when any node is dead.

    A kube-proxy waits half a minute for the Node that it is named after. This namespace has none, so
    it borrows the first node's name; its own address is given to it.
    """
    return proxy(layout, node=layout.node_names[0], address=str(API_ADDRESS))


def proxy(layout: Layout, *, node: str, address: str) -> tuple[str, ...]:
    return (
        str(layout.binaries / "kube-proxy"),
        f"--kubeconfig={layout.kubeconfig('proxy')}",
        f"--hostname-override={node}",
        f"--bind-address={address}",
        "--healthz-bind-address=127.0.0.1:10256",
        "--proxy-mode=nftables",
        f"--cluster-cidr={POD_NETWORK}",
        # These are settings of the whole machine, which are not a cluster's to change.
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
        "--oom-score-adj=0",
    )


def main() -> None:
    layout = Layout.load(Path(sys.argv[1]))
    run("mount", "-t", "proc", "proc", "/proc")
    Supervisor(services(layout), layout.control_plane).run()


if __name__ == "__main__":
    main()
