"""The example's files: readable, disjoint, never overwriting what is there."""

from madpo.core.errors import StorageError
from madpo.data import check, load_preferences
from madpo.data.example import FILES, write_example
from refusals import refused


def test_the_example_is_fit_for_training(tmp_path) -> None:
    paths = write_example(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == list(FILES)
    assert len(load_preferences(paths[0])) == 20
    report = check(paths[0], eval_data=paths[1])
    assert report.findings == ()
    assert write_example(tmp_path / "new" / "folder") == paths, "again it changes nothing"


def test_other_files_of_these_names_stay(tmp_path) -> None:
    (tmp_path / "heldout.jsonl").write_text("mine\n")
    with refused(StorageError, "heldout.jsonl"):
        write_example(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["heldout.jsonl"]
