"""The wheel: built, installed into an environment of its own, and a picture made by it."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = """
import sys, torch, sd_mini
from pathlib import Path
assert Path(sd_mini.__file__).is_relative_to(sys.prefix), sd_mini.__file__
assert Path(sd_mini.__file__).with_name("cpu").joinpath("kernels.c").is_file()
pipeline = sd_mini.Pipeline.from_pretrained(sys.argv[1])
picture = pipeline("a small red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
print(picture.size)
"""


def test_the_wheel_makes_a_picture(tiny_run, tmp_path):
    source = tmp_path / "source"  # setuptools leaves its build/ there, and would take what an older one held
    shutil.copytree(ROOT / "sd_mini", source / "sd_mini", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    roots = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert roots == {"sd_mini"} and "sd_mini/pipelines/text_to_image.py" in names and "sd_mini/cpu/kernels.c" in names

    # an environment that holds nothing of ours; torch and its kin are read from where they are installed already
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    (site,) = (tmp_path / "env").glob("lib/python3*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = tmp_path / "env" / "bin" / "python"
    command = [str(python), "-c", CODE, str(tiny_run / "pipeline")]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0 and made.stdout.strip() == "(32, 32)", made.stderr
