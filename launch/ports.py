"""TCP ports of this machine."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_problem(host: str, port: int) -> str | None:
    """Why no server can listen on this address; None if one can."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None


def port_refusals(host: str, port: int) -> tuple[str, ...]:
    """The sentence for an address that no server could listen on now, if it is one."""
    problem = port_problem(host, port)
    return (f"--host {host} --port {port} cannot be used ({problem}): choose a free one.",) if problem else ()


def http_address(host: str, port: int) -> str:
    """The URL of a server at this address, with IPv6 addresses in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
