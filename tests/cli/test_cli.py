"""The command line: what it makes, what it prints, what it refuses, and that it stays light until it has to work."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sd_mini import Pipeline, png
from sd_mini.cli import commands as cli
from sd_mini.cli import generate

PROMPT = "a small red circle in the centre"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the command's own choice


def assert_refused(argv, capsys, *parts):
    """Exit code 2 and one line on stderr that has all `parts` in it; nothing on stdout."""
    assert cli.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert str(part) in err


@pytest.fixture(scope="module")
def by_hand(tiny_run):
    """Seed => the picture of PROMPT, through the Python API."""
    pipeline = Pipeline.from_pretrained(tiny_run / "pipeline").to(DEVICE)

    def make(seed, **options):
        return np.asarray(pipeline(PROMPT, generator=torch.Generator().manual_seed(seed), **options).images[0])

    return make


def test_help_and_inspect_load_no_torch(tiny_run):
    code = f"""if True:
        import sys
        import sd_mini
        from sd_mini.cli import commands as cli
        assert cli.main(["inspect", {str(tiny_run)!r}]) == 0
        try:
            cli.main(["--help"])
        except SystemExit as stop:
            assert stop.code == 0
        heavy = {{"torch", "diffusers", "transformers", "datasets"}} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_picture_equals_the_python_api(tiny_run, tmp_path, capsys, by_hand):
    out = tmp_path / "a.png"
    assert cli.main(["generate", str(tiny_run), PROMPT, "--seed", "5", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert np.array_equal(np.asarray(Image.open(out)), by_hand(5))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_each_picture_of_several_depends_on_its_own_seed_only(tiny_run, tmp_path, by_hand):
    folder, out = str(tiny_run / "pipeline"), str(tmp_path / "a.png")  # a pipeline folder itself this time
    assert cli.main(["generate", folder, PROMPT, "--seed", "4", "--count", "3", "--out", out]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_0.png", "a_1.png", "a_2.png"]
    for i in range(3):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"a_{i}.png")), by_hand(4 + i))


def test_options_reach_the_pipeline(tiny_run, tmp_path, by_hand):
    out = tmp_path / "a.bmp"
    options = ["--steps", "3", "--guidance", "1.5", "--height", "48", "--width", "32", "--negative", "a blue cross"]
    assert cli.main(["generate", str(tiny_run), PROMPT, *options, "--out", str(out)]) == 0
    expected = by_hand(
        0, num_inference_steps=3, guidance_scale=1.5, height=48, width=32, negative_prompt="a blue cross"
    )
    assert expected.shape == (48, 32, 3)
    assert np.array_equal(np.asarray(Image.open(out)), expected)


def test_a_run_without_a_pipeline_is_joined(tiny_run, tmp_path, by_hand):
    run = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("pipeline"))
    assert cli.main(["generate", str(run), PROMPT, "--out", str(tmp_path / "a.png")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), by_hand(0))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--out", "missing/a.png"], ["no folder", "missing"]),
        (["--out", "a.xyz"], [".xyz", ".png"]),
        (["--out", "a"], ["without an ending"]),
        (["--out", "a.psd"], [".psd"]),  # Pillow reads it and cannot write it
        (["--out", "."], ["is a folder"]),
        (["--count", "0"], ["--count", "'0'", "from 1"]),
        (["--seed", "-1"], ["--seed", "'-1'", "from 0"]),
        (["--seed", "9" * 30], ["--seed", "10^18"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--guidance", "much"], ["--guidance", "'much'"]),
        (["--cuont", "2"], ["--cuont"]),
        (["--co", "2"], ["--co"]),  # an abbreviation
    ],
)
def test_generate_refuses_before_it_loads_anything(options, parts, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "open_pipeline", lambda folder: pytest.fail("the pipeline was loaded"))
    assert_refused(["generate", tiny_run, PROMPT, *options], capsys, *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prompt", "options", "parts"),
    [
        (PROMPT, ["--height", "33"], ["height 33", "32", "36"]),
        (PROMPT, ["--guidance", "-1"], ["guidance", "-1"]),
        ("  ", [], ["empty"]),
        ("red " * 99, ["--strict"], ["tokens", "24"]),
    ],
)
def test_generate_refuses_what_no_picture_comes_out_of(prompt, options, parts, tiny_run, tmp_path, capsys):
    assert_refused(["generate", tiny_run, prompt, "--out", tmp_path / "a.png", *options], capsys, *parts)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_is_refused(tiny_run, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert_refused(["generate", tmp_path / "missing", PROMPT, "--out", out], capsys, "no such folder")
    assert_refused(["generate", tmp_path, PROMPT, "--out", out], capsys, "neither a pipeline", "nor a run")
    assert_refused(["export", tmp_path], capsys, "neither a pipeline", "nor a run")
    assert_refused(["inspect", tmp_path], capsys, "no exported stage")
    (tmp_path / "autoencoder").mkdir()
    assert_refused(["generate", tmp_path, PROMPT, "--out", out], capsys, "text_encoder", "train it first")
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder"]


def test_a_damaged_pipeline_is_refused(tiny_run, tmp_path, capsys):
    pipeline = shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    next((pipeline / "autoencoder").glob("*.safetensors")).unlink()
    assert_refused(["generate", pipeline, PROMPT, "--out", tmp_path / "a.png"], capsys, "cannot be loaded", pipeline)


@pytest.mark.parametrize("argv", [[], ["insp", "x"], ["generate", "x"], ["inspect"]])
def test_a_wrong_command_is_one_line(argv, capsys):
    assert_refused(argv, capsys, "--help")


def test_export_writes_a_pipeline_that_loads(tiny_run, tmp_path, capsys, by_hand):
    out = tmp_path / "new" / "pipeline"
    assert cli.main(["export", str(tiny_run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    made = Pipeline.from_pretrained(out).to(DEVICE)(PROMPT, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.array_equal(np.asarray(made), by_hand(0))
    assert cli.main(["export", str(tiny_run), "--out", str(out)]) == 0  # its own kind is replaced


def test_export_replaces_nothing_of_another_kind(tiny_run, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    assert_refused(["export", tiny_run, "--out", tmp_path], capsys, "other files")
    assert_refused(["export", tiny_run, "--out", tmp_path / "letter.txt"], capsys, "is a file")
    assert_refused(["export", tiny_run, "--out", tmp_path / "letter.txt" / "inner"], capsys, "is a file")
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_inspect_prints_the_stages_and_whether_they_belong(tiny_run, tmp_path, capsys):
    assert cli.main(["inspect", str(tiny_run)]) == 0
    shown = capsys.readouterr().out
    for kind in ("text_encoder", "autoencoder", "noise_predictor"):
        contract = json.loads((tiny_run / kind / "final" / "stage.json").read_text())
        assert contract["hash"][:12] in shown
    for part in ("1,234 parameters", "latents 8 x 16 x 16", "prompt embeddings 24 x 32", "shapes:train, 256 pictures",
                 "psnr 20", "belong together", "32 px, 2 steps, guidance 2.0; joined from these stages"):  # fmt: skip
        assert part in shown


def test_inspect_names_what_is_missing_and_what_does_not_fit(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    path = run / "autoencoder" / "final" / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hash": "f" * 64}))
    assert cli.main(["inspect", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "was trained against autoencoder" in shown and "f" * 12 in shown
    assert "joined from other stages: autoencoder" in shown

    shutil.rmtree(run / "noise_predictor")
    shutil.rmtree(run / "pipeline")
    assert cli.main(["inspect", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "not trained yet" in shown and "sd-mini export" in shown and "all three are trained" in shown

    (run / "report").mkdir()
    (run / "report" / "report.json").write_text("{")
    assert_refused(["inspect", run], capsys, "report.json", "not readable as JSON")


NOWHERE = "/proc/self"  # where not even root can write


@pytest.mark.skipif(not os.path.isdir(NOWHERE), reason="Linux alone has such a folder")
@pytest.mark.parametrize("command", [["generate", "RUN", PROMPT, "--out", f"{NOWHERE}/a.png"],
                                     ["export", "RUN", "--out", f"{NOWHERE}/pipeline"]])  # fmt: skip
def test_a_place_that_takes_nothing_is_found_out_before_the_work(command, tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(generate, "open_pipeline", lambda folder: pytest.fail("the pipeline was loaded"))
    monkeypatch.setattr(Pipeline, "from_run", lambda *given, **more: pytest.fail("the stages were loaded"))
    assert_refused([tiny_run if word == "RUN" else word for word in command], capsys, "nothing can be written", NOWHERE)


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, capsys):
    from sd_mini.errors import UserError

    with pytest.raises(UserError, match=r"cannot be written \(File name too long\)"):
        png.replace(Image.new("RGB", (8, 8)), tmp_path / f"{'a' * 300}.png", "PNG")
    assert not list(tmp_path.iterdir())


def test_export_keeps_a_user_s_own_files(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "pipeline" / "README.md").write_text("mine")
    (run / "pipeline" / "gallery").mkdir()
    (run / "pipeline" / "gallery" / "a.png").write_bytes(b"a picture")
    assert cli.main(["export", str(run)]) == 0
    assert (run / "pipeline" / "README.md").read_text() == "mine"
    assert (run / "pipeline" / "gallery" / "a.png").read_bytes() == b"a picture"
    Pipeline.from_pretrained(run / "pipeline")


def test_export_drops_the_card_of_the_pipeline_that_it_replaces(tiny_run, tmp_path, capsys):
    from sd_mini.files import GENERATED

    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "pipeline" / "README.md").write_text(f"{GENERATED}\nmeasured")
    assert cli.main(["export", str(run)]) == 0
    assert not (run / "pipeline" / "README.md").exists()


def test_a_negative_prompt_of_nothing_is_none(tiny_run, tmp_path, capsys, by_hand):
    out = tmp_path / "a.png"
    assert cli.main(["generate", str(tiny_run), PROMPT, "--negative", "", "--out", str(out)]) == 0
    assert np.array_equal(np.asarray(Image.open(out)), by_hand(0))


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("target", "code", "said"), [("| true", 141, ""), ("> /dev/full", 2, "error: stdout: ")])
def test_an_output_that_takes_no_more_is_no_fault_of_ours(tiny_run, target, code, said, unbuffered):
    if not os.path.exists("/dev/full"):
        pytest.skip("Linux alone has /dev/full")
    command = f"sys.exit(cli.main(['inspect', {str(tiny_run)!r}]))"
    script = f"import sys, time; from sd_mini.cli import commands as cli; time.sleep(0.3); {command}"
    environment = {**os.environ, "CODE": script, "PYTHONUNBUFFERED": unbuffered}
    line = f'"{sys.executable}" -c "$CODE" {target}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_a_full_disk_elsewhere_is_not_taken_for_stdout_s():
    import errno

    from sd_mini.config import command

    def main(argv):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        command(main, [])


def test_the_installed_script_and_the_module_are_the_command():
    """By the name in pyproject.toml, which scripts that are installed already call, too."""
    from sd_mini import cli as package

    assert package.main is cli.main
