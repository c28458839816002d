"""Whether target and draft mean the same by a token id."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from specextend.errors import ModelError


def check_vocabularies(
    target: PreTrainedConfig,
    target_tokenizer: PreTrainedTokenizerBase,
    draft: PreTrainedConfig,
    draft_tokenizer: PreTrainedTokenizerBase | None,
) -> int:
    """Ids both models know, after checking that each means the same token to both.

    Padding rows may differ, and so may the names of control tokens (a chat finetune renames them): a draft's guess of
    a control token that means something else is rejected like any wrong guess. Text tokens must be the same.
    """
    shared = min(target.vocab_size, draft.vocab_size)
    if draft_tokenizer is None and target.vocab_size != draft.vocab_size:
        raise ModelError(
            f"the vocabularies differ: target {target.vocab_size} tokens, draft {draft.vocab_size} and no tokenizer to "
            "compare; choose a draft with the target's vocabulary"
        )
    used = min(target.vocab_size, max(target_tokenizer.get_vocab().values()) + 1)
    if draft.vocab_size < used:
        raise ModelError(
            f"the draft's vocabulary ({draft.vocab_size}) is smaller than the target tokenizer's ({used}); "
            "choose a draft with the target's vocabulary"
        )
    if draft_tokenizer is not None:
        _check_same_tokens(target_tokenizer, draft_tokenizer, shared)
    return shared


def _check_same_tokens(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, size: int) -> None:
    control = {
        token_id
        for tokenizer in (target, draft)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    draft_tokens = {token_id: token for token, token_id in draft.get_vocab().items()}
    for token, token_id in sorted(target.get_vocab().items(), key=lambda item: item[1]):
        if token_id < size and token_id not in control and draft_tokens.get(token_id, token) != token:
            raise ModelError(
                f"the vocabularies differ: id {token_id} is {token!r} for the target and {draft_tokens[token_id]!r} "
                "for the draft; choose a draft with the target's vocabulary"
            )
