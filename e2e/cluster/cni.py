"""The pod network of one node, as the container runtime reads it."""

from __future__ import annotations

import json
from ipaddress import IPv4Network


def bridge_network(pods: IPv4Network) -> str:
    """Pods hang on a bridge of their node; static routes lead to other nodes' pods."""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": str(pods)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, portmap]}, indent=2)
