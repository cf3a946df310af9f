import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedllm_flwr.deploying import keys
from fedllm_flwr.deploying.keys import make_node_key, make_server_files


def test_the_server_certificate_is_signed_by_the_authority_and_names_its_hosts(
    tmp_path: Path,
) -> None:
    files = make_server_files(tmp_path / "net", ["127.0.0.1", "localhost"])
    authority, own = (
        x509.load_pem_x509_certificate(path.read_bytes())
        for path in (files.authority, files.certificate)
    )
    own.verify_directly_issued_by(authority)
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.certificate, files.key)  # raises if the key is another's
    ssl.create_default_context(cafile=str(files.authority))


def test_private_keys_are_for_the_owner_alone_and_are_kept(tmp_path: Path) -> None:
    files = make_server_files(tmp_path, ["localhost"])
    node = tmp_path / "keys" / "node-0"
    public = make_node_key(node)
    for path in (files.key, node):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = [path.read_bytes() for path in (files.key, files.certificate, node, public)]
    make_server_files(tmp_path, ["localhost"])
    make_node_key(node)
    after = [path.read_bytes() for path in (files.key, files.certificate, node, public)]
    assert after == before, "a second start goes on with the same identities"


@pytest.mark.parametrize(("days", "kept"), [(0, False), (1, True)])
def test_a_certificate_that_has_run_out_is_made_anew(
    days: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(keys, "VALID_DAYS", days)
        before = make_server_files(tmp_path, ["localhost"]).certificate.read_bytes()
    files = make_server_files(tmp_path, ["localhost"])
    assert (files.certificate.read_bytes() == before) is kept
    authority, own = (
        x509.load_pem_x509_certificate(path.read_bytes())
        for path in (files.authority, files.certificate)
    )
    own.verify_directly_issued_by(authority)


def test_a_nodes_public_key_belongs_to_its_private_one(tmp_path: Path) -> None:
    public = make_node_key(tmp_path / "node")
    private = serialization.load_ssh_private_key((tmp_path / "node").read_bytes(), password=None)
    form = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    assert private.public_key().public_bytes(*form) == public.read_bytes().strip()
    assert public.read_bytes().startswith(b"ecdsa-sha2-nistp384 ")
    assert make_node_key(tmp_path / "other").read_bytes() != public.read_bytes()
