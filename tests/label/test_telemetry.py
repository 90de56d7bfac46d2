"""A real run on a real Ray, and what its metrics endpoint says about it."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cliper.pipeline.telemetry import METRICS, timed
from tests.conftest import ROOT
from tests.support.fakes import Fragile, write_corpus

DASHBOARD = ROOT / "configs" / "grafana" / "cliper.json"
IMAGES, BROKEN = 30, 5


def scrape(address: str) -> dict[str, dict[str, float]]:
    """Name to {value of its own tag: sum over processes}."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            _, key, _ = METRICS.get(sample.name.removeprefix("ray_"), ("", "", ""))
            sums = found.setdefault(sample.name, {})
            tag = sample.labels.get(key, "")
            sums[tag] = sums.get(tag, 0.0) + sample.value
    return found


def run_and_scrape(folder: Path) -> dict[str, Any]:
    """Label `folder`/images on a Ray of this process's own; return the metrics once all images are counted."""
    import ray

    from cliper.pipeline.flow import label_corpus
    from cliper.pipeline.label.pool import Pool
    from tests.support.jobs import fake_job, tasks_of

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200_000_000,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    job = fake_job(str(folder / "images"), str(folder / "run"), make=Fragile, shard={"images": 8})
    summaries = list(label_corpus(job, tasks_of(job), Pool(1, 1, 0)))
    node = ray.nodes()[0]
    address = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    found: dict[str, dict[str, float]] = {}
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = scrape(address)
        all_stages = len(found.get("ray_cliper_stage_seconds_total", {})) == 5
        if sum(found.get("ray_cliper_images_total", {}).values()) == job.manifest.images and all_stages:
            break
        time.sleep(1)
    ray.shutdown()
    return {"shards": len(summaries), "bytes": sum(s["bytes"] for s in summaries), "metrics": found}


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own: this one may have a Ray already, with the metrics of other tests."""
    folder = tmp_path_factory.mktemp("telemetry")
    write_corpus(folder / "images", IMAGES, broken_each=1)
    (folder / "images" / "part0" / "raise.jpg").write_bytes((folder / "images/part0/photo-00000.jpg").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "tests.label.test_telemetry", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_endpoint_tells_what_the_run_did(scraped: dict[str, Any]) -> None:
    metrics = scraped["metrics"]
    assert metrics["ray_cliper_images_total"] == {"ok": IMAGES - BROKEN, "failed": BROKEN + 1}
    causes = {"empty": 1, "not_an_image": 1, "corrupt": 1, "oversized": 1, "unsupported": 1, "RuntimeError": 1}
    assert metrics["ray_cliper_failures_total"] == causes
    assert metrics["ray_cliper_shards_total"] == {"": scraped["shards"]}
    assert metrics["ray_cliper_written_bytes_total"] == {"": scraped["bytes"]}
    seconds = metrics["ray_cliper_stage_seconds_total"]
    assert set(seconds) == {"load", "decode", "segment", "encode", "write"}
    assert all(value > 0 for value in seconds.values())


def expressions(node: Any) -> Iterator[str]:
    """Every PromQL text of a dashboard: targets, and queries of its variables."""
    if isinstance(node, dict):
        yield from (node[key] for key in ("expr", "definition") if isinstance(node.get(key), str))
        yield from (text for value in node.values() for text in expressions(value))
    if isinstance(node, list):
        yield from (text for value in node for text in expressions(value))


def test_the_dashboard_names_metrics_that_exist(scraped: dict[str, Any]) -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    on_gpu_nodes = {"ray_cliper_device_memory_bytes", "ray_node_gpus_utilization"}
    declared = {f"ray_{name}" for name in (*METRICS, *METRICS_GAUGES)}
    assert on_gpu_nodes <= declared
    found = list(expressions(json.loads(DASHBOARD.read_text())))
    assert len(found) > 10
    named = {name for text in found for name in re.findall(r"\bray_\w+", text)}
    assert named <= set(scraped["metrics"]) | on_gpu_nodes
    assert {f"ray_{name}" for name in METRICS} <= named
    for text in found:
        assert text.count("(") == text.count(")")
        for key in re.findall(r"by \((\w+)\)", text):
            name = re.search(r"ray_(cliper_\w+)", text)
            assert name is not None
            assert METRICS[name[1]][1] in (key, ""), text


def test_time_is_recorded_even_if_the_work_raises_and_nothing_outside_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, str]] = []
    record = "cliper.pipeline.telemetry.record"
    monkeypatch.setattr(record, lambda name, value, run, tag="": seen.append((name, run, tag)))
    with pytest.raises(ValueError, match="broken"), timed("decode", "runs/a"):
        raise ValueError("broken")
    assert seen == [("cliper_stage_seconds_total", "runs/a", "decode")]
    monkeypatch.setitem(sys.modules, "ray", None)
    record("cliper_shards_total", 1, "runs/a")


if __name__ == "__main__":
    print(json.dumps(run_and_scrape(Path(sys.argv[1]))))
