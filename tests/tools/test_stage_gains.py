import numpy as np
import pytest

from tools.contact_sheet import COLUMNS, draw_scenes
from tools.scenes import CLASSES, SEEDS, make_scene
from tools.stage_gains import (
    ATTENTION,
    FUSED,
    FUSION,
    STAGES,
    image_counts,
    measure,
    miou,
    summarise,
    table,
    tiny_config,
)

SCENES = 24
MEASURED = ("vanilla q-k", "q-q", "k-k", "v-v", "identity", FUSED, FUSION, "+ FGC (mean)", "+ FGC (chain)")


@pytest.fixture(scope="module")
def gains() -> dict[str, float]:
    counts = measure(tiny_config(), SEEDS["test"], SCENES, "cpu", MEASURED)
    return {row["name"]: row["miou"] for row in summarise(counts)}


def test_miou_of_perfect_and_of_wrong_labels():
    scene = make_scene(SEEDS["validation"], 0)
    assert miou(image_counts(scene, scene.labels)[None]) == 100
    assert miou(image_counts(scene, np.zeros_like(scene.labels))[None]) == 0


def test_plain_attention_is_no_segmenter(gains):
    assert gains["vanilla q-k"] < 20


def test_fused_attention_with_feature_fusion_beats_every_other_attention(gains):
    assert gains[FUSION] > 70
    assert gains[FUSION] > max(gains[stage] for stage in ATTENTION) + 2
    assert gains[FUSION] > gains[FUSED] + 2


def test_fgc_with_the_mean_of_heads_refines(gains):
    assert gains["+ FGC (mean)"] > gains[FUSION] + 2.5


def test_the_order_of_the_refinements(gains):
    assert gains["+ FGC (mean)"] > gains["+ FGC (chain)"] + 0.5
    assert gains["+ FGC (chain)"] > gains[FUSION] + 0.5


def test_the_table_has_a_row_per_stage():
    rows = [{"name": stage, "miou": 1.0, "low": 0.5, "high": 1.5} for stage in STAGES]
    assert len(table(rows).splitlines()) == len(STAGES) + 2


def test_contact_sheet_shows_each_scene_in_four_images():
    sheet = draw_scenes(tiny_config(), count=2, side=64)
    assert sheet.width >= 2 * len(COLUMNS) * 64
    picture = np.asarray(sheet)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert len(CLASSES) == 19
