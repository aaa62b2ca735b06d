"""``deployfa serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deployfa.cli.options import EngineOption, TargetOption, Threads
from deployfa.errors import InputError

__all__ = ["serve"]


def serve(
    bundles: Annotated[
        list[Path],
        typer.Argument(help="Bundle directories, or NAME=DIRECTORY. Default name: the directory's, without .bundle."),
    ],
    host: Annotated[str, typer.Option("--host", help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for a free one; the log says which.")] = 8000,
    target: TargetOption = None,
    engine: EngineOption = None,
    threads: Threads = None,
    spinning: Annotated[
        bool, typer.Option("--spinning", help="Idle threads of the runtime keep polling: sooner, and a core burns.")
    ] = False,
    default_adapter: Annotated[
        str | None, typer.Option("--default-adapter", help="Of requests that name none; base for the base model.")
    ] = None,
    max_adapters: Annotated[
        int | None,
        typer.Option("--max-adapters", min=1, help="In memory, of a model; the rest stays on disk. Default: no limit."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Keeps the adapters that were loaded while serving. Default: the user's own."),
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Rows of one batch.")] = 32,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of one batch, padding included.")] = 16_384,
    max_padding: Annotated[
        float, typer.Option("--max-padding", min=0.0, max=1.0, help="Share of a batch that may be padding.")
    ] = 0.25,
    max_delay_ms: Annotated[
        float, typer.Option("--max-delay-ms", min=0.0, help="How long an idle model waits for more requests (ms).")
    ] = 0.0,
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Requests that may wait; more get 503.")] = 1024,
    timeout: Annotated[float, typer.Option("--timeout", min=0.001, help="Deadline of a request (s).")] = 60.0,
    drain_timeout: Annotated[
        float, typer.Option("--drain-timeout", min=1.0, help="After SIGTERM, time to answer what was accepted (s).")
    ] = 30.0,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="DEPLOYFA_TOKEN", help="Bearer token of every request, health aside."),
    ] = None,
    admin_token: Annotated[
        str | None,
        typer.Option(
            "--admin-token", envvar="DEPLOYFA_ADMIN_TOKEN", help="Allows to load and unload, with this bearer token."
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate chain, a PEM file.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its key, a PEM file.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option("--tls-client-ca", help="Clients must show a certificate signed by it (mutual TLS).")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="Web pages from there may ask. Default: none.")
    ] = None,
    max_body_mb: Annotated[float, typer.Option("--max-body-mb", min=0.001, help="Of one request (MB).")] = 33.5,
    read_timeout: Annotated[
        float, typer.Option("--read-timeout", min=0.1, help="By when a request must have arrived whole (s).")
    ] = 30.0,
    max_connections: Annotated[int, typer.Option("--max-connections", min=1, help="Open at once.")] = 1024,
    metrics_adapters: Annotated[
        int,
        typer.Option("--metrics-adapters", min=0, help="Adapters with their own series at /metrics; more are _other."),
    ] = 100,
    log_level: Annotated[
        str, typer.Option("--log-level", help="debug, info (a line for each request), warning or error.")
    ] = "info",
) -> None:
    """Answer over HTTP: the Open Inference Protocol v2, as Triton and KServe speak it.

    Requests for different adapters of a pack ride in one batch. The log is JSON on standard error.

    Example: deployfa serve pack.bundle --port 8000

    Then: curl localhost:8000/v2/models/pack/infer -d '{"parameters": {"adapter": "vefa"},
    "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["A joy."]}]}'
    """
    from deployfa.cli.console import warn
    from deployfa.errors import MissingExtraError
    from deployfa.serving.fair_queue import Policy
    from deployfa.serving.limits import Limits

    try:
        from deployfa.serving import server
        from deployfa.serving.opening import Running
        from deployfa.serving.service import Access
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "deployfa"):
            raise  # our own mistake, which no installing mends
        raise MissingExtraError(missing, "serve", "serving") from error

    if log_level not in ("debug", "info", "warning", "error"):
        raise InputError(f"--log-level is {log_level}; pass debug, info, warning or error")
    if (tls_cert is None) != (tls_key is None) or (tls_client_ca is not None and tls_cert is None):
        raise InputError("TLS needs a certificate and its key; pass --tls-cert and --tls-key")
    for option, given in (("--token", token), ("--admin-token", admin_token)):
        if given is not None and (not given.strip() or given != given.strip()):
            raise InputError(f"{option} is empty, or begins or ends in a space, which no header can send; pass another")
    tls = None
    if tls_cert is not None and tls_key is not None:
        tls = server.Tls(certificate=tls_cert, key=tls_key, client_ca=tls_client_ca)
    changeable = admin_token is not None or tls_client_ca is not None
    if host not in ("127.0.0.1", "::1", "localhost") and token is None and tls_client_ca is None:
        warn([f"whoever reaches {host}:{port} may ask; pass --token, or --tls-client-ca"])
    options = server.ServeOptions(
        bundles=_named(bundles),
        host=host,
        port=port,
        running=Running(
            target=target,
            engine=engine,
            threads=threads,
            spinning=True if spinning else "brief",
            default_adapter=default_adapter,
            max_resident=max_adapters,
        ),
        policy=Policy(
            max_rows=max_batch,
            max_tokens=max_tokens,
            max_padding=max_padding,
            max_queue=max_queue,
            max_delay_s=max_delay_ms / 1e3,
        ),
        limits=Limits(body_bytes=int(1e6 * max_body_mb), connections=max_connections, read_s=read_timeout),
        access=Access(token=token, admin_token=admin_token, mutual_tls=tls_client_ca is not None),
        tls=tls,
        state=_state(state) if changeable or state is not None else None,
        timeout_s=timeout,
        drain_s=drain_timeout,
        cors_origins=cors_origin or [],
        metric_adapters=metrics_adapters,
        log_level=log_level,
    )
    status = server.serve(options)
    if status:
        raise typer.Exit(status)


def _named(bundles: list[Path]) -> dict[str, Path]:
    """``pack.bundle`` → ``pack``; ``shop=pack.bundle`` → ``shop``."""
    found: dict[str, Path] = {}
    for given in bundles:
        name, equals, path = str(given).partition("=")
        if not equals or given.exists():
            path = str(given)
            name = Path(path).resolve().name.removesuffix(".bundle")
        if name in ("", ".", "..") or not name.isprintable() or "/" in name:
            raise InputError(f"'{name}' cannot name a model; pass NAME=DIRECTORY with a plain name")
        if name in found:
            raise InputError(f"two bundles are called '{name}'; pass NAME=DIRECTORY for one of them")
        found[name] = Path(path)
    return found


def _state(state: Path | None) -> Path:
    if state is not None:
        return state
    import platformdirs

    return platformdirs.user_state_path("deployfa") / "serve"
