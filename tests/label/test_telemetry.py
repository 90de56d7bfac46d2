"""The metrics of a real run, scraped from Ray's endpoint."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from cliper.pipeline.telemetry import METRICS, record, timed
from tests.conftest import ROOT
from tests.support.fakes import Fragile, write_corpus

DASHBOARD = ROOT / "configs" / "grafana" / "cliper.json"
IMAGES, BROKEN = 30, 5


def scrape(address: str) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """Name to {value of the metric's tag: sum over processes}; and name to the labels of its samples."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    labels: dict[str, list[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            _, key, _ = METRICS.get(sample.name.removeprefix("ray_"), ("", "", ""))
            sums = found.setdefault(sample.name, {})
            tag = sample.labels.get(key, "")
            sums[tag] = sums.get(tag, 0.0) + sample.value
            labels[sample.name] = sorted(sample.labels)
    return found, labels


def run_and_scrape(folder: Path) -> dict[str, Any]:
    """Label `folder`/images on a Ray started by this process; return the metrics once all images are counted."""
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
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found, labels = scrape(address)
        all_stages = len(found.get("ray_cliper_stage_seconds_total", {})) == 5
        if sum(found.get("ray_cliper_images_total", {}).values()) == job.manifest.images and all_stages:
            break
        time.sleep(1)
    ray.shutdown()
    return {
        "shards": len(summaries),
        "bytes": sum(s["bytes"] for s in summaries),
        "metrics": found,
        "labels": labels,
    }


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Scrape in a separate process: this one may have a Ray already, with the metrics of other tests."""
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


def test_the_metrics_count_the_run(scraped: dict[str, Any]) -> None:
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


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector of a parsed PromQL expression."""
    if type(node).__name__ == "VectorSelector":
        yield node
    children = [getattr(node, name, None) for name in ("lhs", "rhs", "expr", "vector_selector")]
    for child in [*children, *getattr(node, "args", [])]:
        if child is not None:
            yield from selectors(child)


def aggregations(node: Any) -> Iterator[Any]:
    """Every `by (...)` of a parsed PromQL expression, with the aggregated expression."""
    if type(node).__name__ == "AggregateExpr" and node.modifier is not None:
        yield node
    children = [getattr(node, name, None) for name in ("lhs", "rhs", "expr")]
    for child in [*children, *getattr(node, "args", [])]:
        if child is not None:
            yield from aggregations(child)


RULES = ROOT / "configs" / "cluster" / "alerts.yaml"
VARIABLES = {"$__rate_interval": "5m", "$session": ".*", "$run": ".*"}


def test_every_expression_is_promql_over_what_is_scraped(scraped: dict[str, Any]) -> None:
    """Dashboard and alerts: each metric and label that they name is in the scrape, or is only on GPU nodes."""
    import promql_parser
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    only_on_gpus = {
        "ray_cliper_device_memory_bytes": ["NodeAddress", "SessionName", "kind", "run"],
        "ray_node_gpus_utilization": ["SessionName"],
    }
    assert {name.removeprefix("ray_") for name in only_on_gpus} <= {*METRICS, *METRICS_GAUGES}
    labels = scraped["labels"] | only_on_gpus
    rules = [
        rule["expr"] for group in yaml.safe_load(RULES.read_text())["spec"]["groups"] for rule in group["rules"]
    ]
    panels = [text for text in expressions(json.loads(DASHBOARD.read_text())) if "label_values" not in text]
    assert len(panels) > 10
    named = set()
    for text in [*rules, *panels]:
        parsed = promql_parser.parse(reduce(lambda done, pair: done.replace(*pair), VARIABLES.items(), text))
        for found in selectors(parsed):
            named.add(found.name)
            assert found.name in labels, text
            assert {matcher.name for matcher in found.matchers.matchers} <= set(labels[found.name]), text
        for grouped in aggregations(parsed):
            known = {label for found in selectors(grouped) for label in labels[found.name]}
            assert set(grouped.modifier.labels) <= known, text
    assert {f"ray_{name}" for name in METRICS} <= named
    assert all("run" in labels[f"ray_{name}"] for name in METRICS)


def test_time_is_recorded_even_if_the_work_raises_and_nothing_outside_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, str]] = []
    recorder = "cliper.pipeline.telemetry.record"
    monkeypatch.setattr(recorder, lambda name, value, run, tag="": seen.append((name, run, tag)))
    with pytest.raises(ValueError, match="broken"), timed("decode", "runs/a"):
        raise ValueError("broken")
    assert seen == [("cliper_stage_seconds_total", "runs/a", "decode")]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    record("cliper_shards_total", 1, "runs/a")


if __name__ == "__main__":
    print(json.dumps(run_and_scrape(Path(sys.argv[1]))))
