"""``deployfa serve``: what cannot be served is one line and exit status 2, before anything listens."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from typer.testing import CliRunner

from deployfa.bundle import Bundle
from deployfa.cli import main
from deployfa.cli.app import app


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``cert``, ``key``, ``ca``; ``other``: the key of another certificate; ``locked``: ``key`` with a password."""
    folder = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    issued, other = (authority.issue_cert("localhost", "127.0.0.1") for _ in range(2))
    found = {name: folder / f"{name}.pem" for name in ("cert", "key", "ca", "other", "locked")}
    issued.cert_chain_pems[0].write_to_path(found["cert"])
    issued.private_key_pem.write_to_path(found["key"])
    authority.cert_pem.write_to_path(found["ca"])
    other.private_key_pem.write_to_path(found["other"])
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.BestAvailableEncryption(b"secret"),
    )
    found["locked"].write_bytes(locked)
    return found


@pytest.fixture
def refused(monkeypatch, capsys) -> Callable[..., str]:
    """``refused("nothing.bundle")``: its only line on standard error.  In this process: a start costs a second."""

    def message(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["deployfa", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        out, err = capsys.readouterr()
        # nothing was logged before: it never began to listen
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return message


@pytest.fixture
def nothing(tmp_path: Path) -> Path:
    """No bundle: options are refused before it is looked for."""
    return tmp_path / "nothing.bundle"


class TestBundles:
    def test_no_such_bundle_is_one_line_and_status_2(self, cli, nothing: Path) -> None:
        result = cli("serve", "--port", "0", nothing)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and "nothing.bundle' is not a bundle" in line and "deployfa export" in line

    def test_not_a_bundle(self, refused, bundles: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "empty' is not a bundle" in refused(tmp_path / "empty")
        # the good one beside it is not served alone
        assert "empty' is not a bundle" in refused(bundles["folded"], f"other={tmp_path / 'empty'}")
        (tmp_path / "empty" / "manifest.json").write_text("{")
        assert "manifest.json' is broken" in refused(tmp_path / "empty")

    def test_a_damaged_one_ends_the_server(self, cli, bundles: dict[str, Path], tmp_path: Path) -> None:
        copy = Path(shutil.copytree(bundles["folded"], tmp_path / "copy"))
        graph = Bundle.open(copy).graph
        graph.write_bytes(graph.read_bytes()[:-1])
        result = cli("serve", "--port", "0", copy)
        assert result.returncode == 2
        *lines, last = result.stderr.splitlines()
        assert last.startswith("error: model 'copy' does not load") and graph.name in last
        events = [json.loads(line)["event"] for line in lines]
        assert "model not loaded" in events and "ready" not in events

    def test_two_of_one_name(self, refused, bundles: dict[str, Path]) -> None:
        told = refused(bundles["folded"], f"folded={bundles['side-op']}")
        assert told == "error: two bundles are called 'folded'; pass NAME=DIRECTORY for one of them\n"

    @pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb"])
    def test_a_name_that_no_url_has(self, refused, nothing: Path, name: str) -> None:
        assert "cannot name a model" in refused(f"{name}={nothing}")

    def test_no_bundle_at_all(self, cli) -> None:
        result = cli("serve")
        assert result.returncode == 2 and "bundles" in result.stderr


class TestOptions:
    def test_a_port_in_use(self, refused, bundles: dict[str, Path]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            told = refused(bundles["folded"], "--port", port)
        assert f"cannot listen on 127.0.0.1:{port}" in told and "pass another --host or --port" in told

    def test_an_address_of_another_machine(self, refused, bundles: dict[str, Path]) -> None:
        # 192.0.2.0/24 is for documentation: nobody has it
        told = refused(bundles["folded"], "--host", "192.0.2.1", "--port", 0, "--token", "x")
        assert "cannot listen on 192.0.2.1:0" in told

    def test_a_log_level_that_there_is_not(self, refused, nothing: Path) -> None:
        assert "--log-level is x; pass debug, info, warning or error" in refused(nothing, "--log-level", "x")

    @pytest.mark.parametrize("option", ["--token", "--admin-token"])
    @pytest.mark.parametrize("value", ["", " ", "secret "])
    def test_a_token_that_protects_nothing_or_fits_nothing(self, refused, nothing, option: str, value: str) -> None:
        assert f"error: {option} is empty" in refused(nothing, option, value)

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--port", "70000"), ("--max-batch", "0"), ("--max-padding", "1.5"), ("--timeout", "0"), ("--threads", "x")],
    )
    def test_numbers_out_of_range(self, nothing: Path, option: str, value: str) -> None:
        result = CliRunner().invoke(app, ["serve", str(nothing), option, value])
        assert result.exit_code == 2 and option in result.output


class TestTls:
    @pytest.mark.parametrize(
        "options",
        [
            ("--tls-cert", "cert"),
            ("--tls-key", "key"),
            ("--tls-client-ca", "ca"),
            ("--tls-key", "key", "--tls-client-ca", "ca"),
        ],
    )
    def test_half_of_it(self, refused, nothing: Path, pem: dict[str, Path], options: tuple[str, ...]) -> None:
        given = [pem.get(option, option) for option in options]
        assert "TLS needs a certificate and its key; pass --tls-cert and --tls-key" in refused(nothing, *given)

    def test_a_damaged_certificate(self, refused, nothing: Path, pem: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "cut.pem").write_text(pem["cert"].read_text()[:200])
        for cert, key in (
            (tmp_path / "cut.pem", pem["key"]),
            (tmp_path / "no.pem", pem["key"]),
            (pem["cert"], pem["other"]),
        ):
            told = refused(nothing, "--tls-cert", cert, "--tls-key", key)
            assert f"'{cert}' and '{key}' cannot be used" in told and "as PEM files" in told

    def test_a_damaged_client_authority(self, refused, nothing: Path, pem: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "empty.pem").write_text("")
        for authority in (tmp_path / "empty.pem", tmp_path / "no.pem"):
            given = ("--tls-cert", pem["cert"], "--tls-key", pem["key"], "--tls-client-ca", authority)
            told = refused(nothing, *given)
            assert f"'{authority}' cannot be used" in told and "who signs clients" in told

    def test_a_key_with_a_password_asks_nobody(self, refused, nothing: Path, pem: dict[str, Path]) -> None:
        told = refused(nothing, "--tls-cert", pem["cert"], "--tls-key", pem["locked"])
        assert "has a password" in told and "openssl pkey" in told


def test_the_help_shows_a_request(cli) -> None:
    told = " ".join(cli("serve", "--help", env={"COLUMNS": "120"}).stdout.split())
    assert "curl localhost:8000/v2/models/pack/infer -d" in told
    assert '"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["A joy."]}]}' in told


@pytest.mark.parametrize("missing", ["uvicorn", "starlette", "prometheus_client"])
def test_without_the_extra_it_is_named(nothing: Path, missing: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; from deployfa.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(nothing)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    wanted = f"error: serving needs {missing}, which is not installed; run: pip install 'deployfa[serve]'"
    assert result.stderr.splitlines() == [wanted]


def test_the_other_commands_need_no_extra() -> None:
    """And importing the command line does not import a server."""
    code = "import sys; import deployfa.cli.app; print([m for m in ('uvicorn', 'starlette') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
