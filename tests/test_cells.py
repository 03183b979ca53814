"""Every section of the four scripts runs cell by cell in IPython, its picture under its cell. The file is also what the
subprocess runs: what takes long is cut short, nothing else is changed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FEW = {"\nimport data\n": "\nimport data\ndata.garments.SPLITS.update(train=500, test=100)\n"}
SHORTER = {
    "01_time_embedding.py": {},
    "02_attention.py": FEW | {"SIDES = (8, 16, 32, 64)": "SIDES = (2, 4)", "steps=200": "steps=2"},
    "03_unet_uncond.py": FEW
    | {
        '"name": "auto"': '"name": "garments"',
        "make_optimizers, steps=120": "make_optimizers, steps=20",
        "range(120)": "range(20)",
        "noise_levels(400)": "noise_levels(40)",
        'load_garments("train", 2000)': 'load_garments("train", 200)',
        "steps=100": "steps=2",
        "range(100), curves": "range(2), curves",
        "index in range(100)": "index in range(4)",
    },
    "04_unet_cond.py": {"noise_levels(18)": "noise_levels(2)", "enough=0.3": "enough=0"},
}


def run_cells(script):
    """Of each cell of a script, in IPython: its title, and how many pictures are open after it."""
    import matplotlib
    import matplotlib.pyplot as plt
    from IPython.core.interactiveshell import InteractiveShell

    matplotlib.use("agg")
    shell = InteractiveShell.instance()
    text = (ROOT / script).read_text()
    for before, after in SHORTER[script].items():
        assert before in text, before
        text = text.replace(before, after)
    cells = re.split(r"^(?=# %%)", text, flags=re.MULTILINE)
    for cell in cells:
        shell.run_cell(cell).raise_error()
        yield cell.partition("\n")[0], len(plt.get_fignums()), "return figure" in cell or "return lesson" in cell
        plt.close("all")


def test_every_cell_runs_in_order_and_shows_its_picture(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("FASHION_MNIST_DIR", None)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        for script in SHORTER
    ]
    for script, process in zip(SHORTER, processes, strict=True):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        cells = json.loads(output.splitlines()[-1])
        sections = [cell for cell in cells if re.match(r"# %% \d", cell[0])]
        assert len(sections) >= 6, script
        for title, pictures, draws in sections:
            assert pictures == draws, f"{script}: {title}"
        assert all(pictures == 0 for title, pictures, _ in cells if [title, pictures, _] not in sections)
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".png", ".pt")] == []  # nothing was trained


if __name__ == "__main__":
    print(json.dumps([[title, pictures, bool(draws)] for title, pictures, draws in run_cells(sys.argv[1])]))
