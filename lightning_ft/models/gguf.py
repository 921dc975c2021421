"""A GGUF file as an ordinary Hugging Face folder that loads in a fraction of a second, saves and trains."""

from __future__ import annotations

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path

from lightning_ft.functional.errors import Refusal

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def convert_gguf(file: Path, target: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as a bf16 safetensors folder.

    Four-bit weights have far fewer significant bits than bf16 keeps, so that no more is lost in the cast than in any
    other bf16 copy of the model. The folder is read back and compared before this returns.

    Args:
        file: the GGUF file, with its tokenizer and chat template inside.
        target: an existing folder.

    Raises:
        Refusal: ``gguf`` or ``accelerate`` is not installed, or the folder does not read back as it was written.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise Refusal(
            f"Converting {file.name} needs {' and '.join(missing)}, not installed here: "
            "pip install 'lightning-ft[starter]'."
        )
    # Five progress bars of a second each, one of which no setting turns off.
    with contextlib.redirect_stderr(io.StringIO()):
        _convert(file, target)


def _convert(file: Path, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Newer transformers keep GGUF weights packed (and untrainable) unless told otherwise; older ones have no such word.
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = packed.config.max_position_embeddings

    # A fresh model of the same shape: nothing about GGUF stays in its configuration, which would bar training it.
    about = {name: value for name, value in packed.config.to_dict().items() if name != "quantization_config"}
    model = type(packed)(type(packed.config)(**about))
    model.load_state_dict(packed.state_dict())
    model = model.bfloat16()
    for name in _SPECIAL:
        setattr(model.config, name, getattr(tokenizer, name))
        setattr(model.generation_config, name, getattr(tokenizer, name))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

    read = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    weights, written = read.state_dict(), model.state_dict()
    words = AutoTokenizer.from_pretrained(target)
    chat = [{"role": "user", "content": "Is 2,024 even?\n\tYes or no."}]
    same = (
        weights.keys() == written.keys()
        and all(weights[name].dtype == torch.bfloat16 and torch.equal(weights[name], written[name]) for name in written)
        and not hasattr(read.config, "quantization_config")
        and all(getattr(words, name) == getattr(tokenizer, name) for name in _SPECIAL)
        and words.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
        and words(chat[0]["content"])["input_ids"] == tokenizer(chat[0]["content"])["input_ids"]
    )
    if not same:
        raise Refusal(
            f"transformers {transformers.__version__} does not read back what it made of {file.name}, so nothing was "
            "kept: install the version that constraints.txt names."
        )
