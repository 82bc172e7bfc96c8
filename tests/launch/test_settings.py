"""What decides a run's result is in its identity, and a run is not continued under another one."""

from pathlib import Path

import pytest
import torch.distributed
from settings import TokenizerTraining, identity_of

from shodh.config import ConfigError, load_config
from shodh.training.checkpoint import write_checkpoint
from shodh.training.run import train_resumably
from shodh.training.tracking import StepSize, TrackingConfig

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "train_tokenizer" / "debug.yaml"


class NeverCalled:
    def begin_step(self, step: int) -> None:
        raise AssertionError

    def __call__(self, engine, batch):
        raise AssertionError


@pytest.fixture
def single_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def load(*overrides: str) -> TokenizerTraining:
    return load_config(TokenizerTraining, CONFIG, [*overrides, "engine.zero_stage=0"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("engine.optimizer=adamw", "engine.optimizer=muon"),
        ("engine.optimizer=muon", "engine.optimizer=adamw"),
        ("engine.precision=fp32", "engine.precision=bf16"),
    ],
)
def test_a_run_is_not_continued_with_another_optimizer_or_precision(tmp_path, single_process, old, new):
    run = {"identity": identity_of(load(old)), "record": {"config": {"seed": 0}}}
    kept = write_checkpoint(tmp_path / "checkpoints" / "tokenizer", 3, {"optimizer/step": torch.tensor(3)}, run)
    config = load(new)
    message = rf"another configuration \({old.replace('=', ': ')} -> {new.partition('=')[2]}\)"
    with pytest.raises(ConfigError, match=message) as caught:
        train_resumably(
            None,
            NeverCalled(),
            lambda step: pytest.fail("no batch is drawn"),
            config.loop,
            [],
            folder=tmp_path,
            phase="tokenizer",
            identity=identity_of(config),
            record={},
            checkpoint_interval=1,
            tracking=TrackingConfig(wandb="disabled"),
            step_size=StepSize(1),
        )
    assert "\n" not in str(caught.value) and kept.is_dir()


def test_what_only_changes_the_cost_of_training_does_not_change_a_run_s_identity():
    assert identity_of(load("autoencoder.recompute=true")) == identity_of(load())
    assert identity_of(load("engine.threads_per_rank=2")) == identity_of(load())


@pytest.mark.parametrize(
    ("weights", "accepted"), [("[]", True), ("[1, 2]", True), ("[1, 2, 1]", False), ("[1]", False)]
)
def test_weights_are_one_for_each_domain_or_none(weights, accepted):
    choices = ["domains=[open_channel, porous_media]", f"weights={weights}"]
    if accepted:
        load(*choices)
        return
    with pytest.raises(ConfigError, match="there are 2 domains. Give one for each") as caught:
        load(*choices)
    assert "\n" not in str(caught.value)
