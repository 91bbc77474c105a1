import json

import pytest
import torch

from training.storage import checkpoint


def write(root, step, keep_last=2):
    tensors = {"model": {"a": torch.arange(6.0).view(2, 3) + step}}
    return checkpoint.save(root, step, tensors, {"step": step}, keep_last)


def test_round_trip_and_pruning(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    folder, complaints = checkpoint.newest(tmp_path)
    tensors, state = checkpoint.load(folder)
    assert not complaints and state == {"step": 3}
    assert torch.equal(tensors["model"]["a"], torch.arange(6.0).view(2, 3) + 3)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_one_is_named_skipped_and_kept(tmp_path, name, harm):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    raw = bytearray(path.read_bytes())
    if harm == "flip":
        raw[-1] ^= 1
        path.write_bytes(raw)
    elif harm == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        path.unlink()
    folder, complaints = checkpoint.newest(tmp_path)
    assert folder.name == "step-00000001"
    assert name in complaints[0] and "step-00000002" in complaints[0]
    assert path.parent.is_dir()


def test_a_folder_without_its_manifest_is_not_a_checkpoint(tmp_path):
    (write(tmp_path, 1) / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path)[0] is None


def test_a_failed_save_leaves_the_old_one(tmp_path):
    write(tmp_path, 1, keep_last=1)
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 2, {}, {"not json": object()}, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.damage(tmp_path / "step-00000001") is None


def test_manifest_lists_every_file(tmp_path):
    folder = write(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 7 and set(manifest["files"]) == {"model.safetensors", "state.json"}


def test_keep_every_spares_some_for_good(tmp_path):
    for step in range(1, 8):
        tensors = {"model": {"a": torch.tensor([float(step)])}}
        checkpoint.save(tmp_path, step, tensors, {}, keep_last=2, keep_every=3)
    assert [p.name[-1] for p in sorted(tmp_path.iterdir())] == ["3", "6", "7"]


def test_a_damaged_one_stays_when_its_step_is_saved_anew(tmp_path):
    harmed = write(tmp_path, 1) / "model.safetensors"
    harmed.write_bytes(b"rotten")
    checkpoint.set_aside(tmp_path)
    write(tmp_path, 1)
    assert checkpoint.damage(tmp_path / "step-00000001") is None
    assert (tmp_path / "step-00000001.damaged" / "model.safetensors").read_bytes() == b"rotten"
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-00000001", [])


def test_tied_and_strided_tensors_come_back(tmp_path):
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    tensors = {"model": {"a": weight, "tied": weight, "row": weight[0], "empty": torch.empty(0)}}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, tensors, {}))[0]["model"]
    assert all(torch.equal(loaded[name], value) for name, value in tensors["model"].items())


def test_every_names_a_damaged_one(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    assert [path.name for path in checkpoint.every(tmp_path)[0]] == ["step-00000001", "step-00000002"]
    (tmp_path / "step-00000001" / "state.json").write_text("{}")
    valid, complaints = checkpoint.every(tmp_path)
    assert [path.name for path in valid] == ["step-00000002"] and "step-00000001: state.json is damaged" in complaints[
        0
    ]
