"""Tasks of reasoning-gym as a task distribution: each data set of it is a task, its questions and answers are the rows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_ft.functional.errors import Refusal

Row = dict[str, Any]


def reasoning_tasks(
    rng: np.random.Generator,
    count: int,
    *,
    datasets: Sequence[str] | Mapping[str, Mapping[str, Any]],
    shot: int = 8,
    query: int = 8,
    chat: bool = True,
    longest_answer: int | None = 40,
) -> list[dict[str, list[Row]]]:
    """``count`` tasks, each a data set of reasoning-gym with new questions.

    Args:
        rng: what to draw from.
        count: tasks.
        datasets: names to draw from, such as ``["letter_counting", "chain_sum"]``; or name -> the data set's own settings.
            What is measured is learning of new tasks where validation and test have others than training.
        shot: support rows of each task.
        query: query rows of each; none is a support row.
        chat: whether prompts are chats of one turn, for a model with a chat template; else plain text.
        longest_answer: most characters of an answer; longer ones are drawn anew. None: any.

    Returns:
        ``{"support": rows, "query": rows}`` for each, rows with ``prompt`` and ``completion``.

    Raises:
        Refusal: reasoning-gym is not installed, a name that it does not know, settings that it refuses, or a data set with too
            few different rows.

    References:
        Stojanovski et al., 2025 (reasoning-gym).
    """
    made, names = _library(), list(datasets)
    if not names:
        raise Refusal("reasoning_tasks: datasets names nothing; give names, such as letter_counting.")
    tasks = []
    for number in rng.integers(len(names), size=count).tolist():
        name = names[number]
        settings = dict(datasets[name]) if isinstance(datasets, Mapping) else {}
        found = _rows(made, name, settings, int(rng.integers(2**31)), shot + query, longest_answer)
        rows = [_row(question, answer, chat) for question, answer in found]
        tasks.append({"support": rows[:shot], "query": rows[shot:]})
    return tasks


def _library() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise Refusal("reasoning_tasks needs reasoning-gym: pip install 'lightning-ft[starter]'.") from error
    return reasoning_gym


def _rows(
    library: Any, name: str, settings: Mapping[str, Any], seed: int, wanted: int, longest: int | None
) -> list[tuple[str, str]]:
    """So many different (question, answer) of a data set with this seed."""
    if name not in library.factory.DATASETS:
        near = difflib.get_close_matches(name, library.factory.DATASETS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else "letter_counting is one."
        raise Refusal(f"reasoning-gym has no data set {name!r}; {hint}")
    try:
        entries = library.create_dataset(name, seed=seed, size=8 * wanted, **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise Refusal(f"reasoning-gym refuses the settings {dict(settings)} of {name}: {error}.") from error
    found: dict[str, str] = {}
    for at in range(len(entries)):
        entry = entries[at]
        answer = str(entry["answer"])
        if longest is None or len(answer) <= longest:
            found.setdefault(entry["question"], answer)
        if len(found) == wanted:
            return list(found.items())
    raise Refusal(
        f"reasoning_tasks: among {len(entries)} rows of {name} only {len(found)} differ and have answers of at most {longest} "
        f"characters, and shot + query are {wanted}; lower them, raise longest_answer, or leave it out."
    )


def _row(question: str, answer: str, chat: bool) -> Row:
    if not chat:
        return {"prompt": f"{question}\n", "completion": answer}
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


__all__ = ["reasoning_tasks"]
