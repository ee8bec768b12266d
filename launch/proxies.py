"""The proxy of a request. Servers on this machine are reached without one, whatever the environment says.

httpx reads the same variables, but also sends loopback addresses to the proxy and fails for forms of NO_PROXY that other programs
accept (`fd00::/8`).
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from urllib.request import getproxies

import httpx

_OWN = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether the name or address is this machine's."""
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    return False


def proxy_for(url: httpx.URL) -> str | None:
    """Address of the environment's proxy for `url`; None without one and for loopback addresses."""
    found = getproxies()
    proxy = found.get(url.scheme) or found.get("all")
    if not proxy or is_loopback(url.host) or _exempt(url, found.get("no", "")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def own_servers_direct(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """NO_PROXY for a server that this process starts, so that its requests to itself use no proxy."""
    known = environment.get("no_proxy", environment.get("NO_PROXY", ""))
    entries = [entry for entry in re.split(r"[,\s]+", known) if entry]
    value = ",".join([*entries, *(name for name in _OWN if name not in entries)])
    return {"no_proxy": value, "NO_PROXY": value}


def _exempt(url: httpx.URL, no_proxy: str) -> bool:
    return any(_matches(entry.lower(), url) for entry in re.split(r"[,\s]+", no_proxy) if entry)


def _matches(entry: str, url: httpx.URL) -> bool:
    """One entry of NO_PROXY: `*`, a name with its sub-domains, an address, a network; all but the network with a port or not."""
    if entry == "*":
        return True
    entry, host = entry.split("://")[-1], url.host.rstrip(".").lower()
    with suppress(ValueError):  # before the port is split off: IPv6 addresses contain colons
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    name, _, port = entry.rpartition(":")
    if name and port.isdigit():
        if int(port) != (url.port or {"http": 80, "https": 443}.get(url.scheme)):
            return False
        entry = name
    entry = entry.strip("[]").removeprefix("*").strip(".")
    return bool(entry) and (host == entry or host.endswith(f".{entry}"))
