"""Log-probabilities of tokens under the target itself, before penalties and temperature.

Those of an answer are read where the target chooses (`Recorder`); those of a prompt take a pass of their own
(`specextend.decoding.scoring`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from specextend.decoding.scoring import TokenScore, scores_of


class Recorder(LogitsProcessor):
    """Changes nothing and notes the scores of an answer's tokens; the first processor of its generation.

    Args:
        top: how many alternatives to note.
    """

    def __init__(self, top: int):
        self._top = top
        self._rows: list[Tensor] = []  # [1, V], whose tokens are not known yet
        self._told = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._rows.append(scores.clone())
        return scores

    def take(self, token_ids: Sequence[int]) -> list[TokenScore]:
        """The scores of the tokens that came since the last call; `token_ids` is the whole answer so far."""
        new = token_ids[self._told :]
        self._told += len(new)
        rows, self._rows = self._rows[: len(new)], self._rows[len(new) :]
        return [score for row, token in zip(rows, new, strict=True) for score in scores_of(row, [token], self._top)]


class TokenNames:
    """Tokens as texts that add up, more or less: a lone byte of a character is a replacement character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False, verbose=False).input_ids[-1]
        self._before = len(tokenizer.decode([self._anchor]))

    def __call__(self, token: int) -> str:
        # behind another token: at the beginning some tokenizers drop a blank
        return self._tokenizer.decode([self._anchor, token])[self._before :]

    def completion(self, scores: Sequence[TokenScore], offset: int = 0) -> dict:
        """The `logprobs` of a completion's choice.

        Args:
            offset: of the first token in the choice's text.
        """
        tokens = [self(score.token) for score in scores]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        tops = [None if score.logprob is None else self._tops(score) for score in scores]
        return {
            "tokens": tokens, "token_logprobs": [score.logprob for score in scores], "top_logprobs": tops,
            "text_offset": offsets,
        }  # fmt: skip

    def chat(self, scores: Sequence[TokenScore]) -> dict:
        """The `logprobs` of a conversation's choice."""
        content = [
            self._entry(score.token, score.logprob) | {"top_logprobs": [self._entry(*top) for top in score.top]}
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _tops(self, score: TokenScore) -> dict[str, float]:
        """The alternatives and the token itself, the more probable where two have one name."""
        tops: dict[str, float] = {}
        for token, logprob in sorted([*score.top, (score.token, score.logprob)], key=lambda pair: -pair[1]):
            tops.setdefault(self(token), logprob)
        return tops

    def _entry(self, token: int, logprob: float) -> dict:
        name = self(token)
        return {"token": name, "logprob": logprob, "bytes": None if "\ufffd" in name else list(name.encode())}
