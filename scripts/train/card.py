"""The model card, written from the training record alone."""

SOURCES_HEADER = "| source repository | kind | licence | documents | MB |\n|---|---|---|---|---|"

CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# The bundled models

Two small Llama models for trying out long-input speculative decoding where nothing can be downloaded: a target that
reads up to {long_context:,} tokens, and a draft distilled from it that has only ever seen {draft_context:,}. Both load
with `AutoModelForCausalLM.from_pretrained`. Written by `scripts.train`; every number below comes from
`training_record.json`.

{sizes}

Vocabulary {vocab_size:,}; tied embeddings; RoPE base 10,000, the target's scaled linearly by 4; weights in bfloat16.

## Training
{documents:,} documents, {megabytes:.1f} MB, {tokens:,} training tokens ({characters_per_token:.2f} characters each) and
{validation_tokens:,} held-out ones; seed {seed}. Muon for the matrices, AdamW for embeddings and norms. In some rows
spans are repeated far away, facts are planted and asked for, and near repeats are trained against (unlikelihood).
The draft starts from random weights and minimises the KL divergence from the target at temperature
{teacher_temperature}, {distilled_on}.

{phases}

## Measured on held-out text
Target, loss by position (nats per token):

{loss_by_position}

Target, loss on the same last tokens given only so many tokens before them:

{loss_by_context}

Draft against target, teacher-forced; overlap is the sum of min(target at temperature 0.8, draft at temperature 1):

{agreement}

A span or a fact from far back, share of tokens right, by context length:

{far}

{heads}Greedy text of the target, {loop_prompts} prompts: {repeated_4grams:.1%} of its 4-grams repeat earlier ones,
{ends_in_loop:.1%} of the continuations end in a loop.

## Limits
A research aid. The target is tiny: it knows nothing, what it writes is not to be trusted, and it is English only. The
draft is meant to fail beyond {draft_context:,} tokens: that failure is what the project studies. Old books carry the
views of their time.

## Data and licence
Weights: Apache-2.0. {data}
"""

DATA_WITH_SOURCES = """The text: public-domain books, works of the US government, and technical documentation
under permissive licences (public domain, CC0, CC BY 3.0 and 4.0, Apache-2.0, MIT, BSD), converted to plain prose, from
these repositories, whose authors are credited hereby:

{header}
{rows}"""
DATA_HUB = "The text: train splits of PG-19 (public-domain books) and GovReport (US government works), from the hub."
DATA_UNLISTED = "The text came from files given to the script, without a list of sources beside them."


HEAD_CARD = """---
license: apache-2.0
pipeline_tag: text-generation
---
# {name} head for {target}

A draft for lossless speculative decoding of {target} with SpecExtend: `run_eagle.py -m TARGET --head THIS_FOLDER`.
Trained by `scripts.train` on rows of up to {draft_context:,} tokens, so its working cache holds no more by default.

| parameters | M tokens | steps | seconds | device | torch |
|---|---|---|---|---|---|
| {parameters:,} | {m_tokens:.1f} | {steps:,} | {seconds:.0f} | {device} | {torch} |

{vocabulary}## What it learned from
{own:.0%} of the rows hold answers that the target itself wrote: {rows:,} of them, {answer_tokens:,} tokens, a third
greedy, the others at temperature 0.8; {ended:.0%} ended by themselves, the others after {generation_answer} tokens.
The other rows are text of the corpus. The divergence from the target at temperature {teacher_temperature} is minimised
over {eagle_steps} steps of the head's own states.

Same argmax as the target on held-out rows, at step k from k - 1 of the head's own states:

{validation}

## Limits
It speeds its target up and changes nothing of what that writes. What text it learned from decides where it drafts well.

{data}
"""


LONGER_CARD = """---
license: apache-2.0
pipeline_tag: text-generation
---
# {target} at {long_context:,} positions

Its weights learned on, at stretched (linear) RoPE, on rows of {long_context:,} tokens from documents as long. Drafts
and heads of {target} fit it. Written by `scripts.train`; the numbers come from `training_record.json`.

| parameters | M tokens | rows | seconds | device | torch |
|---|---|---|---|---|---|
| {parameters:,} | {m_tokens:.1f} | {rows:,} | {seconds:.0f} | {device} | {torch} |

Nats per token on held-out text of that length: {first_loss:.2f} after {first_seconds:.0f} s, {last_loss:.2f} at the end

## Limits
It holds long inputs; it understands no more than the model that it was. What that one learned from, its own card says.

{data}
"""


def write_longer_card(record: dict) -> str:
    """The card of a target at more positions, out of a finished record."""
    training, environment = record["longer"]["training"], record["longer"]["environment"]
    (phase,) = training["phases"].values()
    first, last = training["validation"][0], training["validation"][-1]
    return LONGER_CARD.format(
        **record["settings"],
        parameters=record["longer"]["parameters"],
        m_tokens=phase["tokens"] / 1e6,
        rows=phase["steps"] * phase["batch"],
        seconds=phase["seconds"],
        device=environment["device"],
        torch=environment["torch"],
        first_loss=first["loss"],
        first_seconds=first["seconds"],
        last_loss=last["loss"],
        data=_data(record["tokenizer"]),
    )


def write_head_card(kind: str, record: dict) -> str:
    """The card of one head, out of a finished record."""
    settings, head, answers = record["settings"], record[kind], record["answers"]
    (phase,) = head["training"]["phases"].values()
    last = head["training"]["validation"][-1]
    steps = range(1, settings["eagle_steps"] + 1)
    lines = ["| text | " + " | ".join(f"step {step}" for step in steps) + " |", "|---" * (1 + len(steps)) + "|"]
    for text, prefix in (("the target's answers", ""), ("corpus", "corpus_")):
        lines.append(f"| {text} | " + " | ".join(f"{last[f'{prefix}same_argmax_{step}']:.3f}" for step in steps) + " |")
    vocabulary = (
        f"It drafts from {head['draft_vocabulary']:,} tokens, {head['covered']:.1%} of those in the target's answers, "
        f"and reads what enters the target's layers {', '.join(map(str, head['layers']))}.\n\n"
        if kind == "eagle3"
        else ""
    )
    return HEAD_CARD.format(
        **settings | {"target": answers["target"]},
        name={"eagle1": "EAGLE-1", "eagle3": "EAGLE-3"}[kind],
        parameters=head["parameters"],
        m_tokens=phase["tokens"] / 1e6,
        steps=phase["steps"],
        seconds=phase["seconds"],
        **{name: head["environment"][name] for name in ("device", "torch")},
        vocabulary=vocabulary,
        own=settings["eagle_own"],
        rows=answers["rows"],
        answer_tokens=answers["tokens"],
        ended=answers["ended"],
        validation="\n".join(lines),
        data=_data(record["tokenizer"]),
    )


def write_card(record: dict) -> str:
    """The card's text for a finished record."""
    settings, corpus, measured = record["settings"], record["tokenizer"], record["measure"]
    looping = measured["looping"]
    return CARD.format(
        **settings | {"validation_tokens": corpus["validation_tokens"]},
        **{name: corpus[name] for name in ("documents", "megabytes", "tokens", "characters_per_token")},
        sizes=_sizes(record),
        distilled_on=_distilled_on(record["draft"]["written_rows"]),
        phases=_phases(record),
        loss_by_position=_row(measured["loss_by_position"]),
        loss_by_context=_row(measured["loss_by_context"]),
        agreement=_agreement(measured),
        far=_far(measured),
        heads=_heads(record),
        loop_prompts=looping["prompts"],
        repeated_4grams=looping["repeated_4grams"],
        ends_in_loop=looping["ends_in_loop"],
        data=_data(corpus),
    )


def _sizes(record: dict) -> str:
    settings = record["settings"]
    lines = ["| | layers | hidden | heads | FFN | positions | parameters |", "|---|---|---|---|---|---|---|"]
    for model, positions in (("target", "long_context"), ("draft", "draft_context")):
        shape = " | ".join(str(settings[f"{model}_{size}"]) for size in ("layers", "hidden", "heads", "ffn"))
        lines.append(f"| {model} | {shape} | {settings[positions]:,} | {record[model]['parameters']:,} |")
    return "\n".join(lines)


def _distilled_on(written_rows: int) -> str:
    if not written_rows:
        return "on text of the corpus"
    return f"half on text of the corpus, half on text that the target wrote ({written_rows:,} rows)"


def _phases(record: dict) -> str:
    columns = ("model", "context", "batch", "steps", "M tokens", "seconds", "tokens/s", "device", "torch")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for model in ("target", "draft", "eagle1", "eagle3"):
        if not record.get(model, {}).get("finished"):
            continue
        environment = record[model]["environment"]
        for phase in record[model]["training"]["phases"].values():
            shape = f"{model} | {phase['context']:,} | {phase['batch']}"
            work = f"{phase['steps']:,} | {phase['tokens'] / 1e6:.1f} | {phase['seconds']:.0f}"
            place = f"{environment['device']} | {environment['torch']}"
            lines.append(f"| {shape} | {work} | {phase['tokens_per_s']:,.0f} | {place} |")
    return "\n".join(lines)


def _row(figures: dict[str, float]) -> str:
    head, rule = "| " + " | ".join(figures) + " |", "|" + "---|" * len(figures)
    return "\n".join([head, rule, "| " + " | ".join(f"{value:.3f}" for value in figures.values()) + " |"])


def _agreement(measured: dict) -> str:
    lines = ["| text | position | draft sees | same argmax | overlap |", "|---|---|---|---|---|"]
    for seen, by_position in measured["agreement_natural"].items():
        for position, figures in by_position.items():
            lines.append(f"| natural | {position} | {seen.replace('_', ' ')} | {_pair(figures)} |")
    for name, figures in measured["agreement_own_text"].items():
        lines.append(f"| written by the target, {name.replace('_', ' ')} | all | everything | {_pair(figures)} |")
    return "\n".join(lines)


def _pair(figures: dict[str, float]) -> str:
    return f"{figures['same_argmax']:.3f} | {figures['overlap_draft_at_1.0']:.3f}"


def _far(measured: dict) -> str:
    lengths = list(measured["copying"]["target"])
    lines = ["| task | model | " + " | ".join(lengths) + " |", "|---|---|" + "---|" * len(lengths)]
    for task in ("copying", "facts"):
        for model, figures in measured[task].items():
            lines.append(f"| {task} | {model} | " + " | ".join(f"{figures[n]:.3f}" for n in lengths) + " |")
    return "\n".join(lines)


def _heads(record: dict) -> str:
    """The EAGLE heads that were trained, a paragraph that ends with an empty line; nothing where there are none."""
    trained = [kind for kind in ("eagle1", "eagle3") if record.get(kind, {}).get("finished")]
    if not trained:
        return ""
    steps = range(1, record["settings"]["eagle_steps"] + 1)
    lines = [
        "EAGLE heads of the target (`eagle1/`, `eagle3/`; draft vocabulary of EAGLE-3: "
        f"{record.get('eagle3', {}).get('draft_vocabulary') or 0:,} tokens), trained on contexts of up to "
        f"{record['settings']['draft_context']:,} tokens. Same argmax as the target on held-out text, at step k from "
        "k - 1 of the head's own states:",
        "",
        "| head | parameters | M tokens | seconds | " + " | ".join(f"step {step}" for step in steps) + " |",
        "|---" * (4 + len(steps)) + "|",
    ]
    for kind in trained:
        (phase,) = record[kind]["training"]["phases"].values()
        last = record[kind]["training"]["validation"][-1]
        shares = " | ".join(f"{last[f'same_argmax_{step}']:.3f}" for step in steps)
        cost = f"{record[kind]['parameters']:,} | {phase['tokens'] / 1e6:.1f} | {phase['seconds']:.0f}"
        lines.append(f"| {kind} | {cost} | {shares} |")
    return "\n".join(lines) + "\n\n"


def _data(corpus: dict) -> str:
    if corpus["hub"]:
        return DATA_HUB
    if not corpus["sources"]:
        return DATA_UNLISTED
    columns = ("repository", "kind", "licence", "documents", "mb")
    rows = "\n".join("| " + " | ".join(source[name] for name in columns) + " |" for source in corpus["sources"])
    return DATA_WITH_SOURCES.format(header=SOURCES_HEADER, rows=rows)
