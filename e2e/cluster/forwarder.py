"""Carries connections from a port of the host's loopback into the cluster's network.

The listening socket is made by the parent, in the host's network namespace, and inherited; this
process runs in the cluster's, so what it dials is looked up there. What happens to one side happens
to the other: an end of input is passed on as such, and a reset as a reset, for a client must be able
to tell a server that died from one that finished.

Usage: python -m e2e.cluster.forwarder <fd of the listening socket> <address> <port>
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys

_CHUNK_BYTES = 64 * 1024
_CONNECT_TIMEOUT_SECONDS = 10.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


async def serve(listener: socket.socket, address: str, port: int) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _carry(reader, writer, address, port)

    server = await asyncio.start_server(handle, sock=listener)
    async with server:
        await server.serve_forever()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, port: int) -> None:
    try:
        there_reader, there_writer = await asyncio.wait_for(
            asyncio.open_connection(address, port), _CONNECT_TIMEOUT_SECONDS
        )
    except OSError as error:
        # TimeoutError is one too. The client sees a reset, as it would from the address itself.
        print(f"cannot reach {address}:{port}: {error}", file=sys.stderr, flush=True)
        _reset(writer)
        return
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(_copy(reader, there_writer))
            both.create_task(_copy(there_reader, writer))
    except* OSError:
        _reset(writer)
        _reset(there_writer)
    else:
        writer.close()
        there_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()


def main() -> None:
    descriptor, address, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    asyncio.run(serve(socket.socket(fileno=descriptor), address, port))


if __name__ == "__main__":
    main()
