"""`make demo`, the first command of the README, with two scenes."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.conftest import ROOT


def test_the_demo_draws_its_contact_sheet(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from tools.demo import main; main(Path({str(tmp_path / 'demo')!r}), 2)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "labeled   6 images" in done.stdout
    assert "with FGC, 2 scenes against their pixel labels" in done.stdout
    assert Image.open(tmp_path / "demo" / "contact_sheet.png").width > 400
