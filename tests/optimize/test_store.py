"""Tensors of many rows on disk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmix.errors import ConfigError, OutputError
from expertmix.optimize.store import RowFile, read_json, write_json, write_rows

shapes = st.lists(st.integers(0, 4), min_size=0, max_size=3)
rows = st.lists(st.dictionaries(st.sampled_from("abc"), shapes, max_size=3), max_size=5)


@given(shaped=rows)
def test_rows_come_back(tmp_path_factory, shaped):
    """Any shapes, also empty ones, also names that some rows lack: one by one and all together."""
    generator = torch.Generator().manual_seed(0)
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.int64}
    made = [
        {name: (9 * torch.randn(shape, generator=generator)).to(dtypes[name])
         for name, shape in row.items()}
        for row in shaped
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("store") / "rows.safetensors"
    size = write_rows(path, made, {"about": [1, None]})
    file = RowFile(path)
    assert size == path.stat().st_size
    assert file.notes == {"about": [1, None]}
    for number, row in enumerate(made if any(made) else []):
        for found in (file.row(number), file.rows()[number]):
            assert sorted(found) == sorted(row)
            for name, tensor in row.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor)


def test_files_are_whole_or_absent(tmp_path):
    """What cannot be written leaves nothing; what cannot be read is told."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        write_rows(tmp_path / "file" / "rows", [{"a": torch.zeros(2)}])
    with pytest.raises(TypeError):
        write_json(tmp_path / "data.json", {"a": object()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    for name in ("file", "missing"):
        with pytest.raises(ConfigError, match="cannot read"):
            RowFile(tmp_path / name)
        with pytest.raises(ConfigError, match="cannot read"):
            read_json(tmp_path / name)
    write_json(tmp_path / "data.json", {"a": 1})
    assert read_json(tmp_path / "data.json") == {"a": 1}
