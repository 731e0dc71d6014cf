from dataclasses import replace

import pytest

from raekit.data.loader import DataConfig
from raekit.errors import UserError
from raekit.recipes import find
from raekit.stages.evaluation import EvaluationConfig
from raekit.stages.generation import GenerationConfig
from raekit.stages.reconstruction import ReconstructionConfig
from raekit.stages.scaling import for_steps, steps_of
from raekit.stages.selection import SelectionConfig


def test_every_number_of_steps_is_scaled_and_nothing_else():
    config = find("emoji_decoder_gan").config
    assert isinstance(config, ReconstructionConfig)
    config = replace(config, selection=SelectionConfig(every=100))
    steps = config.train.steps
    double = for_steps(config, 2 * steps)
    assert double.adversarial
    assert config.adversarial
    assert double.train == replace(config.train, steps=2 * steps, checkpoint_every=2 * config.train.checkpoint_every)
    assert double.optim.decay_end == 2 * config.optim.decay_end
    assert double.adversarial.optim.decay_end == 2 * config.adversarial.optim.decay_end
    assert double.adversarial.start == 2 * config.adversarial.start
    assert double.adversarial.discriminator_start == 2 * config.adversarial.discriminator_start
    assert double.perceptual == replace(config.perceptual, start=2 * config.perceptual.start)  # type: ignore[union-attr, type-var]
    assert double.selection == SelectionConfig(every=200)
    assert for_steps(double, steps) == config
    assert for_steps(config, 3).train.checkpoint_every == 1
    kept = replace(config, train=replace(config.train, milestones=(1, 100)))
    assert for_steps(kept, 2 * steps).train.milestones == (2, 200)
    assert for_steps(kept, 3).train.milestones[0] == 1


def test_a_schedule_that_is_longer_than_the_training_keeps_its_shape():
    config = find("dit_dh_b_dinov2b_256").config
    assert isinstance(config, GenerationConfig)
    short = for_steps(replace(config, evaluation=EvaluationConfig(every=1251)), 8000)
    assert (short.train.steps, short.optim.decay_end, short.optim.warmup_steps) == (8000, 80_000, 4000)
    assert short.evaluation == EvaluationConfig(every=100)


def test_epochs_are_passes_over_the_split(images):
    config = find("emoji_encoder").config
    config = replace(config, data=DataConfig(source=images, image_size=64), train=replace(config.train, batch_size=8))
    assert steps_of(config, 4) == 15
    assert steps_of(config, 0.01) == 1
    assert steps_of(replace(config, data=replace(config.data, split="heldout")), 8) == 9
    named = replace(config.data, splits="train=val,heldout=train")
    assert steps_of(replace(config, data=named), 8) == 9
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"--epochs: .* must be positive"):
            steps_of(config, wrong)
