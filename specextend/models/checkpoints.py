"""Checkpoints on disk: found, read, checked and loaded as unmodified Hugging Face models.

A name is first resolved to a local directory (as given, out of the hub's cache, or downloaded), so that transformers
itself never waits for a network. Whatever cannot be used ends in one line that says what, why and the way out.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.distributed import DistributedConfig
from transformers.utils import is_protobuf_available, is_sentencepiece_available
from transformers.utils import logging as transformers_logging

from specextend.errors import CapacityError, ModelError
from specextend.modeling import attention
from specextend.modeling.packed import pack_linears
from specextend.models import gguf

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
FLOATING = ("F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # single file, or sharded with `.index.json`; in this order
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_TIMEOUT_S = 5.0
LOADING_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def find_checkpoint(name: str, *, weights: bool = True) -> Path:
    """Where the checkpoint `name` lies here: a directory, a GGUF file, or a hub id out of the cache or downloaded.

    A cached copy with all that is asked for (weights, else the tokenizer) is taken without asking the hub. Otherwise
    the hub is asked once, with a short timeout, before any download starts.
    """
    directory = local_directory(name)
    if directory is not None:
        return directory
    if gguf.is_gguf(name):
        return gguf.existing(name)
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"model directory {name!r} does not exist; give a directory with config.json or a hub id")
    cached = _cached_snapshot(name)
    if cached is not None and _is_complete(cached, weights):
        return cached
    return _download(name, weights)


def local_directory(name: str) -> Path | None:
    """The directory that `name` is here, None if it is none; ModelError if it may not be read."""
    if not name:
        return None
    try:
        directory = Path(name).expanduser()
        if not directory.is_dir():
            return None
        next(directory.iterdir(), None)
    except PermissionError as error:
        raise ModelError(f"{name} cannot be read ({error.strerror}); check the folder's permissions") from error
    except (OSError, RuntimeError, ValueError):  # a name too long, a user who is not there, a null byte
        return None
    return directory


def read_config(directory: Path) -> PreTrainedConfig:
    """The checkpoint's config, of a supported architecture, with LongChat's condensed rope made plain linear rope."""
    if gguf.is_gguf(directory):
        return gguf.read_config(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} has no config.json; give the directory of a Hugging Face checkpoint")
    _check_architecture(directory, read_json(path))
    _check_generation_config(directory)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
        check_supported(config, directory)
        return _with_condensed_rope(directory, config)
    except LOADING_ERRORS as error:
        raise ModelError(f"{path} is not a valid model config ({one_line(error)}); download it again") from error


def check_supported(config: PreTrainedConfig, name: object = "the model") -> None:
    """ModelError for a model that our forward passes do not compute as transformers does; every door asks here.

    Args:
        name: what the error calls the model.
    """
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"{name} is a {' / '.join(config.architectures or [config.model_type])}; supported are causal LMs of the "
            f"Llama family: {', '.join(ARCHITECTURES.values())}"
        )
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{name} is quantized; use the checkpoint in fp32, fp16 or bf16 it was made from")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"{name} has rope type {rope_type!r}; supported are {', '.join(ROPE_TYPES)}")
    if config.hidden_act not in ACT2FN:
        raise ModelError(f"{name} has the activation {config.hidden_act!r}, which transformers does not know")


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. How long a text may be is not its business: the engine checks capacity."""
    if gguf.is_gguf(directory):
        return gguf.read_tokenizer(directory)
    if not has_tokenizer(directory):
        raise ModelError(f"{directory} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); copy it beside the weights")
    sentencepiece = (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file()
    if sentencepiece and not (is_sentencepiece_available() and is_protobuf_available()):
        raise ModelError(
            f"{directory} has a SentencePiece tokenizer.model only; run: pip install sentencepiece protobuf"
        )
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, model_max_length=int(1e30)
            )
    except Exception as error:  # `tokenizers` raises bare Exception for a broken tokenizer.json
        raise ModelError(
            f"the tokenizer in {directory} cannot be read ({one_line(error)}); download it again"
        ) from error


def has_tokenizer(directory: Path) -> bool:
    return gguf.is_gguf(directory) or any((directory / name).is_file() for name in TOKENIZER_FILES)


def load_causal_lm(
    directory: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    sharding: DistributedConfig | None = None,
) -> PreTrainedModel:
    """The model in eval mode on `device`, its attention ours, every weight of the file used and none made up.

    On a CPU its linear layers are packed (`packed.py`). With `sharding` it is this process's share (`parallel.py`).

    Keys that are rightly absent or superfluous (a tied `lm_head`, the `rotary_emb.inv_freq` of old files) are known
    to transformers and not reported by it.
    """
    is_gguf = gguf.is_gguf(directory)
    if is_gguf and sharding:
        raise ModelError(f"{directory} cannot be spread over processes; give a Hugging Face checkpoint")
    if not is_gguf:
        _require_weights(directory)
    try:
        stored = {"state_dict": gguf.read_weights(directory, config, dtype)} if is_gguf else {}
        if not is_gguf:
            _check_stored_dtypes(directory)
        with quiet_transformers():
            loader = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if is_gguf else AutoModelForCausalLM
            model, report = loader.from_pretrained(
                None if is_gguf else directory,
                config=config,
                **stored,
                dtype=dtype,
                attn_implementation=attention.NAME,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **({"distributed_config": sharding} if sharding else {}),
            )
        _check_keys(directory, report)
        if is_gguf:
            model.generation_config = gguf.read_generation_config(directory)
        model = model.requires_grad_(False).eval().to(device)
        check_finite(directory, dict(model.named_parameters()))
        if sharding is None:
            pack_linears(model)
        return model
    except (MemoryError, *LOADING_ERRORS) as error:
        if _is_out_of_memory(error):
            raise CapacityError(
                f"memory ran out while loading {directory} in {dtype} on {device}; "
                "choose a smaller model or a half-precision dtype",
                setting="dtype",
            ) from error
        raise ModelError(
            f"the weights in {directory} cannot be read ({one_line(error)}); "
            "the files may be corrupt or incomplete: download them again"
        ) from error


def check_finite(directory: Path, weights: Mapping[str, Tensor]) -> None:
    """ModelError for weights that hold NaN or infinity, as damaged files do, or values too large for the dtype."""
    sums = [
        getattr(weight, "to_local", lambda one=weight: one)().sum(dtype=torch.float32) for weight in weights.values()
    ]
    finite = torch.stack(sums).isfinite().tolist()
    broken = [name for name, is_finite in zip(weights, finite, strict=True) if not is_finite]
    if broken:
        dtype = str(weights[broken[0]].dtype).removeprefix("torch.")
        raise ModelError(
            f"{directory}: {len(broken)} weights hold NaN or infinity in {dtype} ({_first(broken)}); download them "
            "again, or choose a dtype of more range"
        )


def check_floating(directory: Path, dtypes: Mapping[str, str]) -> None:
    """ModelError for stored weights of integers or 8-bit floats: without their scales they mean nothing."""
    odd = [name for name, dtype in dtypes.items() if name.endswith((".weight", ".bias")) and dtype not in FLOATING]
    if odd:
        raise ModelError(
            f"{directory}: {len(odd)} weights are stored as {dtypes[odd[0]]} ({_first(odd)}): it is quantized; use the "
            "checkpoint in fp32, fp16 or bf16 it was made from"
        )


def _check_stored_dtypes(directory: Path) -> None:
    """`check_floating` on the files' headers; no weight is read."""
    for file in weight_files(directory):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                dtypes = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
        else:
            state = torch.load(file, map_location="meta", weights_only=True)
            dtypes = {name: str(weight.dtype) for name, weight in state.items()}
        check_floating(directory, dtypes)


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in `dtype`, counted on a model without storage."""
    try:
        with torch.device("meta"), quiet_transformers():
            model = AutoModelForCausalLM.from_config(config)
    except LOADING_ERRORS as error:
        raise ModelError(f"no model can be made of the config of {config.name_or_path} ({one_line(error)})") from error
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, else of the machine (Linux: what the kernel calls available); None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        return int(re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)[1]) * 1024
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # macOS tells the total only
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def check_memory(name: str, needed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse weights of `needed` bytes that cannot be held on `device`, before any is read."""
    available = available_bytes(device)
    if available is not None and needed > available:
        raise CapacityError(
            f"{name} needs {needed / 1e9:.2f} GB for its weights in {str(dtype).removeprefix('torch.')}, "
            f"{device} has {available / 1e9:.2f} GB free; choose a smaller model or a half-precision dtype",
            setting="dtype",
        )


def one_line(error: BaseException, width: int = 200) -> str:
    """An error's text on one line, cut to `width`; its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "weights_only" in text:  # PyTorch's advice is to run the file's code
        text = "it holds more than tensors"
    return text if len(text) <= width else text[: width - 1] + "…"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, deprecations or advice from transformers; what matters is checked here and raised."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _cached_snapshot(name: str) -> Path | None:
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _is_complete(directory: Path, weights: bool) -> bool:
    if not weights:
        return has_tokenizer(directory)
    files = weight_files(directory)
    return (directory / "config.json").is_file() and bool(files) and all(file.is_file() for file in files)


def _download(name: str, weights: bool) -> Path:
    fetch = f"`hf download {name}`"
    try:
        info = HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        files = {sibling.rfilename for sibling in info.siblings or ()}
        return Path(snapshot_download(name, allow_patterns=_patterns(files, weights)))
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, run `hf auth login`, then {fetch}; "
            "the model `bundled` needs no download"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name} is neither a directory here nor a public model on the hub; check the name, or run "
            f"`hf auth login` if it is private; the model `bundled` needs no download"
        ) from error
    except (OfflineModeIsEnabled, HFValidationError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"{name} is not in the local cache and cannot be fetched ({one_line(error, 80)}); "
            f"run {fetch} where there is a network; the model `bundled` needs no download"
        ) from error


def _patterns(files: set[str], weights: bool) -> list[str]:
    """What to download: config and tokenizer files, and the weights in one format only."""
    patterns = ["*.json", "*.jinja", "tokenizer.model"]
    if weights:
        safetensors = bool(files & {"model.safetensors", "model.safetensors.index.json"})
        patterns.append("model*.safetensors" if safetensors else "pytorch_model*.bin")
    return patterns


def weight_files(directory: Path) -> list[Path]:
    """The checkpoint's weight files, present or not, in transformers' order of preference; empty if it has none."""
    for name in WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return [directory / name]
        if index.is_file():
            shards = read_json(index).get("weight_map")
            names = shards.values() if isinstance(shards, dict) else [None]
            if not shards or not all(isinstance(shard, str) and shard == Path(shard).name for shard in names):
                raise ModelError(f"{index} has no weight_map from weights to files beside it; download it again")
            return [directory / shard for shard in sorted(set(names))]
    return []


def _require_weights(directory: Path) -> None:
    files = weight_files(directory)
    if not files:
        raise ModelError(f"{directory} has no weights ({' or '.join(WEIGHT_FILES)}, or their shards); download them")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} of {len(files)} weight files ({_first(missing)}); download them again"
        )


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not valid JSON ({one_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object; download it again")
    return content


def _check_generation_config(directory: Path) -> None:
    """ModelError for a file that transformers would pass over in silence, and its EOS ids with it."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return
    ids = read_json(path).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    if ids != [None] and not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ModelError(f"{path}: eos_token_id is {ids!r}; it must be a token id or a list of them")
    try:
        with quiet_transformers():
            GenerationConfig.from_pretrained(directory, local_files_only=True)
    except LOADING_ERRORS as error:
        raise ModelError(f"{path} is not a valid generation config ({one_line(error)}); download it again") from error


def _check_architecture(directory: Path, config: dict) -> None:
    model_type = config.get("model_type")
    architectures = config.get("architectures") or [ARCHITECTURES.get(model_type, model_type)]
    if model_type not in ARCHITECTURES or not set(architectures) & set(ARCHITECTURES.values()):
        raise ModelError(
            f"{directory} is a {' / '.join(map(str, architectures))} (model_type {model_type}); "
            f"supported are causal LMs of the Llama family: {', '.join(ARCHITECTURES.values())}"
        )


def _with_condensed_rope(directory: Path, config: PreTrainedConfig) -> PreTrainedConfig:
    """Read LongChat's `rope_condense_ratio` r (position t used as t/r) as linear rope of factor r, once.

    Later revisions say the same in `rope_scaling` too: then there is nothing to do.
    """
    rope = config.rope_parameters
    ratio = getattr(config, "rope_condense_ratio", None) or 1
    if ratio == 1 or (rope["rope_type"] == "linear" and rope["factor"] == ratio):
        return config
    if rope["rope_type"] != "default":
        raise ModelError(
            f"{directory}/config.json contradicts itself: rope_condense_ratio {ratio} but {rope['rope_type']} rope "
            f"of factor {rope['factor']}; delete the wrong one"
        )
    config.rope_parameters = {"rope_type": "linear", "rope_theta": rope["rope_theta"], "factor": float(ratio)}
    return config


def _check_keys(directory: Path, report: dict) -> None:
    """Every weight of the model came from the file, and every weight of the file went into the model."""
    mismatched = [f"{key} {list(found)} instead of {list(wanted)}" for key, found, wanted in report["mismatched_keys"]]
    faults = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "of the wrong shape": sorted(mismatched),
    }
    found = [f"{len(keys)} weights are {fault} ({_first(keys)})" for fault, keys in faults.items() if keys]
    if found:
        raise ModelError(f"{directory}: {'; '.join(found)}; weights and config.json do not belong together")


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA and Python have types for it; PyTorch's CPU allocator raises RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)
