from typing import Any

import numpy as np
import pytest

from raekit.errors import UserError
from raekit.evaluation.labels import draw_labels
from raekit.models.conditioning import same_classes


def counts(labels: list[int], classes: int) -> list[int]:
    return np.bincount(labels, minlength=classes).tolist()


def test_balanced_labels_have_each_class_equally_often_in_an_order_that_depends_on_the_seed():
    labels = draw_labels("balanced", 10, 500, 3, None)
    assert counts(labels, 10) == [50] * 10
    assert labels == draw_labels("balanced", 10, 500, 3, None) != sorted(labels)
    assert labels != draw_labels("balanced", 10, 500, 4, None)
    assert sorted(counts(draw_labels("balanced", 10, 503, 3, None), 10)) == [50] * 7 + [51] * 3


def test_random_labels_are_uniform_and_independent():
    labels = draw_labels("random", 10, 5000, 3, None)
    found = counts(labels, 10)
    assert 400 < min(found) < max(found) < 600
    assert draw_labels("random", 10, 100, 3, None) == labels[:100]


def test_labels_of_the_reference_have_its_proportions():
    assert counts(draw_labels("reference", 3, 100, 0, (5, 0, 15)), 3) == [25, 0, 75]
    assert counts(draw_labels("reference", 3, 10, 0, (1, 1, 1)), 3) in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert counts(draw_labels("reference", 3, 7, 0, (10, 1, 3)), 3) == [5, 1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "has 0 labelled images"),
        ((1, 2), "of 2 classes, but the model has 3"),
        ((0, 0, 0), "has 0 labelled"),
    ],
)
def test_a_reference_of_other_classes_is_rejected(given, message):
    with pytest.raises(UserError, match=message):
        draw_labels("reference", 3, 10, 0, given)


def test_an_unknown_way_to_draw_labels_is_rejected():
    kind: Any = "even"
    with pytest.raises(UserError, match="labels: 'even' is none of balanced, random, reference"):
        draw_labels(kind, 3, 10, 0, None)


def test_names_of_classes_are_compared_where_they_say_something():
    assert same_classes(["a", "b"], ["a", "b"])
    assert not same_classes(["a", "b"], ["b", "a"])
    assert same_classes([], ["a", "b"])
    assert same_classes(["0", "1"], ["a", "b"])
    # ImageNet's folders have the ids of WordNet, and its labels count the sorted ids.
    assert same_classes(["n01440764", "n01443537"], ["tench", "goldfish"])
    assert not same_classes(["n01440764", "n01443537"], ["n01443537", "n01440764"])
    assert not same_classes(["n01440764"], ["tench", "goldfish"])
