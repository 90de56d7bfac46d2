"""The command in its own process: exit codes, output, and interruptions."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from tests.conftest import PHOTOS, ROOT, S3Server
from tests.support.fakes import write_corpus

CLIPER = str(Path(sys.executable).parent / "cliper")


def cliper(*arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CLIPER, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | environment,
    )


def label_command(settings: dict[str, str], corpus: str | Path, output: str | Path = "", *more: str) -> list[str]:
    given = {"--output": str(output)} | settings
    return ["label", "--input", str(corpus), *(part for pair in given.items() for part in pair), *more]


def all_rows(output: Path) -> list[dict[str, object]]:
    return [row for path in sorted((output / "labels").iterdir()) for row in pq.read_table(path).to_pylist()]


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
    done = cliper(*label_command(settings, PHOTOS, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"labeled   4 images in [\d.]+ s", done.stdout)
    assert "failed    0" in done.stdout
    first, *lines = done.stderr.splitlines()
    assert first == "left out  1 .md: not an image's ending"
    for told in (
        "4 images in ",
        "starting 1 actor, each ",
        "1 actor ready: ",
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

    again = cliper(*label_command(settings, PHOTOS, tmp_path / "run"))
    assert "4 images in 1 shards, 4 of them done" in again.stderr
    other = cliper(*label_command(settings, PHOTOS, tmp_path / "run", "--batch-size", "3"))
    assert other.returncode == 2
    assert "belongs to a run with other settings: model.batch_size was 8, is now 3" in other.stderr


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [CLIPER, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_shards(output: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Wait until `count` shards are committed or the process has ended."""
    while process.poll() is None and len(list((output / "labels").glob("shard-*"))) < count:
        time.sleep(0.02)


def test_killed_three_times_and_resumed_equals_uninterrupted(settings: dict[str, str], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 80, broken_each=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cliper(*label_command(settings, corpus, whole)).returncode == 0
    points = sorted(random.Random(time.time_ns()).sample(range(1, 20), 3))
    for point in points:
        process = started(label_command(settings, corpus, killed))
        wait_for_shards(killed, point, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = cliper(*label_command(settings, corpus, killed))
    assert done.returncode == 0, done.stderr
    assert all_rows(killed) == all_rows(whole), f"killed at {points} shards"
    assert len(all_rows(whole)) == 80


def test_ctrl_c_stops_cleanly_and_continues(settings: dict[str, str], tmp_path: Path) -> None:
    corpus, output = tmp_path / "corpus", tmp_path / "run"
    write_corpus(corpus, 120)
    process = started(label_command(settings, corpus, output))
    wait_for_shards(output, 1, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert f"stopped; the same command continues {output}" in stderr
    assert "Traceback" not in stderr
    assert cliper(*label_command(settings, corpus, output)).returncode == 0
    assert len({row["image_id"] for row in all_rows(output)}) == 120


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
        done = cliper(*command, **environment)
        assert done.returncode == 2, (command, done.stderr)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        steps = ("left out  ", "4 images in ", "starting Ray on this machine", "reserving actors")
        messages = [line for line in done.stderr.splitlines() if not line.startswith(steps)]
        assert len(messages) == 1, done.stderr
        assert messages[0].startswith("cliper: ")
    assert not list(output.glob("labels/*"))
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["thesis.tex"]
