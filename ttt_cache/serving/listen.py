"""The port and the certificate, both looked at before a model is loaded."""

from __future__ import annotations

import errno
import socket
import ssl
from pathlib import Path


def tls(folder: Path) -> ssl.SSLContext:
    """Read `cert.pem` and `key.pem`.

    Raises:
        ValueError: they are not there, or not a certificate and its key.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # A key with a passphrase is refused: without one given, Python would ask the terminal.
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem", password="")
    except OSError as error:  # SSLError is one
        raise ValueError(
            f"--ssl must be a folder with a certificate in cert.pem and its key in key.pem, "
            f"got {folder}: {error.strerror or error}"
        ) from None
    return context


def bound(host: str, port: int, shared: bool = False) -> list[socket.socket]:
    """Sockets of every address of a host, taken before a model is loaded.

    Until they are accepted from, clients wait: a port is only taken once something listens there.

    Args:
        shared: with other processes of this user that say so, too: the kernel gives each new
            connection to one of those that listen.

    Raises:
        ValueError: no host is named, there is none such, or the port is in use or not ours to take.
    """
    if not host.strip():
        raise ValueError(
            "--host must be a name or an address of this machine, such as localhost, or 0.0.0.0 "
            f"or :: for all of its addresses, got {host!r}"
        )
    found: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, _, _, _, address in dict.fromkeys(addresses):
            try:
                found.append(_socket(family, address, shared))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
    except (OSError, OverflowError, UnicodeError) as error:
        for each in found:
            each.close()
        raise ValueError(_refused(host, port, error)) from None
    if not found:
        raise ValueError(f"--host must be an address of this machine, got {host}")
    return found


def _socket(family: int, address: tuple, shared: bool) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:  # the IPv4 address has a socket of its own
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        if not shared:
            made.listen(1)
    except OSError:
        made.close()
        raise
    return made


def _refused(host: str, port: int, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; stop what listens there, or choose another --port"
    return f"{host}:{port} cannot be listened to: {getattr(error, 'strerror', None) or error}"
