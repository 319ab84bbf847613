"""What `docs/` shows is what the code gives now."""

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))
AGAIN = "run `jupyter nbconvert --to notebook --execute --inplace` on it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_prints_what_it_shows(path, tmp_path, monkeypatch):
    """Cell by cell, without Jupyter: assertions of the notebook hold, and stored outputs are those of now."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), names)
        assert all(output.get("name") == "stdout" for output in cell["outputs"]), f"{path.name}: print, do not display"
        stored = "".join(line for output in cell["outputs"] for line in output["text"])
        assert stored == printed.getvalue(), f"{path.name}, code cell {number} shows something else; {AGAIN}"


@pytest.fixture(scope="module")
def embeddings():
    spec = importlib.util.spec_from_file_location("embeddings", DOCS / "embeddings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_embeddings_page_is_what_its_script_writes(embeddings, tmp_path):
    embeddings.main(["--output", str(tmp_path / "page.html")])
    made = (tmp_path / "page.html").read_text(encoding="utf-8")
    command = "python docs/embeddings.py --output docs/embeddings.html"
    assert made == (DOCS / "embeddings.html").read_text(encoding="utf-8"), f"run {command}"
    assert not re.search(r"<script|src=|href=|url\(", made)  # nothing to run or to fetch

    rows = dict(re.findall(r'<th scope="row">([^<]*)((?:<td[^>]*>\d+)+)\n', made))
    ids = {name: [int(cell) for cell in re.findall(r">(\d+)", cells)] for name, cells in rows.items()}
    assert ids["token type ids"] == [0] * 6 + [1] * 4 + [0] * 2
    assert ids["segment ids (mask)"] == [1] * 10 + [0] * 2
    assert ids["position ids"] == list(range(embeddings.LENGTH))
    vocabulary = dict(re.findall(r"<li>(\d+) <code>([^<]*)<", made))
    pieces = [vocabulary[str(index)] for index in ids["token ids"]]
    whole = " ".join(pieces).replace(" ##", "")
    assert whole == "[CLS] Uma sentença . [SEP] E outra ! [SEP] [PAD] [PAD]" and len(pieces) == 12
