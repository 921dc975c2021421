"""Writes the table of docs/guides/architectures.md by running the admission check on tiny random models of each kind.

python docs/render_architectures.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the models are those of the tests

import transformers as hf  # noqa: E402

from lightning_ft.functional.errors import Refusal  # noqa: E402
from lightning_ft.models.admission_tasks import admit_task  # noqa: E402
from lightning_ft.models.load import attention_for, why_not_causal  # noqa: E402
from lightning_ft.models.load_task import why_not  # noqa: E402
from tests.models.architectures import CAUSAL, ENCODERS, SEQ2SEQ, build_for, task_config  # noqa: E402

PAGE = ROOT / "docs" / "guides" / "architectures.md"
_BLOCK = re.compile(r"(<!-- admission of tiny models -->\n).*?(<!-- end of admission -->)", re.DOTALL)

TASKS = ("causal_lm", "seq2seq_lm", "sequence_classification", "token_classification")
NAMES = {
    "llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma 2", "mistral": "Mistral, with a window", "phi": "Phi",
    "gpt2": "GPT-2", "granite": "Granite", "cohere": "Cohere", "mixtral": "Mixtral", "gpt_oss": "GPT-OSS",
    "gpt_neo": "GPT-Neo", "llama4": "Llama 4", "falcon_h1": "Falcon-H1", "mamba": "Mamba", "bert": "BERT",
    "roberta": "RoBERTa", "distilbert": "DistilBERT", "electra": "ELECTRA", "albert": "ALBERT",
    "deberta_v2": "DeBERTa-v2", "modernbert": "ModernBERT, first token", "modernbert_mean": "ModernBERT, mean",
    "t5": "T5", "umt5": "UMT5", "bart": "BART", "mbart": "mBART", "marian": "Marian",
}  # fmt: skip


def verdict(kind: str, task: str) -> tuple[str, str]:
    """What a model of a kind may do in a task, and why not more: ("packed" | "padded" | "refused" | "-", reason)."""
    config = task_config(kind, task)
    if (why_not_causal(config) if task == "causal_lm" else why_not(task, config)) is not None:
        return "-", ""
    mapping: Any = {
        "causal_lm": hf.MODEL_FOR_CAUSAL_LM_MAPPING,
        "token_classification": hf.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        "sequence_classification": hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }.get(task, {})
    model = build_for(kind, task, attention_for(config, "auto", mapping))
    try:
        admission = admit_task(model, task, packing=True)
    except Refusal as refusal:
        return "refused", _plain(str(refusal), type(model).__name__)
    if admission.packing:
        return "packed", ""
    return "padded", _plain(admission.packing_reason, type(model).__name__)


def _plain(reason: str, name: str) -> str:
    """A reason without the class's name and the number of one run, so that equal reasons are equal."""
    reason = re.sub(r" by [\d.e+-]+(?= |,|:)", "", reason.replace(f"of {name} ", "").replace(name, "the model"))
    reason = re.sub(r"with token \d+ and not with \d+", "with another token than", reason).replace(
        "than, the", "than the"
    )
    return (reason[0].upper() + reason[1:]).rstrip(".") + "."


def table(kinds: dict[str, str] = NAMES) -> str:
    """The table in Markdown, with the reasons below it."""
    reasons: list[str] = []
    lines = [("architecture", *(f"`{task}`" for task in TASKS)), ("---",) * (len(TASKS) + 1)]
    for kind, name in kinds.items():
        cells = []
        for task in TASKS:
            word, reason = verdict(kind, task)
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append(f"{word} ({reasons.index(reason) + 1})" if reason else word)
        lines.append((name, *cells))
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text + "\n" + "".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))


def render(text: str) -> str:
    """The page with its table filled anew."""
    content = table()
    return _BLOCK.sub(lambda match: f"{match[1]}{content}{match[2]}", text)


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    assert {**CAUSAL, **ENCODERS, **SEQ2SEQ}.keys() >= NAMES.keys()
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
