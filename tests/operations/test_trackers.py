"""``madpo train --report_to``: what a tracker wrote stays with the result."""

import struct

from tensorboardX.proto.event_pb2 import Event

from practice_cases import read, run, text_pairs, write


def scalars(folder):
    """(tag, step) -> value of TensorBoard's files: records of a length, its checksum, an event, its checksum."""
    found = {}
    for path in folder.rglob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += length + 16
    return found


def test_tensorboards_files_stay_with_the_result(llama, tmp_path, own_cache):
    data = write(tmp_path / "pairs.jsonl", text_pairs(12))
    run("train", data, "--model_name_or_path", llama, "--loss", "dpo", "--output_dir", tmp_path / "P", "--batch_size",
        "4", "--epochs", "1", "--args.logging_steps", "1", "--report_to", "tensorboard")  # fmt: skip
    logged = {("train/loss", row["step"]): row["loss"] for row in read(tmp_path / "P" / "log.jsonl") if "loss" in row}
    found = scalars(tmp_path / "P" / "runs")
    assert len(logged) == 3
    for key, value in logged.items():
        assert abs(found[key] - value) < 1e-6
    assert not (tmp_path / "P" / "checkpoints").exists()
