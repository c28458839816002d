"""The arms that the report tells of, by their names in journals."""

from __future__ import annotations

FULL, WINDOW = "fa_hta:tree=paper", "fa_hta_streaming:tree=paper"
PAPERS, PRICED = "specextend:tree=paper", "specextend:tree=price"
STANDARD, FULL_PRICED = "standard:tree=paper", "fa_hta:tree=price"
SOONER = "specextend:nodes=50,max_depth=10,threshold=0.15"
LATER = "specextend:nodes=50,max_depth=12,threshold=0.05"
FIXED = {PAPERS: "the paper's", SOONER: "stop at 0.15", LATER: "12 levels, stop at 0.05"}  # trees of fixed bounds
PARTS = {  # of SpecExtend, each alone: an arm and its name in the paper's table 4
    "fa:tree=paper": "Standard+FA",
    "hta:tree=paper": "Standard+HTA",
    "streaming:tree=paper": "Standard+StreamingLLM",
    "cmr:tree=paper": "Standard+CMR",
}
ARMS = {  # what an arm is called, in the order of the columns
    STANDARD: "standard",
    "standard:tree=price": "standard, priced trees",
    FULL: "full cache",
    WINDOW: "window",
    PAPERS: "SpecExtend",
    FULL_PRICED: "full cache, priced trees",
    PRICED: "SpecExtend, priced trees",
    "specextend:nodes=12,max_depth=8,threshold=0.35,min_probability=0.06": "SpecExtend, 12 nodes",
    "prompt_lookup": "prompt lookup",
}
