"""Checkpoints that are whole and still not to be loaded: of another network or config, or poisoned."""

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from sd_mini import stages
from sd_mini.config import command
from sd_mini.errors import UserError
from sd_mini.files import combined_hash, file_hashes
from sd_mini.pipelines.text_to_image import Pipeline
from tests.support.faults import Canary, KillAt
from tests.support.launching import error_line, launch, launch_apart
from training.storage import checkpoint, snapshots


@pytest.mark.parametrize("file", ["model", "optimizer", "ema-0.05"])
@pytest.mark.parametrize("harm", ["missing", "renamed", "reshaped", "added"])
def test_a_checkpoint_of_other_keys_is_refused_by_name(halfway, capsys, file, harm):
    """Whole by its hashes, but not of this network: nothing may be loaded in part."""
    root = halfway / "checkpoints"
    tensors, state = checkpoint.load(root / "step-00000003")
    name = sorted(tensors[file])[5]
    value = tensors[file][name]
    if harm != "added":
        del tensors[file][name]
    if harm != "missing":
        tensors[file][name if harm == "reshaped" else f"{name}x"] = value[None] if harm == "reshaped" else value
    shutil.rmtree(root)
    checkpoint.save(root, 3, tensors, state, 1)
    assert launch("noise_predictor", halfway.parent) == 2
    said = error_line(capsys.readouterr().err)
    assert f"{file}.safetensors" in said and (f"{name}x" if harm == "added" else name) in said
    assert not (halfway / "final").exists()


def test_a_missing_file_of_a_whole_checkpoint_is_refused(halfway, capsys):
    root = halfway / "checkpoints"
    tensors, state = checkpoint.load(root / "step-00000003")
    del tensors["ema-0.1"]
    shutil.rmtree(root)
    checkpoint.save(root, 3, tensors, state, 1)
    assert launch("noise_predictor", halfway.parent) == 2
    assert "ema-0.1.safetensors is missing" in error_line(capsys.readouterr().err)


class TestResumeFromAPath:
    def test_nothing_there_is_refused_and_without_it_starts_fresh(self, tmp_path, capsys):
        assert launch("autoencoder", tmp_path / "run", "--resume", str(tmp_path / "nowhere")) == 2
        assert "there is none" in error_line(capsys.readouterr().err)
        assert not (tmp_path / "run").exists()
        assert launch("autoencoder", tmp_path / "run") == 0

    def test_nothing_valid_there_is_refused(self, halfway, tmp_path, capsys):
        (halfway / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"")
        for path in (halfway.parent, halfway, halfway / "checkpoints", halfway / "checkpoints" / "step-00000003"):
            assert launch("noise_predictor", tmp_path / "other", "--resume", str(path)) == 2
            assert "model.safetensors is damaged" in error_line(capsys.readouterr().err)
        assert not (tmp_path / "other").exists()

    def test_another_run_goes_on_from_it(self, smoke_run, tmp_path, capsys):
        first = smoke_run / "autoencoder" / "checkpoints" / "step-00000003"
        assert launch("autoencoder", tmp_path / "other", "--resume", str(first)) == 0
        assert "resumed at step 3" in capsys.readouterr().err
        a, b = tmp_path / "other" / "autoencoder", smoke_run / "autoencoder"
        assert stages.read_contract(a / "final")["hash"] == stages.read_contract(b / "final")["hash"]

    def test_the_same_command_again_goes_on_from_its_own(self, smoke_run, tmp_path):
        """Killed and restarted with --resume still in the command line, as a scheduler would; snapshots go along."""
        more = ("--resume", str(smoke_run / "autoencoder" / "checkpoints" / "step-00000003"))
        more += ("--train.checkpoint_every", "1")
        assert launch_apart("autoencoder", tmp_path / "run", *more, fault=KillAt(5))[0] == [-9]
        codes, said = launch_apart("autoencoder", tmp_path / "run", *more)
        assert codes == [0] and "resumed at step 5" in said
        folders = [run / "autoencoder" for run in (tmp_path / "run", smoke_run)]
        hashes = [stages.read_contract(folder / "final")["hash"] for folder in folders]
        assert hashes[0] == hashes[1]
        taken = [sorted(path.name for path in (folder / "snapshots").iterdir()) for folder in folders]
        assert taken[0] == taken[1] == ["step-00000003", "step-00000006"]

    def test_a_snapshot_is_no_checkpoint(self, smoke_run, tmp_path, capsys):
        for path in ("snapshots", "snapshots/step-00000003"):
            path = str(smoke_run / "autoencoder" / path)
            assert launch("autoencoder", tmp_path / "run", "--resume", path) == 2
            assert "this is a snapshot" in error_line(capsys.readouterr().err)

    def test_not_over_a_run_of_its_own(self, halfway, smoke_run, capsys):
        other = smoke_run / "noise_predictor" / "checkpoints" / "step-00000006"
        assert launch("noise_predictor", halfway.parent, "--resume", str(other)) == 2
        assert "already resumes from" in error_line(capsys.readouterr().err)
        own = halfway / "checkpoints"
        assert launch("noise_predictor", halfway.parent, "--resume", str(own)) == 0

    def test_another_config_is_refused_with_its_fields(self, smoke_run, tmp_path, capsys):
        path = str(smoke_run / "autoencoder")
        assert launch("autoencoder", tmp_path / "other", "--resume", path, "--train.lr", "0.5") == 2
        assert "train.lr was 0.002, now 0.5" in error_line(capsys.readouterr().err)
        assert not (tmp_path / "other").exists()


def test_no_loaded_file_can_execute_code(smoke_run, tmp_path, capsys):
    """A pickle in the place of every file of a run, with manifests that vouch for it, and weights beside it."""
    sung = tmp_path / "sung"
    poison = io.BytesIO()
    torch.save(Canary(sung), poison)
    shutil.copytree(smoke_run, original := tmp_path / "original")
    (original / "noise_predictor" / "config.yaml").unlink()  # a person's own file, and YAML: read by safe_load
    files = [p.relative_to(original) for p in sorted(original.rglob("*")) if p.is_file() and p.suffix in _LOADABLE]
    assert {".safetensors", ".json", ".npy"} <= {p.suffix for p in files}
    for name in files:
        contents = [pickle.dumps(Canary(sung))]
        if name.suffix != ".json":
            contents.append(poison.getvalue())  # which torch.load would read, and nobody gives it text
        for content in contents:
            run = tmp_path / "run"
            shutil.copytree(original, run)
            (run / name).write_bytes(content)
            for beside in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
                (run / name).with_name(beside).write_bytes(content)
            vouch(run / name)
            # a poisoned cache is made anew, all else is refused
            assert read_all(run) == (0 if name.parts[0] == "cache" else 2) and not sung.exists(), name
            capsys.readouterr()
            shutil.rmtree(run)
    pickle.loads(pickle.dumps(Canary(sung)))
    assert sung.exists()  # the canary does sing


def read_all(run: Path) -> int:
    """Load everything that lies in a run as its users do; the exit code."""

    def reading(_) -> None:
        Pipeline.from_run(run)
        snapshots.at_width(run / "noise_predictor", 6, 0.07)
        for root in [*run.glob("*/checkpoints"), *run.glob("*/snapshots")]:
            for path in root.glob("step-*"):
                if (complaint := checkpoint.damage(path)) is not None:
                    raise UserError(complaint)
                checkpoint.load(path)
        shutil.rmtree(run / "noise_predictor" / "final")

    return command(reading, []) or launch("noise_predictor", run)


_LOADABLE = {".safetensors", ".json", ".npy"}


def vouch(path: Path) -> None:
    """Make the manifest or the contract above a file agree with what it holds now."""
    for folder in path.parents:
        for name, key in (("manifest.json", "files"), ("stage.json", "files")):
            if (folder / name).is_file() and path.name != name:
                content = json.loads((folder / name).read_text())
                content[key] = file_hashes(folder, name)
                content.pop("hash", None)
                sealed = content if name == "manifest.json" else content[key]
                content["hash"] = combined_hash(sealed)
                (folder / name).write_text(json.dumps(content))
                return
