"""The notebooks run, in time, and the executed ones beside them are of the same cells."""

import re
import resource

import jupytext
import nbformat
import pytest

from notebooks import build

CORES = 2
NOTEBOOK = pytest.mark.parametrize("source", build.SOURCES, ids=lambda path: path.stem)


def outputs_of(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_there_are_five():
    assert [source.name[0] for source in build.SOURCES] == list("12345")


@NOTEBOOK
def test_a_notebook_runs_in_two_minutes_of_two_cores(source, tiny_run, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = build.execute(source, tmp_path, tiny_run)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert any(output.get("data", {}).get("image/png") for output in outputs_of(notebook))
    # the time of its processes, which other programs beside them do not stretch
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 1 < used < CORES * build.SECONDS


@NOTEBOOK
def test_the_executed_notebook_has_the_cells_of_its_source(source):
    built = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(built)
    cells, expected = ([(cell.cell_type, cell.source) for cell in n.cells] for n in (built, jupytext.read(source)))
    assert cells == expected, "build it again: python -m notebooks.build"


@NOTEBOOK
def test_the_executed_notebook_is_small_and_names_no_machine(source):
    built = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert source.with_suffix(".ipynb").stat().st_size <= build.LIMIT
    assert [cell.execution_count for cell in built.cells if cell.cell_type == "code"] == list(
        range(1, 1 + sum(cell.cell_type == "code" for cell in built.cells))
    )
    assert sum("image/png" in output.get("data", {}) for output in outputs_of(built)) >= 5
    assert build.faults(built) == []
    assert all(output.output_type != "error" for output in outputs_of(built))


def test_a_path_of_this_machine_is_a_fault():
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text="see /home/me/report.html")])
    assert len(build.faults(nbformat.v4.new_notebook(cells=[cell]))) == 1


@NOTEBOOK
def test_answers_are_folded_away(source):
    text = source.read_text(encoding="utf-8")
    exercises = text.split("# ## Exercises")[1]
    assert (
        len(re.findall(r"# \*\*\d\.\*\* ", exercises)) == exercises.count("<details><summary>Answer</summary>\n") >= 3
    )
    assert exercises.count("<details>") == exercises.count("# </details>")
