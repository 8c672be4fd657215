"""The family around SRPO (2604.02288): rewards, a teacher's log-ratios and a divergence beside them, in one expression.

    L = (1/N) sum k [ a PPO(rho, m A + delta) + b w c D(q', p) ] + likelihood + reference

per token: k the loss mask, A the advantage from the rewards of the group (`rewards.py`), m a factor of it (`scales.py`), delta
what is added (`additions.py`), a and b where each term counts (`routes.py`), w weights of the divergence (`weights.py`), q' its
target (`targets.py`), c = min(is_clip, rho). `config.py` declares the axes, `objective.py` computes a micro-batch, `plan.py` what
is known before it.

What depends on stored values of more than one token (group statistics, means over the optimizer step, segments) is computed when
a step is planned, from all samples of all ranks: `Stored` in, columns with one number per token out. So a token's loss depends on
no other token of its micro-batch, and not on how a step is cut. The modules of the axes import no torch.

A choice on an axis is one class in one file, which is its own configuration:

    @additions.register
    class Mine(Addition):
        kind: Literal["mine"] = "mine"
        equation = "delta = ..."
        paper = "..."

        def __call__(self, tokens: Tokens) -> Tensor: ...
"""
