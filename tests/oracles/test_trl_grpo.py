"""TRL's GRPOTrainer as oracle: it is given the answers that our run wrote, and must find the same losses and gradients.

A random fp32 Llama, LoRA factors (B not zero) that reach PEFT through our own export, two rounds of two passes each, so that the
second step of a round has ratios other than 1, some of them clipped; plain SGD, since AdamW's first steps are the signs of
gradients and so of rounding errors. TRL pads and reads a prompt for each of its answers; we pack and read it once.
Rewards, advantages, old and reference log-probabilities are computed by each side itself.
"""

import json

import pytest
import torch

from benchmarks.random_model import write_model
from tests.modules.rollouts import Watch, sevens
from tests.oracles.test_trl_sft import plain_name
from tests.tolerances import TOL

# TRL, PEFT and transformers warn about one another; this test is about their numbers.
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS, SAMPLES, NEW, RATE, RANK, ALPHA, ROUNDS, PASSES = 4, 4, 7, 4.0, 4, 8, 2, 2
CASES = {
    "grpo": (
        {"loss": "grpo", "beta": 0.1, "correct_kl": False},
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    ),
    "dr_grpo": ({"loss": "dr_grpo", "scale": "none"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": ({"loss": "dapo", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": (
        {"loss": "bnpo", "clip_both": 1.25, "scale": "batch"},
        {"loss_type": "bnpo", "delta": 1.25, "scale_rewards": "batch"},
    ),
    "cispo": ({"loss": "cispo", "cispo_most": 1.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "gspo": (
        {"loss": "grpo", "importance": "sequence", "clip_low": 0.02, "clip_high": 0.03},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    "temperature": (
        {"loss": "dapo", "temperature": 0.7, "beta": 0.2},
        {"loss_type": "dapo", "temperature": 0.7, "beta": 0.2},
    ),
}


def lines():
    return [{"prompt": f"tell {n} " + "more " * (n % 3)} for n in range(PROMPTS * ROUNDS)]


def reward(completions, **columns):
    return sevens(completions)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with ``model``, ``prompts.jsonl`` and ``adapter``, the last written by our PEFT export."""
    from transformers import AutoModelForCausalLM

    from lightning_ft.formats.peft import export_peft
    from lightning_ft.nn.lora import LoRAConfig, inject_lora

    folder = tmp_path_factory.mktemp("trl_grpo")
    write_model(folder / "model", initializer_range=0.1)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    inject_lora(model, LoRAConfig(r=RANK, alpha=ALPHA))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    export_peft(model, folder / "adapter")
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def ours(case, files, tmp_path_factory):
    """What our run wrote and found."""
    from lightning import Trainer

    from lightning_ft import GRPO, LoRA, PromptData

    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=ROUNDS,
        callbacks=[LoRA(r=RANK, alpha=ALPHA, init_from=str(files / "adapter")), watch],
        default_root_dir=tmp_path_factory.mktemp("ours"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = GRPO(
        str(files / "model"),
        rewards={"sevens": reward},
        samples=SAMPLES,
        max_new_tokens=NEW,
        drop_without_signal=False,
        lr=RATE,
        optimizer=torch.optim.SGD,
        warmup_steps=0,
        schedule="constant",
        base_dtype="float32",
        **CASES[case][0],
    )
    data = PromptData(
        str(files / "prompts.jsonl"),
        prompts=PROMPTS,
        passes=PASSES,
        batch_size=PROMPTS * SAMPLES,
        shuffle=False,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )
    trainer.fit(module, datamodule=data)
    assert all(batch.shared for batch in watch.batches), "prompts were not shared"
    return watch


@pytest.fixture(scope="module")
def theirs(case, files, ours, tmp_path_factory):
    """What TRL found with the same answers."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seen = {"losses": [], "gradients": [], "logged": []}
    rounds = iter(ours.rounds)

    class Recording(GRPOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            seen["losses"].append(loss.item())
            return loss

        def log(self, logs, *args, **kwargs):
            seen["logged"].append({name: values[-1] for name, values in self._metrics["train"].items()})
            super().log(logs, *args, **kwargs)

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            seen["gradients"].append({plain_name(name): p.grad.clone() for name, p in trained})

    def written(prompts, trainer):
        round = next(rounds)
        assert prompts == [prompt.given for prompt in round.prompts for _ in range(SAMPLES)], "other prompts"
        ids = [list(answer.ids) for answer in round.answers]
        asked = [list(prompt.ids) for prompt in round.prompts for _ in range(SAMPLES)]
        return {"prompt_ids": asked, "completion_ids": ids, "logprobs": [[0.0] * len(one) for one in ids]}

    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    config = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("out")),
        use_cpu=True,
        bf16=False,
        num_generations=SAMPLES,
        max_completion_length=NEW,
        num_iterations=PASSES,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_steps=ROUNDS * PASSES,
        learning_rate=RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **{"temperature": 1.0, **CASES[case][1]},
    )
    trainer = Recording(
        model=PeftModel.from_pretrained(base, files / "adapter", is_trainable=True),
        reward_funcs=[reward],
        args=config,
        train_dataset=Dataset.from_list(lines()),
        processing_class=AutoTokenizer.from_pretrained(files / "model"),
        callbacks=[Gradients()],
        rollout_func=written,
    )
    trainer.train()
    return seen


def test_same_losses(ours, theirs):
    assert len(ours.losses) == len(theirs["losses"]) == ROUNDS * PASSES
    for step, (mine, loss) in enumerate(zip(ours.losses, theirs["losses"], strict=True)):
        # Later steps start from weights that AdamW has made of gradients that agree to rounding.
        assert mine == pytest.approx(loss, abs=TOL[torch.float32] * (1 + 9 * (step > 0))), step
    assert len({round(loss, 3) for loss in theirs["losses"]}) > 2, "losses that do not move prove nothing"


def test_same_lora_gradients(ours, theirs):
    for step, expected in enumerate(theirs["gradients"]):
        found = {plain_name(name): gradient for name, gradient in ours.gradients[step].items()}
        assert found.keys() == expected.keys() and len(expected) == 2 * 2 * 7
        assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
        for name, gradient in expected.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=0, atol=TOL[torch.float32] * (1 + 9 * (step > 0)), msg=f"{step} {name}"
            )


def test_same_numbers_logged(ours, theirs, case):
    same = {"entropy": "entropy"}
    same |= {} if case == "cispo" else {"clipped_low": "clip_ratio/low_mean", "clipped_high": "clip_ratio/high_mean"}
    if case == "gspo":  # they count answers, we count tokens
        same = {"entropy": "entropy"}
    clipped = 0.0
    for mine, logged in zip(ours.logged, theirs["logged"][: ROUNDS * PASSES], strict=True):
        for name, of in same.items():
            assert mine[f"train/{name}"] == pytest.approx(logged[of], abs=1e-4), name
        clipped += mine["train/clipped_low"] + mine["train/clipped_high"]
    assert clipped > 0, "nothing was clipped"
    for number, round in enumerate(ours.rounds):
        logged = theirs["logged"][number * PASSES]
        assert round.facts["reward"] == pytest.approx(logged["reward"], abs=1e-5)
        assert round.facts["length"] == pytest.approx(logged["completions/mean_length"], abs=1e-5)
        assert round.facts["truncated"] == pytest.approx(logged["completions/clipped_ratio"], abs=1e-5)
        assert round.facts["without_signal"] == pytest.approx(logged["frac_reward_zero_std"], abs=1e-5)
