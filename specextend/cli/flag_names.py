"""Which flag sets what: the library's errors name settings, the command line names flags."""

from __future__ import annotations

FLAGS = {
    name: f"--{flag}"
    for name, flag in {
        "dtype": "dtype",
        "device": "device",
        "draft_model": "draft_model",
        "head": "head",
        "max_new_tokens": "max_gen_len",
        "prompt_tokens": "input_len",
        "prompts": "max_samples",
        "input_file": "input_file",
        "data_dir": "data_dir",
        "root": "root",
        "lengths": "lengths",
        "samples": "samples",
        "set_name": "name",
        "from_dir": "from_dir",
        "room": "room",
        "skip": "skip",
        "flash_prefill": "flash_prefill",
        "hybrid_tree_attention": "hybrid_tree_attention",
        "draft_cache": "draft_cache",
        "drafting": "method",
        "prefill_block": "prefill_block",
        "draft_window": "draft_window",
        "tree.nodes": "nodes",
        "tree.max_depth": "max_depth",
        "tree.threshold": "threshold",
        "tree.min_probability": "min_probability",
        "tree.lookup_branch": "lookup_branch",
        "retrieval.chunk_size": "retrieval_chunk_size",
        "retrieval.top_k": "retrieve_top_k",
        "retrieval.every_n_steps": "retrieve_every_n_steps",
        "retrieval.sink": "retrieval_sink",
        "retrieval.recent": "retrieval_recent",
        "sampling.temperature": "temperature",
        "sampling.top_p": "top_p",
        "sampling.top_k": "top_k",
        "sampling.seed": "seed",
    }.items()
}
