"""The loss of a model, predicted from its size and the tokens that it reads.

docs/scaling_laws.md explains the law and where its constants come from.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """The loss of N parameters (without embeddings) after D tokens: A/N^alpha + B/D^beta.

    Hoffmann et al. 2022, section 3.3, without the floor, which differs between texts and does
    not affect which size is best. Repeated tokens are worth less than new ones: Muennighoff et al.
    2023, section 3.1.
    """

    A: float
    alpha: float
    B: float
    beta: float
    repeats: float = 15.4  # epochs after which another one is worth 1/e; not fitted here

    def loss(self, n: float, tokens: float, unique: float = math.inf) -> float:
        """Returns the predicted loss above the floor, in nats per token.

        tokens: read in training, from a text of `unique` tokens.
        """
        return self.A / n**self.alpha + self.B / self.worth(tokens, unique) ** self.beta

    def worth(self, tokens: float, unique: float) -> float:
        """Returns the number of new tokens that teach as much."""
        if tokens <= unique:
            return tokens
        epochs = tokens / unique - 1
        return unique * (1 + self.repeats * (1 - math.exp(-epochs / self.repeats)))

    def best_tokens(self, n: float) -> float:
        """Returns the tokens with which N parameters make the best use of N * D FLOPs."""
        ratio = self.beta * self.B / (self.alpha * self.A)
        return (ratio * n**self.alpha) ** (1 / self.beta)


LAW = Law(A=15.0, alpha=0.357, B=58.9, beta=0.387)  # fitted by benchmarks/scaling.py
