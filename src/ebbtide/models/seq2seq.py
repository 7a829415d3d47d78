"""An encoder-decoder model in memory: tokenizer, two sessions, and the steps of its decoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ebbtide.cancellation import CancelToken
from ebbtide.errors import InputError, UnsupportedModelError, nearest
from ebbtide.models.decoder import Decoder, Held, Steps
from ebbtide.models.loading import Driver, Loaded
from ebbtide.models.tokenizer import Batch

ENCODER: Final = "encoder_model"
DECODER: Final = "decoder_model_merged"
STEMS: Final = (ENCODER, DECODER)

_FROM_ENCODER: Final = frozenset({"encoder_hidden_states", "encoder_attention_mask"})
_LANGUAGE: Final = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}|[a-z]{2,3}_[A-Z]{2}|__[a-z]{2,3}__")
"""How NLLB, mBART and M2M100 spell the token of a language."""


class Seq2Seq(Driver):
    """One encoder-decoder model, as one pipeline owns it."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded, ENCODER)
        self.decoder = Decoder(loaded, DECODER, _FROM_ENCODER)
        names = [one.name for one in self.graph.outputs]
        if "last_hidden_state" not in names:
            raise UnsupportedModelError(
                f"The encoder of model {self.name!r} gives {', '.join(names)}, and no"
                " last_hidden_state: export the model for text2text-generation.",
                model=self.name,
            )
        self._inputs = {one.name: one.dtype for one in self.graph.inputs}

    mixes_lengths = True

    def encode(self, batch: Batch, token: CancelToken) -> dict[str, NDArray[Any]]:
        """What the decoder is fed of some inputs.

        Raises:
            PipelineCancelledError: The token was cancelled.
            RunError: The graph could not be run.
        """
        session = self.graph
        feeds = {
            name: getattr(batch, name).astype(dtype, copy=False)
            for name, dtype in self._inputs.items()
        }
        (hidden,) = session.run(feeds, ["last_hidden_state"], token)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": batch.attention_mask}

    def begin(
        self,
        mask: NDArray[np.int64],
        encoded: dict[str, NDArray[Any]],
        *,
        cache: bool = True,
        held: Held = int,
    ) -> Steps:
        """Begin a generation over what `encode` gave; see `Decoder.begin`."""
        return self.decoder.begin(mask, cache=cache, held=held, fixed=encoded)

    def language(self, name: str) -> int:
        """The id of a language's token, by its code as in ``fra_Latn``, ``fr_XX`` or ``fr``.

        Raises:
            InputError: The model has no such language, or none at all.
        """
        for spelled in (name, f"__{name}__"):
            found = self.tokenizer.token_id(spelled)
            if found is not None and _LANGUAGE.fullmatch(spelled):
                return found
        known = self.languages()
        if not known:
            raise InputError(
                f"Model {self.name!r} translates between the languages it was taught, and has no"
                " names for them: leave src_lang and tgt_lang out.",
                value=name,
            )
        close = nearest(name, known)
        hint = f" Did you mean {close!r}?" if close else ""
        raise InputError(
            f"Model {self.name!r} has no language {name!r}.{hint} It has {', '.join(known[:12])}"
            f"{' and more' if len(known) > 12 else ''}.",
            value=name,
            nearest=close,
        )

    def languages(self) -> list[str]:
        """The codes of the model's languages; empty where it has no tokens for them."""
        return [one.strip("_") for one in self.tokenizer.added() if _LANGUAGE.fullmatch(one)]

    def speak(self, ids: Sequence[int], language: int) -> list[int]:
        """A text's ids with the token of its language in place of the one the tokenizer adds."""
        known = {self.tokenizer.token_id(one) for one in self.tokenizer.added()
                 if _LANGUAGE.fullmatch(one)}  # fmt: skip
        last = len(ids) - 2  # before an end token, or after it; in between they are the text's
        return [
            language if one in known and (not place or place >= last) else one
            for place, one in enumerate(ids)
        ]
