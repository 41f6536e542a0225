"""What is one run? A student that learns a teacher, and the row that it ends in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moe_lens.granularity.configurations import realised
from moe_lens.granularity.draws import generator, inputs
from moe_lens.granularity.fit import Target, affine_fit
from moe_lens.granularity.layer import MoE
from moe_lens.granularity.shapes import Kind, Shape, active_of_student
from moe_lens.granularity.train import Recipe, train

FIT_TOKENS = 131_072
"""Tokens that the affine map is fitted on."""
TEST_TOKENS = 8_192
"""Tokens that everything is judged on."""
ROUTED_TOKENS = 32_768
"""Tokens whose routing is looked at; the same that are recorded."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        hidden: d, of inputs and outputs.
        kind: What experts compute, of both layers.
        teacher: Its shape; its router has no bias.
        student: Its shape.
        gate_bias: The student's router has a bias.
        learning_rate: Of the first epoch.
        seed: Of all that is drawn; teacher and student are drawn apart.
    """

    hidden: int
    kind: Kind
    teacher: Shape
    student: Shape
    gate_bias: bool = False
    learning_rate: float = 1e-2
    seed: int = 0

    @property
    def name(self) -> str:
        """What it is called among others of its kind, hidden size and seed."""
        bias = " bias" if self.gate_bias else ""
        rate = f" lr {self.learning_rate:g}"
        return f"{self.teacher.name} > {self.student.name} w{self.student.width}{bias}{rate}"

    @property
    def width_factor(self) -> float:
        """The student's width over that of as many active neurons as the teacher's and a quarter.

        Constant experts have none: 1.
        """
        if self.kind == "constant":
            return 1.0
        return self.student.width / max(active_of_student(self.hidden) // self.student.top_k, 1)

    @property
    def experts_factor(self) -> float:
        """The student's experts over twice its k."""
        return self.student.experts / (2 * self.student.top_k)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a run ended in: its setting, name by name, and what was found.

    Attributes:
        nmse: Mean squared error over that of predicting zero, at the end of the training.
        nmse_min: The least of it after an epoch, as the paper reports it.
        fvu: Mean squared error over that of predicting the mean, at the end.
        affine_nmse: Of the best affine map.
        affine_fvu: Likewise.
        zero_fvu: Of predicting zero; its NMSE is 1.
        sets_used: Different sets of experts that the trained student chose.
        sets_tokens: Of so many tokens.
        sets_bits: log2 of the sets that there are.
        seconds: Of the training, wall clock.
        device: It ran on.
        gate: The trained router's weights, expert by expert, for its routing to be looked at.
        gate_bias_values: Its biases; empty where it has none.
    """

    hidden: int
    kind: str
    teacher: str
    teacher_experts: int
    teacher_top_k: int
    teacher_width: int
    student: str
    experts: int
    top_k: int
    width: int
    gate_bias: bool
    width_factor: float
    experts_factor: float
    learning_rate: float
    seed: int
    steps: int
    batch: int
    name: str
    nmse: float
    nmse_min: float
    fvu: float
    affine_nmse: float
    affine_fvu: float
    zero_fvu: float
    sets_used: int
    sets_tokens: int
    sets_bits: float
    seconds: float
    device: str
    gate: list[float]
    gate_bias_values: list[float]


@dataclass(frozen=True)
class Judge:
    """A teacher, the sample to be judged on, and what learns nothing makes of it."""

    teacher: MoE
    target: Target
    affine_error: float


def teacher_of(run: Run) -> MoE:
    """The layer to be learned: of the seed and its shape alone."""
    shape = run.teacher
    drawn = generator(run.seed, "teacher", run.hidden, shape.experts, shape.top_k)
    return MoE(shape, run.hidden, run.kind, drawn).requires_grad_(False)


def routed_inputs(hidden: int, seed: int) -> Tensor:
    """x_TD, the tokens whose routing is looked at."""
    return inputs(ROUTED_TOKENS, hidden, generator(seed, "routing", hidden), "cpu")


def execute(run: Run, recipe: Recipe, device: str, on_step: Callable[[], None]) -> Row:
    """Train one student and judge it.

    Args:
        run: What is to be trained.
        recipe: How long and how.
        device: "cpu" or a CUDA device.
        on_step: Called after every step.
    """
    judge = _judge(_of_teacher(run), device)
    student_shape = run.student
    drawn = generator(
        run.seed, "student", run.hidden, student_shape.experts, student_shape.top_k,
        student_shape.width,
    )  # fmt: skip
    student = MoE(student_shape, run.hidden, run.kind, drawn, gate_bias=run.gate_bias).to(device)
    judged = train(
        student,
        judge.teacher,
        judge.target,
        recipe,
        learning_rate=run.learning_rate,
        drawn=_training_inputs(run, device),
        on_step=on_step,
    )
    target = judge.target
    student = student.cpu()
    with torch.no_grad():
        ids_TK = student.route(routed_inputs(run.hidden, run.seed))[2]
    sets = realised(ids_TK, student_shape.experts)
    return Row(
        hidden=run.hidden,
        kind=run.kind,
        teacher=run.teacher.name,
        teacher_experts=run.teacher.experts,
        teacher_top_k=run.teacher.top_k,
        teacher_width=run.teacher.width,
        student=student_shape.name,
        **asdict(student_shape),
        gate_bias=run.gate_bias,
        width_factor=run.width_factor,
        experts_factor=run.experts_factor,
        learning_rate=run.learning_rate,
        seed=run.seed,
        steps=recipe.steps,
        batch=recipe.batch,
        name=run.name,
        nmse=judged.last / target.power,
        nmse_min=judged.least / target.power,
        fvu=judged.last / target.variance,
        affine_nmse=judge.affine_error / target.power,
        affine_fvu=judge.affine_error / target.variance,
        zero_fvu=target.power / target.variance,
        sets_used=sets.used,
        sets_tokens=sets.tokens,
        sets_bits=sets.possible_bits,
        seconds=judged.seconds,
        device=device,
        gate=student.gate_ED.detach().flatten().tolist(),
        gate_bias_values=[] if student.gate_E is None else student.gate_E.detach().tolist(),
    )


def _of_teacher(run: Run) -> Run:
    """The same run for all that a judge depends on."""
    return Run(
        hidden=run.hidden, kind=run.kind, teacher=run.teacher, student=run.teacher, seed=run.seed
    )


@lru_cache(maxsize=2)
def _judge(run: Run, device: str) -> Judge:
    teacher = teacher_of(run)
    with torch.no_grad():
        fit_TD = inputs(FIT_TOKENS, run.hidden, generator(run.seed, "fit", run.hidden), "cpu")
        affine = affine_fit(
            fit_TD, torch.cat([teacher(part) for part in torch.split(fit_TD, 8_192)])
        )
        test_TD = inputs(TEST_TOKENS, run.hidden, generator(run.seed, "test", run.hidden), "cpu")
        target = Target.of(test_TD, teacher(test_TD))
    error = target.error(affine)
    moved = Target(target.x_TD.to(device), target.y_TD.to(device), target.power, target.variance)
    return Judge(teacher.to(device), moved, error)


def _training_inputs(run: Run, device: str) -> torch.Generator:
    """Draws where the inputs are needed: a GPU would wait for the host's draws.

    All students of a teacher see the same tokens.
    """
    drawn = generator(run.seed, "train", run.hidden)
    if device == "cpu":
        return drawn
    return torch.Generator(device).manual_seed(drawn.initial_seed())
