"""Teachers that are the student itself at an earlier time. They have no files of their own; `flows.distill.next_teacher` says
which model such a teacher is in a round. Round 1 is scored by the initial student, whatever the kind."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from storage.identity import Identity
from tasks.inputs.models import ArchitectureModel, CheckpointModel, HubModel, ServedModel


class InitialStudent(Identity):
    """The student before distillation, after its warm-up, in every round. With LoRA that is the base under the adapters.
    SDFT (2601.19897) has it by default."""

    kind: Literal["initial"] = "initial"
    equation: ClassVar[str] = "q_n = p_0(. | c)"
    paper: ClassVar[str] = "2601.19897"


class PreviousRound(Identity):
    """The student that wrote the round's rollouts. Between its steps a round keeps one teacher, so the student moves away from
    it; with one step per round the teacher is the live student."""

    kind: Literal["previous_round"] = "previous_round"
    equation: ClassVar[str] = "q_n = p_(n-1)(. | c)"
    paper: ClassVar[str] = ""


class EmaStudent(Identity):
    """An exponential moving average of the student's float32 weights (with LoRA: of the adapters), which begins as the initial
    student. Round n is scored by the average after round n - 1. SDPO (2601.20802) and SRPO (2604.02288) average after every
    optimizer step with 1 - decay = 0.05 and ask the average of that step; here a teacher stays the same within a round.

    The trainer keeps it in `trainer_state` and exports it as `teacher_ema`, in the dtype of the student."""

    kind: Literal["ema"] = "ema"
    equation: ClassVar[str] = "q_n = p_(t_(n-1))(. | c), t <- decay t + (1 - decay) theta, t_0 = theta_0"
    paper: ClassVar[str] = "2601.20802"

    decay: float = Field(0.95, gt=0, lt=1, description="weight of the average's own value in every update")
    per: Literal["round", "step"] = Field(
        "round", description="when it is updated: once, after the round's last step, or after every optimizer step"
    )


SelfTeacher = InitialStudent | PreviousRound | EmaStudent
TeacherSource = Annotated[
    CheckpointModel | HubModel | ArchitectureModel | ServedModel | InitialStudent | PreviousRound | EmaStudent,
    Field(discriminator="kind"),
]
SELF_TEACHERS: dict[str, type[SelfTeacher]] = {
    "initial": InitialStudent,
    "previous_round": PreviousRound,
    "ema": EmaStudent,
}
"""Kind -> class."""


def is_self(source: Any) -> bool:
    """Whether a teacher's source is the student itself."""
    return isinstance(source, SelfTeacher)
