"""Why it is fast: the analyses of the paper, needles and the recorded race."""
