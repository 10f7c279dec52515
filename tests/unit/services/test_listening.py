"""Where the gateway may listen, and behind what."""

from functools import partial

import pytest

from imaging.config import Places
from imaging.errors import ConfigError
from services.keys import create_key, read_keys, revoke_key
from services.listening import decide_listening
from tests.tiny_tls import make_certificate

ROLES = "issuers: [{issuer: 'https://idp.test', audience: formulary, keys: jwks.json}]\n"


@pytest.fixture
def places(tmp_path):
    (tmp_path / "sites.yaml").write_text("sites: {north: {kind: internal, title: North}}\n")
    return Places(root=tmp_path, build=tmp_path / "build", var=tmp_path / "var")


@pytest.fixture
def certify(tmp_path):
    """A certificate and its key as PEM files."""

    return partial(make_certificate, tmp_path)


def test_loopback_needs_nothing(places):
    for host in ("127.0.0.1", "::1"):
        told = decide_listening(places, host, None, None, False)
        assert (told.options, told.guarded, told.warning) == (["--host", host], False, "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3"])
def test_where_others_reach_it_somebody_must_have_a_credential(places, host):
    with pytest.raises(ConfigError, match="nobody has a credential"):
        decide_listening(places, host, None, None, True)
    made, _ = create_key(places, "north", 90, "ada")
    told = decide_listening(places, host, None, None, True)
    assert told.guarded
    assert "unencrypted" in told.warning
    revoke_key(places, made.id, "ada")
    assert len(read_keys(places.var)) == 1
    with pytest.raises(ConfigError, match="nobody has a credential"):
        decide_listening(places, host, None, None, True)


def test_an_issuer_of_tokens_is_enough(places):
    (places.root / "roles.yaml").write_text(ROLES)
    assert decide_listening(places, "0.0.0.0", None, None, True).guarded


def test_where_others_reach_it_something_encrypts_or_somebody_says_that_it_need_not(places, certify):
    create_key(places, "north", 90, "ada")
    with pytest.raises(ConfigError, match="nothing encrypts"):
        decide_listening(places, "0.0.0.0", None, None, False)
    certificate, key = certify()
    told = decide_listening(places, "0.0.0.0", certificate, key, False)
    assert (told.guarded, told.warning) == (True, "")
    assert told.options[2:6] == ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]


def test_a_name_is_not_an_address(places):
    with pytest.raises(ConfigError, match="'localhost' is not an IP address"):
        decide_listening(places, "localhost", None, None, False)


def test_files_that_make_no_tls_are_told_by_name_before_anything_starts(places, certify, tmp_path):
    certificate, key = certify()
    other, old, locked = certify("other"), certify("old", days=-1), certify("locked", password=b"secret")
    wrong = {
        (certificate, None): "a certificate and its key",
        (None, key): "a certificate and its key",
        (tmp_path / "none.pem", key): "none.pem: No such file",
        (certificate, tmp_path / "none.key"): "none.key: No such file",
        (certificate, other[1]): "key values mismatch",
        (key, key): "server.key is not a certificate",
        (certificate, certificate): "make no TLS",
        old: "old.pem ended on",
        locked: "make no TLS",
        (certificate, tmp_path): "Is a directory",
    }
    for files, words in wrong.items():
        with pytest.raises(ConfigError, match=words):
            decide_listening(places, "127.0.0.1", *files, False)
