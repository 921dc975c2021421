"""What a prefix or a prompt may begin as."""

import torch
from torch import nn

from lightning_ft import Attachment, PromptTuning
from lightning_ft.engine.start_tokens import vocabulary_ids
from tests.contract.subjects import AttentionNet


class Words:
    """A tokenizer of six tokens, two of them special; the table of the model has seven rows."""

    all_special_ids = (0, 2)

    def __len__(self):
        return 6


def test_special_tokens_and_padded_rows_are_nothing_to_begin_from():
    net = AttentionNet()
    assert vocabulary_ids(net, net.reader.embed_tokens) == list(range(7))
    assert vocabulary_ids(net, nn.Embedding(7, 4, padding_idx=3)) == [0, 1, 2, 4, 5, 6]
    net.tokenizer = Words()
    assert vocabulary_ids(net, net.reader.embed_tokens) == [1, 3, 4, 5]


def test_a_prompt_draws_each_of_them_once_before_any_comes_again():
    for tokens in (4, 8):
        net = AttentionNet()
        net.tokenizer = Words()
        table = net.reader.embed_tokens.weight.detach().clone()
        Attachment.of(net).rebuild([PromptTuning(tokens)], seed=0)
        prompt = net.reader.embed_tokens.prompt
        drawn = (prompt[:, None] == table).all(-1).nonzero()[:, 1]
        assert sorted(drawn.tolist()) == sorted([1, 3, 4, 5] * (tokens // 4))
    assert torch.equal(prompt[:4], prompt[4:])
