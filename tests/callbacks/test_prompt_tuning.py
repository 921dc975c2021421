"""Prompt tuning as a callback: the contract, and what only it does."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_ft
from lightning_ft import Attachment, LoRA, Refusal
from lightning_ft.callbacks.prompt_tuning import PromptTuning
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.formats.peft import export_peft
from lightning_ft.nn.prompt import PromptTokens
from lightning_ft.nn.registry import injected_layers
from tests.contract import Case, checks_for
from tests.contract.subjects import AttentionNet, PlainNet, WordNet, chat_job, fit, rows, state, trainer
from tests.modules import tasks
from tests.tolerances import TOL

CASE = Case(PromptTuning, small={"tokens": 3}, idle={"tokens": 0}, second={"tokens": 2, "start": "random"})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def rebuilt(net, *techniques):
    Attachment.of(net).rebuild(list(techniques), seed=0)
    return net


def prompts(module):
    return {n: v for n, v in state(module).items() if n.endswith(".prompt")}


def test_a_text_begins_as_the_vectors_of_its_tokens(chat, tmp_path):
    module, data = chat_job(chat, tmp_path)
    trainer(tmp_path, PromptTuning(6, text="abcd"), max_steps=0).fit(module, data)
    plain, _ = chat_job(chat, tmp_path)
    plain.configure_model()
    ids = plain.tokenizer("abcd", add_special_tokens=False)["input_ids"]
    row = torch.randint(4, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = plain.model(torch.cat([torch.tensor([(ids * 6)[:6]]), row], 1)).logits[:, 6:]
    torch.testing.assert_close(module.model(row).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_loads_generates_exports_and_starts_another_fit(chat, tmp_path):
    module, data = chat_job(chat, tmp_path)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer(tmp_path, PromptTuning(4), keep, enable_checkpointing=True).fit(module, data)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert [(key.rpartition(".")[2], value.shape[0]) for key, value in saved.items()] == [("prompt", 4)]
    loaded = lightning_ft.load(tmp_path / "last.ckpt")
    assert loaded.generate(["ask 1:"], max_new_tokens=4) == module.generate(["ask 1:"], max_new_tokens=4)
    export_peft(loaded.model, tmp_path / "peft", adapter_name="prompt")
    for source in ("last.ckpt", "peft"):
        again, data = chat_job(chat, tmp_path)
        trainer(tmp_path, PromptTuning(init_from=str(tmp_path / source)), max_steps=0).fit(again, data)
        assert all(torch.equal(value, prompts(loaded)[name]) for name, value in prompts(again).items())
        assert all(p.requires_grad == name.endswith(".prompt") for name, p in again.named_parameters())
        with pytest.raises(Refusal, match=r"PromptTuning\.tokens is 7, but the prompt in .* has 4; leave tokens out"):
            fit_again, data = chat_job(chat, tmp_path)
            trainer(tmp_path, PromptTuning(7, init_from=str(tmp_path / source)), max_steps=0).fit(fit_again, data)


def test_a_network_trains_is_kept_and_goes_on_from_its_checkpoint_or_around_a_folder(chat, tmp_path):
    module, data = chat_job(chat, tmp_path)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer(tmp_path, PromptTuning(4, network=5), keep, enable_checkpointing=True).fit(module, data)
    layer = next(x for x in injected_layers(module).values() if isinstance(x, PromptTokens))
    assert not torch.equal(layer.table(), layer.prompt)  # its last layer has learned
    loaded = lightning_ft.load(tmp_path / "last.ckpt")
    assert loaded.generate(["ask 1:"], max_new_tokens=4) == module.generate(["ask 1:"], max_new_tokens=4)
    export_peft(loaded.model, tmp_path / "peft", adapter_name="prompt")
    for source, network in (("last.ckpt", None), ("last.ckpt", 5), ("peft", None), ("peft", 3)):
        again, data = chat_job(chat, tmp_path)
        trainer(tmp_path, PromptTuning(network=network, init_from=str(tmp_path / source)), max_steps=0).fit(again, data)
        other = next(x for x in injected_layers(again).values() if isinstance(x, PromptTokens))
        torch.testing.assert_close(other.table(), layer.table(), rtol=1e-6, atol=1e-6)
        assert (other.network is None) == (source == "peft" and network is None)
    with pytest.raises(Refusal, match=r"PromptTuning\.network is 7, but the prompt in .* has 5; leave network out"):
        again, data = chat_job(chat, tmp_path)
        given = PromptTuning(network=7, init_from=str(tmp_path / "last.ckpt"))
        trainer(tmp_path, given, max_steps=0).fit(again, data)


def test_packed_rows_train_as_padded_ones_also_when_activations_are_recomputed(chat, tmp_path):
    trained = []
    for packing, again in ((True, False), (False, False), (True, True)):
        module, data = chat_job(chat, tmp_path, data={"packing": packing}, model={"gradient_checkpointing": again})
        trainer(tmp_path, PromptTuning(3)).fit(module, data)
        trained.append(prompts(module))
    for other in trained[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, trained[0][name], rtol=1e-4, atol=1e-4, msg=name)


def test_beside_lora_both_train(tmp_path):
    net = AttentionNet()
    fit(tmp_path, net, PromptTuning(3), LoRA(2))
    moved = {n.rpartition(".")[2] for n, p in net.reader.named_parameters() if p.requires_grad and p.grad is not None}
    assert moved == {"prompt", "lora_A", "lora_B"}


def test_the_reference_is_the_base_and_the_start(tmp_path):
    net = AttentionNet()
    net.net.requires_grad_(False)
    plain = net(rows()[0]).detach()
    rebuilt(net, PromptTuning(3))
    start = net(rows()[0]).detach()
    attachment = Attachment.of(net)
    attachment.references.take("start")
    with torch.no_grad():
        for layer in injected_layers(net).values():
            assert isinstance(layer, PromptTokens)
            layer.prompt.add_(1.0)
    with attachment.reference("base"):
        assert torch.equal(net(rows()[0]), plain)
    with attachment.reference("start"):
        assert torch.equal(net(rows()[0]), start)
    assert not torch.equal(net(rows()[0]), start)


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("bert", "sequence_classification"),
        ("bert", "token_classification"),
        ("llama", "sequence_classification"),
        ("t5", "seq2seq_lm"),
    ],
)
def test_other_tasks_train_the_prompt_and_a_new_head(kind, task, tmp_path):
    base = tasks.write_base(kind, tmp_path / "base")
    module, data = tasks.job(base, tmp_path, task, batch_size=8)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    tasks.fit(module, data, tmp_path, PromptTuning(3), keep, enable_checkpointing=True)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert len({n for n in trained if n.endswith(".prompt")}) == 1
    assert all(n.endswith(".prompt") or "classifier" in n or "score" in n or "pooler" in n for n in trained)
    loaded = lightning_ft.load(tmp_path / "last.ckpt")
    assert all(torch.equal(value, state(loaded)[name]) for name, value in state(module).items())
    export_peft(loaded.model, tmp_path / "peft", adapter_name="prompt")


def sharded(network, chat, folder):
    """The prompt of the tiny chat model after three steps of two ranks under FSDP2."""
    module, data = chat_job(Path(chat), Path(folder), data={"batch_size": 4})
    options = {"devices": 2, "strategy": FSDP2Strategy(process_group_backend="gloo"), "use_distributed_sampler": False}
    trainer(Path(folder), PromptTuning(3, network=network), **options).fit(module, data)
    return {n: p.full_tensor().detach() for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.xdist_group("two_ranks")
@pytest.mark.parametrize("network", [None, 5])
def test_sharded_it_trains_as_on_one_device(network, chat, tmp_path, two_ranks):
    module, data = chat_job(chat, tmp_path)
    trainer(tmp_path, PromptTuning(3, network=network)).fit(module, data)
    expected = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    job = {"network": network, "chat": str(chat), "folder": str(tmp_path)}
    for rank in two_ranks.run("tests.callbacks.test_prompt_tuning:sharded", **job):
        assert rank.keys() == expected.keys()
        for name, value in rank.items():
            torch.testing.assert_close(value, expected[name], rtol=TOL[torch.float32], atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": "a", "start": "random"}, "has both a text and start 'random'"),
        ({"text": ""}, "text is empty"),
        ({"init_from": ".", "text": "a"}, "has both init_from and text 'a' to begin from; leave one of them out"),
        ({"init_from": ".", "start": "random"}, "has both init_from and start 'random' to begin from"),
        ({"init_from": "nowhere"}, "init_from names 'nowhere', which does not exist"),
        ({"tokens": -1}, "tokens"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(given, words):
    with pytest.raises(Refusal, match=words):
        PromptTuning(**given)


def test_what_has_no_words_is_refused():
    with pytest.raises(Refusal, match="needs one embedding to stand before, and PlainNet has 0"):
        rebuilt(PlainNet(), PromptTuning(3))
    with pytest.raises(Refusal, match="text needs a tokenizer, and AttentionNet has none"):
        rebuilt(AttentionNet(), PromptTuning(3, text="a"))


def test_a_module_of_ones_own_with_two_embeddings_is_told_by_target():
    class Two(PlainNet):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(9, 4), nn.Embedding(5, 4)

    with pytest.raises(
        Refusal, match=r"needs one embedding to stand before, and Two has 2 \(words, places\); name one"
    ):
        rebuilt(Two(), PromptTuning(3))
    assert rebuilt(Two(), PromptTuning(3, target="words")).words(torch.tensor([[1, 2]])).shape == (1, 5, 4)


def test_of_two_prompts_in_a_file_each_starts_from_its_own_and_at_its_own_place(tmp_path):
    class Two(WordNet):
        def __init__(self):
            super().__init__()
            self.places = nn.Embedding(5, 4)

    net, keep = Two(), ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    both = PromptTuning(3, target="words", name="a"), PromptTuning(2, target="words", name="b")
    fit(tmp_path, net, *both, keep, enable_checkpointing=True)
    file = str(tmp_path / "last.ckpt")
    again = rebuilt(Two(), PromptTuning(init_from=file, name="b"), PromptTuning(init_from=file, name="a"))
    assert (
        all(torch.equal(value, prompts(again)[name]) for name, value in prompts(net).items()) and len(prompts(net)) == 2
    )
    torch.testing.assert_close(again.eval()(rows()[0]), net.eval()(rows()[0]))
    for name, length in (("a", 3), ("b", 2)):
        alone = rebuilt(Two(), PromptTuning(init_from=file, name=name))
        assert alone.words.prompt.shape == (length, 4)
        assert any(torch.equal(alone.words.prompt, value) for value in prompts(net).values())
    with pytest.raises(
        Refusal, match="PromptTuning.target is 'places', but the prompt in .* has 'words'; leave target out"
    ):
        rebuilt(Two(), PromptTuning(init_from=file, name="a", target="places"))
    with pytest.raises(Refusal, match="holds the PromptTuning adapters 'a', 'b' and none called 'prompt'"):
        rebuilt(Two(), PromptTuning(init_from=file))
