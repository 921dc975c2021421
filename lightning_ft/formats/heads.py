"""What other tools have to know of a model's head: the task it stands for, how to load it, what of it an adapter stores."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lightning_ft.nn.registry import base_name, injected_layers

_TASKS = {  # the end of a Hugging Face class's name -> PEFT's task type
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "CAUSAL_LM",  # without an encoder: a decoder that also reads pictures
}

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def task_type(model: nn.Module) -> str | None:
    """PEFT's name for what a Hugging Face model is for; None if its class does not say."""
    name, config = type(model).__name__, getattr(model, "config", None)
    found = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    writes = getattr(config, "is_encoder_decoder", False) and found in (None, "CAUSAL_LM")
    return "SEQ_2_SEQ_LM" if writes and getattr(model, "get_output_embeddings", bool)() is not None else found


def kind_of(config: Any) -> Literal["encoder", "decoder", "encoder-decoder"]:
    """Whether a model sees the whole row, what is before each token, or one row while it writes another."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    masked = getattr(config, "model_type", "") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "encoder" if masked and not getattr(config, "is_decoder", False) else "decoder"


def auto_class(model: nn.Module) -> str:
    """The class of transformers that loads this model from its folder with the head on."""
    return _AUTO_CLASSES.get(task_type(model) or "", "AutoModel")


def adapter_task(model: nn.Module) -> str | None:
    """What PEFT is told that an adapter is for: it looks for a trained head beside one that classifies, so nothing without one."""
    found = task_type(model)
    return None if found in ("SEQ_CLS", "TOKEN_CLS") and not trained_head(model) else found


def trained_head(model: nn.Module) -> list[str]:
    """Pristine names of the modules of a classification head (and of a pooler) that are trained in full.

    They are those outside the body and the body's pooler, where something other than an injected layer requires a
    gradient; an adapter that was trained beside a new head is worth nothing without it.
    """
    body: Any = getattr(model, "base_model", model)
    if task_type(model) not in ("SEQ_CLS", "TOKEN_CLS") or body is model:
        return []
    parts = {id(child): child for child in model.children() if child is not body}
    if isinstance(pooler := getattr(body, "pooler", None), nn.Module):
        parts[id(pooler)] = pooler
    injected = {p for layer in injected_layers(model).values() for p in layer.injected_parameters().values()}
    return [
        base_name(path, model)
        for path, module in model.named_modules()
        if id(module) in parts and any(p.requires_grad and p not in injected for p in module.parameters())
    ]
