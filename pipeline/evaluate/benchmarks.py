"""Benchmark settings: one YAML per benchmark and backbone, with variants and the published results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from cliper.model.config import CLIPerConfig, Settings
from cliper.model.errors import ConfigError
from cliper.pipeline.config import JobConfig, find, read_yaml, shipped, suggest, validate
from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.registry import DATASETS


class BenchmarkConfig(Settings):
    """Settings of a benchmark.

    `backbone`: its name in tables. `protocol`: how labels are decided and the mean is taken; see metrics.
    `classes`: a shipped class list. `truth`: the form of ground truth it was published with, if it has several.
    `segmenter` and `model`: as in a labeling config. `variants`: changes to `model`, by name. `published_miou`:
    percent, by variant.
    """

    benchmark: str
    backbone: str
    protocol: Literal["cliper", "mmseg"]
    classes: str
    truth: str | None = None
    segmenter: str = "cliper"
    model: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    published_miou: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> "BenchmarkConfig":
        if self.benchmark not in DATASETS:
            raise ValueError(f"unknown benchmark '{self.benchmark}'; {suggest(self.benchmark, DATASETS)}")
        if self.truth is not None and self.truth not in DATASETS[self.benchmark].truths:
            raise ValueError(f"truth must be one of: {', '.join(DATASETS[self.benchmark].truths)}")
        unknown = set(self.published_miou) - set(self.variants)
        if unknown:
            raise ValueError(f"published_miou names '{min(unknown)}', which is no variant")
        return self

    def job(self, variant: str, source: str = "") -> JobConfig:
        """The labeling job of a variant; `source` begins the message about a wrong setting.

        Raises EvaluationError for an unknown variant, ConfigError for its settings.
        """
        if variant not in self.variants:
            raise EvaluationError(f"unknown variant '{variant}'; {suggest(variant, self.variants, 'allowed')}")
        content = {"segmenter": self.segmenter, "model": merged(self.model, self.variants[variant])}
        return validate(JobConfig, content, f"{source}variant '{variant}'")

    def settings(self, variant: str) -> CLIPerConfig:
        """CLIPer's settings in a variant. Raises as `job` does, and ConfigError for another segmenter."""
        return self.job(variant).cliper


def load_benchmark(name: str) -> BenchmarkConfig:
    """Read a YAML file or a shipped benchmark config by name. Raises ConfigError."""
    path = find("benchmarks", name)
    config = validate(BenchmarkConfig, read_yaml(path), str(path))
    for variant in config.variants:
        model = config.job(variant, f"{path}, ").model
        if isinstance(model, CLIPerConfig) and model.labels.protocol != config.protocol:
            raise ConfigError(
                f"{path}: protocol is '{config.protocol}', but labels.protocol '{model.labels.protocol}' in "
                f"variant '{variant}'; they must be the same"
            )
    return config


def shipped_benchmarks() -> Iterator[tuple[str, Path]]:
    """Names and files of the shipped benchmark configs."""
    yield from shipped("benchmarks").items()


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` updated with `changes`: mappings are merged key by key, everything else is replaced."""
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result
