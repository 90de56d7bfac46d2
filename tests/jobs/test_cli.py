"""The command in its own process: exit codes, output, and interruptions."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from cliper.pipeline.config import load_classes, load_config
from tests.conftest import PHOTOS, ROOT, S3Server
from tests.support.command import all_rows, cliper, cliper_here, label_command, started, wait_for_shards
from tests.support.direct import label_directly
from tests.support.fakes import write_corpus


def test_help_is_a_page() -> None:
    done = cliper("--help")
    assert done.returncode == 0
    assert "Label image corpora of any size" in done.stdout
    page = cliper("label", "--help").stdout
    for option in ("--input", "--output", "--classes", "--config", "--actors", "--batch-size", "--verbose"):
        assert option in page
    assert page.count("\n") < 110
    alone = subprocess.run(
        [sys.executable, "-m", "cliper.jobs.cli", "label", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--storage-option" in alone.stdout


def test_photographs_end_to_end_in_every_storage(settings: dict[str, str], tmp_path: Path, s3: S3Server) -> None:
    """The four example photographs from disk to disk, and from S3 to S3 with keys in the environment."""
    (tmp_path / "home").mkdir()
    done = cliper(*label_command(settings, PHOTOS, tmp_path / "run"), HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "home" / ".ray").exists(), "a token, which later clusters would ask for"
    assert re.search(r"labeled   4 images in [\d.]+ s", done.stdout)
    assert "failed    0" in done.stdout
    first, *lines = done.stderr.splitlines()
    assert first == "left out  1 .md: not an image's ending"
    for told in (
        "4 images in ",
        "starting Ray on this machine",
        "starting 1 actor, each ",
        "1 actor ready: model loaded in ",
        "first images labeled after",
    ):
        assert sum(line.startswith(told) for line in lines) == 1, done.stderr
    assert not [line for line in lines if "INFO" in line or "raylet" in line], done.stderr
    rows = {row["image_id"]: row for row in all_rows(tmp_path / "run")}
    assert set(rows) == {"astronaut.jpg", "chelsea.jpg", "coffee.jpg", "rocket.jpg"}
    assert (rows["coffee.jpg"]["width"], rows["coffee.jpg"]["height"], rows["coffee.jpg"]["orientation"]) == (
        400,
        600,
        6,
    )

    bucket = s3.bucket("photos")
    for photo in PHOTOS.glob("*.jpg"):
        (s3.folder / "photos" / photo.name).write_bytes(photo.read_bytes())
    done = cliper(*label_command(settings, bucket, f"{s3.bucket('out')}/run"), **s3.environment)
    assert done.returncode == 0, done.stderr
    assert s3.secret not in done.stdout + done.stderr
    on_s3 = {row["image_id"]: row["mask"] for row in all_rows(s3.folder / "out" / "run")}
    assert on_s3 == {image_id: row["mask"] for image_id, row in rows.items()}

    again = cliper_here(*label_command(settings, PHOTOS, tmp_path / "run"))
    assert "4 images in 1 shard, 4 of them done" in again.stderr
    other = cliper_here(*label_command(settings, PHOTOS, tmp_path / "run", "--batch-size", "3"))
    assert other.returncode == 2
    assert "belongs to a run with other settings: model.batch_size was 8, is now 3" in other.stderr


def test_a_run_interrupted_in_every_way_equals_an_uninterrupted_one(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """Ctrl-C, then SIGTERM while a second command is refused, then SIGKILL; each time the same command goes on."""
    corpus, output = tmp_path / "corpus", tmp_path / "run"
    write_corpus(corpus, 120, broken_each=1)
    command = label_command(settings, corpus, output)

    first = started(command)
    wait_for_shards(output, 1, first)
    first.send_signal(signal.SIGINT)
    _, stderr = first.communicate(timeout=300)
    assert first.returncode == 130, stderr
    assert stderr.endswith(f"stopped; the same command continues {output}\n")
    assert "Traceback" not in stderr
    assert not (output / "lease.json").exists()
    kept = {path.name: path.read_bytes() for path in (output / "labels").iterdir()}

    second = started(command)
    wait_for_shards(output, len(kept) + 1, second)
    second.send_signal(signal.SIGSTOP)  # so that it does not finish too early
    refused = cliper_here(*command)
    assert refused.returncode == 2, refused.stderr
    assert f"{output} is in use by process {second.pid} on " in refused.stderr
    assert refused.stderr.count("\n") == 1
    second.send_signal(signal.SIGTERM)
    second.send_signal(signal.SIGCONT)
    _, stderr = second.communicate(timeout=300)
    assert second.returncode == 143, stderr
    assert stderr.endswith(f"stopped; the same command continues {output}\n")

    third = started(command)
    point = len(list(output.glob("labels/*"))) + random.Random(time.time_ns()).randrange(1, 6)
    wait_for_shards(output, point, third)
    os.killpg(third.pid, signal.SIGKILL)
    third.communicate()
    assert 3 <= len(list(output.glob("labels/*"))) < 30

    done = cliper(*command)
    assert done.returncode == 0, done.stderr
    assert kept.items() <= {path.name: path.read_bytes() for path in (output / "labels").iterdir()}.items()
    assert sorted(path.name for path in output.iterdir()) == ["attempts", "labels", "manifest", "run.json"]
    config, classes = load_config(settings["--config"]), load_classes(settings["--classes"])
    whole = label_directly(str(corpus), str(tmp_path / "whole"), config, classes)
    assert all_rows(output) == all_rows(Path(whole.uri)), f"killed at {point} shards"


def test_mistakes_are_one_message_and_exit_code_2(settings: dict[str, str], tmp_path: Path, s3: S3Server) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "twice.csv").write_text("image_id,uri\na,x.jpg\na,y.jpg\n")
    (tmp_path / "blank.txt").write_text("cat\n\ndog\n")
    (tmp_path / "no-weights.yaml").write_text(
        "model: {backbone: {model: ViT-B-16-quickgelu, weights: openai}, fgc: null}"
    )
    (tmp_path / "no-codec.yaml").write_text("mask_codec: jpeg")
    s3.bucket("private")
    output = tmp_path / "out"
    wrong_keys = s3.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    classes, config = "--classes", "--config"
    cases: list[
        tuple[dict[str, str], object, str, dict[str, str]]
    ] = [  # changed settings, input, message, environment
        ({}, tmp_path / "nothing", "nothing does not exist", {}),
        ({}, tmp_path / "empty", "no images found in", {}),
        ({}, tmp_path / "twice.csv", "image_id 'a' occurs twice", {}),
        ({}, "s3://private", "check the credentials", wrong_keys),
        ({}, "s3://no-such-bucket", "s3://no-such-bucket does not exist", s3.environment),
        ({classes: str(tmp_path / "blank.txt")}, PHOTOS, "line 2 is blank", {}),
        ({classes: "nolist"}, PHOTOS, "neither a file nor a shipped class list", {}),
        ({config: "nosuch"}, PHOTOS, "neither a file nor a shipped config", {}),
        ({config: str(tmp_path / "no-weights.yaml")}, PHOTOS, "is not in the cache", offline),
        ({config: str(tmp_path / "no-codec.yaml")}, PHOTOS, "unknown mask_codec 'jpeg'; known: coco-rle, png", {}),
        ({"--format": "zip"}, PHOTOS, "input.format: Input should be 'auto', 'images', 'list'", {}),
        ({"--exclude": "*"}, PHOTOS, "no images found in", {}),
        ({"--storage-option": "anon"}, PHOTOS, "expects KEY=VALUE", {}),
        ({"--output": str(tmp_path / "full")}, PHOTOS, "is not empty and not a run folder", {}),
        ({"--actors": "99"}, PHOTOS, "99 actors with 0.5 CPU each", {}),
    ]
    for changed, corpus, message, environment in cases:
        command = label_command({"--output": str(output)} | settings | changed, str(corpus))
        run = cliper if "--actors" in changed else cliper_here  # the only one that starts Ray
        done = run(*command, **environment)
        assert done.returncode == 2, (command, done.stderr)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        steps = ("left out  ", "4 images in ", "starting Ray on this machine", "reserving actors")
        messages = [line for line in done.stderr.splitlines() if not line.startswith(steps)]
        assert len(messages) == 1, done.stderr
        assert messages[0].startswith("cliper: ")
    assert not list(output.glob("labels/*"))
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["thesis.tex"]
