"""`estimator: credit`: rewards and token credit, one choice on each axis. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from tasks.losses.axes import FullSupport, Normalised, TopkSupport
from tasks.losses.needs import CreditNeeds, Needs, SignalNeed, StudentRequest, everything
from tasks.losses.token_credit.additions import ADDITIONS, Addition, NoAddition
from tasks.losses.token_credit.beside import Beside, Clip, Likelihood, Reference
from tasks.losses.token_credit.returns import RETURNS, Return, TokenReturn
from tasks.losses.token_credit.rewards import REWARDS, NoReward, Reward
from tasks.losses.token_credit.routes import ROUTES, Everywhere, Route
from tasks.losses.token_credit.scales import SCALES, NoScale, Scale

if TYPE_CHECKING:
    RewardField = Reward
    ScaleField = Scale
    AdditionField = Addition
    ReturnField = Return
    RouteField = Route
else:
    RewardField = REWARDS.annotation(names=True)
    ScaleField = SCALES.annotation(names=True)
    AdditionField = ADDITIONS.annotation(names=True)
    ReturnField = RETURNS.annotation(names=True)
    RouteField = ROUTES.annotation(names=True)


class CreditConfig(Normalised):
    """Rewards and token credit: group-relative policy optimisation, a teacher's log-ratios and a divergence beside them.

    Each choice is one field: the reward's advantage, what scales it, what is added, where each term counts, and the divergence.
    The family of SRPO (2604.02288); `configs/recipes/` has its methods, each a few lines."""

    estimator: Literal["credit"] = "credit"
    equation: ClassVar[str] = (
        "a PPO(rho, m A + delta) + b w c D(q', p), rho = p(y) / sg(p_old(y)),"
        " PPO(rho, A) = -min(rho A, clip(rho, 1 - low, 1 + high) A)"
    )
    paper: ClassVar[str] = "2604.02288"

    reward: RewardField = Field(NoReward(), description="A: the advantage of a sample from the rewards of its group")
    scale: ScaleField = Field(NoScale(), description="m: what multiplies A at a token")
    add: AdditionField = Field(NoAddition(), description="delta: what is added at a token, after m")
    returns: ReturnField = Field(TokenReturn(), description="how delta at later tokens counts for a token")
    route: RouteField = Field(Everywhere(), description="a and b: where the policy gradient and the divergence count")
    beside: Beside | None = Field(None, description="the divergence beside the policy gradient; null: none")
    likelihood: Likelihood | None = Field(
        None, description="a likelihood term of tokens that the teacher prefers; null: none"
    )
    reference: Reference | None = Field(None, description="a penalty for leaving a reference model; null: none")
    ratio: Literal["ppo", "none"] = Field(
        "ppo", description="rho = p(y) / p_old(y), clipped; `none`: 1, the gradient of A log p(y)"
    )
    clip: Clip | None = Field(None, description="clip of rho, as PPO; null: none")
    advantage_at: Literal["rollout", "live"] = Field(
        "rollout", description="d of the student that wrote the rollouts, or of the live one at each step"
    )
    log_ratio_clip: float = Field(40.0, gt=0, le=60, description="d is clipped to +- this, against overflow")
    log_rho_clip: float = Field(20.0, gt=0, le=40, description="log rho is clipped to +- this, against overflow")
    last_token: bool = Field(
        True,
        description="false: the stop token that ends a completion is left out of the loss and its denominator (PowerOPD)",
    )
    denominator: Literal["all", "own"] | None = Field(
        None,
        description="each term is divided by the number of all tokens, or of its own (those with a, with b > 0, ...); null: `all`"
        " where the terms share the tokens (routes srpo and spans), else `own`",
    )

    @property
    def policy(self) -> bool:
        """Whether there is a policy gradient."""
        return self.route.policy and (self.reward.uses_rewards or self.add.kind != "none")

    @property
    def distils(self) -> bool:
        """Whether the teacher is in the loss, other than as a reference."""
        compared = self.beside is not None or self.likelihood is not None
        return compared or self.add.kind != "none" or self.scale.kind != "none"

    @property
    def reads_teacher(self) -> bool:
        """Whether the loss reads anything of the teacher."""
        return self.distils or (self.reference is not None and self.reference.to == "teacher")

    @property
    def own_denominators(self) -> bool:
        """Whether each term is divided by the number of its own tokens."""
        return (self.denominator or ("all" if self.route.splits else "own")) == "own"

    @property
    def lists(self) -> TopkSupport | FullSupport | None:
        """The support of the lists that any term reads."""
        found = self.beside.support if self.beside is not None else None
        return found or self.add.lists or self.scale.lists

    @property
    def support(self) -> TopkSupport | FullSupport | None:
        """As `lists`: what checks of other objectives ask for."""
        return self.lists

    @model_validator(mode="after")
    def _sensible(self) -> CreditConfig:
        for problem in _problems(self):
            raise ValueError(problem)
        return self

    @property
    def requires_untruncated_sampling(self) -> bool:
        """A policy gradient of the sampled token holds for exact samples, and so does what only its log-probability is in."""
        beside = self.beside
        sequence = beside is not None and beside.sequence_gradient is not None
        return self.policy or sequence or self.likelihood is not None or self.reference is not None

    def needs(self) -> Needs:
        """Log-probabilities of the sampled tokens, the lists of the divergence, rewards, contexts and what each choice reads."""
        student = StudentRequest(token_logprobs=True)
        metrics = StudentRequest(token_logprobs=True, entropy=True)
        signals: tuple[SignalNeed, ...] = ()
        if (support := self.lists) is not None:
            signals = {
                "teacher_topk": (SignalNeed("teacher_topk", support.k),),
                "full": (SignalNeed("teacher_topk", support.k),),
                "student_topk": (SignalNeed("student_topk", support.k),),
                "union": (SignalNeed("teacher_topk", support.k), SignalNeed("student_topk", support.k)),
            }[support.kind]
            student = replace(student, support=support.kind, log_normaliser=True, tail=support.outside == "bucket")
            metrics = everything(support.kind)
        weight = None if self.beside is None else self.beside.weight
        credit = CreditNeeds(
            reward=self.reward.uses_rewards,
            groups=self.reward.uses_rewards or self.returns.groups,
            teacher_entropy=(weight is not None and weight.teacher_entropy) or self.add.entropy == "teacher",
            student_entropy=self.add.entropy == "student",
            segment_ends=self.add.segments,
            contexts=self.route.contexts or self.scale.contexts or self.add.contexts,
            written=True,
            ended=not self.last_token,
            spans=self.route.spans,
            judged_segments=self.add.judged_segments,
        )
        return Needs((SignalNeed("sampled"), SignalNeed("mask"), *signals), student, metrics, credit=credit)


def _problems(c: CreditConfig) -> list[str]:
    """What does not fit together, each with what to do."""
    found: list[str] = []
    beside, reward, add, scale, route = c.beside, c.reward, c.add, c.scale, c.route
    if not c.policy and beside is None and c.likelihood is None:
        found.append(
            "reward, add, beside: nothing is trained on: give a reward, something to add, a divergence `beside`, or a likelihood"
            + (f" (route {route.kind} has no policy gradient)" if not route.policy else "")
        )
    if not route.policy and ((reward.uses_rewards and not _asks(c)) or add.kind != "none"):
        found.append(
            f"route: {route.kind} has no policy gradient (a = 0), so {'add' if add.kind != 'none' else 'reward'} has no effect;"
            " leave it out, or take another route"
        )
    if route.beside and beside is None:
        found.append(f"beside: route {route.kind} sends tokens to a divergence; give one (beside: {{divergence: jsd}})")
    if add.kind != "none" and add.of_prefix and not reward.uses_rewards:
        found.append(
            f"add: {add.kind} is a function of the prefix alone, so as the whole advantage its expected gradient is zero; give a"
            " reward, or something to add that depends on the sampled token"
        )
    if scale.kind != "none" and not reward.uses_rewards:
        found.append(
            f"scale: {scale.kind} multiplies the advantage from rewards, and there is no reward; give reward: group"
        )
    asking = [
        (f"route: {route.kind}", route.success),
        (f"scale: {scale.kind}", scale.success),
        (f"beside.weight: {beside.weight.kind}" if beside else "", beside is not None and beside.weight.success),
    ]
    for what, asks in asking:
        if asks and reward.threshold is None:
            found.append(
                f"reward.success_threshold: {what} asks which samples are correct; give reward: {{kind: group, success_threshold:"
                " 0.5} (0.5 for rewards of 0 and 1)"
            )
    if reward.drops_equal_groups and route.equal_groups:
        found.append(
            f"reward.drop_equal_groups: route {route.kind} trains on groups that all fail (or all succeed) too; set it to false"
        )
    of_beside = None if beside is None else beside.support
    lists = [
        (name, support)
        for name, support in (("beside", of_beside), ("add", add.lists), ("scale", scale.lists))
        if support is not None
    ]
    if len(lists) > 1 and len({(support.kind, support.k) for _, support in lists}) > 1:
        names = " and ".join(f"{name} {support.kind} k {support.k}" for name, support in lists)
        found.append(f"beside, add, scale: they read different lists ({names}), and a step has one; give them the same")
    if scale.live and c.advantage_at != "live":
        found.append(
            f"advantage_at: scale {scale.kind} compares both distributions on the teacher's list, which is stored of the teacher"
            " alone; set advantage_at: live"
        )
    if add.lists is not None and add.lists.kind == "full" and c.advantage_at != "live":
        found.append(
            f"advantage_at: add {add.kind} over the whole vocabulary needs the student's, which is not stored;"
            " set advantage_at: live"
        )
    if add.judged_segments and not reward.uses_rewards:
        found.append(
            "add.segments_of: the judge runs for rewards, and there are none; give reward: group, or segment_ends"
        )
    if c.returns.kind != "token":
        if add.kind == "none":
            found.append(f"returns: {c.returns.kind} sums `add` over later tokens, and nothing is added; give `add`")
        if add.remembers:
            found.append(
                f"returns: {c.returns.kind} is computed once a round, and add {add.kind} changes from step to step; use returns:"
                " token"
            )
        if c.advantage_at != "rollout" or add.lists is not None:
            found.append(
                f"returns: {c.returns.kind} sums over whole completions of stored values; set advantage_at: rollout, and an `add`"
                " without lists"
            )
    if c.ratio == "none" and c.clip is not None:
        found.append("clip: bounds the ratio, and ratio is none; leave it out")
    if beside is not None and beside.on_errors is not None and not getattr(route, "errors", False):
        found.append("beside.on_errors: the divergence on error spans; it goes with route: {kind: spans, errors: true}")
    if c.reference is not None and c.reference.where == "unrouted" and route.kind != "failed_groups":
        found.append(f"reference.where: route {route.kind} leaves no group to it; use where: all")
    return found


def _asks(c: CreditConfig) -> bool:
    """Whether anything beside the advantage asks which samples are correct."""
    return c.route.success or (c.beside is not None and c.beside.weight.success)
