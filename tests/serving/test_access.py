"""Who may ask, who may change the server: tokens, certificates, web pages from elsewhere."""

from __future__ import annotations

import http.client
import json
import re
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.http as triton
import trustme

from deployfa.errors import RequestError
from deployfa.serving.service import Access

BODY = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["A joy."]}]}
INFER = "/v2/models/folded/infer"
LOAD = "/v2/repository/models/folded/load"
ORIGIN = "https://shop.example"
#: method and path of everything that changes the server
CHANGES = [
    ("POST", LOAD),
    ("POST", "/v2/repository/models/folded/unload"),
    ("PUT", "/v2/models/folded/adapters/x"),
    ("DELETE", "/v2/models/folded/adapters/x"),
    ("POST", "/v2/logging"),
    ("POST", "/v2/trace/setting"),
    ("POST", "/v2/models/folded/trace/setting"),
]


def bearer(token: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {token}"}


@pytest.fixture(scope="module")
def guarded(serve, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with both tokens, from the environment, and pages of one origin."""
    env = {"DEPLOYFA_TOKEN": "ask", "DEPLOYFA_ADMIN_TOKEN": "change"}
    state = tmp_path_factory.mktemp("state")
    with serve(bundles["folded"], "--state", state, "--cors-origin", ORIGIN, env=env) as running:
        yield running


class TestTokens:
    @pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
    def test_health_needs_none(self, guarded, path: str) -> None:
        assert guarded.ask(path)[0] == 200

    @pytest.mark.parametrize(
        "path", ["/v2", "/metrics", "/v2/models/folded", "/v2/models/folded/ready", "/v2/models/none", "/nowhere"]
    )
    def test_everything_else_does(self, guarded, path: str) -> None:
        status, told, headers = guarded.ask(path)
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert told == {"error": "a token is needed; send the header 'Authorization: Bearer TOKEN'"}
        assert guarded.ask(path, headers=bearer("ask"))[0] == (404 if path in ("/v2/models/none", "/nowhere") else 200)

    @pytest.mark.parametrize("path", ["/v2/health/live/", "/v2/health/../models/folded", "/v2/health/live%2f..%2fx"])
    def test_nothing_hides_behind_health(self, guarded, path: str) -> None:
        assert guarded.ask(path)[0] == 401

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            bearer("asks"),
            bearer("as"),
            bearer(""),
            bearer("ask", "Basic"),
            bearer("ask", ""),
            {"Authorization": "ask"},
            bearer("\xe4sk"),
            {"X-Authorization": "Bearer ask"},
        ],
    )
    def test_another_token_is_none(self, guarded, headers: dict[str, str]) -> None:
        assert guarded.ask(INFER, BODY, headers=headers)[0] == 401

    @pytest.mark.parametrize("token", ["ask", "change"])
    def test_the_right_one_answers(self, guarded, token: str) -> None:
        assert guarded.ask(INFER, BODY, headers=bearer(token))[0] == 200
        assert guarded.ask(INFER, BODY, headers=bearer(token, "bearer"))[0] == 200

    def test_two_of_them_are_refused(self, guarded) -> None:
        connection = http.client.HTTPConnection(*guarded.address, timeout=30)
        connection.putrequest("GET", "/v2")
        connection.putheader("Authorization", "Bearer ask")
        connection.putheader("Authorization", "Bearer other")
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 400 and "twice" in json.loads(answer.read())["error"]
        connection.close()

    @pytest.mark.parametrize(("method", "path"), CHANGES)
    def test_to_ask_is_not_to_change(self, guarded, method: str, path: str) -> None:
        for headers in ({}, bearer("ask")):
            status, told, answered = guarded.ask(path, b"{}", method=method, headers=headers)
            assert status == 401 and answered["www-authenticate"] == "Bearer"
            assert ("admin token" in told["error"]) is bool(headers)
        assert guarded.ask(INFER, BODY, headers=bearer("ask"))[0] == 200

    def test_the_admin_token_changes(self, guarded) -> None:
        assert guarded.ask(LOAD, b"", headers=bearer("change"))[0] == 200
        settings = {"log_verbose_level": 0}
        assert guarded.ask("/v2/logging", settings, headers=bearer("change"))[0] == 200

    def test_tokens_stay_out_of_the_log(self, guarded) -> None:
        whole = json.dumps(guarded.lines)
        assert '"change"' not in whole and "Bearer ask" not in whole


class TestAccess:
    """What a server of its own would cost a second for."""

    def refused(self, check: Callable[[Any], None], *headers: tuple[bytes, bytes]) -> int:
        try:
            check({"headers": list(headers)})
        except RequestError as error:
            return error.status
        return 200

    def test_without_any_everybody_asks_and_nobody_changes(self) -> None:
        access = Access()
        assert self.refused(access.check) == 200 and self.refused(access.check_admin) == 403
        assert self.refused(access.check_admin, (b"authorization", b"Bearer ")) == 403

    def test_with_an_admin_token_alone_everybody_asks(self) -> None:
        access = Access(admin_token="x")
        assert self.refused(access.check) == 200 and self.refused(access.check_admin) == 401
        assert self.refused(access.check_admin, (b"authorization", b"Bearer x")) == 200

    def test_mutual_tls_lets_change_unless_there_is_a_token(self) -> None:
        assert self.refused(Access(mutual_tls=True).check_admin) == 200
        assert self.refused(Access(mutual_tls=True, admin_token="x").check_admin) == 401

    def test_a_token_of_any_letters(self) -> None:
        access = Access(token="schl\xfcssel")
        assert self.refused(access.check, (b"authorization", "Bearer schl\xfcssel".encode())) == 200
        assert self.refused(access.check, (b"authorization", b"Bearer schlussel")) == 401


class TestPagesFromElsewhere:
    def test_one_origin_may_ask(self, guarded) -> None:
        _, _, told = guarded.ask(INFER, BODY, headers={"Origin": ORIGIN, **bearer("ask")})
        assert told["access-control-allow-origin"] == ORIGIN
        exposed = told["access-control-expose-headers"].lower()
        assert "inference-header-content-length" in exposed and "x-request-id" in exposed

    def test_it_is_told_what_is_wrong_too(self, guarded) -> None:
        """Or the page sees a network error in the place of ours."""
        for headers, status in (({}, 401), (bearer("ask"), 404)):
            answer = guarded.ask("/v2/models/none", headers={"Origin": ORIGIN, **headers})
            assert answer[0] == status and answer[2]["access-control-allow-origin"] == ORIGIN

    def test_it_may_ask_whether_it_may(self, guarded) -> None:
        """A browser sends no token with that."""
        asked = {
            "Origin": ORIGIN,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,inference-header-content-length",
        }
        status, _, told = guarded.ask(INFER, method="OPTIONS", headers=asked)
        assert status == 200 and told["access-control-allow-origin"] == ORIGIN
        assert "authorization" in told["access-control-allow-headers"]
        assert "POST" in told["access-control-allow-methods"]

    def test_another_may_not(self, guarded) -> None:
        asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        status, _, told = guarded.ask(INFER, method="OPTIONS", headers=asked)
        assert status == 400 and "access-control-allow-origin" not in told
        told = guarded.ask(INFER, BODY, headers={"Origin": "https://evil.example", **bearer("ask")})[2]
        assert "access-control-allow-origin" not in told


class TestRequestIds:
    def test_ones_own_comes_back(self, guarded) -> None:
        for path in ("/v2/health/live", "/metrics", "/v2", "/nowhere"):
            told = guarded.ask(path, headers={"X-Request-Id": "mine/1", **bearer("ask")})[2]
            assert told["x-request-id"] == "mine/1", path
        assert guarded.ask("/v2", headers={"X-Request-Id": "refused"})[2]["x-request-id"] == "refused"

    @pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, "\xe4"])
    def test_one_is_made(self, guarded, given: str | None) -> None:
        headers = {} if given is None else {"X-Request-Id": given}
        made = [guarded.ask("/v2/health/live", headers=headers)[2]["x-request-id"] for _ in range(2)]
        assert made[0] != made[1] and all(re.fullmatch("[0-9a-f]{32}", each) for each in made)


def test_a_method_that_there_is_not_is_said(guarded) -> None:
    status, told, headers = guarded.ask(INFER, headers=bearer("ask"))
    assert status == 405 and told["error"] == f"method not allowed: GET {INFER}"
    assert headers["allow"] == "POST" and headers["x-request-id"]


class Pem:
    """Files of one authority: a server's certificate, a client's, a stranger's."""

    def __init__(self, folder: Path) -> None:
        self.authority, stranger = trustme.CA(), trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        self.server = self._issue(self.authority, folder, "127.0.0.1")
        self.client = self._issue(self.authority, folder, "client@shop.example")
        self.stranger = self._issue(stranger, folder, "client@evil.example")

    @staticmethod
    def _issue(authority: trustme.CA, folder: Path, name: str) -> tuple[Path, Path]:
        issued = authority.issue_cert(name)
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(cert)
        issued.private_key_pem.write_to_path(key)
        return cert, key

    def context(self, shown: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        if shown is not None:
            context.load_cert_chain(*shown)
        return context


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Pem:
    return Pem(tmp_path_factory.mktemp("pem"))


def ask(
    served: Any, context: ssl.SSLContext, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    host, port = served.address
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=30)
    try:
        connection.request("POST" if body is not None else "GET", path, json.dumps(body), headers or {})
        answer = connection.getresponse()
        content = answer.read()
        told = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, json.loads(content) if content else None, told
    finally:
        connection.close()


@pytest.fixture(scope="module")
def secured(serve, bundles: dict[str, Path], pem: Pem) -> Iterator[Any]:
    cert, key = pem.server
    with serve(bundles["folded"], "--tls-cert", cert, "--tls-key", key) as running:
        yield running


class TestTls:
    def test_it_answers(self, secured, pem: Pem) -> None:
        assert secured.url.startswith("https://127.0.0.1:")
        status, answer, _ = ask(secured, pem.context(), INFER, BODY)
        assert status == 200 and answer["model_name"] == "folded"

    def test_tritons_client_too(self, secured, pem: Pem) -> None:
        url = secured.url.removeprefix("https://")
        with triton.InferenceServerClient(url, ssl=True, ssl_context_factory=pem.context) as client:
            assert client.is_server_ready() and client.get_server_metadata()["name"] == "deployfa"

    def test_who_does_not_know_the_authority_leaves(self, secured) -> None:
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(secured, ssl.create_default_context(), INFER, BODY)

    def test_who_speaks_in_clear_gets_no_answer(self, secured) -> None:
        connection = http.client.HTTPConnection(*secured.address, timeout=30)
        with pytest.raises((http.client.HTTPException, OSError)):
            connection.request("GET", "/v2")
            connection.getresponse()
        connection.close()

    @pytest.mark.parametrize(("method", "path"), CHANGES)
    def test_by_default_nobody_changes_it(self, secured, pem: Pem, method: str, path: str) -> None:
        host, port = secured.address
        connection = http.client.HTTPSConnection(host, port, context=pem.context(), timeout=30)
        connection.request(method, path, "{}", bearer(""))
        answer = connection.getresponse()
        assert answer.status == 403 and "start it with --admin-token" in json.loads(answer.read())["error"]
        connection.close()

    def test_by_default_no_page_from_elsewhere_may_ask(self, secured, pem: Pem) -> None:
        _, _, told = ask(secured, pem.context(), INFER, BODY, {"Origin": ORIGIN})
        assert not [name for name in told if name.startswith("access-control")]


@pytest.fixture(scope="module")
def mutual(serve, bundles: dict[str, Path], pem: Pem, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    cert, key = pem.server
    state = tmp_path_factory.mktemp("state")
    options = ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", pem.ca, "--state", state)
    with serve(bundles["folded"], *options) as running:
        yield running


class TestMutualTls:
    def test_the_right_certificate_answers(self, mutual, pem: Pem) -> None:
        assert ask(mutual, pem.context(pem.client), INFER, BODY)[0] == 200

    def test_it_may_change_the_server(self, mutual, pem: Pem) -> None:
        assert ask(mutual, pem.context(pem.client), LOAD, {})[0] == 200
        assert ask(mutual, pem.context(pem.client), INFER, BODY)[0] == 200

    @pytest.mark.parametrize("path", [INFER, LOAD, "/v2/health/live"])
    def test_none_and_a_strangers_are_refused(self, mutual, pem: Pem, path: str) -> None:
        for shown in (None, pem.stranger):
            with pytest.raises(OSError, match=r"(?i)alert|reset|closed|broken|eof") as caught:
                ask(mutual, pem.context(shown), path, BODY)
            assert not isinstance(caught.value, ssl.SSLCertVerificationError)
        # and whoever is refused stops nobody else
        assert ask(mutual, pem.context(pem.client), "/v2/health/live")[0] == 200
