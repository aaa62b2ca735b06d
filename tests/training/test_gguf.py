"""A GGUF file that is none, or of something else, is refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deployfa.errors import InputError, MissingExtraError
from deployfa.training.gguf import from_gguf


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"GGUF", b"GGUF" + b"\0" * 8, b"GGUF\3\0\0\0" + b"\xff" * 64, b"PK\3\4" * 100, b"hello\n"]
)
def test_no_gguf_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read '.*a\.gguf'.*; give a GGUF file of a decoder"):
        from_gguf(tmp_path / "a.gguf", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_file_of_another_architecture(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="give a GGUF file of a decoder"):
        from_gguf(tmp_path / "a.gguf", tmp_path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match="gguf"):
        from_gguf(tmp_path / "a.gguf", tmp_path)
