"""The notebooks run from the top, at a tiny size; what they show is what the run has written."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from inputs import chinese, english, write_jsonl

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("papermill", "ipykernel")),
        reason="papermill and ipykernel are not installed: pip install -r requirements-dev.txt",
    ),
]


def execute(name: str, directory: Path, parameters: dict) -> str:
    """Runs a notebook in a directory; all that it shows as text."""
    given, out = directory / "parameters.json", directory / name
    given.write_text(json.dumps(parameters))
    command = [sys.executable, "-m", "papermill", NOTEBOOKS / name, out, "--parameters_file", given, "--cwd", directory]
    settings = environment(directory) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command), "--kernel", "python3", "--no-progress-bar"],
        env=settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [output for cell in json.loads(out.read_text())["cells"] for output in cell.get("outputs", ())]
    shown = [output.get("text", output.get("data", {}).get("text/html", "")) for output in outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "\n".join("".join(text) for text in shown) + f"\n{pictures} pictures"


@pytest.fixture(scope="module")
def texts(tiny_model, tmp_path_factory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("notebooks")
    base = shutil.copytree(tiny_model, root / "base")
    new, old = write_jsonl(root / "new.jsonl", chinese(200)), write_jsonl(root / "old.jsonl", english(150))
    return root, {"BASE": str(base), "NEW": str(new), "OLD": str(old)}


def test_adapting_then_looking_inside(texts):
    root, given = texts
    options = (
        "--vocabulary.limits.unreachable_pieces 1.0 --domains.0.heldout.max_bytes 2000 "
        "--domains.1.heldout.max_bytes 2000 --samples.new_tokens 4"
    )
    changes = {"REPLAY": given["OLD"], "TOKENS": 5120, "NEW_PIECES": 30, "WORKDIR": "run", "OPTIONS": options}
    parameters = {"BASE": given["BASE"], "NEW": given["NEW"]} | changes
    shown = execute("adapt_a_model.ipynb", root, parameters)
    evaluated = json.loads((root / "run" / "eval.json").read_text())
    for entry in evaluated:
        assert f"{entry['bits_per_byte']:.3f} (" in shown
    assert "1 pictures" in shown

    shown = execute("look_inside.ipynb", root, {"RUN": "run", "DOCUMENTS": 100, "SHOWN": 0})
    # The sums over characters are the run's own evaluation, of the base and of the weights that were exported.
    for name, stage in (("base", "base"), ("result", "lora")):
        found = re.search(rf"^{name} +([\d.]+) bits per byte", shown, re.MULTILINE)
        assert found
        expected = [e["bits_per_byte"] for e in evaluated if e["domain"] == "new" and e["stage"] == stage]
        assert min(abs(float(found[1]) - value) for value in expected) < 2e-4
    passage = json.loads((root / "run/data/new/heldout.jsonl").read_text().splitlines()[0])["text"]
    coloured = re.findall(r'<span title="[\d.]+ to [\d.]+ bits"[^>]*>(.*?)</span>', shown)
    assert "".join(coloured) == passage


def test_choosing_a_replay_share(texts):
    root, given = texts
    small = [f"--domains.{number}.heldout.max_bytes 1000" for number in (0, 1)]
    options = " ".join(["--stages.0.optimizer.learning_rate 1e-2 --stages.0.ema null", *small])
    shown = execute(
        "choose_a_replay_share.ipynb", root, given | {"TOKENS": 2048, "OPTIONS": options, "WORKDIR": "shares"}
    )
    statuses = [run["status"] for run in json.loads((root / "shares/runs/sweep.json").read_text())["runs"]]
    assert statuses == ["done"] * 5
    assert json.loads((root / "shares/law.json").read_text())["answer"] in " ".join(shown.split())
    assert "3 pictures" in shown


@pytest.mark.parametrize("name", ["adapt_a_model", "choose_a_replay_share", "look_inside"])
def test_notebooks_hold_their_outputs_and_no_place_of_a_machine(name):
    text = (NOTEBOOKS / f"{name}.ipynb").read_text()
    cells = json.loads(text)["cells"]
    assert not re.search(r"/(tmp|work|home|root|content)/|Traceback", text)
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))
    assert ["parameters"] in [cell["metadata"].get("tags") for cell in cells]
