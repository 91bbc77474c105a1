import json

import pytest
import torch

from training import checkpoint


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


def test_optimizer_state_survives_bit_for_bit(tmp_path):
    def trained(steps, optimizer, weight):
        for _ in range(steps):
            weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    first = torch.optim.AdamW([straight], lr=0.1)
    trained(2, first, straight)
    copy = torch.nn.Parameter(straight.detach().clone())
    second = torch.optim.AdamW([copy], lr=0.1)
    folder = checkpoint.save(tmp_path, 2, {"optimizer": checkpoint.optimizer_tensors(first)}, {}, 1)
    checkpoint.load_optimizer_tensors(second, checkpoint.load(folder)[0]["optimizer"])
    trained(2, first, straight)
    trained(2, second, copy)
    assert torch.equal(straight, copy)


def test_manifest_lists_every_file(tmp_path):
    folder = write(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 7 and set(manifest["files"]) == {"model.safetensors", "state.json"}
