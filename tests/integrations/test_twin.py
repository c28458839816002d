"""Models as people change them (adapters, hooks, wrapped forwards, quantisation, weights): the drop-in's tokens are
those of plain `generate` after every change, or the call is refused in a line."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specextend.config import SpecExtendConfig, TreeConfig
from specextend.errors import ModelError
from specextend.integrations.custom_generate import CustomGenerate

NEW = 24
TREE = SpecExtendConfig.specextend(tree=TreeConfig(20, 5, 0.0))


@pytest.fixture
def target(make_model, hf_twin):
    return hf_twin(make_model("gqa"))


@pytest.fixture
def compare(make_model, perturbed, hf_twin, make_prompt):
    """compare(model): asserts that one prompt goes on as plain `generate` goes on; returns the tokens.

    One door and one draft for all calls of a test, so that an engine kept too long shows.
    """
    door, draft = CustomGenerate(), hf_twin(perturbed(make_model("gqa"), 0.05))
    ids = make_prompt(60)[None]
    request = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}

    def run(model, draft=draft) -> list[int]:
        plain = model.generate(input_ids=ids, **request)
        ours = model.generate(input_ids=ids, custom_generate=door, draft_model=draft, specextend_config=TREE, **request)
        assert ours.tolist() == plain.tolist()
        return ours[0].tolist()

    run.door = door
    return run


def assert_refused(compare, model, message: str, error: type[Exception] = ModelError) -> None:
    with pytest.raises(error, match=message) as raised:
        compare(model)
    assert "\n" not in str(raised.value)


# ---- adapters


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="needs peft")


def stirred(model, scale: float = 0.4, seed: int = 0):
    """Its adapters as training would leave them: fresh ones change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if any(part in name for part in ("lora_", "ia3_", "vera_", "hada_", "oft_", "prompt")) and weight.ndim:
            weight.data += torch.randn(weight.shape, generator=generator) * scale
    return model


def config_of(peft, kind: str, **options):
    linears = ["q_proj", "v_proj", "down_proj"]
    return {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=linears, **options),
        "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=linears, **options),
        "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=linears, **options),
        "head": lambda: peft.LoraConfig(r=4, target_modules=[*linears, "lm_head"], **options),
        "saved": lambda: peft.LoraConfig(r=4, target_modules=linears, modules_to_save=["lm_head"], **options),
        "ia3": lambda: peft.IA3Config(target_modules=linears, feedforward_modules=["down_proj"], **options),
        "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], **options),
        "loha": lambda: peft.LoHaConfig(r=4, target_modules=linears, **options),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=linears, **options),
        "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **options),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **options),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **options),
        "p": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **options),
        "adaption": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **options),
    }[kind]()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "head", "saved", "ia3", "vera", "loha", "oft", "norms"])
def test_adapters_added_disabled_scaled_and_merged_are_plain_generates(kind, peft, target, compare):
    bare = compare(target)
    model = stirred(peft.get_peft_model(target, config_of(peft, kind, task_type="CAUSAL_LM")).eval())
    if kind == "norms":
        for name, weight in model.named_parameters():
            if "ln_tuning" in name:
                weight.data *= torch.linspace(0.2, 3, len(weight))
    adapted = compare(model)
    assert adapted != bare
    with model.disable_adapter():
        assert compare(model) == bare
    assert compare(model) == adapted
    if hasattr(model.base_model, "merge_adapter"):
        model.base_model.merge_adapter()
        compare(model)
        model.base_model.unmerge_adapter()
        compare(model)
    compare(model.merge_and_unload())


def test_lora_scaled_switched_combined_and_deleted_between_calls(peft, target, compare):
    model = stirred(peft.get_peft_model(target, config_of(peft, "lora", task_type="CAUSAL_LM")).eval())
    first = compare(model)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    scaled = compare(model)
    model.add_adapter("other", config_of(peft, "lora", task_type="CAUSAL_LM"))
    assert compare(model) == scaled
    stirred(model, seed=1)
    model.set_adapter("other")
    other = compare(model)
    model.base_model.set_adapter(["default", "other"])
    both = compare(model)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert compare(model) == other
    assert len({tuple(ids) for ids in (first, scaled, other, both)}) == 4


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_engine_of_an_adapted_model_is_kept_while_nothing_changes(kind, peft, target, compare):
    model = peft.get_peft_model(target, config_of(peft, kind, task_type="CAUSAL_LM")).eval()
    compare(model)
    kept = compare.door._engines[target]
    compare(model)
    assert compare.door._engines[target] is kept
    stirred(model)
    compare(model)
    assert compare.door._engines[target] is not kept


def test_transformers_own_adapters_are_plain_generates(peft, target, compare):
    bare = compare(target)
    target.add_adapter(config_of(peft, "lora"))
    adapted = compare(stirred(target))
    target.disable_adapters()
    assert compare(target) == bare
    target.enable_adapters()
    assert compare(target) == adapted != bare


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p"])
def test_learned_prompts_are_refused_until_they_are_gone(kind, peft, target, compare):
    bare = compare(target)
    model = stirred(peft.get_peft_model(target, config_of(peft, kind, task_type="CAUSAL_LM")).eval())
    assert_refused(compare, model, "prepare_inputs_for_generation replaced")
    with model.disable_adapter():
        assert compare(model) == bare
    assert compare(target) == bare


def test_adapted_attention_and_adapters_by_row_are_refused(peft, make_model, hf_twin, compare, target):
    model = peft.get_peft_model(hf_twin(make_model("mha")), config_of(peft, "adaption", task_type="CAUSAL_LM")).eval()
    assert_refused(compare, model, "AdaptedAttention")
    model = stirred(peft.get_peft_model(target, config_of(peft, "lora", task_type="CAUSAL_LM")).eval())
    named = functools.partial(model.generate, adapter_names=["__base__"])
    model.generate = lambda **options: named(**options)
    assert_refused(compare, model, "forward hook")


def test_dropout_of_a_model_in_training_is_refused(peft, target, compare):
    model = peft.get_peft_model(target, config_of(peft, "lora", task_type="CAUSAL_LM", lora_dropout=0.1))
    assert_refused(compare, model.train(), r"training mode with dropout \(.*lora_dropout")
    compare(model.eval())


def test_checkpointed_gradients_change_nothing(peft, target, compare):
    model = stirred(peft.get_peft_model(target, config_of(peft, "lora", task_type="CAUSAL_LM")))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    compare(model.eval())


def test_draft_with_adapters_drafts_with_them(peft, make_model, perturbed, hf_twin, target, compare):
    draft = peft.get_peft_model(hf_twin(target), config_of(peft, "lora", task_type="CAUSAL_LM")).eval()
    assert compare(target, draft) == compare(target)
    prompted = peft.get_peft_model(hf_twin(target), config_of(peft, "prompt", task_type="CAUSAL_LM")).eval()
    with pytest.raises(ModelError, match="the draft has a prompt that PEFT learned"):
        compare(target, prompted)


# ---- hooks and forwards


def louder(module, args, output):
    return output * 1.5


@pytest.mark.parametrize(
    "path", ["lm_head", "model", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp", "model.norm", ""]
)
def test_hooks_are_refused_whenever_they_come_and_forgotten_when_they_go(path, target, compare):
    bare = compare(target)
    module = target.get_submodule(path)
    hook = module.register_forward_hook(lambda *_: None)
    assert_refused(compare, target, f"the model has a forward hook on {path or 'LlamaForCausalLM'}")
    hook.remove()
    assert compare(target) == bare
    hook = module.register_forward_pre_hook(lambda *_: None)
    assert_refused(compare, target, "forward hook")
    hook.remove()
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert_refused(compare, target, "global forward hook")
    assert compare(target) == bare


def test_hooks_on_the_draft_are_refused(make_model, hf_twin, target, compare):
    draft = hf_twin(make_model("gqa"))
    draft.lm_head.register_forward_hook(louder)
    with pytest.raises(ModelError, match="the draft has a forward hook on lm_head"):
        compare(target, draft)


@pytest.mark.parametrize("path", ["", "model", "model.layers.0", "model.layers.0.mlp"])
def test_forwards_replaced_are_refused_and_compiled_ones_are_not(path, target, compare):
    bare = compare(target)
    module = target.get_submodule(path)
    own = module.forward

    @functools.wraps(own)
    def wrapped(*args, **kwargs):
        return own(*args, **kwargs)

    module.forward = wrapped
    assert_refused(compare, target, r"\.forward replaced")
    module.forward = torch.compile(own, backend="eager")
    assert compare(target) == bare
    module.forward = own
    assert compare(target) == bare
    del module.forward
    module.compile(backend="eager")
    assert compare(target) == bare


def test_classes_with_a_forward_of_their_own_are_refused(target, compare):
    class Shouting(type(target)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.roll(1, dims=-1)
            return out

    class Deaf(type(target.model.layers[0].self_attn)):
        def forward(self, hidden_states, **_):
            return self.o_proj(hidden_states), None

    target.__class__ = Shouting
    assert_refused(compare, target, "a Shouting with a forward of its own")
    target.__class__ = Shouting.__mro__[1]
    compare(target)
    target.model.layers[1].self_attn.__class__ = Deaf
    assert_refused(compare, target, "a Deaf with a forward of its own")


def test_layers_left_out_or_used_twice_are_refused(target, compare):
    layers = target.model.layers
    target.model.layers = layers[:1]
    assert_refused(compare, target, r"layers \[0\]; its config says 2")
    target.model.layers = nn.ModuleList([layers[1], layers[1]])
    assert_refused(compare, target, r"layers \[1, 1\]; its config says 2")


def test_attention_of_the_users_is_refused(target, compare):
    def windowed(module, query, key, value, mask, **options):
        return sdpa_attention_forward(module, query, key[:, :, -8:], value[:, :, -8:], None, **options)

    AttentionInterface.register("windowed", windowed)
    target.set_attn_implementation("windowed")
    assert_refused(compare, target, "attends by 'windowed'")
    target.set_attn_implementation("eager")
    compare(target)


# ---- quantised


def test_quantised_models_are_refused(target, compare):
    assert_refused(compare, torch.ao.quantization.quantize_dynamic(copy.deepcopy(target), {nn.Linear}), "quantized")


def test_torchao_models_are_refused(target, compare):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    quantization.quantize_(target, quantization.Int8WeightOnlyConfig())
    assert_refused(compare, target, "quantized")


# ---- weights, buffers, attributes


def permute(weight, dim: int) -> None:
    weight.data.copy_(weight.data.flip(dim))


CHANGES = {
    "rows permuted": lambda model: permute(model.model.layers[0].mlp.up_proj.weight, 0),
    "columns permuted": lambda model: permute(model.lm_head.weight, 1),
    "negated": lambda model: model.model.layers[0].self_attn.o_proj.weight.data.neg_(),
    "two elements swapped": lambda model: swap(model.lm_head.weight.data.view(-1)),
    "norm": lambda model: model.model.norm.weight.data.copy_(torch.linspace(-2, 2, 64)),
    "epsilon": lambda model: setattr(model.model.layers[0].input_layernorm, "variance_epsilon", 3.0),
    "frequencies": lambda model: model.model.rotary_emb.inv_freq.mul_(0.3),
    "attention factor": lambda model: setattr(model.model.rotary_emb, "attention_scaling", 1.7),
    "scaling": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 1.1),
    "activation": lambda model: setattr(model.model.layers[1].mlp, "act_fn", nn.ReLU()),
    "module": lambda model: setattr(model.model.layers[0].mlp, "down_proj", fresh(96, 64)),
    "parametrized": lambda model: parametrize.register_parametrization(model.lm_head, "weight", Doubled()),
    "attribute of the user's": lambda model: setattr(model.model.layers[0], "mlp", Gain(model.model.layers[0].mlp)),
    "loaded": lambda model: model.load_state_dict({k: v * 1.2 for k, v in model.state_dict().items()}),
}


class Doubled(nn.Module):
    def forward(self, weight):
        return weight.roll(1, dims=0)


class Gain(nn.Module):
    """A module of the user's whose setting is a plain attribute, a list inside a dict."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.settings = inner, {"gain": [0.0]}

    def forward(self, x):
        return self.inner(x) * self.settings["gain"][0]


def fresh(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(9)
    return nn.Linear(inputs, outputs, bias=True).requires_grad_(False)


def swap(flat) -> None:
    flat[[0, 2]] = flat[[2, 0]]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_calls_are_noticed(change, target, compare):
    before = compare(target)
    CHANGES[change](target)
    assert compare(target) != before


def test_settings_inside_of_modules_of_the_users_are_noticed(target, compare):
    target.model.layers[0].mlp = gain = Gain(target.model.layers[0].mlp)
    silent = compare(target)
    gain.settings["gain"][0] = 2.0
    assert compare(target) != silent


def test_double_precision_and_half_are_plain_generates_too(target, compare, make_model, hf_twin):
    compare(target.double(), hf_twin(make_model("gqa")).double())


def test_rope_of_other_frequencies_than_its_configs_is_refused_where_it_is_ours(make_model, hf_twin, compare):
    model = hf_twin(make_model("dynamic"))
    model.model.rotary_emb.original_inv_freq.mul_(0.5)
    assert_refused(compare, model, "dynamic rope of other frequencies")


def test_rope_types_of_no_checkpoint_of_ours_are_refused(make_model, hf_twin, target, compare):
    target.config.rope_parameters = target.config.rope_parameters | {"rope_type": "longrope"}
    assert_refused(compare, target, "longrope")


def test_models_that_cannot_be_copied_are_refused(target, compare):
    weight = nn.Parameter(torch.ones(2))
    target.model.norm.cached = weight * 2  # of a graph: PyTorch copies none
    assert_refused(compare, target, "cannot be copied")
