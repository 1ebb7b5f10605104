"""Runs small models of transformers' decoder families and writes the table of docs/models.md.

Each family gets a small configuration and random weights; `flexmask doctor --model` checks a real
model in the same way. Layers are traced as in the engine, but executed eagerly, without inductor
(`--compile` uses it, which takes several times as long).

Usage::

    python docs/model_families.py                      # every family, into docs/models.md
    python docs/model_families.py llama gpt2           # some, printed
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "models.md"
WORDS = {"ok": "right", "unavailable": "refused", "broken": "wrong"}
"""Words of the page for the states of checks."""
MOST_PARAMETERS = 20_000_000
BEGIN, END = "<!-- families -->", "<!-- end -->"

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_d_state", "mamba_n_heads", "mamba_d_head", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_head_dim", "ssm_state_size", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "mamba_dt_rank"), 4),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "mamba_d_ssm": 64,
    "use_mamba_kernels": False,
    "pad_token_id": 2,
    "bos_token_id": 0,
}
"""Small values for attributes of configurations."""


_DECODER = {"is_decoder": True}
SPECIAL: dict[str, dict[str, Any]] = {
    **{key: {"num_key_value_heads": 4} for key in ("minicpm3", "hrm_text")},
    **{key: {"first_k_dense_replace": 1} for key in ("deepseek_v2", "deepseek_v3")},
    **dict.fromkeys(("bert", "roberta", "electra", "camembert", "xlm-roberta", "ernie"), _DECODER),
    **dict.fromkeys(("rembert", "roformer", "megatron-bert", "bert-generation"), _DECODER),
    **dict.fromkeys(("data2vec-text", "roc_bert", "xmod"), _DECODER),
    **{
        key: {"use_sliding_window": True, "max_window_layers": 1}
        for key in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 3,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 3,
    },
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1], "attn_rotary_emb": 8},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    **{key: {"layer_types": ["conv", "full_attention"]} for key in ("lfm2", "lfm2_moe")},
    "nemotron_h": {},
    "recurrent_gemma": {"num_hidden_layers": 3},
}
"""Additional values that single families need, for example to make their sizes consistent."""


def small_config(family: str, vocab_size: int) -> Any:
    """Make a small configuration of a family of transformers' decoders."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[family]
    default = cls()
    values: dict[str, Any] = {
        name: value
        for name, value in (SIZES | {"vocab_size": vocab_size, "eos_token_id": None}).items()
        if (name in vars(default) or hasattr(default, name))
        and not isinstance(getattr(cls, name, None), property)
    }
    if isinstance(vars(default).get("num_attention_heads"), list):
        del values["num_attention_heads"]
    if getattr(default, "kv_lora_rank", None):  # latent attention has a key head per query head
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
        values["head_dim"] = SIZES["qk_rope_head_dim"]
    types = getattr(default, "layer_types", None)
    if (
        types
        and family not in SPECIAL
        and not isinstance(getattr(cls, "layer_types", 0), property)
    ):
        kinds = list(dict.fromkeys(types))
        values["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        values["num_hidden_layers"] = len(values["layer_types"])
    return cls(**values | SPECIAL.get(family, {}))


class NotSmallError(Exception):
    """A family has no small model: too many parameters, or none can be made."""


def check_family(family: str, *, compiled: bool = False) -> list[dict[str, str]]:
    """Check a small model of a family (`flexmask.doctor.model_checks.check_model`).

    Returns:
        Name, state and detail of each check; a third check, under ``flexmask_dense``, if the
        first is not ok and the model does not support attention backends.

    Raises:
        NotSmallError: If no small model of the family can be made.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flexmask.attention import BACKEND
    from flexmask.attention.backend import register_attention
    from flexmask.demo import model_path
    from flexmask.doctor.model_checks import check_dense, check_model, refused

    register_attention()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    try:
        config = small_config(family, len(tokenizer))
        with torch.device("meta"):
            meta_model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception as error:  # of transformers' own code, before flexmask has a part in it
        raise NotSmallError(f"no small model can be made: {error}") from error
    size = meta_model.num_parameters()
    if size > MOST_PARAMETERS:
        raise NotSmallError(f"the configuration is not small: {size:,} parameters")
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=BACKEND)
    except KeyError as error:
        if error.args != (BACKEND,):
            raise
        name = type(meta_model).__name__
        reason = f"{name} has its own attention classes only and uses no registered backend"
        return [asdict(check) for check in refused(reason)]
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.15)  # larger than usual, so that attention affects the logits
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = SIZES["pad_token_id"]
    backend = None if compiled else "eager"
    with torch.compiler.set_stance(force_backend=backend):
        checks = check_model(model, tokenizer)
        if checks[0].state != "ok" and not model.is_backend_compatible():
            checks.append(check_dense(model, tokenizer))
        return [asdict(check) for check in checks]


def _in_process(families: Sequence[str], compiled: bool) -> Iterator[dict[str, Any]]:
    """Check families in another process; start a new one after a family that crashes it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    todo = list(families)
    while todo:
        command = [sys.executable, __file__, "--here", *["--compile"][:compiled], *todo]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
                    todo.pop(0)
        if todo:
            yield {"family": todo.pop(0), "error": f"process ended with {process.returncode}"}


def _here(families: Sequence[str], compiled: bool) -> None:
    """Check families in this process; print a line of JSON for each."""
    import torch
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    for family in families:
        try:
            outcome = {"family": family, "checks": check_family(family, compiled=compiled)}
        except Exception as error:  # any error is an outcome
            at = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            outcome = {"family": family, "error": f"{reason} ({at.filename}:{at.lineno})"}
        print(json.dumps(outcome), flush=True)
        torch.compiler.reset()


def all_families() -> list[str]:
    """Return the names of the decoder families in transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def table(outcomes: Sequence[dict[str, Any]]) -> str:
    """Return the table of the page: a row for each family with a small configuration."""
    import torch
    import transformers

    checked = [outcome for outcome in outcomes if "checks" in outcome]
    rows = [[WORDS[check["state"]] for check in outcome["checks"]] for outcome in checked]
    dense = sum(states[2:] == ["right"] for states in rows)
    either, both = (
        sum(test(s == "right" for s in states[:2]) for states in rows) for test in (any, all)
    )
    wrong = sum("wrong" in states for states in rows)
    lines = [
        f"With transformers {transformers.__version__} and torch {torch.__version__}, of "
        f"{len(checked)} families {both} are right in both ways, {either - both} in one and "
        f"{dense} under `flexmask_dense` alone; {len(checked) - either - dense - wrong} are "
        f"refused, {wrong} are wrong. No small configuration "
        f"was made of {len(outcomes) - len(checked)} more, most with parts of other modalities.",
        "",
        "| family | `use_strategy` | engine | why not |",
        "| --- | --- | --- | --- |",
    ]
    for outcome, states in zip(checked, rows, strict=True):
        reasons = dict.fromkeys(c["detail"] for c in outcome["checks"] if c["state"] != "ok")
        why = "; ".join(reasons).replace("|", "\\|")
        backend = "dense" if states[2:] == ["right"] else states[0]
        lines.append(f"| {outcome['family']} | {backend} | {states[1]} | {why} |")
    return "\n".join(lines)


def main() -> None:
    """Check the families that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="some families; all by default")
    parser.add_argument("--here", action="store_true", help="in this process, JSON Lines alone")
    parser.add_argument("--compile", action="store_true", help="compile as the engine does")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the outcomes here too")
    options = parser.parse_args()
    families = options.families or all_families()
    if options.here:
        return _here(families, options.compile)
    parts = [families[n :: options.processes] for n in range(options.processes)]
    outcomes: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.processes) as pool:

        def check(part: Sequence[str]) -> None:
            for outcome in _in_process(part, options.compile):
                outcomes.append(outcome)
                print(json.dumps(outcome), flush=True)

        list(pool.map(check, parts))
    outcomes.sort(key=lambda outcome: str(outcome["family"]))
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=1))
    print(table(outcomes))
    if not options.families:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{table(outcomes)}\n{END}{after}")


if __name__ == "__main__":
    main()
