"""Wrong values are told before torch is imported, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
from flexmask_cli.app import main

for arguments in json.load(sys.stdin):
    sys.argv = ["flexmask", *arguments]
    try:
        main()
        ending = "no error"
    except SystemExit as end:
        ending = end.code
    loaded = sorted({"torch", "transformers"} & sys.modules.keys())
    print(json.dumps([ending, loaded]), file=sys.stderr)
"""

ERRORS = {
    ("generate", "--strategy", "casual"): "did you mean 'causal'?",
    ("generate", "--param", "window=3"): "has no parameter 'window'",
    ("generate", "--param", "positions=up"): "positions must be restart|sequential",
    ("generate", "--fusion", "vot"): "did you mean 'vote'?",
    ("generate", "--fusion", "weighted_mean"): "needs weights",
    ("generate", "--task", "webq"): "did you mean 'webqa'?",
    ("generate", "--input", "nowhere.jsonl"): "No such file",
    ("generate", "--column", "answers"): "--column takes NAME=COLUMN",
    ("generate", "--limit", "0"): "--limit must be a positive number",
    ("generate", "--batch-size", "many"): "--batch-size must be",
    ("generate", "--max-new-tokens", "x"): "--max-new-tokens must be",
    ("generate", "--temperature", "-1"): "temperature must not be negative",
    ("generate", "--top-p", "2"): "top_p must be above 0",
    ("generate", "--stop", ""): "--stop must not be empty",
    ("generate", "--device", "gpu"): "device must be auto, cpu, cuda or cuda:N",
    ("generate", "--dtype", "bfloat"): "did you mean 'bfloat16'?",
    ("generate", "--prefill-kernel", "cudnn"): "--prefill-kernel must be",
    ("generate", "--tensor-parallel", "0"): "--tensor-parallel must be a positive number",
    ("generate", "--tensor-parallel", "2", "--kv-cache-host", "1GB"): "keeps whole heads",
    ("generate", "--model", "./nowhere"): "model folder './nowhere' does not exist",
    ("generate", "--model", "nowhere.gguf"): "model file 'nowhere.gguf' does not exist",
    ("generate", "--output", "out.csv"): "unknown extension '.csv'",
    ("generate", "--resume", "--overwrite"): "exclude each other",
    ("generate", "--config", "nowhere.toml"): "No such file",
    ("compare", "--strategies", "casual"): "did you mean 'causal'?",
    ("compare", "--fusions", "median"): "fusion must be one of",
    ("compare", "--num-segments", "0"): "--num-segments must be",
    ("compare", "--dtype", "float8"): "dtype must be",
    ("compare", "--model", "./nowhere"): "does not exist",
    ("show", "--strategy", "casual"): "did you mean 'causal'?",
    ("show", "--against", "casual"): "did you mean 'causal'?",
    ("show", "--segments", "3,x"): "--segments must be",
    ("show", "--row", "2"): "--row needs an --input or a --task",
    ("show", "--output", "mask.gif"): "unknown extension '.gif'",
    ("show", "nowhere.jsonl"): "No such file",
    ("show", "--tile", "0"): "--tile must be",
    ("bench", "--heads", "24:7"): "query heads must be a multiple of key heads",
    ("bench", "--dtype", "int8"): "dtype must be",
    ("bench", "--suffix", "0"): "--suffix must be",
    ("bench", "--input", "nowhere.jsonl"): "No such file",
    ("warmup", "--prompt-tokens", "0"): "--prompt-tokens must be",
    ("warmup", "--device", "mps"): "device must be",
    ("warmup", "--model", "./nowhere"): "does not exist",
    ("doctor", "--device", "mps"): "device must be",
    ("doctor", "--model", "./nowhere"): "does not exist",
    ("doctor", "--dtype", "float16"): "and --trust-remote-code need a --model",
    ("check", "casual"): "did you mean 'causal'?",
    ("precompute",): "precompute needs a folder to write to; name one: --kv-cache FOLDER",
    ("precompute", "--kv-cache", "kv", "--input", "nowhere.jsonl"): "No such file",
    ("kv-cache", "nowhere"): "No such file",
    ("kv-cache", ".", "--prune", "8G"): "--prune must be a size",
    ("eval", "nowhere.feather"): "No such file",
    ("new", "class"): "got 'class'",
    ("strategies", "casual"): "did you mean 'causal'?",
}


def test_wrong_values_of_every_command_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(list(ERRORS)),
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout == ""
    endings = [json.loads(line) for line in result.stderr.splitlines()]
    for (arguments, message), (ending, loaded) in zip(ERRORS.items(), endings, strict=True):
        assert (message in str(ending), loaded) == (True, []), (arguments, ending, loaded)
