"""``lightning-ft compare CONFIG CONFIG ...``: each configuration as a fit of its own, in turn, on one budget; then a table.

A run that is finished under the same configuration is kept, one that was interrupted goes on: the same command line
continues a comparison that was stopped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt

from lightning_ft.cli.checkpoint_parser import SmallParser, small_parser
from lightning_ft.cli.comparison import Entry, Outcome, markdown, table
from lightning_ft.cli.config_files import ConfigFiles
from lightning_ft.cli.errors import say
from lightning_ft.cli.readable import duration, number
from lightning_ft.cli.run_folder import CONFIG, SUMMARY, newest_checkpoint
from lightning_ft.cli.scores import direction
from lightning_ft.functional.errors import Refusal

OWN = ("--max_steps", "--max_time", "--seeds", "--metric", "--mode", "--name")
_RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
DECIDED = {  # flags of fit that this command gives itself
    "--name": "--name, before --, names the comparison",
    "--seed_everything": "--seeds says how many there are",
    "--ckpt_path": "runs that were interrupted go on by themselves",
    "--trainer.fast_dev_run": "it trains nothing; use --max_steps",
}


@dataclass
class Plan:
    """One configuration of a comparison.

    Attributes:
        label: its name in the table and in its runs' folders.
        words: the words after ``fit`` that all its seeds share.
        folder: where its runs lie.
        config: the whole configuration of its first seed, as its run will save it.
    """

    label: str
    words: list[str]
    folder: Path = field(default_factory=Path)
    config: dict[str, Any] = field(default_factory=dict)


def parser() -> SmallParser:
    """The flags of ``compare``; what else it is given goes to ``fit``."""
    flags = small_parser(
        "compare CONFIG CONFIG ...",
        "Runs each configuration as a fit of its own, in turn, on one budget, and prints a table of what came out. "
        "CONFIG is a file, or several stacked with +, as configs/sft_full.yaml+configs/parts/freeze.yaml. "
        "All other flags are given to every fit, as --data.path my.jsonl.",
    )
    flags.add_argument(
        "--max_steps",
        type=Annotated[int, Gt(0)] | None,
        default=None,
        help="Optimizer steps of each run, whatever epochs it is configured for.",
    )
    flags.add_argument(
        "--max_time",
        type=str | None,
        default=None,
        help="Longest time of each run, as DD:HH:MM:SS; a run that ends earlier by its own configuration does so.",
    )
    flags.add_argument("--seeds", type=Annotated[int, Ge(1)], default=1, help="Runs of each, with seeds 0, 1, 2 ...")
    flags.add_argument(
        "--metric", type=str, default="val/loss", help="What is compared: the last value that a run logged."
    )
    flags.add_argument(
        "--mode",
        type=Literal["min", "max"] | None,
        default=None,
        help="Whether a low or a high value is good; null knows it from the metric's name.",
    )
    flags.add_argument("--name", type=str, default="compare", help="The runs and the table lie in runs/NAME.")
    return flags


def compare_command(argv: list[str]) -> None:
    """Runs what is not finished yet, then prints the table and writes it.

    Raises:
        Refusal: a configuration that no fit would take, found before the first run starts.
        SystemExit: code 1 when a run failed, after all others; 130 after Ctrl-C.
    """
    configs, own, shared = split(argv)
    flags = parser().parse_args(own)
    mode = flags.mode or direction(flags.metric)
    if not configs:
        raise Refusal("Say what to compare: lightning-ft compare CONFIG CONFIG ... --max_steps 100.")
    if mode is None:
        raise Refusal(
            f"Whether a low or a high {flags.metric} is good cannot be known from its name: say --mode min or max."
        )
    plans = [Plan(label, words) for label, words in labelled(configs).items()]
    for plan in plans:
        plan.words += [*shared, *budget(flags.max_steps, flags.max_time)]
        check(plan, flags.name, flags.metric, has_time=flags.max_time is not None)
    entries = []
    total = len(plans) * flags.seeds
    for number_, plan in enumerate(plans):
        outcomes: list[Outcome] = []
        for seed in range(flags.seeds):
            print(f"[{number_ * flags.seeds + seed + 1}/{total}] {plan.label}, seed {seed}: ", end="", flush=True)
            if outcomes and outcomes[-1].exit_code == 2:  # a refusal: another seed changes nothing
                outcomes.append(Outcome(plan.folder, seed, exit_code=2, error=outcomes[-1].error))
            else:
                outcomes.append(run(plan, seed))
            print(told(outcomes[-1], flags.metric), flush=True)
        entries.append(Entry(plan.label, outcomes))
    rows = table(entries, flags.metric, mode)
    said = markdown(rows, flags.metric, mode, limit=limit(flags.max_steps, flags.max_time), seeds=flags.seeds)
    write(plans[0].folder, said, {"metric": flags.metric, "mode": mode, "arguments": argv, "rows": rows})
    print(f"\n{said}")
    if any(row["failed"] for row in rows):
        sys.exit(1)


# ---------------------------------------------------------------- the words


def split(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(configurations, flags of this command, flags of every fit). A flag's value is the word after it, or after ``=``."""
    configs: list[str] = []
    own: list[str] = []
    shared: list[str] = []
    at, only_shared = 0, False
    while at < len(argv):
        word = argv[at]
        name = word.partition("=")[0]
        taken = 1
        if word == "--" and not only_shared:
            only_shared = True
        elif word in ("-h", "--help"):
            own.append(word)
        elif word.startswith("-"):
            taken = 1 if "=" in word or at + 1 == len(argv) else 2
            ours = name in OWN and not only_shared
            if name in DECIDED and not ours:
                raise Refusal(f"{name} cannot be given to the fits of a comparison: {DECIDED[name]}.")
            (own if ours else shared).extend(argv[at : at + taken])
        elif only_shared:
            raise Refusal(f"After -- come flags for every fit; {word} is none. Configurations come first.")
        else:
            configs.append(word)
        at += taken
    return configs, own, shared


def labelled(configs: list[str]) -> dict[str, list[str]]:
    """Each configuration's name, after its files, with the words that give it to ``fit``.

    Raises:
        Refusal: a file that is missing or no configuration, or one that is given twice.
    """
    found: dict[str, list[str]] = {}
    for config in configs:
        files = [Path(part) for part in config.split("+")]
        words = [word for file in files for word in ("--config", str(file))]
        ConfigFiles.of(words)
        label = "-".join(file.stem for file in files)
        if words in found.values():
            raise Refusal(f"{config} is given twice.")
        if label in found:
            label = "-".join(f"{file.resolve().parent.name}-{file.stem}" for file in files)
        if label in found:
            raise Refusal(f"{config} and another configuration are both called {label}: rename one of the files.")
        found[label] = words
    return found


def budget(max_steps: int | None, max_time: str | None) -> list[str]:
    """The flags that make all runs equally long.

    Raises:
        Refusal: a time in another form than Lightning's.
    """
    words = []
    if max_time is not None:
        if not re.fullmatch(r"\d{2}:\d{2}:\d{2}:\d{2}", max_time):
            raise Refusal(f"max_time is written DD:HH:MM:SS, as 00:00:30:00 for half an hour, got {max_time}.")
        words.append(f"--trainer.max_time={max_time}")
    if max_steps is not None:
        words += [f"--trainer.max_steps={max_steps}", "--trainer.max_epochs=-1"]
    return words


def limit(max_steps: int | None, max_time: str | None) -> str:
    """The budget in words."""
    parts = [f"{max_steps} optimizer steps"] if max_steps is not None else []
    parts += [f"at most {max_time} (DD:HH:MM:SS)"] if max_time is not None else []
    return " and ".join(parts) or "as each configuration says"


# ---------------------------------------------------------------- before the first run


def check(plan: Plan, name: str, metric: str, *, has_time: bool) -> None:
    """Builds what a fit would build, without a model, and notes where it will write and with which configuration.

    Raises:
        Refusal: what ``fit`` would refuse before it loads a model, with the configuration's name; a score that it could not have.
    """
    from lightning.pytorch import seed_everything

    from lightning_ft.cli.training import FineTuningCLI

    class Rehearsal(FineTuningCLI):
        """A fit without its trainer."""

        def _set_seed(self) -> None:
            seed_everything(0, workers=True, verbose=False)

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            return None

    try:
        cli = Rehearsal("fit", [*plan.words, "--name", f"{name}/{plan.label}-seed0", "--seed_everything", "0"])
        check_files = getattr(cli.datamodule, "check_files", None)
        if check_files is not None:
            check_files("fit")
    except Refusal as refusal:
        raise Refusal(f"{plan.label}: {refusal}") from refusal
    config = cli.config["fit"]
    plan.folder = cli.run_path(config).parent
    plan.config = yaml.safe_load(cli._parser("fit").dump(config, skip_none=False))
    trainer = config["trainer"]
    if has_time and trainer.max_steps == -1 and trainer.max_epochs is None:
        raise Refusal(
            f"{plan.label}: its learning rate falls over max_epochs or max_steps, and it has neither: "
            "add --trainer.max_epochs beside --max_time."
        )
    data = cli.datamodule
    parts = (
        list(data.tasks.values()) if hasattr(data, "task_objectives") else [data]
    )  # several tasks, each with its own
    unheld = all(getattr(one, "val_path", "") is None and getattr(one, "val_fraction", 1) == 0 for one in parts)
    if metric.startswith("val/") and unheld:
        raise Refusal(
            f"{plan.label}: no rows are held out, so that {metric} cannot be measured: add --data.val_fraction 0.1 or "
            "--data.val_path FILE."
        )


# ---------------------------------------------------------------- one run


def run(plan: Plan, seed: int) -> Outcome:
    """One fit, unless it is finished already; one that was interrupted goes on from its last checkpoint."""
    name = f"{plan.label}-seed{seed}"
    folder = plan.folder / name
    words = [*plan.words, f"--name={plan.folder.name}/{name}", f"--seed_everything={seed}"]
    same = _saved_config(folder) == _of_seed(plan, seed)
    summary = _summary(folder)
    if same and summary.get("status") == "finished":
        return Outcome(folder, seed, summary=summary, kept=True)
    checkpoint = newest_checkpoint(folder) if same else None
    if checkpoint is not None:
        words.append(f"--ckpt_path={checkpoint}")
    log = plan.folder / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"running, see {log} ... ", end="", flush=True)
    code = fit(words, log)
    if code != 0:
        return Outcome(folder, seed, exit_code=code, error=last_words(log, code))
    return Outcome(folder, seed, summary=_summary(folder))


def fit(words: list[str], log: Path) -> int:
    """``lightning-ft fit`` in a process of its own, so that its memory and its seeds are; its exit code.

    Raises:
        SystemExit: code 130 after Ctrl-C, which the process got as well.
    """
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_ft", "fit", *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**_without_ranks(os.environ), "PYTHONUNBUFFERED": "1"},
        )
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
    # Not from within the except clause: `reported` would speak of a checkpoint of this process, which has none.
    print()
    say("Stopped by Ctrl-C; the same command line goes on from here.")
    sys.exit(130)


def _without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what a fit of several ranks leaves in this process, or a launcher gave it: a new fit would wait for those ranks."""
    known = (*_RANKS, *_MEETING)
    return {k: value for k, value in environment.items() if k not in known and not k.startswith("TORCHELASTIC_")}


def last_words(log: Path, code: int) -> str:
    """The sentence that a failed fit has left."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("lightning-ft: ") for line in lines if line.startswith("lightning-ft: ")]
    if code == 2 and said:
        return said[-1]
    return f"exit code {code}: {lines[-1] if lines else 'nothing was said'} (see {log})"


def told(outcome: Outcome, metric: str) -> str:
    """A run in one line."""
    if outcome.error is not None:
        return f"failed: {outcome.error}"
    seconds = outcome.summary.get("train_seconds")
    took = f", {duration(seconds)}" if seconds is not None else ""
    return f"{metric} {number(outcome.score(metric))}{took}{', finished earlier' if outcome.kept else ''}"


def _summary(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _saved_config(folder: Path) -> dict[str, Any] | None:
    try:
        found = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    return {**found, "ckpt_path": None} if isinstance(found, dict) else None


def _of_seed(plan: Plan, seed: int) -> dict[str, Any]:
    return {**plan.config, "name": f"{plan.folder.name}/{plan.label}-seed{seed}", "seed_everything": seed}


def write(folder: Path, said: str, found: dict[str, Any]) -> None:
    """The table as text and as data, beside the runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.md").write_text(said + "\n", encoding="utf-8")
    (folder / "compare.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
