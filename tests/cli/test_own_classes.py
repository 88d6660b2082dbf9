"""The installed command finds classes in the folder where it is typed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.forked_command import run_command
from tests.test_readme import ROOT

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_class_of_the_present_folder_is_found_by_the_script(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from lightning_gr.layers import HSTUEncoder\n\n\nclass MyEncoder(HSTUEncoder):\n    pass\n"
    )
    (tmp_path / "polars.py").write_text("raise ImportError('a file of the folder hides a library')\n")
    # The script lies in another folder, as in an environment's bin, and that folder is what Python puts first.
    script = tmp_path / "bin" / "script.py"
    script.parent.mkdir()
    script.write_text("import sys\nfrom lightning_gr.cli import main\nsys.exit(main())\n")
    words = ["fit", "--config", "hstu/tiny", "--model.init_args.encoder", "mine.MyEncoder", "--print_config"]
    done = run_command([sys.executable, str(script), *words], cwd=tmp_path, env=ENV)
    assert done.returncode == 0, done.stderr
    assert "class_path: mine.MyEncoder" in done.stdout
