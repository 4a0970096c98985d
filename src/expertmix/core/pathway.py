"""A pathway: routing weights over sites and experts that one sample could have had.

Test-time optimization tries many pathways on the same texts. Here is what it needs of a model, so
that it knows none: questions in, log-probabilities out, differentiable in the pathway. A binding
fulfils `Pathways`, and may recompute only what a pathway can change.

Legend: B questions, O options, W tokens of the longest option, D decision tokens, L critical sites,
E experts, K selected ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from expertmix.core.site import SiteInfo
from expertmix.errors import ConfigError

Mode = Literal["set", "add"]
Tokens = Literal["prompt", "scored"]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and texts that may follow it: the choices, or the one answer.

    Attributes:
        prompt: Token ids; at least one.
        options: Token ids of each; at least one option of at least one token.

    Raises:
        ConfigError: An empty prompt or option, no options, or a token id below 0.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.options or not all((self.prompt, *self.options)):
            raise ConfigError(
                f"a question has a prompt and options of at least one token each: "
                f"{len(self.prompt)} tokens, options of {[len(one) for one in self.options]}"
            )
        least = min(map(min, (self.prompt, *self.options)))
        if least < 0:
            raise ConfigError(f"token id {least} is below 0: leave padding and labels out")


@dataclass(frozen=True, eq=False, slots=True)
class Pathway:
    """Routing of B questions at the decision tokens of the critical sites.

    Attributes:
        values: (B, D, L, E) logits; D = 1 serves every decision token of its question. Minus
            infinity keeps an expert out. In mode `set` they decide alone; in mode `add` they shift
            what the router gives at that token.
        mass: (B, D, L), what the weights of a token sum to, in mode `set`; in mode `add` it is
            the router's own.
        width: How many experts a decision token calls: K for what the router could do, more while
            optimizing, so that experts outside the top K have gradients.
        mode: `set` or `add`.
    """

    values: Tensor
    mass: Tensor
    width: int
    mode: Mode = "set"


@dataclass(frozen=True, eq=False, slots=True)
class Reading:
    """What a plain pass over one question gave: detached tensors on the CPU.

    A prompt of fewer than D tokens repeats its first one in front; no token has these entries.

    Attributes:
        logprobs: (O, W) float32 log-probabilities of the options' tokens, 0 beyond their ends.
        last: (H,) hidden state of the last prompt token where it enters the first critical layer.
        mean: (H,) mean of that over the prompt.
        logits: (D, L, E) the gates' logits at the last D prompt tokens; of adapters, the router's
            scores, minus infinity where an adapter does nothing. Where a router shows none, the
            logarithm of its dense weights.
        indices: (D, L, K) experts chosen there.
        weights: (D, L, K) their weights.
        state: What `Pathways.batch` needs to read the question again, by name.
    """

    logprobs: Tensor
    last: Tensor
    mean: Tensor
    logits: Tensor
    indices: Tensor
    weights: Tensor
    state: Mapping[str, Tensor]


class Pathways(Protocol):
    """A model that can be read again with other pathways; used as an open context."""

    @property
    def sites(self) -> Sequence[SiteInfo]:
        """The L critical sites, in the order in which they run."""

    @property
    def decisions(self) -> int:
        """D: how many tokens of a prompt's end are decision tokens."""

    @property
    def scored(self) -> bool:
        """Whether the options' tokens are decision tokens too."""

    @property
    def shift(self) -> bool:
        """Whether pathways of mode `add` may come."""

    @property
    def exact(self) -> bool:
        """Whether only what a pathway can change is computed again."""

    @property
    def notice(self) -> str | None:
        """What a user should be told of how the model is read, such as why not `exact`ly."""

    def fingerprint(self) -> str:
        """Of the model."""

    def read(self, questions: Sequence[Question]) -> list[Reading]:
        """One plain pass; nothing for no questions."""

    def batch(
        self,
        questions: Sequence[Question],
        states: Sequence[Mapping[str, Tensor]],
        *,
        only: Sequence[int] | None = None,
    ) -> object:
        """Questions that were read before, ready to be scored many times.

        Args:
            questions: As they were read.
            states: What their readings left.
            only: Number of the one option of each question that will be scored; all by default.
        """

    def score(self, batch: object, pathway: Pathway | None) -> Tensor:
        """(B, O, W) float32 log-probabilities under a pathway, 0 beyond ends; differentiable.

        Without a pathway the router decides. O is 1 in a batch of one option each.

        Raises:
            ConfigError: The pathway's shape is not that of the batch and the sites, or it is one of
                mode `add` and the pathways were not opened for shifts.
        """


@runtime_checkable
class TunableRouters(Pathways, Protocol):
    """Pathways whose critical routers have weights that can be trained."""

    def gates(self) -> Sequence[Tensor]:
        """Weight matrices of the critical routers, the very ones of the model."""

    def routed(self, batch: object) -> Tensor:
        """(B, D, L, E) logits that the gates give now at the decision tokens.

        Differentiable in the gates. The context before the decision tokens was routed when it was
        read. A prompt with fewer tokens than D repeats its first one in front.
        """
