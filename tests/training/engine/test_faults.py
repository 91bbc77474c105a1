"""What goes wrong on real machines, really done: killed in a save, a full disk, rotten bytes, numbers that are none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sd_mini import files
from sd_mini.files import combined_hash
from tests.support.faults import DiskFull, DiskFullAfter, Hold, ReadOnlyAfter, save_and_die, state_of
from tests.support.launching import apart, assert_equal_runs, error_line, launch, launch_apart, lines
from training.engine import learner, loop
from training.storage import checkpoint

POINTS = 50


def holds(root: Path) -> int:
    """The step that the newest valid checkpoint is of, after its tensors were compared with that step's."""
    folder, _ = checkpoint.newest(root)
    tensors, state = checkpoint.load(folder)
    for name, values in state_of(state["step"], 5000).items():
        assert all(torch.equal(tensors[name][key], value) for key, value in values.items())
    return state["step"]


def test_killed_at_fifty_points_of_a_save(tmp_path):
    """keep-last-1, so the old checkpoint is pruned in the same call: at each point one of the two is whole."""
    checkpoint.save(tmp_path / "0", 1, state_of(1, 5000), {"step": 1}, 1)
    assert apart(save_and_die, tmp_path / "0", 2, 5000, None, tmp_path / "lines") == 0
    lines_run = int((tmp_path / "lines").read_text())
    assert lines_run > POINTS
    found = []
    for number, line in enumerate(np.linspace(1, lines_run, POINTS).round().astype(int).tolist(), start=1):
        root = tmp_path / str(number)
        checkpoint.save(root, 1, state_of(1, 5000), {"step": 1}, 1)
        assert apart(save_and_die, root, 2, 5000, line, tmp_path / "unused") == -9
        found.append(holds(root))
        checkpoint.save(root, 2, state_of(2, 5000), {"step": 2}, 1)
        assert [path.name for path in root.iterdir()] == ["step-00000002"] and holds(root) == 2
    assert found == sorted(found) and set(found) == {1, 2}


@pytest.mark.parametrize(
    ("log_with", "says"),
    [("none", "step-00000006: the checkpoint cannot be written"), ("tensorboard", "cannot be written")],
)
def test_a_full_disk_loses_nothing(smoke_run, tmp_path, log_with, says):
    run = tmp_path / "run"
    options = ("--train.keep_last", "1", "--train.preview_every", "6", "--log_with", log_with)
    codes, said = launch_apart("autoencoder", run, *options, fault=DiskFullAfter(3))
    assert codes == [2]
    assert says in error_line(said) and "File too large" in said
    folder = run / "autoencoder"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert checkpoint.damage(folder / "checkpoints" / "step-00000003") is None
    codes, said = launch_apart("autoencoder", run, *options)
    assert codes == [0], said
    assert_equal_runs(folder, smoke_run / "autoencoder")  # which looked at previews more often: no matter


def test_a_disk_full_from_the_start_leaves_no_half_config(tmp_path):
    """Then the same command, with room, starts as if nothing had been."""
    codes, said = launch_apart("autoencoder", tmp_path / "run", fault=DiskFull(900))
    assert codes == [2] and "cannot be written" in error_line(said)
    assert not (tmp_path / "run" / "autoencoder" / "config.yaml").exists()
    assert launch("autoencoder", tmp_path / "run") == 0


def test_a_disk_full_at_a_restart_keeps_the_log(halfway):
    """Dropping what was logged after the checkpoint rewrites the log: beside it, and then in its place."""
    log = halfway / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": 1, "loss": 0.5}) + "\n" for _ in range(1000)) + log.read_text())
    before = log.read_text()
    codes, said = launch_apart("noise_predictor", halfway.parent, "--log_with", "none", fault=DiskFull(9000))
    assert codes == [2] and "cannot be written" in error_line(said)
    assert log.read_text() == before


def test_a_full_disk_while_encoding(smoke_run, tmp_path):
    for name in ("autoencoder", "text_encoder"):
        shutil.copytree(smoke_run / name, tmp_path / "run" / name)
    codes, said = launch_apart("noise_predictor", tmp_path / "run", fault=DiskFull(1000))
    assert codes == [2] and "cannot be written" in error_line(said)


def test_two_trainings_in_one_folder_are_refused(halfway, tmp_path):
    """The second is told so at once and touches nothing; the lock ends with the process that holds it."""
    with Hold(halfway):
        codes, said = launch_apart("noise_predictor", halfway.parent)
        assert codes == [2] and "another process is at work here" in error_line(said)
    assert launch_apart("noise_predictor", halfway.parent)[0] == [0]


def test_a_disk_that_cannot_be_read_is_a_damaged_checkpoint(halfway, monkeypatch):
    root = halfway / "checkpoints"
    shutil.copytree(root / "step-00000003", root / "step-00000001")
    manifest = json.loads((root / "step-00000001" / "manifest.json").read_text()) | {"step": 1}
    manifest["hash"] = combined_hash({k: v for k, v in manifest.items() if k != "hash"})
    (root / "step-00000001" / "manifest.json").write_text(json.dumps(manifest))
    digest = files.file_hash

    def dying(path):
        if path.parent.name == "step-00000003" and path.name == "model.safetensors":
            raise OSError(5, "Input/output error", str(path))
        return digest(path)

    monkeypatch.setattr(files, "file_hash", dying)
    folder, complaints = checkpoint.newest(root)
    assert folder.name == "step-00000001" and "model.safetensors is not readable (Input/output error)" in complaints[0]


def test_damaged_checkpoints_do_not_push_whole_ones_out(halfway, capsys):
    """keep-last-2 with the newest rotten: it is set aside, the whole one and the new ones stay."""
    root = halfway / "checkpoints"
    tensors, state = checkpoint.load(root / "step-00000003")
    rotten = checkpoint.save(root, 4, tensors, state | {"step": 4})
    (rotten / "optimizer.safetensors").write_bytes(b"rotten")
    assert launch("noise_predictor", halfway.parent) == 0
    assert "step-00000004: optimizer.safetensors is damaged" in capsys.readouterr().err
    assert sorted(p.name for p in root.iterdir()) == ["step-00000003", "step-00000004.damaged", "step-00000006"]


def test_a_folder_turned_read_only(tmp_path):
    codes, said = launch_apart("autoencoder", tmp_path / "run", fault=ReadOnlyAfter(3))
    assert codes == [2]
    assert "cannot be written (Permission denied)" in error_line(said)
    folder = tmp_path / "run" / "autoencoder" / "checkpoints"
    assert checkpoint.newest(folder) == (folder / "step-00000003", [])


@pytest.mark.parametrize("stage", ["text_encoder", "noise_predictor"])
def test_every_truncation_and_every_flipped_tensor_is_found(smoke_run, tmp_path, stage):
    folder = shutil.copytree(smoke_run / stage / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    assert checkpoint.damage(folder) is None
    harmed = 0
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        cuts = [raw[: len(raw) * part // 64] for part in range(64)]
        for damaged in cuts + [bytes(b) for b in flips(path, raw)]:
            path.write_bytes(damaged)
            assert path.name in checkpoint.damage(folder)
            harmed += 1
        path.write_bytes(raw)
    assert checkpoint.damage(folder) is None and harmed > 64 * 4


def flips(path: Path, raw: bytes) -> list[bytearray]:
    """The file with one bit flipped: in each tensor of a safetensors file, else in 64 places."""
    if path.suffix == ".safetensors":
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        places = [8 + size + (start + end) // 2 for start, end in spans]
        assert len(places) == len(load_file(path))
    else:
        places = np.linspace(0, len(raw) - 1, 64).astype(int).tolist()
    copies = [bytearray(raw) for _ in places]
    for copy, place in zip(copies, places, strict=True):
        copy[place] ^= 1 << place % 8
    return copies


def test_a_checkpoint_under_another_steps_name_is_refused(smoke_run, tmp_path):
    folder = shutil.copytree(smoke_run / "autoencoder" / "checkpoints" / "step-00000003", tmp_path / "step-00000009")
    assert "of another checkpoint" in checkpoint.damage(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["batch", "gradient", "weight"])
def test_not_finite_stops_within_a_step_and_is_never_saved(tmp_path, monkeypatch, capsys, bad, where):
    """Step 4 of 6 is poisoned, the last checkpoint is of step 3."""
    update, updated = loop.Loop.update, learner.Learner.update
    ids = []

    def first(learner):
        return next(iter(learner.trained.values()))

    def poisoned(self, inputs):
        if inputs.step == 4:
            ids.extend(inputs.ids.tolist())
            if where == "batch":
                inputs.passes[0]["pixels"][2] = bad
            if where == "weight":
                first(self.learners[0]).data[..., 0] = bad
        update(self, inputs)

    def spoiled(self, step):
        if where == "gradient" and step == 5:
            first(self).grad[..., 0] = bad
        return updated(self, step)

    monkeypatch.setattr(loop.Loop, "update", poisoned)
    monkeypatch.setattr(learner.Learner, "update", spoiled)
    assert launch("autoencoder", tmp_path) == 2
    said = error_line(capsys.readouterr().err)
    assert "step 5: the gradient is not finite" in said and str(ids) in said
    if where == "batch":
        assert f"the loss of [{ids[2]}] is not" in said
    root = tmp_path / "autoencoder" / "checkpoints"
    tensors, state = checkpoint.load(checkpoint.newest(root)[0])
    assert state["step"] == 3
    assert all(torch.isfinite(t).all() for values in tensors.values() for t in values.values())
    assert [line["step"] for line in lines(tmp_path / "autoencoder")] == [4]


def test_a_weight_that_no_gradient_shows_is_not_saved_either(tmp_path):
    with pytest.raises(ValueError, match=r"step 7: 'a' of model is not finite"):
        checkpoint.save(tmp_path, 7, {"model": {"a": torch.tensor([1.0, float("inf")])}}, {})
    assert not list(tmp_path.iterdir())
