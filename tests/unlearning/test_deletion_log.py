import hashlib
import json

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm_flwr.errors import ConfigError, VerificationError
from fedllm_flwr.runs.atomic import write_bytes
from fedllm_flwr.unlearning.deletion_log import (
    KEY_VARIABLE,
    Head,
    append,
    read_private_key,
    read_public_key,
    verify,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key()


def pem(key):
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def public_pem(key):
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form)


def head_of(path):
    lines = path.read_bytes().splitlines()
    return Head(len(lines), hashlib.sha256(lines[-1]).hexdigest())


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "deletions.jsonl"
    for client in range(5):
        add(path, client)
    return path


def add(path, client, key=KEY):
    body = {"client": client, "method": "rewind"}
    return append(path, body, time=f"2025-01-0{client + 1}T00:00:00Z", key=key, write=write_bytes)


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def test_entries_come_back_and_the_head_follows(tmp_path):
    path = tmp_path / "log"
    heads = [add(path, client) for client in range(3)]
    assert [head.entries for head in heads] == [1, 2, 3]
    assert head_of(path) == heads[-1]
    entries = verify(path, PUBLIC, head=heads[-1])
    assert [entry.body["client"] for entry in entries] == [0, 1, 2]
    assert entries[1].index == 1
    assert entries[1].time == "2025-01-02T00:00:00Z"
    # a head of long ago is in the log still
    assert len(verify(path, PUBLIC, head=heads[0])) == 3


@pytest.mark.parametrize("index", range(5))
def test_an_edited_entry_is_named(log, index):
    lines = lines_of(log)
    lines[index] = lines[index].replace(b'"rewind"', b'"merge"')
    log.write_bytes(b"".join(lines))
    with pytest.raises(VerificationError, match=f"entry {index}: expected a signature of its text"):
        verify(log, PUBLIC)


@pytest.mark.parametrize("index", range(4))
def test_a_deleted_entry_is_named(log, index):
    lines = lines_of(log)
    del lines[index]
    log.write_bytes(b"".join(lines))
    with pytest.raises(VerificationError, match=f"entry {index}: expected index {index} after"):
        verify(log, PUBLIC)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 3), (3, 4)])
def test_entries_that_changed_places_are_named(log, first, second):
    lines = lines_of(log)
    lines[first], lines[second] = lines[second], lines[first]
    log.write_bytes(b"".join(lines))
    with pytest.raises(VerificationError, match=f"entry {first}: expected index {first} after"):
        verify(log, PUBLIC)


def test_an_entry_put_in_or_copied_is_named(log):
    lines = lines_of(log)
    log.write_bytes(b"".join([*lines, lines[4]]))
    with pytest.raises(VerificationError, match="entry 5: expected index 5 after"):
        verify(log, PUBLIC)


@pytest.mark.parametrize("kept", [0, 2, 4])
def test_a_log_cut_at_its_end_is_found_by_its_head(log, kept):
    head = head_of(log)
    log.write_bytes(b"".join(lines_of(log)[:kept]))
    assert len(verify(log, PUBLIC)) == kept, "without the head it looks whole"
    with pytest.raises(VerificationError, match=f"entry {kept}: expected 5 entries up to hash"):
        verify(log, PUBLIC, head=head)


def test_a_log_cut_within_a_line_is_named(log):
    log.write_bytes(log.read_bytes()[:-7])
    with pytest.raises(VerificationError, match="entry 4: expected a whole line"):
        verify(log, PUBLIC)


def test_a_log_that_was_signed_anew_is_found_by_its_head(log, tmp_path):
    """Even who has the key cannot rewrite what a certificate quotes."""
    forged = tmp_path / "forged"
    for client in (0, 1, 2, 3, 0):
        add(forged, client)
    assert len(verify(forged, PUBLIC)) == 5
    with pytest.raises(VerificationError, match="expected 5 entries up to hash"):
        verify(forged, PUBLIC, head=head_of(log))


def test_an_entry_of_another_log_with_the_same_key_and_place_is_named(log, tmp_path):
    other = tmp_path / "other"
    for client in (0, 1, 4, 3):
        add(other, client)
    log.write_bytes(b"".join([*lines_of(log)[:3], lines_of(other)[3]]))
    with pytest.raises(VerificationError, match="entry 3: expected index 3 after hash"):
        verify(log, PUBLIC)


def test_another_key_signs_nothing(log):
    with pytest.raises(VerificationError, match="entry 0: expected a signature of its text"):
        verify(log, OTHER.public_key())
    with pytest.raises(VerificationError, match="entry 0"):
        add(log, 5, key=OTHER)
    assert len(lines_of(log)) == 5


def test_a_broken_log_is_not_added_to(log):
    log.write_bytes(log.read_bytes().replace(b'"client":2', b'"client":9'))
    before = log.read_bytes()
    with pytest.raises(VerificationError, match="entry 2"):
        add(log, 5)
    assert log.read_bytes() == before


@pytest.mark.parametrize("text", [b"\n", b"[]\n", b"{}\n", b'{"signature":"zz"}\n', b"\xff\n"])
def test_a_line_that_is_no_entry_is_named(log, text):
    log.write_bytes(log.read_bytes() + text)
    with pytest.raises(VerificationError, match="entry 5: expected a signed entry"):
        verify(log, PUBLIC)


def test_another_form_of_the_same_content_is_named(log):
    lines = lines_of(log)
    lines[1] = json.dumps(json.loads(lines[1])).encode() + b"\n"
    log.write_bytes(b"".join(lines))
    with pytest.raises(VerificationError, match="entry 1: expected the form in which"):
        verify(log, PUBLIC)


def test_a_missing_log_and_a_body_that_is_no_json_are_refused(tmp_path):
    with pytest.raises(VerificationError, match="deletion log log: cannot be read"):
        verify(tmp_path / "log", PUBLIC)
    for body in ({"client": {1}}, {1: "client"}, {"loss": float("nan")}, {"clients": (1, 2)}):
        with pytest.raises(ConfigError, match="plain JSON values"):
            append(tmp_path / "log", body, time="now", key=KEY, write=write_bytes)
    assert not (tmp_path / "log").exists()


def test_keys_come_from_a_file_or_from_the_environment(tmp_path):
    file, public = tmp_path / "key.pem", tmp_path / "public.pem"
    file.write_bytes(pem(KEY))
    public.write_bytes(public_pem(KEY))
    assert read_private_key(file, {}).private_bytes_raw() == KEY.private_bytes_raw()
    from_text = read_private_key(None, {KEY_VARIABLE: pem(KEY).decode()})
    assert from_text.private_bytes_raw() == KEY.private_bytes_raw()
    assert read_public_key(public).public_bytes_raw() == PUBLIC.public_bytes_raw()


def test_keys_that_are_none_are_refused_without_a_word_of_them(tmp_path):
    file = tmp_path / "key.pem"
    with pytest.raises(ConfigError, match=f"expected a private key in {KEY_VARIABLE}, got nothing"):
        read_private_key(None, {})
    with pytest.raises(ConfigError, match=r"key\.pem, got nothing that can be read"):
        read_private_key(file, {})
    for content in (b"secret", pem(generate_private_key(SECP256R1())), public_pem(KEY)):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="expected an Ed25519 private key as PEM") as error:
            read_private_key(file, {})
        assert content.decode() not in str(error.value)
    with pytest.raises(ConfigError, match="expected an Ed25519 public key"):
        read_public_key(tmp_path / "absent")
    file.write_bytes(pem(KEY))
    with pytest.raises(ConfigError, match="expected an Ed25519 public key"):
        read_public_key(file)
