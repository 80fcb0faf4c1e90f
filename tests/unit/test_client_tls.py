"""Where no encrypted connection comes about, every caller of a server says what is wrong."""

import re
import ssl
from contextlib import contextmanager

import grpc
import pytest

from client import AccessDeniedError, HttpClient, Tls
from tests.commands import run
from tests.unit.certificate_files import authority, issued, openssl
from tests.unit.client_servers import every, grpc_server, http_server, image
from tests.unit.onnx_files import write_graph_set

REASONS = {  # by server's certificate, whom the client trusts, and what it shows
    ("renamed", "ours", None): "is for one.example, two.example, 10.0.0.1, not for 127.0.0.1; "
    "connect by a name that it holds, or make a certificate for 127.0.0.1",
    ("nameless", "ours", None): "is for nameless, not for 127.0.0.1",
    ("expired", "ours", None): "or of who signed it, has expired",
    ("early", "ours", None): "or of who signed it, is not valid yet",
    ("itself", "ours", None): "is self-signed and not among those in .*ours.crt",
    ("server", "others", None): "signed by an authority that is not among those in .*others.crt",
    ("server", None, None): "signed by an authority that is not among those that this machine",
}
AT_SERVERS_THAT_ASK = {
    ("server", "ours", None): "as one does that wants a client certificate",
    ("server", "ours", "stranger"): "does not accept our certificate .*stranger.crt",
    ("server", "ours", "expired"): "does not accept our certificate .*expired.crt",
    # Before it says whom it trusts the server has shown a certificate itself.
    ("renamed", "ours", None): "is for one.example, .*, not for 127.0.0.1",
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    ours, others = authority(folder, "ours"), authority(folder, "others")
    issued(folder, ours, "server", "IP:127.0.0.1")
    issued(folder, ours, "renamed", "DNS:one.example,DNS:two.example,IP:10.0.0.1")
    issued(folder, ours, "nameless", "email:nobody@one.example")
    issued(folder, ours, "expired", "IP:127.0.0.1", days=-1)
    issued(folder, others, "stranger", "IP:127.0.0.1")
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-subj", "/CN=itself", "-addext", "subjectAltName=IP:127.0.0.1", "-days", 2),
        *("-keyout", folder / "itself.key", "-out", folder / "itself.crt"),
    )
    issued(folder, ours, "early", "IP:127.0.0.1")  # and again, from 2090 on
    (folder / "index").touch()
    (folder / "serial").write_text("01\n")
    (folder / "ca.conf").write_text(
        "[ca]\ndefault_ca=ours\n[ours]\npolicy=any\ndefault_md=sha256\n"
        f"database={folder}/index\nserial={folder}/serial\nnew_certs_dir={folder}\n"
        "[any]\ncommonName=supplied\n"
    )
    openssl(
        *("ca", "-batch", "-notext", "-config", folder / "ca.conf"),
        *("-cert", ours.certificate, "-keyfile", ours.key, "-in", folder / "early.csr"),
        *("-startdate", "20900101000000Z", "-enddate", "20910101000000Z"),
        *("-extfile", folder / "early.ext", "-out", folder / "early.crt"),
    )
    return folder


@contextmanager
def serve(kind, folder, name, asks_for_one=False):
    files = [folder / f"{name}.crt", folder / f"{name}.key"]
    if kind is HttpClient:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*files)
        if asks_for_one:
            context.load_verify_locations(folder / "ours.crt")
            context.verify_mode = ssl.CERT_REQUIRED
        with http_server(context=context) as (asked, url):
            yield asked, url
        return
    roots = (folder / "ours.crt").read_bytes() if asks_for_one else None
    pair = tuple(file.read_bytes() for file in reversed(files))
    credentials = grpc.ssl_server_credentials([pair], roots, asks_for_one)
    with grpc_server(credentials=credentials) as (service, url):
        yield service.asked, url


@every
@pytest.mark.parametrize(
    ("asks_for_one", "files", "said"),
    [(False, *case) for case in REASONS.items()]
    + [(True, *case) for case in AT_SERVERS_THAT_ASK.items()],
)
def test_the_reason_is_named(kind, asks_for_one, files, said, certificates):
    name, ca, shown = files
    pair = (certificates / f"{shown}.crt", certificates / f"{shown}.key") if shown else ()
    tls = Tls(ca and certificates / f"{ca}.crt", *pair)
    with serve(kind, certificates, name, asks_for_one) as (asked, url):
        with kind(url, tls=tls) as client, pytest.raises(AccessDeniedError, match=said) as caught:
            client.infer([image(7)], timeout_s=20)
        assert "\n" not in str(caught.value) and url in str(caught.value)
    assert not asked


def test_by_a_name_that_the_certificate_holds_it_is_a_connection(certificates):
    issued_for = Tls(certificates / "ours.crt")
    with serve(None, certificates, "server") as (_, url):
        assert issued_for.why_refused(url) is None
        said = issued_for.why_refused(url.replace("127.0.0.1", "localhost"))
    assert "is for 127.0.0.1, not for localhost; connect by a name that it holds" in said
    assert issued_for.why_refused("127.0.0.1:1") is None  # no server: not about certificates


@pytest.mark.parametrize(
    ("folder", "words", "code"),
    [
        ("server", ["check"], 1),
        ("server", ["rollout"], 2),
        ("calibration", ["collect", "--images", ".", "--onnx", "onnx"], 2),
        ("client", ["infer", "a.png"], 2),
    ],
)
def test_every_command_says_whose_certificate_it_met(
    folder, words, code, certificates, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(image(7))
    write_graph_set(tmp_path / "onnx")
    wrong_name = REASONS["renamed", "ours", None]
    with serve(None, certificates, "renamed") as (_, url):
        for more, said in (
            (["--tls-ca", certificates / "ours.crt"], wrong_name),
            ([], f"the server at {url} wants TLS; give the certificate of who signed its own"),
        ):
            done = run(folder, *words, "--url", url, *more)
            assert done.code == code, done
            lines = (done.out + done.err).splitlines()
            assert len(lines) == 1 and re.search(said, lines[0]), lines
