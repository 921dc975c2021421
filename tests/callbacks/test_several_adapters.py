"""Several adapters of one run: which of them a checkpoint computes with, and how much of each."""

import torch

import lightning_ft
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.nn.adapters import active_adapters, set_adapters
from tests.contract.subjects import chat_job, trainer

WEIGHTS = {"a": 0.7, "b": -0.3}


def test_a_checkpoint_keeps_the_combination_and_gives_it_to_what_loads_or_resumes_it(chat, tmp_path):
    def job(folder):
        module, data = chat_job(chat, folder, model={"lr": 0.05})
        return module, data, trainer(folder, LoRA(2, name="a"), LoRA(2, target=["q_proj"], name="b"), max_steps=2)

    module, data, run = job(tmp_path)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "both.ckpt")
    set_adapters(module, WEIGHTS)
    run.save_checkpoint(tmp_path / "weighted.ckpt")
    set_adapters(module, {"b": 1.0})
    run.save_checkpoint(tmp_path / "b.ckpt")
    ids = torch.randint(4, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    seen = {}
    for name, weights in (("both", {"a": 1.0, "b": 1.0}), ("weighted", WEIGHTS), ("b", {"a": 0.0, "b": 1.0})):
        set_adapters(module, weights)
        seen[name] = module.model.eval()(ids).logits
        loaded = lightning_ft.load(tmp_path / f"{name}.ckpt")
        assert active_adapters(loaded) == weights
        assert torch.equal(loaded.model(ids).logits, seen[name])
    assert not torch.allclose(seen["both"], seen["weighted"]) and not torch.allclose(seen["b"], seen["weighted"])
    (tmp_path / "again").mkdir()
    again, data, run = job(tmp_path / "again")
    run.validate(again, data, ckpt_path=tmp_path / "weighted.ckpt", verbose=False)
    assert active_adapters(again) == WEIGHTS
    resumed, data, run = job(tmp_path / "again")
    run.fit_loop.epoch_loop.max_steps = 3
    run.fit(resumed, data, ckpt_path=tmp_path / "weighted.ckpt")
    assert run.global_step == 3 and active_adapters(resumed) == WEIGHTS
    old = torch.load(tmp_path / "both.ckpt", weights_only=True)
    del old["lightning_ft"]["adapters"]  # of a version that did not say
    torch.save(old, tmp_path / "old.ckpt")
    assert active_adapters(lightning_ft.load(tmp_path / "old.ckpt")) == {"a": 1.0, "b": 1.0}
