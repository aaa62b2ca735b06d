"""The command line itself: start-up, tables, exit statuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "onnxruntime", "onnx_ir", "tensorrt", "numpy")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['deployfa', '--help']\n"
        "from deployfa.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('HEAVY', *[name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "HEAVY"


def test_every_command_has_help_and_an_own_line(cli) -> None:
    overview = cli("--help").stdout
    for command in (
        "train",
        "inspect",
        "convert",
        "merge",
        "plan",
        "export",
        "verify",
        "bench",
        "run",
        "demo",
        "report",
        "fetch",
        "models",
    ):
        assert f" {command} " in overview
        result = cli(command, "--help")
        assert result.returncode == 0
        assert "Usage" in result.stdout


def test_version(cli) -> None:
    assert cli("--version").stdout.startswith("deployfa 0.")


def test_completion_is_offered(cli) -> None:
    assert "--install-completion" in cli("--help").stdout


def test_inspect_says_what_it_found(cli, trained: dict[str, Path]) -> None:
    result = cli("inspect", trained["lora"])
    assert result.returncode == 0, result.stderr
    for part in ("lora adapter", "LowRank on the output", "replaced module", "sha256:", "negative, positive"):
        assert part in result.stdout


def test_plan_prints_reasons_and_totals(cli, trained: dict[str, Path]) -> None:
    folded = cli("plan", "-a", trained["vefa"])
    assert "folds into its own weight" in folded.stdout
    assert "36 folded, 0 side ops; together 0 extra FLOPs and 0 bytes" in folded.stdout
    beside = cli("plan", "-a", trained["lorfa"], "--placement", "side-op")
    assert "asked for with --placement side-op" in beside.stdout
    # per site and token: A x is 2 k r, B (A x) is 2 r times what it is added to, and as many additions: to the k
    # inputs, or to the d outputs where they are fewer (1536 -> 384)
    assert f"{6 * (5 * 384 * (4 * 8 + 1) + 2 * 8 * 1536 + 384 * (2 * 8 + 1)):,} extra FLOPs and " in beside.stdout


def test_plan_counts_no_fusions_when_told_so(cli, trained: dict[str, Path]) -> None:
    command = ["plan", "-a", trained["vefa"], "--placement", "side-op"]
    assert "cost fusions" in cli(*command, "--optimize", "ort").stderr
    assert "cost fusions" not in cli(*command, "--optimize", "none").stderr
    assert "fusion" not in cli(*command, "--no-fusions").stderr


def test_export_shows_which_fusions_the_adapter_costs(cli, trained: dict[str, Path], tmp_path: Path) -> None:
    command = ["export", "-a", trained["vefa"], "--optimize", "ort"]
    beside = cli(*command, "--placement", "side-op", "-o", tmp_path / "beside")
    assert "6 lost" in beside.stdout and "kept" in beside.stdout
    assert "warning: the adapter costs fusions of the runtime: 6 of 6 packed MatMul (3 in 1)" in beside.stderr
    folded = cli(*command, "-o", tmp_path / "folded")
    assert "Fused operators of the session" in folded.stdout and "lost" not in folded.stdout
    assert "warning" not in folded.stderr


def test_run_answers(cli, bundles: dict[str, Path], small_data: dict[str, Path]) -> None:
    result = cli("run", bundles["folded"], "--data", small_data["tweets"])
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 48
    assert {line.split()[0] for line in result.stdout.splitlines()} <= {"negative", "positive"}


def test_verify_exits_1_when_parity_fails(cli, bundles: dict[str, Path], tmp_path: Path) -> None:
    """The stored noise made a thousand times smaller: an honest bundle no longer fits it."""
    import msgspec

    copy = Path(shutil.copytree(bundles["folded"], tmp_path / "b"))
    manifest = msgspec.json.decode((copy / "manifest.json").read_bytes())
    manifest["reference"]["noise"] /= 1000
    (copy / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    result = cli("verify", copy, "--no-torch")
    assert result.returncode == 1
    assert "FAIL" in result.stdout


@pytest.mark.slow
def test_verify_with_torch_prints_every_stage(cli, bundles: dict[str, Path], small_data: dict[str, Path]) -> None:
    result = cli("verify", bundles["side-op"], "--data", small_data["movies_test"])
    assert result.returncode == 0, result.stdout + result.stderr
    for part in ("PyTorch float32", "optimisations off", "as deployed", "McNemar", "PASS"):
        assert part in result.stdout


def test_texts_are_no_markup(cli, bundles: dict[str, Path]) -> None:
    text = "[/b] a [bold]fine[/] film :smile:"
    result = cli("run", bundles["folded"], "--text", text)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith(text)


def test_a_bundle_on_a_read_only_disk_is_verified_with_a_warning(cli, bundles: dict[str, Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounts = (["--bind", str(bundles["folded"]), str(disk)], ["-o", "remount,ro,bind", str(disk)])
    if any(subprocess.run(["mount", *each], capture_output=True).returncode for each in mounts):
        subprocess.run(["umount", str(disk)], capture_output=True)
        pytest.skip("this user may not mount")
    try:
        result = cli("verify", disk, "--no-torch")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert result.returncode == 0, result.stderr
    assert "PASS" in result.stdout and "warning: the manifest does not keep this result" in result.stderr
