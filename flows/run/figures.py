"""The figures of a round as they are shown: one table for terminal, pages, cards and studies. What they mean and their standard
errors: `storage.query.figures`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """A metric of a round. `heading`: of its column; `form`: of its value; `name`: in a sentence; `unit`: where it has one."""

    metric: str
    heading: str
    form: str
    name: str
    unit: str = ""

    @property
    def with_unit(self) -> str:
        """`length (tokens)`."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


EVALUATED = (
    Shown("accuracy_greedy", "accuracy", "{:.1%}", "accuracy"),
    Shown("accuracy_sampled", "sampled", "{:.1%}", "sampled accuracy"),
    Shown("reverse_kl", "reverse KL", "{:.4f}", "reverse KL", "nats per token"),
    Shown("mean_length", "length", "{:.1f}", "length", "tokens"),
    Shown("clipped_ratio", "clipped", "{:.1%}", "clipped"),
)
"""What an evaluation measures, each with a standard error. `accuracy` is greedy."""
SAMPLED = Shown("rollout_tokens", "tokens", "{:,.0f}", "tokens sampled for training")
REWARD = Shown("judge_reward", "reward", "{:.3f}", "mean reward of the rollouts")
DIAGNOSED = (
    Shown("judge_success_rate", "right", "{:.1%}", "right rollouts"),
    Shown("judge_length_correct", "length right", "{:.1f}", "length of right rollouts", "tokens"),
    Shown("judge_length_wrong", "length wrong", "{:.1f}", "length of wrong rollouts", "tokens"),
    Shown("judge_groups_without_signal", "no signal", "{:,.0f}", "groups without signal"),
    Shown("train_routed_samples", "routed", "{:.1%}", "routed samples"),
    Shown("train_overlap_ratio_last", "overlap", "{:.2f}", "overlap of the top K, last step"),
    Shown("train_student_entropy_last", "entropy", "{:.3f}", "entropy of the student, last step", "nats"),
    Shown("train_teacher_entropy_last", "teacher entropy", "{:.3f}", "entropy of the teacher, last step", "nats"),
)
"""What the papers watch beside the figures of an evaluation; the judge's with standard errors. More by position and by token:
the named questions `overlap`, `entropy-by-position`, `lengths`, `reward-by-round`."""
TRAINED = (
    Shown("train_loss", "training loss", "{:.4f}", "training loss"),
    Shown("train_reverse_kl", "training reverse KL", "{:.4f}", "training reverse KL"),
    Shown("train_tokens", "trained tokens", "{:,.0f}", "trained tokens"),
)
"""Of a training, by teacher where there are several."""
BY_METRIC = {shown.metric: shown for shown in (*EVALUATED, SAMPLED, REWARD, *DIAGNOSED, *TRAINED)}
MAIN = (BY_METRIC["accuracy_greedy"], BY_METRIC["reverse_kl"])
"""Where there is room for two."""
PAIRED = EVALUATED[:3]
"""Of which differences between rounds and runs are shown."""
