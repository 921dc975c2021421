"""MAML and its relatives: a start from which a few gradient steps on a few examples lead far."""

from collections.abc import Sequence
from typing import Annotated, Literal, cast

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from lightning_ft.engine.adapting import AdaptingModule, Inner, Tasks, mapped
from lightning_ft.engine.episode_checks import check_steps
from lightning_ft.engine.episode_tasks import EpisodeTask
from lightning_ft.engine.episodes import Episode, MetaBatch
from lightning_ft.engine.module import DtypePolicy, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.functional.episode_losses import LossName
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.implicit_gradient import implicit_gradient
from lightning_ft.functional.inner_loop import Order, multi_step_weights
from lightning_ft.models.quantize import Mode
from lightning_ft.nn.double_backward import explained, twice_differentiable


class MAML(AdaptingModule):
    """Learns weights from which a few gradient steps on a few examples of a new task lead far.

    Minimises the mean over tasks of ``L_query(phi_k)`` with ``phi_0 = theta, phi_{j+1} = phi_j - alpha grad L_support(phi_j)``:
    the model is adapted on each task's support rows by k plain steps, and the start theta is moved so that the adapted model
    does better on the task's query rows. One training step is one meta-batch, so that accumulation, clipping, DDP and whatever
    edits gradients work as for any other objective; each task counts the same. With the data's ``EpisodeData``.

    What is trained outside is decided by callbacks (all parameters when there is none), what adapts inside by ``inner``.

    Args:
        base: the model to start from, for texts: ``starter:minilm-l6``, a local folder, or a Hugging Face id; to classify it gets
            a new head of as many classes as an episode has. None: see ``net``.
        net: any torch module instead, for tensors and images.
        task: what a base learns, by its objective's name: ``sequence_classification``, the class of a text;
            ``token_classification``, a tag of each word; ``regression``, a number of a text; ``causal_lm`` and ``seq2seq_lm``, the
            tokens of an answer, each counting the same; ``reward``, which of two answers is better, by Bradley-Terry; ``dpo``, the
            same as a policy, against the model as it was when the fit began. All but classes need tasks that a function makes, see
            `EpisodeData`.
        way: classes of an episode; None: as the data have. Of a base that classifies only.
        order: 2 differentiates through the inner steps (MAML); 1 takes the inner gradients for constants (FOMAML), at less than
            half the time and memory, and much less exact after several steps.
        steps: inner steps k in training.
        inner_lr: rate alpha of the inner steps, or where it starts if it is learned. Texts want more than the outer rate: 0.1
            for plain steps on a head.
        rates: whether inner rates are learned: ``fixed``; ``per_parameter``, one for each number (Meta-SGD); ``per_step``, one for
            each tensor and step (MAML++). Learned rates may become negative, as in both papers.
        rates_lr: peak rate at which they are learned; None: ``lr``. That of a base is too small for them: 200 steps at 2e-5
            move a rate of 0.5 by 0.004 or so; try a hundredth of ``inner_lr``.
        inner: which of the trained parameters adapt: ``all``; ``head`` (ANIL: the body is learned outside alone); ``adapter``,
            whatever LoRA, prefixes, prompts or bottleneck adapters have injected; ``adapter_and_head``; or a list of patterns
            and words as in `Freeze` (``["biases"]``). What adapts must be trained.
        multi_step: optimizer steps over which the query loss goes from the mean over all inner steps to the last one's (MAML++),
            which steadies the first phase; 0: the last one's alone.
        implicit: iMAML: strength lambda of a pull ``lambda / 2 |phi - theta|^2`` in the inner loss, whose minimum the inner steps
            are to reach; the meta-gradient is solved for there and no inner step is kept, so that ``steps`` may be many. Then
            ``order`` says nothing. Try 0.5 to 2. None: not.
        cg_steps: of conjugate gradients, for ``implicit``: each costs about two backward passes; 5 in the paper.
        inner_loss: loss of a support row (token, pair): ``auto`` (cross_entropy of classes, tags, tokens and judged pairs, mse of
            numbers, sigmoid of dpo), ``cross_entropy``, ``mse``, ``mae``, ``huber``; of dpo ``sigmoid``,
            ``ipo``, ``hinge``, ``simpo`` or another that judges each pair by itself, see `DPO`.
        outer_loss: loss of a query row, likewise.
        beta: of dpo: how strongly the policy is held to its reference; None: 0.1.
        eval_steps: numbers of inner steps after which validation and test measure each episode; None: 0, 1, 5 and 10. That of
            training always is one.
        tasks: ``at_once`` maps tasks by `torch.vmap`, fast for small nets, with a memory that grows with the meta-batch;
            ``one_by_one`` keeps one task's graph at a time; ``auto`` takes the first where episodes are tensors of one shape and
            it was found to give the same losses.
        lr: peak rate of the outer optimizer; None takes what the technique suggests, 2e-5 for a whole base, 1e-3 for a net.
        head_lr: peak rate of a base's new head; None: ``lr``.
        weight_decay: AdamW's decay of trained matrices; 0 makes it Adam, as in the papers. Never of learned rates.
        warmup_steps: optimizer steps over which the rate rises from zero.
        schedule: how the rate falls after the warm-up.
        optimizer: a factory of another torch optimizer for the outer loop; None is AdamW, fused, betas .9 and .999.
        base_dtype: of frozen weights. float32, since second derivatives in bfloat16 are coarse; ``auto`` as in `SFT`.
        attention: of a base: ``auto``, ``lightning_ft``, ``sdpa`` or ``eager``. Whatever it is, kernels without a second
            derivative are never used in inner steps of order 2.
        trust_remote_code: run Python code that the model's repository brings; only for authors you trust.
        revision: branch, tag or commit of a Hugging Face id; None is its main branch.
        quantize: pack the weights of the base's linear layers, which stay frozen then, see `SFT`. To order 2 only where the packed
            layers' second derivative is found to be right.

    Logs:
        ``train/loss`` (mean query loss after adapting) and, of classes, ``train/accuracy``; ``val/loss``, ``val/accuracy`` after
        ``steps``, and for each s of ``eval_steps`` ``val/step_s/loss``, ``val/step_s/accuracy``; beside each ``..._ci95``, half the
        width of the 95 % interval over episodes.

    Differs from:
        Finn et al., 2017: dropout is off, and a net runs in evaluation mode but for its norms; batch norms with running
        statistics are refused, since all tasks would share them.

    Raises:
        Refusal: for arguments out of bounds here; when the run begins for FSDP2, fp16, a technique's dropout, a net that draws at
            random in every mode, torch.compile, activation checkpointing, or an ``inner`` that names nothing.

    Example:
        >>> MAML(net=torch.nn.Linear(1, 1), order=1, inner_lr=0.01).order
        1

    References:
        Finn et al., 2017, equations 1 and 2; Raghu et al., 2020 (ANIL); Li et al., 2017 (Meta-SGD); Antoniou et al., 2019
        (MAML++); Rajeswaran et al., 2019 (iMAML). Proven against finite differences in float64 and a plain loop of torch.func in
        tests/modules.
    """

    def __init__(
        self,
        base: str | None = None,
        *,
        net: nn.Module | None = None,
        task: EpisodeTask = "sequence_classification",
        way: Annotated[int, Ge(2)] | None = None,
        order: Order = 2,
        steps: Annotated[int, Ge(1)] = 1,
        inner_lr: Annotated[float, Gt(0)] = 0.01,
        rates: Literal["fixed", "per_parameter", "per_step"] = "fixed",
        rates_lr: Annotated[float, Gt(0)] | None = None,
        inner: Inner | list[str] = "all",
        multi_step: Annotated[int, Ge(0)] = 0,
        implicit: Annotated[float, Gt(0)] | None = None,
        cg_steps: Annotated[int, Ge(1)] = 5,
        inner_loss: LossName = "auto",
        outer_loss: LossName = "auto",
        beta: Annotated[float, Gt(0)] | None = None,
        eval_steps: list[int] | None = None,
        tasks: Tasks = "auto",
        lr: Annotated[float, Gt(0)] | None = None,
        head_lr: Annotated[float, Gt(0)] | None = None,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        warmup_steps: Annotated[int, Ge(0)] = 0,
        schedule: Schedule = "constant",
        optimizer: OptimizerFactory | None = None,
        base_dtype: DtypePolicy = "float32",
        attention: Literal["auto", "lightning_ft", "sdpa", "eager"] = "auto",
        trust_remote_code: bool = False,
        revision: str | None = None,
        quantize: Mode | None = None,
    ) -> None:
        super().__init__(
            base,
            net=net,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
            optimizer=optimizer,
            base_dtype=base_dtype,
            attention=attention,
            trust_remote_code=trust_remote_code,
            revision=revision,
            quantize=quantize,
            task=task,
        )
        self.way = way
        self.order = order
        self.steps = steps
        self.inner_lr = inner_lr
        self.rates = rates
        self.rates_lr = rates_lr
        self.inner = inner
        self.multi_step = multi_step
        self.implicit = implicit
        self.cg_steps = cg_steps
        self.inner_loss = inner_loss
        self.outer_loss = outer_loss
        self.beta = beta
        self.eval_steps = eval_steps
        self.tasks = tasks
        self.head_lr = head_lr
        self.check()
        check_steps("MAML", eval_steps)
        if implicit is not None:
            if rates != "fixed" or multi_step:
                raise Refusal(
                    "MAML.implicit keeps no inner step that learned rates or multi_step could get a gradient through; leave them "
                    "out."
                )
            self.no_likelihood = "with implicit solves for the gradient of a task, which no likelihood has"
        if head_lr is not None and base is None:
            raise Refusal("MAML.head_lr belongs to the new head of a base; leave it out for a net.")
        if rates_lr is not None and rates == "fixed":
            raise Refusal(
                "MAML.rates_lr is of learned rates, and rates is fixed; leave it out, or set rates to per_step."
            )
        self.inner_rates = nn.ParameterDict()

    # -- rates ----------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Also makes the learned rates, which join the trained parameters; those of an earlier run go on where it ended."""
        super()._prepare()
        if self.rates == "fixed":
            return
        parameters = dict(self.named_parameters())
        sizes = {n: parameters[n].numel() if self.rates == "per_parameter" else self.steps for n in self.inner_names}
        for key in set(self.inner_rates) - {_key(name) for name, size in sizes.items() if self._learned(name, size)}:
            del self.inner_rates[key]
        for name, size in sizes.items():
            if _key(name) in self.inner_rates:
                self.inner_rates[_key(name)].requires_grad_(True)  # whatever this run freezes of the net
                continue
            p = parameters[name]
            # In one dimension, so that weight decay, which acts on matrices, leaves it alone.
            rate = torch.full((size,), self.inner_lr, dtype=torch.float32, device=p.device)
            self.inner_rates[_key(name)] = nn.Parameter(rate)

    def _wanted(self) -> set[str]:
        """All but the rates, which an earlier run may have made."""
        return {name for name in super()._wanted() if not name.startswith("inner_rates.")}

    def own_rates(self) -> dict[str, float]:
        """Also that of learned rates."""
        factor = 1.0 if self.rates_lr is None else self.rates_lr / self.resolved_lr()
        return {**super().own_rates(), **{f"inner_rates.{key}": factor for key in self.inner_rates}}

    def _learned(self, name: str, size: int) -> bool:
        """Whether there are rates of a weight, of this many numbers."""
        return _key(name) in self.inner_rates and cast(Tensor, self.inner_rates[_key(name)]).numel() == size

    @property
    def fixed_rate(self) -> float | None:
        """See `AdaptingModule.fixed_rate`."""
        return self.inner_lr if self.rates == "fixed" else None

    def step_rates(self, step: int) -> dict[str, Tensor | float]:
        """The rate of each weight at a step of the inner loop, from 0; after the last learned step that step's."""
        if self.fixed_rate is not None:
            return dict.fromkeys(self.inner_names, self.fixed_rate)
        own = {name: cast(Tensor, self.inner_rates[_key(name)]) for name in self.inner_names}
        if self.rates == "per_step":
            return {name: rate[min(step, self.steps - 1)] for name, rate in own.items()}
        parameters = dict(self.named_parameters())
        return {name: rate.view(parameters[name].shape) for name, rate in own.items()}

    # -- steps ----------------------------------------------------------------------------------------------------------

    def training_step(self, batch: MetaBatch, batch_idx: int) -> Tensor:
        """One meta-batch: the sum of its tasks' query losses, divided by the window's number of tasks."""
        if self.implicit is None and self.maps_tasks(batch):
            stacked = batch.stacked
            assert stacked is not None
            losses, hits = mapped(lambda episode: self._task(episode, transform=True), stacked)
            total, correct = losses.sum(), hits.sum() if self.classifies else None
        else:
            gradients = self._with_gradients if self.implicit is None else self._solved
            total, correct = self.accumulated(batch, gradients)
            correct = correct if self.classifies else None
        return self._hand_over("maml", batch, total, correct)

    def _with_gradients(self, episode: Episode) -> tuple[Tensor, Sequence[Tensor | None], Tensor]:
        task = self._task(self.referred(episode), transform=False)
        try:
            return self.differentiated(*task)
        except RuntimeError as error:
            raise explained(error, "MAML") from error

    def _solved(self, episode: Episode) -> tuple[Tensor, Sequence[Tensor | None], Tensor]:
        """The same by the implicit function theorem, at the end of the inner steps."""
        assert self.implicit is not None
        episode, theta = self.referred(episode), self.start()
        inside = {id(p) for p in theta.values()}
        others = [p for p in self.trained() if id(p) not in inside]
        phi = {name: weight.requires_grad_() for name, weight in self.adapt(episode.support).items()}
        outputs = self.outputs(phi, episode.query.inputs)
        loss = self.loss(self.outer_loss, outputs, episode.query.targets)
        asked = [*phi.values(), *others]
        slopes = torch.autograd.grad(loss, asked, allow_unused=True, materialize_grads=True)
        with twice_differentiable():
            inner = self.outputs(phi, episode.support.inputs)
        inner_loss = self.loss(self.inner_loss, inner, episode.support.targets)
        try:
            solved, beside = implicit_gradient(
                inner_loss, list(phi.values()), slopes[: len(phi)], others, lam=self.implicit, steps=self.cg_steps
            )
        except RuntimeError as error:
            raise explained(error, "MAML") from error
        own = dict(zip((id(p) for p in theta.values()), solved, strict=True))
        through = zip(others, slopes[len(phi) :], beside, strict=True)
        own |= {id(p): slope + more for p, slope, more in through}
        hits = self.right(outputs.detach(), episode.query.targets).mean() if self.classifies else loss.detach()
        return loss.detach(), [own.get(id(p)) for p in self.trained()], hits

    def _task(self, episode: Episode, *, transform: bool) -> tuple[Tensor, Tensor]:
        """(query loss after adapting, share of the query rows that are right: of numbers some number that nobody reads)."""
        weights_of = self._step_weights()
        run = self.adapted(episode.support, steps=self.steps, order=self.order, transform=transform)
        total, hits, query = None, None, self.read(episode.query, graph=True)
        for step, weights in enumerate(run):
            share = weights_of.get(step, 0.0)
            if not share:
                continue
            outputs = self.outputs(weights, query)
            loss = self.loss(self.outer_loss, outputs, episode.query.targets)
            loss = loss if share == 1.0 else share * loss
            total = loss if total is None else total + loss
            hits = self.right(outputs.detach(), episode.query.targets).mean() if self.classifies else loss.detach()
        assert total is not None and hits is not None
        return total, hits

    def _said_with_gradient(self, episode: Episode) -> Tensor:
        *_, weights = self.adapted(episode.support, steps=self.steps, order=self.order)
        return self.outputs(weights, episode.query.inputs)

    def _step_weights(self) -> dict[int, float]:
        if not self.multi_step:
            return {self.steps: 1.0}
        progress = self.trainer.global_step / self.multi_step
        if progress >= 1:
            return {self.steps: 1.0}
        return dict(enumerate(multi_step_weights(self.steps, progress), start=1))


def _key(name: str) -> str:
    """A parameter's name as a key of a `ParameterDict`, which takes no dots."""
    return name.replace(".", "/")
