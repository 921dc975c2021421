"""fit, validate, test and predict: LightningCLI with our defaults, named slots, run folder and error sentences."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_ft.callbacks.lwf import LwF
from lightning_ft.callbacks.throughput import Throughput
from lightning_ft.cli import checkpoint_argument
from lightning_ft.cli.baselines import refuse_baselines, train_baselines
from lightning_ft.cli.config_files import ConfigFiles, config_arguments
from lightning_ft.cli.console import quiet
from lightning_ft.cli.errors import explain, rank, reported, say
from lightning_ft.cli.flag_values import join_negative_values, register_mode
from lightning_ft.cli.names import near_file
from lightning_ft.cli.predictions import PredictionFile, checked_file, free_file
from lightning_ft.cli.run_folder import (
    CHECKPOINTS,
    CONFIG,
    RunFolder,
    folder_of,
    newest_checkpoint,
)
from lightning_ft.cli.run_summary import RunSummary
from lightning_ft.cli.run_writers import DiskCheck, MetricsLogger, SaveConfig
from lightning_ft.cli.slots import add_slots, filled, refuse_joined_names, techniques
from lightning_ft.cli.step_log import StepLog
from lightning_ft.cli.strategy import strategy_of
from lightning_ft.functional.errors import Refusal

# Arguments of Trainer's methods that LightningCLI fills in itself.
_FILLED = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
DEFAULT_EPOCHS = 3  # as TRL's trainers; Lightning's own default is 1000, made for training from scratch


class Parser(LightningArgumentParser):
    """Reports one sentence instead of usage and ten lines about unions."""

    files = ConfigFiles()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the sentence; nested parsers of class arguments report to their caller, as before."""
        if isinstance(ex, Refusal):
            raise ex
        if not self.exit_on_error:
            super().error(message, ex)
        subcommands = getattr(self, "_subcommands_action", None)
        inner = next(iter(subcommands._name_parser_map.values()), self) if subcommands else self
        raise Refusal(explain(message, inner, self.files.where, self.files.named)) from ex


class FineTuningCLI(LightningCLI):
    """Parses, builds and runs one of Trainer's methods.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``. Only its parser is built.
        argv: the words after the command.
        model: default class of ``model``.
        data: default class of ``data``.
    """

    def __init__(
        self,
        command: str,
        argv: list[str],
        *,
        model: type[LightningModule] | None = None,
        data: type[LightningDataModule] | None = None,
        run: bool = True,
    ) -> None:
        argv = with_config_of_checkpoint(join_negative_values(argv))
        Parser.files = ConfigFiles.of(argv)  # before anything heavy is imported
        if model is None or data is None:
            import lightning_ft

            # A class that is loaded may be given by its bare name: --data ClassificationData.
            for name in lightning_ft.names_below("modules", "data"):
                getattr(lightning_ft, name)
            model, data = model or lightning_ft.SFT, data or lightning_ft.SFTData
        mode = register_mode()
        self.command, self.argv = command, argv
        # What the user names becomes the default: else its arguments would start from those of the class it replaces.
        self.default_classes = {
            "model": named_class(argv, Parser.files, "model") or model,
            "data": named_class(argv, Parser.files, "data") or data,
        }
        self.slots = techniques()
        self.folder: RunFolder | None = None
        self.checkpoint: Path | None = None  # what --ckpt_path means
        self.resumed_step: int | None = None
        self.predictions: Path | None = None  # the file that predict writes
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"enable_model_summary": False},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "lightning-ft", "parser_mode": mode, command: {"parser_mode": mode}},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=([command] if run else []) + [self._help_of_default(word) for word in argv],
            run=run,
        )

    # ------------------------------------------------------------ the parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """One alone: building the parsers of all four takes four times as long."""
        return {self.command: _FILLED}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run's name and the slots; SFT and SFTData unless a class is named."""
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the run; all that it writes lies in runs/NAME below trainer.default_root_dir. "
            "By default the first --config file's name.",
        )
        parser.add_argument(  # of every command, since all read the config that a fit has saved
            "--baselines",
            type=bool,
            default=False,
            help="fit of MultiTask: then train each task alone for as many of its rows, and print what sharing has brought.",
        )
        if self.command == "predict":
            parser.add_argument(
                "--output",
                type=str | None,
                default=None,
                help="The file to write, a line of JSON for each row. By default predictions.jsonl in the run's folder.",
            )
        add_slots(parser, self.slots)
        parser.set_defaults(
            {key: {"class_path": f"{cls.__module__}.{cls.__qualname__}"} for key, cls in self.default_classes.items()}
        )

    def _help_of_default(self, word: str) -> str:
        """``--model.help`` alone would describe LightningModule; here it means the default class."""
        cls = self.default_classes.get(word.removeprefix("--").removesuffix(".help"))
        return f"{word}={cls.__module__}.{cls.__qualname__}" if cls and word.endswith(".help") else word

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Without LightningCLI's warning about ``args`` beside ``sys.argv``: `main` gives them on purpose."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        config = self.config[self.command] if "subcommand" in self.config else self.config
        if not isinstance(config["trainer"], Namespace):
            place = Parser.files.where("trainer")
            raise Refusal(f"trainer{place} takes keys, as in trainer.max_epochs, got {config['trainer']}.")
        refuse_joined_names(config, self.slots)

    def _parse_ckpt_path(self) -> None:
        """Checks the checkpoint, and lets what the user wrote stand.

        LightningCLI would overwrite the model's arguments with those in the file, flags of this very command included.
        """
        config = self.config[self.command] if "subcommand" in self.config else self.config
        given = config.get("ckpt_path")
        config["name"] = config.get("name") or self._default_name(given)
        if given and given != "hpc" and "://" not in str(given):  # hpc: what SLURM saved
            self.checkpoint = checkpoint_argument.resolve(str(given), self.run_path(config))
            ours = str(config["model"]["class_path"]).startswith("lightning_ft.")
            ours = ours or any(config.get(slot) is not None for slot in self.slots)
            checkpoint = checkpoint_argument.check(self.checkpoint, resume=self.command == "fit", ours=ours)
            resume = self.command == "fit"
            checkpoint_argument.compare(self.checkpoint, checkpoint, config, self.slots, resume=resume)
            self.resumed_step = int(checkpoint.get("global_step", 0))
            config["ckpt_path"] = str(self.checkpoint)
        if self.command == "predict":
            self.predictions = checked_file(config.output) if config.output else free_file(self.run_path(config))
            config.return_predictions = bool(config.return_predictions)  # else all of them would be kept in memory
        trainer = config["trainer"]
        if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            # A stream of tasks knows how many epochs it has.
            streams = str(config["data"]["class_path"]).rpartition(".")[2] == "TaskStream"
            trainer.max_epochs = -1 if streams else DEFAULT_EPOCHS

    def _default_name(self, checkpoint: str | None) -> str:
        inside = folder_of(checkpoint) if checkpoint and checkpoint not in checkpoint_argument.WORDS else None
        if inside is not None and inside.parent.name == "runs":
            return inside.name
        name = Parser.files.paths[0].stem if Parser.files.paths else "run"
        trial = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        return f"{name}-{trial}" if trial else name  # a sweep's trials share one config, and may run at once

    def run_path(self, config: Any) -> Path:
        """Where a fit with this configuration writes; where it goes on, when it resumes a run that lies in ``runs``."""
        return Path(config["trainer"]["default_root_dir"] or ".") / "runs" / config["name"]

    # ------------------------------------------------------------ the objects

    def instantiate_classes(self) -> None:
        """A constructor's refusal as it was raised: the parser wraps it into its own text about unions."""
        try:
            super().instantiate_classes()
        except Refusal:
            raise
        except ValueError as error:
            at: BaseException | None = error
            while at is not None:
                if isinstance(at, Refusal):
                    raise at from None
                at = at.__cause__ or at.__context__
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Our run folder, logger, checkpoints and slots beside whatever the user configured."""
        config = self._get(self.config_init, "trainer")
        if type(self.datamodule).__module__.startswith("lightning_ft."):
            kwargs["use_distributed_sampler"] = False  # ours splits rows itself, without repeating any
        if self.command != "fit":
            return super().instantiate_trainer(logger=config["logger"] or False, **kwargs)
        path = self.run_path(self.config[self.command])
        kwargs["default_root_dir"] = path
        if config["logger"] is not False:
            own = MetricsLogger(path, resumed_step=self.resumed_step if self.resumes_in(path) else None)
            others = config["logger"] if isinstance(config["logger"], list) else [config["logger"]]
            kwargs["logger"] = [own, *(logger for logger in others if logger not in (None, True))]
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        slots = filled(self.config_init[self.command], self.slots)
        ours = bool(slots) or hasattr(self.model, "lightning_ft_module")  # else it is plain Lightning
        config["strategy"] = strategy_of(config.get("strategy"), ours=ours)
        callbacks = [*callbacks, *slots]
        has_own = any(isinstance(one, Checkpoint) for one in (given if isinstance(given, list) else [given]))
        if self.command != "fit" and self.checkpoint is None and not has_own:
            config["enable_checkpointing"] = False
        elif self.command != "fit" and not has_own:  # writes nothing; else Lightning warns that it is not there
            assert self.checkpoint is not None
            callbacks.append(ModelCheckpoint(self.checkpoint.parent, save_last=True))
        if self.predictions is not None:
            callbacks.append(PredictionFile(self.predictions))
        elif self.command == "fit" and not config.get("fast_dev_run"):
            path = Path(config["default_root_dir"])
            callbacks += [
                DiskCheck(path),
                StepLog(thin=config.get("log_every_n_steps") is None),
                Throughput(),
                RunSummary(),
            ]
            if config.get("enable_checkpointing") is not False and not has_own:
                callbacks.append(ModelCheckpoint(path / CHECKPOINTS, filename="{epoch}-{step}", save_last=True))
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise Refusal(f"The trainer cannot be built: {error}") from error

    def resumes_in(self, path: Path) -> bool:
        """Whether the checkpoint that is resumed lies in the folder that this run writes to."""
        return self.checkpoint is not None and path.resolve() in self.checkpoint.resolve().parents

    # ------------------------------------------------------------ the run

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing yet: LightningCLI would run inside its constructor, and nobody could ask this object afterwards."""

    def start(self) -> None:
        """Runs the command; a fit claims its folder first, and gives it back untouched if it fails before a step."""
        if self.command == "fit":
            refuse_lwf_alone(self.trainer, self.datamodule)
        check_files = getattr(self.datamodule, "check_files", None)
        if check_files is not None:
            check_files(self.command)  # before a model is loaded, which takes longer than reading a file
        wants_baselines = self.command == "fit" and self.config["fit"].get("baselines")
        if wants_baselines:
            slots = [slot for slot in self.slots if self.config["fit"].get(slot) is not None]
            refuse_baselines(self.model, self.datamodule, self.trainer, slots)
        if self.command != "fit" or self.config["fit"]["trainer"]["fast_dev_run"] or rank() != 0:
            super()._run_subcommand(self.command)
            return
        path = self.run_path(self.config["fit"])
        resume = self.resumes_in(path)
        if not resume:
            refuse_inputs_inside(path, self.config["fit"].as_dict())
        self.folder = RunFolder.claim(path, resume=resume)
        try:
            super()._run_subcommand(self.command)
        except BaseException:
            if self.trainer.global_step == 0:
                self.folder.abandon()
            raise
        finally:
            self.folder.release()
            if self.folder.moved_to is not None:
                say(f"{path} already held a run, which is now {self.folder.moved_to}.")
        last = self.last_checkpoint()
        if last is not None:
            say(f"The run lies in {path}. {self.what_next(last)}")
        if wants_baselines:
            train_baselines(self.argv, path, self.model, self.datamodule, self.trainer, slots)

    def what_next(self, last: Path) -> str:
        """The command that shows best what a run's last checkpoint can do."""
        if getattr(self.model, "writes", True):
            return f"Ask it: lightning-ft generate --ckpt_path {last} --prompt TEXT"
        if not hasattr(self.datamodule, "test_path"):
            # A stream or a mixture: several files, which the run's config names.
            return f"Measure it: lightning-ft validate --ckpt_path {last}"
        kept = any(getattr(self.datamodule, name, None) for name in ("test_path", "test_classes", "tasks"))
        measure = f"Measure it: lightning-ft test --ckpt_path {last}{'' if kept else ' --data.test_path FILE'}"
        if not hasattr(self.model, "adapt_") or self.model.base is None:
            return measure
        return f"{measure}. Adapt it: lightning-ft adapt --ckpt_path {last} --support FILE --output FOLDER"

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint of this run, to tell the user after it was interrupted."""
        return newest_checkpoint(self.folder.path) if self.folder is not None else None


def refuse_lwf_alone(trainer: Trainer, data: object) -> None:
    """Refuses LwF in a command without tasks: its teacher is the end of a task before, and one command is one fit.

    (In Python several fits of one callback are tasks, too.)
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not hasattr(data, "tells_tasks") and any(isinstance(one, LwF) for one in callbacks):
        raise Refusal(
            f"LwF teaches what the model said at the end of the last task, and {type(data).__name__} has no tasks, so it would do "
            "nothing; wrap the data in a TaskStream (one task is enough: the next command goes on from its checkpoint with "
            "--data.continue_from), or leave --lwf out."
        )


def refuse_inputs_inside(folder: Path, config: object, key: str = "") -> None:
    """Refuses a run that reads from the very folder that it is about to move aside (an adapter to start from, say)."""
    if isinstance(config, dict):
        for name, value in config.items():
            refuse_inputs_inside(folder, value, f"{key}.{name}".lstrip("."))
    elif isinstance(config, list):
        for value in config:
            refuse_inputs_inside(folder, value, key)
    elif isinstance(config, str) and config and folder.exists() and os.path.exists(config):
        inside = folder.resolve() in [Path(config).resolve(), *Path(config).resolve().parents]
        if inside:
            key = key.replace(".init_args", "")
            raise Refusal(f"{key} reads {config}, but this run would write to {folder}; give it another --name.")


def named_class(argv: list[str], files: ConfigFiles, key: str) -> type | None:
    """The class that the command line or its files choose for ``key``; None where they name none that can be found."""
    lines = files.lines.get(f"{key}.class_path") or files.lines.get(key)
    name = lines[-1][2] if lines and lines[-1][2] else None
    name = name or value_of(argv, f"--{key}.class_path") or value_of(argv, f"--{key}")
    if name is None:
        return None
    module, _, bare = name.rpartition(".")
    try:
        found = getattr(import_module(module or "lightning_ft"), bare, None)
    except (ImportError, ValueError):
        return None
    return found if isinstance(found, type) else None


def with_config_of_checkpoint(argv: list[str]) -> list[str]:
    """Without a --config, a checkpoint that lies in a run folder brings the configuration of its run.

    So ``lightning-ft fit --ckpt_path runs/x/checkpoints/last.ckpt`` goes on with a run, and ``test --ckpt_path ...
    --data.path other.jsonl`` measures it on other rows; flags still win.
    """
    given = value_of(argv, "--ckpt_path")
    if given is None or given in checkpoint_argument.WORDS or config_arguments(argv):
        return argv
    if "://" not in given and not Path(given).exists():  # else the run's own model.base would be called missing
        raise Refusal(f"There is no checkpoint {given}{near_file(Path(given))}.")
    folder = folder_of(given)
    return argv if folder is None else ["--config", str(folder / CONFIG), *argv]


def value_of(argv: list[str], flag: str) -> str | None:
    """The last value that a command line gives to a flag."""
    found = None
    for at, word in enumerate(argv):
        if word == flag and at + 1 < len(argv):
            found = argv[at + 1]
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found


def run(command: str, argv: list[str]) -> None:
    """Runs one of Trainer's methods from its command line."""
    quiet()
    cli = FineTuningCLI(command, argv)
    with reported(cli.last_checkpoint if command == "fit" else None):
        cli.start()
