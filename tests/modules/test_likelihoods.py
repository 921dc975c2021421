"""What each module answers when it is asked for its examples, against transformers' own forward on single rows."""

import pytest
import torch
import torch.nn.functional as F

from lightning_ft import DPO, EWC, KTO, LoRA
from tests.contract.subjects import trainer
from tests.engine.importances import AtTheEnd, loop
from tests.modules import preference, rewards, tasks
from tests.tolerances import TOL


def measured(folder, module, data, *callbacks, labels="empirical"):
    """Importances after one step, in float64."""
    measure = AtTheEnd(labels)
    trainer(folder, *callbacks, measure, max_steps=1, limit_val_batches=0).fit(module, data)
    module.eval()
    return measured_of(measure)


def measured_of(measure):
    assert measure.found is not None and not measure.found.slow - {"model.bert.embeddings.position_embeddings.weight"}
    return measure.found


def single_rows(data, count=1):
    """The training rows, ``count`` segments at a time, padded."""
    data.packing = False
    data.batch_size = count
    return data.in_order()["train"]


def close(found, expected):
    assert found.keys() == expected.keys() and any(v.any() for v in expected.values())
    for name, value in expected.items():
        # Heads of rows and rewards give float32, whatever the model is in.
        tolerance, largest = TOL[torch.float32], max(float(v.max()) for v in expected.values())
        torch.testing.assert_close(
            found[name],
            value,
            rtol=tolerance,
            atol=1e-3 * tolerance * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tasks.write_base(kind, folder / kind) for kind in ("bert", "llama", "t5")}


def of_classes(batch, logits):
    return logits[0].log_softmax(-1)[int(batch.targets)]


def of_tags(batch, logits):
    chosen = logits.reshape(-1, logits.shape[-1])[batch.scored]
    return chosen.log_softmax(-1)[torch.arange(len(chosen)), batch.labels].sum()


def of_bits(batch, logits):
    return -F.binary_cross_entropy_with_logits(logits[0], batch.targets[0].double(), reduction="sum")


def of_numbers(batch, logits):
    return -(logits[0, 0] - batch.targets[0]).square()


@pytest.mark.parametrize(
    ("kind", "task", "of"),
    [
        ("bert", "sequence_classification", of_classes),
        ("llama", "sequence_classification", of_classes),
        ("bert", "token_classification", of_tags),
        ("llama", "multi_label", of_bits),
        ("bert", "regression", of_numbers),
    ],
)
def test_encoders_and_heads(kind, task, of, bases, tmp_path):
    module, data = tasks.job(bases[kind], tmp_path, task, batch_size=5, packing=kind == "llama")
    found = measured(tmp_path, module, data)
    assert found.examples == 32

    def losses():
        for batch in single_rows(data):
            own = module.model(input_ids=batch.ids).logits
            yield of(batch, own)

    close(found.diagonal, loop(module, losses()))


def test_encoder_decoders(bases, tmp_path):
    module, data = tasks.job(bases["t5"], tmp_path, "seq2seq_lm", batch_size=5)
    measure = AtTheEnd("empirical")
    trainer(tmp_path, measure, max_steps=1, limit_val_batches=0).fit(module, data)
    module.eval()
    # The table of relative positions is called with no row of any example.
    assert all("relative_attention_bias" in name for name in measure.found.slow)

    def losses():
        data.batch_size = 1
        for batch in data.in_order()["train"]:
            logits = module.model(input_ids=batch.source.ids, decoder_input_ids=batch.ids).logits
            yield of_tags(batch, logits)

    close(measure.found.diagonal, loop(module, losses()))


@pytest.mark.parametrize("share", [True, False])
def test_pairs_are_asked_for_their_chosen_answers(share, tmp_path):
    job = preference.write_job(tmp_path / "job")
    module, data = preference.dpo(job, tmp_path, data={"share_prompts": share, "batch_size": 5})
    found = measured(tmp_path, module, data, LoRA(2))
    assert found.examples == preference.ROWS

    def losses():
        data.share_prompts = False
        for batch in single_rows(data):
            logits = module.model(input_ids=batch.ids[:1][:, batch.mask[0]]).logits
            first = batch.segment_of_scored == 0
            yield (
                logits[0][batch.scored[first]]
                .log_softmax(-1)[torch.arange(int(first.sum())), batch.labels[first]]
                .sum()
            )

    close(found.diagonal, loop(module, losses()))


def test_rated_answers_are_asked_where_they_are_good(tmp_path):
    job = preference.write_job(tmp_path / "job")
    module, data = preference.kto(job, tmp_path, data={"batch_size": 6})
    found = measured(tmp_path, module, data, LoRA(2))
    assert found.examples == sum(n % 3 > 0 for n in range(preference.ROWS))


def test_reward_models_are_asked_which_answer_is_better(tmp_path):
    base = rewards.write_base("llama", tmp_path / "llama")
    module, data = rewards.job(base, tmp_path, data={"batch_size": 5})
    found = measured(tmp_path, module, data)
    assert found.examples == rewards.ROWS

    def losses():
        data.share_prompts = False
        for batch in single_rows(data):
            both = [
                module.model(input_ids=ids[mask][None]).logits[0, 0]
                for ids, mask in zip(batch.ids, batch.mask, strict=True)
            ]
            yield F.logsigmoid(both[0] - both[1])

    close(found.diagonal, loop(module, losses()))


@pytest.mark.parametrize("cls", [DPO, KTO])
def test_ewc_holds_a_policy_while_preferences_are_learned(cls, tmp_path):
    """The second fit's gradient is the objective's own and the penalty's; the reference is another thing than the anchor."""
    job = preference.write_job(tmp_path / "job")
    make, outcomes = (preference.dpo if cls is DPO else preference.kto), {}
    for lam in (0.0, 0.05):
        module, data = make(job, tmp_path, lr=0.02)
        technique = EWC(lam)
        for _ in range(2):
            preference.fit(tmp_path, module, data, LoRA(2), technique)
        held = technique._held
        outcomes[lam] = preference.weights(module), {n: v.clone() for n, v in held.center.items()}, held.importance
    (free, star, importance), (stiff, star_too, _) = outcomes[0.0], outcomes[0.05]
    assert all(torch.equal(star[n], star_too[n]) for n in star)

    def away(weights):
        return sum(float((importance[n] * (weights[n] - star[n]) ** 2).sum()) for n in star)

    assert 0 < away(stiff) < away(free)
