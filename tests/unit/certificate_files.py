"""Certificates for tests, made with the openssl program."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key."""

    certificate: Path
    key: Path


def openssl(*arguments: object) -> None:
    """Run it."""
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def authority(folder: Path, name: str) -> Pair:
    """A certificate authority."""
    pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
    openssl(
        *("req", "-x509", *_NEW_KEY, "-days", "2", "-subj", f"/CN={name}"),
        *("-keyout", pair.key, "-out", pair.certificate),
    )
    return pair


def issued(folder: Path, issuer: Pair, name: str, names: str, days: int = 2) -> Pair:
    """A certificate of an authority; `names` as in `DNS:localhost,IP:127.0.0.1`."""
    pair, request = Pair(folder / f"{name}.crt", folder / f"{name}.key"), folder / f"{name}.csr"
    extensions = folder / f"{name}.ext"
    extensions.write_text(f"subjectAltName={names}\n")
    openssl("req", *_NEW_KEY, "-subj", f"/CN={name}", "-keyout", pair.key, "-out", request)
    openssl(
        *("x509", "-req", "-in", request, "-CA", issuer.certificate, "-CAkey", issuer.key),
        *("-CAcreateserial", "-days", days, "-extfile", extensions, "-out", pair.certificate),
    )
    return pair
