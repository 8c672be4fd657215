"""A teacher behind `vllm serve`: token ids go in, the log-probabilities of the prompt come back (`POST /v1/completions` with
`prompt_logprobs`, one generated token). No torch; the server does the arithmetic.

Which model answers is proven by fixed sequences of token ids: their log-probabilities are computed from the checkpoint where its
weights are here, else they are those that the server first gave. They are kept in the store (`teachers/`), and compared whenever
a scorer opens the teacher and after every batch of answers. The temperature is 1 and nothing else acts on logits.

A request has several sequences. One that fails is halved, down to the sequence that fails alone, which ends the stage by its
name; nothing is made up in its place.

`client`: requests. `answers`: their content. `offers`: what a server can give. `probes`: which model answers. `model`: the
teacher made of these."""

from tasks.engines.server.client import TeacherServerError
from tasks.engines.server.model import ServerModel
from tasks.engines.server.offers import Offer, offers
from tasks.engines.server.probes import RECORDS, OtherTeacher, probe_sequences, recorded

__all__ = [
    "RECORDS",
    "Offer",
    "OtherTeacher",
    "ServerModel",
    "TeacherServerError",
    "offers",
    "probe_sequences",
    "recorded",
]
