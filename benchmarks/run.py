"""All measurements, one table, and build/bench.json.

    python -m benchmarks.run            everything this machine allows: tens of minutes on two cores
    python -m benchmarks.run --quick    small corpora, ViT-B/16 without FGC

Every measurement runs in its own process, one after the other. A failed measurement is a row with its error.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import machine

OUTPUT = Path("build/bench.json")


def child(module: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark module; its JSON, or {"error": ...}."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    print("+", " ".join(command[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1]}
    content: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return content


def model_runs(quick: bool, cuda: bool) -> list[dict[str, Any]]:
    """Run the model benchmarks on the CPU and, if there is one, on the GPU, both sides in turn."""
    cases = [("B/16", False)] if quick else [("B/16", False), ("B/16", True), ("L/14", False), ("L/14", True)]
    settings = [("cpu", "float32", "exact", 1), ("cpu", "bfloat16", "fast", 1)]
    if cuda:
        settings += [
            ("cuda", "float16", "exact", 8),
            ("cuda", "float16", "fast", 8),
            ("cuda", "float32", "exact", 8),
        ]
    runs: list[dict[str, Any]] = []
    for name, fgc in cases:
        for device, dtype, preset, batch in settings:
            options = ["--name", name, "--device", device, "--dtype", dtype, "--preset", preset]
            options += ["--batch", str(batch), "--repeats", "10" if device == "cuda" else "3"]
            options += ["--fgc"] if fgc else []
            if device == "cpu" and preset == "fast":  # compared with the official order as it is run: in float32
                result = runs[-1]["result"] | child("model", *options, "--side", "ours")
            else:
                result = child("model", *options)
            case = f"{name}{' + FGC' if fgc else ''}"
            runs.append({"case": case, "device": device, "dtype": dtype, "preset": preset, "result": result})
    return runs


def model_table(runs: list[dict[str, Any]]) -> list[str]:
    """One row per stage: both times, their ratio, both peaks, their ratio."""
    head = ["model", "device", "stage", "official s", "ours s", "ratio", "official MB", "ours MB", "ratio"]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for run in runs:
        where = f"{run['device']} {run['dtype']} {run['preset']}"
        if "error" in run["result"]:
            rows.append(f"| {run['case']} | {where} | failed: {run['result']['error']} | | | | | | |")
            continue
        official, ours = run["result"]["official"], run["result"]["ours"]
        for stage in official:
            (s, b), (t, c) = ((side[stage]["seconds"], side[stage]["bytes"] / 1e6) for side in (official, ours))
            memory = f"{b:.0f} | {c:.0f} | {b / c:.1f}x" if c >= 1 else f"{b:.0f} | {c:.0f} | "
            rows.append(f"| {run['case']} | {where} | {stage} | {s:.4f} | {t:.4f} | {s / t:.1f}x | {memory} |")
    return rows


def other_table(results: dict[str, Any]) -> list[str]:
    """All other measurements, one value per row."""
    rows = ["| measurement | value |", "|---|---|"]
    for section, content in results.items():
        rows += [f"| {section} {name} | {value} |" for name, value in _leaves(content)]
    return rows


def _leaves(content: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(content, dict):
        return [leaf for key, value in content.items() for leaf in _leaves(value, f"{path} {key}".strip())]
    return [(path, f"{content:.4g}" if isinstance(content, float) else str(content))]


def main() -> None:
    """Measure, print the table, write build/bench.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    import torch

    cuda = torch.cuda.is_available()
    small = ["--images", "200", "--rows", "100000", "--curve", "500"] if args.quick else []
    about, models = machine(), model_runs(args.quick, cuda)
    others: dict[str, Any] = {"input": child("inputs"), "flow": child("flow", *small), "presets": child("presets")}
    others["listing"] = child("listing", "--keys", "100000" if args.quick else "1000000")
    if not args.quick:
        where = ["--device", "cuda", "--dtype", "float16"] if cuda else ["--batch", "1"]
        others["floor"] = child("ceilings", *where)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps({"machine": about, "model": models, "other": others}, indent=2))
    print("\n".join([json.dumps(about), "", *model_table(models), "", *other_table(others)]))


if __name__ == "__main__":
    main()
