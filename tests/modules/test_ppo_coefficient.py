"""PPO resumed with another weight of its KL, which counts from the next round on."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ft import LoRA
from lightning_ft.functional.kl_estimators import adapted
from tests.modules.ppo_jobs import play, ppo
from tests.modules.rollouts import Watch, fit, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("ppo"))


@pytest.mark.parametrize("kl", ["reward", "loss"])
@pytest.mark.parametrize(("before", "now"), [(0.05, 0.5), (0.0, 0.5), (0.05, 0.0)])
def test_a_resumed_run_takes_a_new_beta_from_its_next_round_on(
    job: Path, tmp_path: Path, kl: str, before: float, now: float
) -> None:
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    given = {"kl": kl, "watch_kl": True}  # without a reference in the checkpoint a KL to it is refused
    play(job, tmp_path, LoRA(r=4), save, beta=before, options={"max_epochs": 1, "enable_checkpointing": True}, **given)
    module, rows = ppo(job, tmp_path, beta=now, **given)
    watch = Watch()
    fit(tmp_path, module, rows, LoRA(r=4), watch, ckpt_path=tmp_path / "saved/step=2.ckpt")
    assert [round.facts["kl_coefficient"] for round in watch.rounds] == [before, now]
    if now and kl == "loss":
        last = watch.logged[-1]
        parts = last["train/policy"] + 0.1 * last["train/value"] + now * last["train/kl_loss"]
        assert last["train/loss"] == pytest.approx(parts, rel=1e-5)


def test_a_resumed_run_that_had_no_kl_moves_the_beta_that_it_is_given(job: Path, tmp_path: Path) -> None:
    """A coefficient of 0 would stay 0 whatever it is multiplied with."""
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=4)
    options = {"max_epochs": 1, "enable_checkpointing": True}
    play(job, tmp_path, LoRA(r=4), save, beta=0.0, watch_kl=True, options=options)
    module, rows = ppo(job, tmp_path, beta=0.2, kl_target=0.01, kl_horizon=50.0)
    watch = Watch()
    fit(tmp_path, module, rows, LoRA(r=4), watch, max_epochs=3, ckpt_path=tmp_path / "saved/step=4.ckpt")
    first, second = (round.facts for round in watch.rounds)
    assert first["kl_coefficient"] == 0.2
    moved = adapted(0.2, first["kl"], target=0.01, horizon=50.0, steps=12)
    assert second["kl_coefficient"] == pytest.approx(moved) and moved != 0.2
