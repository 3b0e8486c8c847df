"""A GGUF file with fewer rows in its vocabulary, so that only kept rows are ever dequantised.

The rows of an embedding are quantised one by one, so keeping some of them copies their bytes. transformers then makes
tokenizer and model of the smaller file as it would of the whole one: a SentencePiece vocabulary has no list of merges,
they follow from its entries and their order, which stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from madpo.core.errors import DataError

_ROWS = ("token_embd.weight", "output.weight")


def cut_gguf(source: Path, kept: Sequence[int], target: Path) -> None:
    """Write ``target``: the model of ``source`` with the entries ``kept`` of its vocabulary, numbered in this order.

    Args:
        kept: ids, ascending. The tokens that the file names (beginning, end, padding, unknown) must be among them.

    Raises DataError: the file is none of version 3 without merges.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    try:
        reader = GGUFReader(source)
        version = reader.fields["GGUF.version"].contents()
    except (ValueError, LookupError):
        version = None
    if version != 3:
        raise DataError(f"{source} is no GGUF file of version 3; install the package that it is from again")
    new = {old: i for i, old in enumerate(kept)}
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name == "tokenizer.ggml.merges":
            raise DataError(f"{source}: {name} lists merges, which cannot be cut yet; use the whole model")
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer's own
            continue
        value, kind, inner = field.contents(), field.types[0], None
        if kind == GGUFValueType.ARRAY:
            inner = field.types[-1]
            value = [value[i] for i in kept] if name.startswith("tokenizer.ggml.") else value
        elif name.endswith("_token_id"):
            value = new[value]
        writer.add_key_value(name, value, kind, sub_type=inner)
    for tensor in reader.tensors:
        data = tensor.data[list(kept)] if tensor.name in _ROWS else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
