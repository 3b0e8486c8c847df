"""What ``--overwrite`` and a kill can cost: no file of a user's, nothing that the command reads, no finished work."""

import errno
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import soak
from madpo.cli import main
from madpo.errors import DataError, StorageError
from madpo.locks import LOCK
from madpo.practice import RewardSettings, ScoreSettings, folders, reward, score, scoring
from madpo.practice import reward_model as reward_module
from madpo.practice.claims import claim
from madpo.practice.folders import building, digest, in_place
from madpo.practice.overwriting import FINISHED, MARKERS, empty, refuse_inputs_inside, refuse_to_replace, strangers
from madpo.storage import storage_errors
from madpo.training import stages
from madpo.training.checkpoints import newest
from madpo.training.reward import RewardModelTrainer
from practice_cases import text_pairs, write


def ours(folder: Path, **files: str) -> Path:
    """A folder that is a result of ours, with files in it."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('# madpo train "pairs.jsonl"\n')
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_users_file_in_a_result_is_refused_before_anything_is_removed(tmp_path: Path) -> None:
    out = ours(tmp_path / "P", report_json="{}", notes_txt="weeks", zzz="")
    before = tree(tmp_path)
    says = r"P holds notes\.txt, which is no part of such a result and which --overwrite would remove; move it away, or"
    with pytest.raises(StorageError, match=says), building(out, {}, overwrite=True):
        pass
    with pytest.raises(StorageError, match=says):
        claim(out, {}, overwrite=True)
    assert tree(tmp_path) == before
    for name in ("notes.txt", "zzz"):
        (out / name).unlink()
    with building(out, {}, overwrite=True) as partial:
        (partial / "new").write_text("")
    assert [p.name for p in out.iterdir()] == ["new"]


def test_score_refuses_a_users_file_among_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "pairs.jsonl", [row | {"a": 2.0, "b": 1.0} for row in text_pairs(8)])
    words = ["score", str(data), "--score_columns", "a", "b", "--output_dir", str(tmp_path / "S")]
    assert main(words) == 0
    (tmp_path / "S" / "corrected.jsonl").write_text("by hand")
    before = tree(tmp_path)
    assert main([*words, "--overwrite", "--format", "parquet"]) == 2
    assert "S holds corrected.jsonl, which is no part of such a result" in capsys.readouterr().err
    assert tree(tmp_path) == before
    (tmp_path / "S" / "corrected.jsonl").unlink()
    assert main([*words, "--overwrite", "--format", "parquet"]) == 0
    assert sorted(p.name for p in (tmp_path / "S").iterdir()) == ["report.json", "scored.parquet", "settings.json"]


@pytest.mark.parametrize(
    "name", ["model-notes.safetensors", ".env", "Model", "report.json.bak", "folds2", ".notes.tmp"]
)
def test_names_that_resemble_ours_are_a_users(tmp_path: Path, name: str) -> None:
    out = ours(tmp_path / "P")
    (out / name).mkdir()
    with pytest.raises(StorageError, match="which is no part of such a result"):
        refuse_to_replace(out)


def test_what_a_kill_left_of_ours_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "T").mkdir()
    for name in (LOCK, ".settings.json.4711.tmp", ".rehearsal.tmp"):
        (tmp_path / "T" / name).write_text("")
    refuse_to_replace(tmp_path / "T")
    for name in ("study.journal.lock0-1.rename", "model-00001-of-00002.safetensors", "settings.json"):
        (tmp_path / "T" / name).write_text('{"data_digest": ""}')
    refuse_to_replace(tmp_path / "T")


def test_the_files_of_any_model_are_known(llama: Path, tmp_path: Path) -> None:
    """In several parts, and with several chat templates, as a large model has them."""
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path)
    assert {"model.safetensors.index.json", "additional_chat_templates"} < {p.name for p in tmp_path.iterdir()}
    assert strangers(tmp_path) == []


def test_a_folder_that_was_half_emptied_is_still_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ours(tmp_path / "P", report_json="", README_md="", log_jsonl="")
    left, remove = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self: (left.append(self.name), remove(self))[1])
    empty(out)
    assert len(left) == 4
    assert left[-1] in MARKERS


def a_result_with_inputs(place: Path, llama: Path) -> None:
    """``P``, a result of ours that holds what each command may be asked to read."""
    rows = [row | {"reward_margin": 1.0, "a": 2.0, "b": 1.0} for row in text_pairs(8)]
    ours(place / "P")
    write(place / "P" / "scored.jsonl", rows)
    write(place / "pairs.jsonl", rows)
    shutil.copytree(llama, place / "P" / "merged")
    for name, head in (("adapter", ""), ("reward", "reward_model.json")):
        folder = place / "P" / name if not head else place / name / "adapter"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "P/merged"}))
        if head:
            (place / name / head).write_text('{"base": "P/merged"}')
    (place / "P" / "chosen.toml").write_text("")


READ = {
    "train P/scored.jsonl --model_name_or_path m": "the data P/scored.jsonl",
    "train pairs.jsonl --model_name_or_path m --eval_data P/scored.jsonl": "the eval_data P/scored.jsonl",
    "train pairs.jsonl --model_name_or_path P/merged": "the model P/merged",
    "train pairs.jsonl --model_name_or_path m --config P/chosen.toml": "the configuration P/chosen.toml",
    "reward P/scored.jsonl --model_name_or_path m": "the data P/scored.jsonl",
    "reward pairs.jsonl --model_name_or_path m --eval_data P/scored.jsonl": "the eval_data P/scored.jsonl",
    "reward pairs.jsonl --model_name_or_path P/merged": "the model P/merged",
    "evaluate P/adapter --reference m --prompts pairs.jsonl --reward m": "the policy P/adapter",
    "evaluate m --reference P/merged --prompts pairs.jsonl --reward m": "the reference P/merged",
    "evaluate m --reference m --prompts P/scored.jsonl --reward m": "the prompts P/scored.jsonl",
    "evaluate m --reference m --prompts pairs.jsonl --reward P/merged": "the reward model P/merged",
    "evaluate m --reference m --prompts pairs.jsonl --reward reward": "the base model P/merged of the reward model rew",
    "score P/scored.jsonl --score_columns a b": "the data P/scored.jsonl",
    "score pairs.jsonl --reward_model P/merged": "the reward model P/merged",
    "score pairs.jsonl --reward_model reward": "the base model P/merged of the reward model reward",
    "score pairs.jsonl --folds 2 --model_name_or_path P/merged": "the model P/merged",
    "tune P/scored.jsonl --model_name_or_path m": "the data P/scored.jsonl",
    "tune pairs.jsonl --model_name_or_path P/merged": "the model P/merged",
    "tune pairs.jsonl --model_name_or_path m --criterion reward --reward_model P/merged --kl 1": "the reward model P",
    "trim-vocab P/merged --corpus pairs.jsonl": "the model P/merged",
    "trim-vocab m --corpus pairs.jsonl P/scored.jsonl": "the corpus P/scored.jsonl",
    "trim-vocab m --corpus pairs.jsonl --eval P/scored.jsonl": "the eval_data P/scored.jsonl",
}


@pytest.fixture(scope="module")
def with_inputs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    a_result_with_inputs(place, llama)
    shutil.copytree(llama, place / "m")
    return place


@pytest.mark.parametrize("line", READ)
def test_no_command_removes_what_it_reads(
    line: str, with_inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(with_inputs)
    before = tree(with_inputs)
    assert main([*line.split(), "--output_dir", "P", "--overwrite"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"madpo: {READ[line]}")
    assert "P, which this command would replace; choose another output_dir, or move the input away" in said
    assert tree(with_inputs) == before


def test_what_is_read_from_elsewhere_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gemma-3-270m", "tiny-llama", "P", "Q"):
        (tmp_path / name).mkdir()
    for name in ("gemma-3-270m", "tiny-llama"):  # models of these names lie in no folder of the user's
        refuse_inputs_inside(Path(name), [("model", name)])
    refuse_inputs_inside(Path("P"), [("data", "owner/name"), ("data", None), ("model", "Q"), ("data", Path("."))])
    (tmp_path / "link").symlink_to(tmp_path / "P")
    for folder, given in (("P", "P"), ("link", "P"), ("P", "link"), ("P", "P/../P")):
        with pytest.raises(StorageError, match="which this command would replace"):
            refuse_inputs_inside(Path(folder), [("model", given)])


def test_an_input_in_the_folder_of_an_interrupted_work_is_kept(tmp_path: Path) -> None:
    partial = ours(tmp_path / ".P.partial", pairs_jsonl="{}")
    inputs = [("data", partial / "pairs.jsonl")]
    with pytest.raises(StorageError, match=r"the data .*pairs\.jsonl lies in .*\.P\.partial"):
        building(tmp_path / "P", {}, inputs=inputs).__enter__()
    assert (partial / "pairs.jsonl").exists()


def work(out: Path, *, overwrite: bool) -> None:
    """A training of hours, which ``hours`` counts, and seconds after its last checkpoint."""
    with building(out, {"seed": 1}, overwrite=overwrite) as partial:
        point = partial / "checkpoints" / "checkpoint-9"
        if not point.exists():
            with (out.parent / "hours").open("a") as file:
                file.write("x")
            point.mkdir(parents=True)
            (point / "manifest.json").write_text("{}")
        (partial / "config.toml").write_text("# madpo train new\n")
        (partial / "adapter").mkdir(exist_ok=True)
        (partial / "adapter" / "weights").write_text("new")


def hours(root: Path) -> int:
    return len((root / "hours").read_text()) if (root / "hours").exists() else 0


def killed_at_call(number: int, act) -> bool:
    """Whether ``act``, in a process of its own, was killed just before its ``number``-th change of the disk."""
    child = os.fork()
    if child == 0:
        done = 0

        def counted(event: str, _: object) -> None:
            nonlocal done
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"):
                done += 1
                if done == number:
                    os._exit(9)

        sys.addaudithook(counted)
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "it failed by itself"
    return code == 9


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "replaced"])
def test_a_kill_at_any_moment_costs_no_finished_work(tmp_path: Path, overwrite: bool) -> None:
    """The same call continues from the checkpoint, or says that the result is in its place."""
    work(tmp_path / "whole" / "P", overwrite=False)
    whole, ends = digest(tmp_path / "whole" / "P"), []
    for number in itertools.count(1):
        root = tmp_path / str(number)
        out = ours(root / "P", report_json="old") if overwrite else root / "P"
        root.mkdir(exist_ok=True)
        if not killed_at_call(number, lambda out=out: work(out, overwrite=overwrite)):
            break
        spent = hours(root)
        in_place = (out / "adapter" / "weights").exists()
        finished = (root / ".P.partial" / FINISHED).exists()
        saved = bool(list((root / ".P.partial").glob("checkpoints/*/manifest.json")))
        ends.append("in place" if in_place else "finished" if finished else "begun")
        assert spent == 1 or ends[-1] == "begun"
        if in_place:
            assert digest(out) == whole, "what the kill left in it counts for nothing"
            continue
        if finished and (saved or not overwrite):
            with pytest.raises(StorageError, match="P is complete: an earlier run had finished it and was stopped"):
                work(out, overwrite=overwrite)
        else:
            work(out, overwrite=overwrite)
        assert hours(root) == spent + (not saved and not (finished and not overwrite))
        assert digest(out) == whole
        assert sorted(p.name for p in out.iterdir()) == ["adapter", "config.toml"]
        assert sorted(p.name for p in root.iterdir()) == ["P", "hours"]
    assert [end for end, _ in itertools.groupby(ends)] == ["begun", "finished", "in place"]
    assert ends.count("finished") >= 4
    assert ends.count("in place") >= 2


def test_an_old_result_that_was_moved_away_last_is_there_or_its_successor_is(tmp_path: Path) -> None:
    """Between the two renames neither has its name; the next call, whatever it asks for, mends that."""
    for number in itertools.count(1):
        root = tmp_path / str(number)
        out = ours(root / "P", report_json="old")
        assert killed_at_call(number, lambda out=out: work(out, overwrite=True)), "no kill came between the renames"
        if not out.exists():
            break
    with pytest.raises(StorageError, match="P is complete"), building(out, {"seed": 2}):
        pass
    assert (out / "adapter" / "weights").read_text() == "new"
    assert hours(root) == 1


def test_what_was_short_is_made_anew_after_a_kill_that_came_last(tmp_path: Path) -> None:
    """As a study's step does that was killed there: the same call must go through."""
    out, partial = tmp_path / "model", tmp_path / ".model.partial"

    def interrupted() -> None:
        with building(out, {"size": 3}, overwrite=True) as place:
            (place / "vocabulary.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (partial / ".state.json").rename(partial / FINISHED)
    with building(out, {"size": 3}, overwrite=True) as place:
        assert not (place / "vocabulary.json").exists()
        assert (out / "vocabulary.json").exists(), "the finished one stays until its successor is there"
        (place / "config.json").write_text("{}")
    assert [p.name for p in out.iterdir()] == ["config.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_part_of_a_larger_work_that_was_finished_is_put_in_its_place(tmp_path: Path) -> None:
    """The reward models of ``score --folds``: the same command goes on with the next."""
    assert not in_place(tmp_path / "P")
    for number in itertools.count(1):
        root = tmp_path / str(number)
        root.mkdir()
        assert killed_at_call(number, lambda out=root / "P": work(out, overwrite=False)), "no kill came at the end"
        if (root / ".P.partial" / FINISHED).exists():
            break
        assert not in_place(root / "P")
    assert in_place(root / "P")
    assert sorted(p.name for p in (root / "P").iterdir()) == ["adapter", "config.toml"]
    assert sorted(p.name for p in root.iterdir()) == ["P", "hours"]


def test_score_goes_on_after_a_kill_between_two_of_its_reward_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, trained, put = write(tmp_path / "pairs.jsonl", text_pairs(8)), [], folders._put_in_place
    settings = ScoreSettings(folds=2, reward=RewardSettings(model="m"))
    monkeypatch.setattr(scoring, "_train_fold", lambda data, pairs, settings, out: trained.append(out.name))
    monkeypatch.setattr(
        scoring, "_in_parts", lambda settings, pairs, rows, *_: (np.ones(len(rows)), np.zeros(len(rows)))
    )

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "_put_in_place", killed)
    with pytest.raises(KeyboardInterrupt):
        score(data, tmp_path / "S", settings)
    monkeypatch.setattr(folders, "_put_in_place", put)
    assert score(data, tmp_path / "S", settings).pairs == 8
    assert trained == [".fold-0.partial", ".fold-1.partial"]


def test_what_came_into_the_folder_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    for name, overwrite, says in (
        ("P", False, r"P is there and not empty; the new result is finished and waits in .*\.P\.partial: move away"),
        (
            "Q",
            True,
            r"Q holds notes\.txt, which is no part of such a result and which --overwrite would remove; the new result",
        ),
    ):
        out = tmp_path / name / name

        def filled(out: Path = out, overwrite: bool = overwrite) -> None:
            with building(out, {}, overwrite=overwrite) as partial:
                (partial / "checkpoints" / "checkpoint-1").mkdir(parents=True)
                (partial / "checkpoints" / "checkpoint-1" / "manifest.json").write_text("{}")
                (partial / "report.json").write_text("new")
                ours(out, notes_txt="thoughts")

        with pytest.raises(StorageError, match=says):
            filled()
        assert (out / "notes.txt").read_text() == "thoughts"
        out.rename(tmp_path / f"{name} elsewhere")
        with pytest.raises(StorageError, match=f"{name} is complete"):
            filled()
        assert {p.name: p.read_text() for p in out.iterdir()} == {"report.json": "new"}


def test_a_reward_model_that_is_trained_outlives_a_kill_of_its_measurement(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "pairs.jsonl", text_pairs(60))
    settings = RewardSettings.model_validate(
        {
            "model": str(llama),
            "optimisation": {"batch_size": 2, "epochs": 4, "learning_rate": 1e-2},
            "eval_share": 0.4,
            "eval_every": 9,
            "patience": 2,
        }
    )
    whole = reward(data, tmp_path / "whole", settings)
    steps, step, measure = [], RewardModelTrainer.training_step, reward_module._measure

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        RewardModelTrainer,
        "training_step",
        lambda self, *a, **k: (steps.append(self.state.global_step), step(self, *a, **k))[1],
    )
    monkeypatch.setattr(reward_module, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        reward(data, tmp_path / "R", settings)
    taken = len(steps)
    assert 25 < taken < 68, "it stopped early, after a checkpoint"
    monkeypatch.setattr(reward_module, "_measure", measure)
    assert reward(data, tmp_path / "R", settings) == whole
    assert steps[taken:] == steps[25:taken], "what is after the checkpoint alone"
    for name in ("adapter/adapter_model.safetensors", "log.jsonl", "report.json"):
        assert (tmp_path / "R" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path / "R").iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def test_a_studys_reward_model_keeps_its_checkpoints_until_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soak.prepare(tmp_path / "made")
    soak.train("reward_model", tmp_path / "made", tmp_path / "whole")
    measured = stages.margin_table

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "margin_table", killed)
    with pytest.raises(KeyboardInterrupt):
        soak.train("reward_model", tmp_path / "made", tmp_path / "out")
    assert newest(tmp_path / "out" / "checkpoints") is not None
    monkeypatch.setattr(stages, "margin_table", measured)
    soak.train("reward_model", tmp_path / "made", tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert soak.result(tmp_path / "out") == soak.result(tmp_path / "whole")


def test_scores_that_could_not_be_made_take_only_their_own_files_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "pairs.jsonl", [row | {"a": 2.0, "b": 1.0} for row in text_pairs(8)])
    settings, out = ScoreSettings(score_columns=("a", "b")), tmp_path / "S"

    def stopped(error: BaseException) -> None:
        def rehearse(*_: object) -> None:
            raise error

        monkeypatch.setattr(scoring, "_rehearse", rehearse)
        with pytest.raises(type(error)):
            score(data, out, settings)

    stopped(KeyboardInterrupt())
    assert [p.name for p in out.iterdir()] == ["settings.json"]
    (out / "notes.txt").write_text("thoughts")
    stopped(DataError("line 3 is wrong; correct it"))
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    stopped(DataError("line 3 is wrong; correct it"))
    assert not out.exists()


def test_a_lock_and_a_mark_do_not_change_a_digest(tmp_path: Path) -> None:
    out = ours(tmp_path / "P", report_json="{}")
    (out / "adapter").mkdir()
    before = digest(out)
    for name in (FINISHED, LOCK):
        (out / name).write_text("x")
    assert digest(out) == before
    (out / "adapter" / LOCK).write_text("x")
    assert digest(out) != before


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.EBUSY, "it is in use, as a mount point is, or a file that another process has open; choose another"),
        (errno.EXDEV, "it cannot be renamed across file systems, or out of a container's image; choose another"),
    ],
)
def test_a_rename_that_the_system_refuses_is_told(tmp_path: Path, code: int, says: str) -> None:
    with pytest.raises(StorageError, match=f"^{tmp_path / 'P'}: {says} folder$"), storage_errors(tmp_path):
        raise OSError(code, os.strerror(code), str(tmp_path / "P"))


def test_a_result_that_cannot_be_put_in_its_place_is_told_where_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, renamed = ours(tmp_path / "P", report_json="old"), Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name == ".P.partial":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return renamed(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    says = (
        r"P cannot be put in its place \(Invalid cross-device link\); the new result is finished and waits in .*\.P\."
    )

    def replaced() -> None:
        with building(out, {}, overwrite=True) as partial:
            (partial / "report.json").write_text("new")
            (partial / "vocabulary.json").write_text("{}")

    with pytest.raises(StorageError, match=says):
        replaced()
    assert (out / "report.json").read_text() == "old"
    assert (tmp_path / ".P.partial" / "report.json").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".P.partial", "P"]
    monkeypatch.undo()
    with building(out, {}, overwrite=True):
        assert (out / "report.json").read_text() == "new", "the next call puts it there first"


def test_the_base_that_a_reward_model_alone_names_is_an_input(tmp_path: Path) -> None:
    out = ours(tmp_path / "policy")
    (out / "merged").mkdir()
    reward_model = tmp_path / "rm"
    (reward_model / "adapter").mkdir(parents=True)
    (reward_model / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    (reward_model / "reward_model.json").write_text(json.dumps({"base": str(out / "merged")}))
    with pytest.raises(StorageError, match=r"merged of the reward model .*rm lies in"):
        refuse_to_replace(out, [("reward model", reward_model)])


def test_a_result_may_be_made_again_from_its_own_configuration(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: None
) -> None:
    data, out = write(tmp_path / "pairs.jsonl", text_pairs(8)), tmp_path / "P"
    few = ["--loss", "dpo", "--args.max_steps", "1", "--model_name_or_path", str(llama)]
    assert main(["train", str(data), *few, "--output_dir", str(out)]) == 0
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (
        main(["train", str(data), "--config", str(out / "config.toml"), "--output_dir", str(out), "--overwrite"]) == 0
    )
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == weights
