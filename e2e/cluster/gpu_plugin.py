"""A device plugin that advertises GPUs which do not exist, so that scheduling by GPU can be tested.

To the kubelet it is like any vendor's. Which devices there are, and their health, it reads from a
file again and again, so that a test breaks a GPU by writing one. The few messages of the kubelet's
device plugin API (v1beta1) are encoded by hand: generated code would outweigh them.

Usage: python -m e2e.cluster.gpu_plugin <the kubelet's device-plugins folder> <health file>
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc  # type: ignore[import-untyped]

RESOURCE = "nvidia.com/gpu"
_API_VERSION = "v1beta1"
_SOCKET = "resilientllm-gpu.sock"
_POLL_SECONDS = 0.1


def field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def count_messages(encoded: bytes) -> int:
    """How many length-delimited fields follow one another in a message that has no others."""
    count = position = 0
    while position < len(encoded):
        _, position = _read_varint(encoded, position)
        length, position = _read_varint(encoded, position)
        position += length
        count += 1
    return count


def registration(endpoint: str) -> bytes:
    """RegisterRequest: version, endpoint, resource name."""
    return field(1, _API_VERSION.encode()) + field(2, endpoint.encode()) + field(3, RESOURCE.encode())


def devices(healthy: Mapping[str, bool]) -> bytes:
    """ListAndWatchResponse: a list of devices, each an id and its health."""
    return b"".join(
        field(1, field(1, name.encode()) + field(2, b"Healthy" if good else b"Unhealthy"))
        for name, good in sorted(healthy.items())
    )


class Plugin:
    """The service that the kubelet calls; requests and answers are encoded messages."""

    def __init__(self, health_file: Path) -> None:
        self._health_file = health_file

    def handler(self) -> grpc.GenericRpcHandler:
        methods = {
            "GetDevicePluginOptions": grpc.unary_unary_rpc_method_handler(lambda request, context: b""),
            "ListAndWatch": grpc.unary_stream_rpc_method_handler(self._watch),
            "Allocate": grpc.unary_unary_rpc_method_handler(self._allocate),
        }
        return grpc.method_handlers_generic_handler(f"{_API_VERSION}.DevicePlugin", methods)

    def _watch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        sent = None
        while context.is_active():
            current = devices(json.loads(self._health_file.read_text()))
            if current != sent:
                yield current
                sent = current
            time.sleep(_POLL_SECONDS)

    def _allocate(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        # One answer for each container that asked; there is nothing to mount for a GPU that is not there.
        return field(1, b"") * count_messages(request)


def serve(folder: Path, health_file: Path) -> None:
    """Serve, and register with the kubelet again whenever it was started anew."""
    socket = folder / _SOCKET
    kubelet = folder / "kubelet.sock"
    while True:
        server = grpc.server(ThreadPoolExecutor(max_workers=4))
        server.add_generic_rpc_handlers((Plugin(health_file).handler(),))
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        with grpc.insecure_channel(f"unix:{kubelet}") as channel:
            register = channel.unary_unary(f"/{_API_VERSION}.Registration/Register")
            register(registration(_SOCKET), wait_for_ready=True)
        # A kubelet that starts removes all sockets of the folder, ours too: that is the sign.
        while socket.exists():
            time.sleep(_POLL_SECONDS)
        server.stop(None)


def _read_varint(encoded: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = encoded[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def main() -> None:
    serve(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
