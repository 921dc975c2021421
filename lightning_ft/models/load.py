"""Loading a base model and its tokenizer: a starter asset, a folder, or a model of the Hugging Face hub.

Weights are loaded in the dtype of their file, on the CPU; what they are kept in later depends on what will be trained
(``models/dtype.py``). A folder or a hub model in the local cache needs no network; without a network nothing waits.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_ft.formats.heads import kind_of
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.dtype import compute_dtype
from lightning_ft.nn import attention as packed_attention

ATTENTIONS = ("auto", packed_attention.NAME, "sdpa", "eager")

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

#: Seconds that one question to the hub may take.
HUB_TIMEOUT = 5.0


@dataclass(frozen=True)
class Source:
    """Where a base model comes from.

    Attributes:
        base: what the user wrote.
        location: a folder, or a hub id.
        local: whether everything must come from this machine.
    """

    base: str
    location: str
    local: bool


def resolve(base: str, *, revision: str | None = None) -> Source:
    """Find where ``base`` is, without loading anything.

    Args:
        base: ``starter:NAME``, a folder, or a hub id such as ``organisation/name``.
        revision: of a hub model: a branch, tag or commit.

    Returns:
        The source; a hub model that is neither cached nor reachable is not returned.

    Raises:
        Refusal: nothing is there; the sentence names what is near.
    """
    if base.startswith("starter:"):
        from lightning_ft.models import starter

        return Source(base, str(starter.path(base.removeprefix("starter:"))), local=True)
    folder = Path(base).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return Source(base, str(folder), local=True)
        if (folder / "adapter_config.json").is_file():
            raise Refusal(
                f"'{base}' holds an adapter, not a model: give the base that it was trained on, and import it."
            )
        raise Refusal(f"'{base}' is a folder without config.json, so it is no model; give the folder that holds one.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base):
        raise Refusal(f"There is no folder '{base}'{_near(folder)}.")

    from huggingface_hub import constants

    if _cached(base, revision, "config.json") and _cached(base, revision, *_WEIGHTS):
        return Source(base, base, local=True)
    if constants.HF_HUB_OFFLINE:
        raise Refusal(
            f"'{base}' is neither a folder nor in the local cache of the Hugging Face hub, and HF_HUB_OFFLINE forbids "
            f"fetching it{_near(folder)}."
        )
    if (problem := ask_hub(base, revision)) is not None:
        raise Refusal(
            f"'{base}' is neither a folder nor in the local cache of the Hugging Face hub, {problem}{_near(folder)}."
        )
    return Source(base, base, local=False)


def _near(folder: Path) -> str:
    """The end of a sentence: what the user may have meant."""
    from lightning_ft.models.starter import ASSETS

    found: list[str] = []
    if folder.parent.is_dir():
        siblings = {path.name: path for path in folder.parent.iterdir() if path.is_dir()}
        found = [str(siblings[name]) for name in difflib.get_close_matches(folder.name, list(siblings), n=3)]
    found += [f"starter:{name}" for name, asset in ASSETS.items() if asset.kind != "text"]
    return "; near it or always there: " + ", ".join(found)


def _cached(repo: str, revision: str | None, *names: str) -> bool:
    """Whether one of these files of a hub model lies in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(repo, name, revision=revision), str) for name in names)


def ask_hub(repo: str, revision: str | None) -> str | None:
    """What keeps the hub from giving this model, or None. One question, a few seconds at most."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        return "and the hub asks for a licence to be accepted there first"
    except RepositoryNotFoundError:
        return "and the hub has no model of that name that you may read"
    except RevisionNotFoundError:
        return f"and the hub's model has no revision '{revision}'"
    except Exception as error:  # no network has many faces: DNS, proxies, TLS, timeouts
        return f"and the hub cannot be reached ({type(error).__name__})"
    return None


def hub_settings(source: Source, trust_remote_code: bool, revision: str | None) -> dict[str, Any]:
    """What every ``from_pretrained`` is told about where a file may come from."""
    return {"local_files_only": source.local, "trust_remote_code": trust_remote_code, "revision": revision or "main"}


def _explain(error: Exception, base: str, what: str) -> Refusal:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return Refusal(
            f"'{base}' brings Python code of its own; read it, then set trust_remote_code to true to let it run here."
        )
    return Refusal(f"The {what} of '{base}' cannot be loaded: {text[:400]}")


def load_config(base: str | Source, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The model's configuration alone; nothing large is read.

    Args:
        base: see :func:`resolve`.
        trust_remote_code: whether Python code in the model's repository may run.
        revision: of a hub model.

    Raises:
        Refusal: it is not there or cannot be read.
    """
    from transformers import AutoConfig

    source = base if isinstance(base, Source) else resolve(base, revision=revision)
    try:
        return AutoConfig.from_pretrained(source.location, **hub_settings(source, trust_remote_code, revision))
    except (OSError, ValueError, KeyError) as error:
        raise _explain(error, source.base, "configuration") from error


def _is_tokenizer_alone(folder: Path) -> bool:
    others = ("config.json", "adapter_config.json")
    return (folder / "tokenizer_config.json").is_file() and not any((folder / name).exists() for name in others)


def load_tokenizer(base: str | Source, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of a base.

    Where it has no padding token, the end-of-text token fills rows up: masks and labels are made from spans and never
    from a comparison with either, so that this is safe.

    Args:
        base: see :func:`resolve`; also a folder that holds a tokenizer and no model.
        trust_remote_code: whether Python code in the model's repository may run.
        revision: of a hub model.

    Raises:
        Refusal: it is not there or cannot be read.
    """
    from transformers import AutoTokenizer

    if isinstance(base, Source):
        source = base
    elif _is_tokenizer_alone(folder := Path(base).expanduser()):
        source = Source(base, str(folder), local=True)
    else:
        source = resolve(base, revision=revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **hub_settings(source, trust_remote_code, revision))
    except (OSError, ValueError, KeyError) as error:
        raise _explain(error, source.base, "tokenizer") from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal(
    base: str,
    *,
    dtype_policy: str = "auto",
    attention: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """A causal language model in the dtype of its file, on the CPU, in eval mode, and its tokenizer.

    Args:
        base: ``starter:NAME``, a folder, or a hub id.
        dtype_policy: only checked here, before anything is read; ``models/dtype.py`` applies it once it is known what
            is trained (rounding a float32 file to bfloat16 first would lose what full training needs).
        attention: "auto" takes ours, for packed rows, where the architecture lets it, else transformers' default.
        trust_remote_code: whether Python code in the model's repository may run.
        revision: of a hub model: a branch, tag or commit.

    Returns:
        The transformers model and tokenizer.

    Raises:
        Refusal: nothing is there, it is not a causal model, or weights are missing from the file.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    source, config = open_base(base, dtype_policy, attention, trust_remote_code, revision)
    if (problem := why_not_causal(config)) is not None:
        raise Refusal(f"'{base}' {problem}.")
    settings = hub_settings(source, trust_remote_code, revision)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, revision=revision)
    implementation = attention_for(config, attention, MODEL_FOR_CAUSAL_LM_MAPPING)
    model, info = read_weights(AutoModelForCausalLM, source, implementation, **settings)
    refuse_missing(base, model, info["missing_keys"])
    return model, tokenizer


def open_base(
    base: str, dtype_policy: str, attention: str, trust_remote_code: bool, revision: str | None
) -> tuple[Source, Any]:
    """Where a base is, and its configuration; settings that nobody knows are refused before anything is looked for."""
    compute_dtype(dtype_policy)
    if attention not in ATTENTIONS:
        raise Refusal(f"attention '{attention}' is not known; choose one of {', '.join(ATTENTIONS)}.")
    source = resolve(base, revision=revision)
    return source, load_config(source, trust_remote_code=trust_remote_code, revision=revision)


def read_weights(auto_class: Any, source: Source, implementation: str | None, **settings: Any) -> tuple[Any, Any]:
    """A model by one of transformers' Auto classes, in the dtype of its file, and what its file lacked or had otherwise.

    Raises:
        Refusal: the files cannot be read as that kind of model.
    """
    packed_attention.register()
    try:
        model, info = auto_class.from_pretrained(
            source.location, dtype="auto", attn_implementation=implementation, output_loading_info=True, **settings
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _explain(error, source.base, "model") from error
    # Where the padding token is also the end of turn, its row must learn; padding is masked by position here. Encoder
    # and decoder may each look the one weight up by a module of their own.
    weight = getattr(model.get_input_embeddings(), "weight", None)
    for module in model.modules():
        if getattr(module, "padding_idx", None) is not None and getattr(module, "weight", None) is weight:
            module.padding_idx = None
    return model, info


def refuse_missing(base: str, model: Any, missing: Collection[str]) -> None:
    """Refuse a file that lacks tensors, which transformers has filled with random numbers."""
    if missing:
        raise Refusal(
            f"The weights of '{base}' lack {len(missing)} tensors ({', '.join(sorted(missing)[:3])} ...) that "
            f"{type(model).__name__} needs; they would be random. Give the folder of the complete model."
        )


def architecture_of(config: Any) -> str:
    """The class that a configuration names, for sentences."""
    return str((getattr(config, "architectures", None) or ["a model"])[0])


def why_not_causal(config: Any) -> str | None:
    """What else this model is and which task fits it, or None for a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = architecture_of(config)
    kind = getattr(config, "model_type", "")
    if kind_of(config) == "encoder-decoder":
        return f"is a sequence-to-sequence model ({architecture}); use SFT with the task seq2seq_lm, or a decoder"
    if kind_of(config) == "encoder":
        return (
            f"is an encoder ({architecture}), which sees the whole row and predicts no next token; use the task "
            "sequence_classification, token_classification or regression"
        )
    if re.search(r"For(Sequence|Token)Classification$|ForQuestionAnswering$", architecture):
        return f"has the head of another task ({architecture}); use the task sequence_classification, or its base model"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "AutoModelForCausalLM" not in (
        getattr(config, "auto_map", None) or {}
    ):
        return f"is {architecture} of the kind '{kind}', which transformers does not list among causal language models"
    return None


def attention_for(config: Any, wanted: str, mapping: Mapping[type, Any]) -> str | None:
    """The attention to load with, given the classes of a task by configuration; None is transformers' default."""
    if wanted != "auto":
        return wanted
    # Architectures that do not go through the attention interface would ignore ours, or fail on its name.
    known = mapping.get(type(config), None)
    return packed_attention.NAME if getattr(known, "_supports_attention_backend", False) else None


def source_fingerprint(model: nn.Module) -> str:
    """A short proof of which weights a model holds: SHA-256 over a sample of every parameter, by name.

    Samples are taken at even distances and rounded to bfloat16, so that float32 and bfloat16 copies of one model agree.
    To be taken before anything is injected or trained.

    Args:
        model: on any device; sharded or quantised weights are not supported.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters(), key=lambda item: item[0]):
        flat = p.detach().reshape(-1)
        step = max(1, -(-flat.numel() // 4096))
        sample = flat[::step].to("cpu")
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16)
        digest.update(f"{name} {tuple(p.shape)}\n".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
