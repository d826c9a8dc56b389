"""The notebooks run from a fresh kernel, and are kept as they were written: without what they showed somewhere."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
WITHOUT_RAY = ["1_one_silo", "2_one_round"]
NAMES = [*WITHOUT_RAY, "3_steer_a_run"]


def opened(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Execute a notebook in an empty folder, on a Ray of its own if it starts one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
        where = {"metadata": {"path": str(tmp_path)}}
        return NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()

    return run


def texts(notebook: nbformat.NotebookNode) -> str:
    """All that its cells showed as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_counts_are_stripped(name: str):
    notebook = opened(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count, cell.metadata) == ([], None, {})
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


@pytest.mark.parametrize("name", WITHOUT_RAY)
def test_it_runs_without_ray(name: str, execute):
    notebook = opened(name)
    notebook.cells.append(nbformat.v4.new_code_cell("import sys\nprint('ray' in sys.modules)"))
    execute(notebook)
    assert notebook.cells[-1].outputs[0]["text"] == "False\n"


@pytest.mark.ray
def test_a_run_is_steered_on_a_local_ray(execute):
    said = texts(execute(opened("3_steer_a_run")))
    assert "learning tokenizers: 3 of 3" in said
    assert "model.width cannot be changed in a run" in said
    for change in ("{'set': 'outer.lr', 'to': 0.7}", "'add': {'name': 'maths'", "{'drop': 'cpp'}", "{'return': 'cpp'}"):
        assert change in said
    assert said.rstrip().endswith("finished")
