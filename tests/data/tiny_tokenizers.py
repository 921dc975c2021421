"""A byte-level tokenizer made on the spot, and chat templates in the style of well-known models, written by hand."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
]
WORDS = "hello world is this sentence positive or negative yes no thank you user assistant system tool think"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Reasoning models drop the thoughts of all turns but the last.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '(think) ' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNCLOSED = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


@cache
def _backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS, " " + WORDS] * 5, trainer)
    return backend.to_str()


def tiny_tokenizer(
    template: str | None = None, *, eos: str | None = "</s>", pad: str | None = None, puts_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A fresh tokenizer; ``pad`` defaults to ``eos``, the case that loses EOS wherever masks are guessed from ids."""
    backend = Tokenizer.from_str(_backend())
    if puts_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    words = {"bos_token": AddedToken("<s>", special=True), "eos_token": eos, "pad_token": pad or eos}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in words.items() if v is not None})
    tokenizer.chat_template = template
    return tokenizer


def tiny_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """One like BERT's: [CLS] text [SEP] second [SEP], with types, and words cut into ``##`` pieces."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    words = [
        *["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        *letters,
        *("##" + letter for letter in letters),
        *WORDS.split(),
    ]
    backend = Tokenizer(models.WordPiece({word: n for n, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special)


def tiny_seq2seq_tokenizer() -> PreTrainedTokenizerFast:
    """One like T5's: an end token after each text, and padding with a token of its own."""
    backend = Tokenizer.from_str(_backend())
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<s>")
