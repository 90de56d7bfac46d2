"""Mistakes at the command line: one line that names the mistake, exit code 2, and nothing is written."""

from pathlib import Path

import pytest

from tests.conftest import PHOTOS, ROOT
from tests.support.command import cliper_here

RUN = ROOT / "tests" / "data" / "run_0_1" / "run"

# A command: a part of its message. RUN is a finished run, OUT a folder that does not exist, EMPTY an empty one,
# FULL one that holds a file, FILE.
MISTAKES = {
    "label": "Missing option '--input'",
    "label --inptu PHOTOS": "No such option: --inptu (Possible options: --include, --input)",
    "label --input PHOTOS --output OUT --classes voc12": "did you mean voc21 or voc20?",
    "label --input PHOTOS --output OUT --classes EMPTY": "is neither a file nor a shipped class list",
    "label --input PHOTOS --output OUT --config vit-l14": "did you mean vit-l-14",
    "label --input PHOTOS --output OUT --config FULL/segmenter.yaml": "unknown segmenter 'clipper'; did you mean",
    "label --input PHOTOS --output OUT --preset fats": "unknown preset 'fats'; there is: exact, fast,",
    "label --input PHOTOS --output OUT --device gpu": "should be 'auto', 'cpu' or 'cuda' (got 'gpu')",
    "label --input PHOTOS --output OUT --actors many": "--actors 'many': expected a number",
    "label --input PHOTOS --output OUT --max-failures 120%": "a share like 5% up to 100%",
    "label --input PHOTOS --output OUT --relabel changed": "--relabel needs --extend",
    "label --input PHOTOS --output OUT --wait-for-resources soon": "'soon' is not a duration; expected e.g. 90s",
    "label --input EMPTY/none --output OUT": "none does not exist",
    "label --input EMPTY --output OUT": "no images found in",
    "label --input PHOTOS --output FULL": "is not empty and not a run folder (it holds",
    "label --input PHOTOS --output FILE": "a part of the path is a file, and a folder is needed",
    "label --input PHOTOS --output OUT --storage-option foo=1": "there is no storage option 'foo'; known: ",
    "label --input PHOTOS --output OUT --config vit-l-14": "--classes is needed: ViT-L-14-quickgelu has no",
    "plan --input EMPTY/none": "none does not exist",
    "plan --input PHOTOS --sample 0": "Invalid value for '--sample'",
    "prepare voc22 --root EMPTY --output OUT": "unknown benchmark 'voc22'; did you mean voc21 or voc20?",
    "prepare voc21 --root EMPTY": "expected the folder JPEGImages in",
    "evaluate": "BENCHMARK is missing; e.g. cliper evaluate voc21-b16 --data",
    "evaluate voc21-b61 --data EMPTY --output OUT": "did you mean voc21-b16",
    "evaluate voc21-b16 --data EMPTY --output OUT": "holds no prepared benchmark (dataset.json); run 'cliper",
    "evaluate --run RUN --all": "--run and --all do not go together",
    "evaluate --compare RUN RUN": "has no finished evaluation; run 'cliper evaluate --run",
    "agree RUN": "agreement needs two runs or more",
    "verify EMPTY": "is not a run folder: it has no run.json",
    "verify RUN --workers many": "expected a number of processes of at least 1, or ray",
    "status EMPTY": "is not a run folder: it has no run.json",
    "retry EMPTY": "is not a run folder: it has no run.json",
    "export RUN --to coc --output OUT": "unknown format 'coc'; did you mean coco or voc?",
    "export RUN --to coco --output FULL": "is not empty and not an export (it holds",
    "export RUN --to coco --output RUN": "is not empty and not an export (it holds",
    "export RUN --to coco --output OUT --class gras": "the run has no class 'gras'; did you mean grass?",
    "export RUN --to coco --output OUT --rename a": "--rename takes OLD=NEW, not 'a'",
    "export RUN --to coco --output OUT --split-by folders": "--split-by 'folders' matches no image id",
    "export RUN --to coco --output OUT --things FULL/none": "none cannot be read",
    "export RUN --to coco --output OUT --where margn<2": 'Referenced column "margn" not found',
    "export RUN --to voc --output OUT --instances": "the format voc has no --instances",
    "export RUN --to coco --output s3x://b/c": "s3x:// is not read; use a local path, s3://",
    "report EMPTY": "is not a run folder: it has no run.json",
    "report RUN --output EMPTY": "is a folder; name a file, e.g. ",
    "report RUN --against EMPTY": "is not a run folder: it has no run.json",
    "view EMPTY": "is not a run folder: it has no run.json",
    "serve --config tinny": "did you mean tiny?",
    "serve --examples EMPTY": "--examples: no images in",
    "review": "Missing command",
    "review pick RUN --output RUN": "is a run folder; choose a folder of its own for the tasks",
    "review pick RUN --output OUT --agreement EMPTY": "name a folder that 'cliper agree' printed",
    "review apply RUN FULL/none": "none does not exist",
    "review aply RUN": "Did you mean 'apply'?",
    "sttaus RUN": "Did you mean 'status'?",
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    full, empty = tmp_path / "full", tmp_path / "empty"
    empty.mkdir()
    full.mkdir()
    (full / "segmenter.yaml").write_text("segmenter: clipper\n")
    found = {"PHOTOS": PHOTOS, "RUN": RUN, "OUT": tmp_path / "out", "EMPTY": empty, "FULL": full}
    return {name: str(path) for name, path in found.items()} | {"FILE": str(full / "segmenter.yaml")}


def test_every_mistake_is_one_line_that_names_it(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    before = sorted(RUN.rglob("*"))
    wrong = []
    for command, message in MISTAKES.items():
        done = cliper_here(*(_filled(part, places) for part in command.split(" ")))
        text = done.stderr.strip()
        ours = text.startswith("cliper:")  # else typer's box, of several lines
        if done.returncode != 2 or message not in text or "Traceback" in text or (ours and "\n" in text):
            wrong.append((command, done.returncode, text))
    assert not wrong
    assert not Path(places["OUT"]).exists()
    assert sorted(RUN.rglob("*")) == before


def _filled(part: str, places: dict[str, str]) -> str:
    head, slash, rest = part.partition("/")
    return f"{places[head]}{slash}{rest}" if head in places else part
