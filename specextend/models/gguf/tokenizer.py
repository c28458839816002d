"""The tokenizer in a GGUF file, as transformers' fast tokenizer: byte-level BPE or SentencePiece, chat template too."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from specextend.errors import ModelError
from specextend.models.gguf.file import GgufFile

TOKENS = "tokenizer.ggml.tokens"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
# Control tokens that end a text or a turn whatever a file names as its EOS; llama.cpp stops at the same.
ENDINGS = frozenset(
    "<|endoftext|> <|im_end|> <|eot_id|> <|eom_id|> <|end_of_text|> <|end|> <end_of_turn> </s> <|EOT|> "
    "<｜end▁of▁sentence｜>".split()
)
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# how text is cut before merges, by the name that llama.cpp gives each way
CUTS = {
    **dict.fromkeys(("default", "gpt-2"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact"), "digits"),
    **dict.fromkeys(LLAMA3, _WORDS.format(numbers="{1,3}")),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _WORDS.format(numbers="")),
}


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """The tokenizer; ModelError for a kind that we do not read as its makers do."""
    if TOKENS not in file.metadata:
        raise ModelError(f"{file.path} has no tokenizer ({TOKENS}); give a file that holds one")
    kind, tokens = file["tokenizer.ggml.model"], file[TOKENS]
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{file.path} has a tokenizer of the kind {kind!r}; supported are gpt2 (BPE) and llama")
    _check_tokens(file, tokens)
    tokenizer = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens)
    for number, token in enumerate(tokens):
        if _type(file, number) in (CONTROL, USER_DEFINED):
            added = AddedToken(token, normalized=False, special=_type(file, number) == CONTROL)
            (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    named = {f"{name}_token": _named(file, tokens, key) for name, key in _NAMED.items()}
    adds_bos = kind == "llama" or file.metadata.get("tokenizer.ggml.pre") in LLAMA3
    before = named["bos_token"] if file.metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    after = named["eos_token"] if file.metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if before or after:
        tokenizer.post_processor = _framed(tokenizer, before, after)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=int(1e30),
        clean_up_tokenization_spaces=False,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        **{name: token for name, token in named.items() if token is not None},
    )


def stop_ids(file: GgufFile) -> list[int]:
    """Ids that end a text: the file's EOS and EOT, and control tokens that mean as much by their name."""
    tokens = file.metadata.get(TOKENS, [])
    named = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    endings = {number for number, token in enumerate(tokens) if token in ENDINGS and _type(file, number) == CONTROL}
    return sorted(endings | {number for number in named if number is not None and number < len(tokens)})


_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _named(file: GgufFile, tokens: list[str], key: str) -> str | None:
    number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _check_tokens(file: GgufFile, tokens: list[str]) -> None:
    types, rows = file.metadata.get("tokenizer.ggml.token_type"), file.tensors["token_embd.weight"].shape[0]
    if len(tokens) > rows or (types is not None and len(types) != len(tokens)):
        raise ModelError(
            f"{file.path}: {len(tokens)} tokens, {len(types or tokens)} types of tokens and {rows} embeddings do not "
            "belong together; download it again"
        )


def _type(file: GgufFile, number: int) -> int:
    types = file.metadata.get("tokenizer.ggml.token_type")
    return types[number] if types else NORMAL


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    cut = file.metadata.get("tokenizer.ggml.pre", "default")
    if cut not in CUTS:
        raise ModelError(
            f"{file.path} cuts text in the way {cut!r} before it tokenizes; known are {', '.join(CUTS)}: use the "
            "model's own checkpoint"
        )
    merges = [tuple(merge.split(" ")) for merge in file["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    ignores = cut in LLAMA3  # a whole word that is a token needs no merges
    tokenizer = Tokenizer(_model(file, vocabulary, merges, ignore_merges=ignores))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=CUTS[cut] in ("gpt2", "digits"))
    if CUTS[cut] == "gpt2":
        tokenizer.pre_tokenizer = byte_level
    elif CUTS[cut] == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        split = pre_tokenizers.Split(Regex(CUTS[cut]), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if cut in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    scores = zip(tokens, file["tokenizer.ggml.scores"], strict=True)
    others = {token for number, token in enumerate(tokens) if _type(file, number) != NORMAL}
    merges = generate_merges(vocabulary, scores, others)
    unknown = _named(file, tokens, "unknown")
    tokenizer = Tokenizer(_model(file, vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefixed else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def _model(file: GgufFile, vocabulary: dict[str, int], merges: list[tuple[str, str]], **options) -> BPE:
    try:
        return BPE(vocabulary, merges, **options)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ModelError(f"the tokenizer in {file.path} is damaged ({error}); download it again") from error


def _framed(tokenizer: Tokenizer, before: str | None, after: str | None) -> processors.TemplateProcessing:
    """Puts the control tokens around what is encoded."""
    edges = [token for token in (before, after) if token]
    one = " ".join(filter(None, [before, "$A", after]))
    two = f"{one} {one.replace('$A', '$B')}"
    return processors.TemplateProcessing(
        single=one, pair=two, special_tokens=[(token, tokenizer.token_to_id(token)) for token in edges]
    )
