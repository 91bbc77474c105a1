"""A newcomer who follows one training step, or one picture, through the code reads few files."""

from sd_mini import Pipeline
from tests import walks


def test_one_step_passes_through_few_files(smoke_run, tmp_path):
    files = walks.step_walk(smoke_run, tmp_path)
    assert "training/engine/loop.py" in files and len(walks.counted(files)) <= walks.STEP, files


def test_one_picture_passes_through_few_files(tiny_run):
    files = walks.picture_walk(Pipeline.from_pretrained(tiny_run / "pipeline"))
    counted = walks.counted(files)
    assert "sd_mini/pipelines/text_to_image.py" in files and len(counted) <= walks.PICTURE, "\n".join(counted)
