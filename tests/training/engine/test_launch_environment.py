"""What the environment says of threads and of the arithmetic, from the shell or through `accelerate launch`."""

import os
import subprocess
import sys

import pytest

from tests.support.launching import ROOT, error_line, launch

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
THREADS = """import torch
from training.distributed.processes import tune_cpu
tune_cpu(1)
print('threads', torch.get_num_threads())
"""


def run(*line, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "ACCELERATE_"))}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("launcher", [[sys.executable], ACCELERATE])
def test_the_number_of_threads_is_the_user_s_or_all_cores(tmp_path, launcher):
    """`accelerate launch` sets OMP_NUM_THREADS to 1 where the user has not; that is not the user's."""
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    cores = len(os.sched_getaffinity(0))
    assert f"threads {cores}\n" in run(*launcher, str(script))
    assert "threads 1\n" in run(*launcher, str(script), OMP_NUM_THREADS="1")


@pytest.mark.parametrize("program", ["training", "eval"])
@pytest.mark.parametrize("user", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_how_threads_wait_is_said_before_torch_is_there(program, user):
    code = f"import sys, os, {program}\nprint('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    spins = user.get("GOMP_SPINCOUNT") if user else "1000"
    assert run(sys.executable, "-c", code, **user) == f"False {spins}\n"


def test_so_does_the_command_line():
    code = "import os, sys\nfrom sd_mini.cli.commands import main\nmain(['inspect', 'nowhere'])\n"
    code += "print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    assert run(sys.executable, "-c", code) == "False 1000\n"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--train.accumulation"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "--train.compile"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "FSDP2"),
    ],
)
def test_what_accelerate_would_change_of_the_arithmetic_is_refused(tmp_path, monkeypatch, capsys, name, value, says):
    monkeypatch.setenv(name, value)
    assert launch("autoencoder", tmp_path / "run") == 2
    assert name in (said := error_line(capsys.readouterr().err)) and says in said
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_what_accelerate_says_by_default_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert launch("autoencoder", tmp_path / "run", "--steps", "1", "--train.warmup_steps", "0") == 0
