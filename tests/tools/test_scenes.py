import numpy as np

from tools.scene_stuff import STUFF
from tools.scenes import CLASSES, SEEDS, classes_in, make_scene, make_scenes


def test_a_scene_depends_on_seed_and_index_alone():
    first, again, other = make_scene(7, 3), make_scenes(7, [0, 3])[1], make_scene(8, 3)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert first.caption == again.caption
    assert not np.array_equal(first.image, other.image)


def test_the_caption_names_what_is_visible_and_nothing_else():
    for scene in make_scenes(11, range(12)):
        sizes = np.bincount(scene.labels.ravel(), minlength=len(CLASSES) + 1)
        visible = {k for k in range(len(CLASSES)) if sizes[k + 1] >= 0.005 * scene.labels.size}
        assert set(classes_in(scene.caption)) == visible
        assert sizes[0] == 0


def test_scenes_vary_and_every_class_occurs():
    scenes = make_scenes(12, range(40))
    seen = set(np.unique(np.concatenate([np.unique(scene.labels) for scene in scenes])).tolist())
    assert seen == set(range(1, len(CLASSES) + 1))
    brightness = [scene.image.mean() for scene in scenes]
    assert max(brightness) - min(brightness) > 40
    things = [len([k for k in np.unique(scene.labels) if k > len(STUFF)]) for scene in scenes]
    assert min(things) == 2
    assert max(things) == 4


def test_no_class_name_hides_in_another():
    for name in CLASSES:
        assert classes_in(f"a photo of a {name}.") == [CLASSES.index(name)]


def test_seeds_of_training_validation_and_test_differ():
    assert len(set(SEEDS.values())) == 3
