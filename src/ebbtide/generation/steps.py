"""What generating needs of a model: steps from new tokens to logits, over a cache that it keeps."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken

Ids = NDArray[np.int64]
"""Token ids: [rows, tokens]."""

Scores = NDArray[np.float32]
"""Logits, or what processors made of them: [rows, vocabulary]."""


class Steps(Protocol):
    """One generation in the making: rows of tokens, of which the model has seen all but the newest.

    Rows are left-padded to one length at the beginning; the model knows which tokens are padding.
    """

    @property
    def length(self) -> int:
        """Tokens of each row that the model has seen, padding included."""

    def may_guess(self, token: CancelToken) -> bool:
        """Whether a wrong guess costs little, and guesses change nothing that is written."""

    @property
    def takes_back(self) -> bool:
        """Whether tokens can be taken back at all."""

    def forward(self, ids: Ids, token: CancelToken, *, last: bool = True) -> NDArray[np.float32]:
        """Show the model the next tokens of every row.

        Args:
            ids: The new tokens: [rows, new], the same number for each row.
            token: Stops it from another thread.
            last: Whether the logits of the last of them are enough.

        Returns:
            float32 logits: [rows, 1, vocabulary] if ``last``, else [rows, new, vocabulary].

        Raises:
            PipelineCancelledError: The token was cancelled.
            RunError: The graph could not be run.
        """

    def select(self, rows: NDArray[np.int64]) -> None:
        """Go on with these rows, in this order: one may come more than once, or not at all."""

    def crop(self, length: int) -> None:
        """Forget what was seen after so many tokens.

        Raises:
            UnsupportedModelError: The model keeps a state that cannot be taken back.
        """

    def close(self) -> None:
        """Give the cache back; called once, however the generation ended."""
