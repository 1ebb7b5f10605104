"""``flexmask generate`` as a user runs it, on the bundled model."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.feather
import pytest
from safetensors.torch import load_file, save_file

from command import run_command
from flexmask.demo import model_path, questions_path
from flexmask.encoding.tokenization import load_tokenizer
from flexmask.errors import OutputError
from flexmask.results.result_writer import read_finished_rows, read_run_config
from flexmask_cli.app import main

COMMAND = [sys.executable, "-m", "flexmask_cli", "generate", "--device", "cpu"]


def run(*arguments):
    """Run a command in this process, where what is compiled serves all of them."""
    return run_command(*COMMAND[3:], *arguments)


def run_as_process(*arguments):
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def error_of(monkeypatch, capfd):
    """Runs a command that must fail; gives its one line on stderr."""

    def get(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["flexmask", *COMMAND[3:], *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        line = exit_.value.code  # a text: Python prints it to stderr and ends with status 1
        assert isinstance(line, str)
        assert "\n" not in line
        assert line.startswith("error: ")
        assert capfd.readouterr() == ("", "")
        return line

    return get


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def small(tmp_path):
    """Options of a run that compiles once for all tests: two rows at a time."""
    output = tmp_path / "out.feather"
    return ["--limit", 3, "--batch-size", 2, "--max-new-tokens", 6, "--output", output]


def test_the_demo_writes_rows_answers_and_its_configuration(small):
    result = run_as_process(*small, "--stop", "\\n", "-v")
    assert result.returncode == 0, result.stderr
    assert "accuracy:" in result.stdout
    assert "compilations: 2, of them 0 after the first rows" in result.stdout
    assert re.search(
        r"batch: 2 rows, \d+% of them in use over \d+ decode steps; 2 prefills", result.stdout
    )
    table = pyarrow.feather.read_table(small[-1])
    names = ["uuid", "answers", "paraphrases", "prediction", "generation"]
    assert table.column_names[:5] == names
    questions = [json.loads(line) for line in questions_path().read_text().splitlines()[:3]]
    assert table["uuid"].to_pylist() == [row["uuid"] for row in questions]
    assert table["paraphrases"].to_pylist() == [row["segments"] for row in questions]
    assert set(table["finish_reason"].to_pylist()) <= {"stop", "eos", "length"}
    config = read_run_config(small[-1])
    assert config.run["strategy"] == "ensemble_isolation"
    assert config.run["parameters"] == {"positions": "restart"}
    assert config.run["stop"] == ["\n"]
    assert config.environment["device"] == "cpu"


def test_standard_input_and_a_model_folder_are_read(small, monkeypatch):
    rows = "".join(
        json.dumps({"segments": [f"Q: Where is {name}?", f"Q: Tell me where {name} is."]}) + "\n"
        for name in ("Mirel", "Tasko")
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(rows))
    result = run(
        *small, "--input", "-", "--model", model_path(), "--strategy", "ensemble_isolation",
        "--param", "positions=sequential",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert read_run_config(small[-1]).run["parameters"] == {"positions": "sequential"}
    table = pyarrow.feather.read_table(small[-1])
    assert table["uuid"].to_pylist() == ["1", "2"]
    assert table["correct"].to_pylist() == [None, None]


def test_resuming_adds_the_rows_that_are_missing(small, error_of):
    assert run(*small, "--limit", 1).status == 0
    first = pyarrow.feather.read_table(small[-1])
    result = run(*small, "--resume")
    assert result.status == 0, result.err
    assert "rows: 2 generated" in result.out
    resumed = pyarrow.feather.read_table(small[-1])
    assert resumed.num_rows == 3
    assert resumed.slice(0, 1).equals(first)
    again = run(*small, "--resume")
    assert again.out.startswith("accuracy: ")
    assert again.out.endswith(f"3 rows in {small[-1]}\n")
    assert "made by a different run" in error_of(*small, "--resume", "--max-new-tokens", 7)
    assert "pass --resume" in error_of(*small)


def test_every_sample_has_a_row_and_is_resumed_by_itself(small, error_of):
    options = [*small, "--samples", 3, "--temperature", 1, "--num-segments", 2]
    assert error_of(*options[:-4]) == (
        "error: 3 samples need a temperature above 0, since at 0 all are the same"
    )
    assert run(*options, "--limit", 1).status == 0
    first = pyarrow.feather.read_table(small[-1])
    result = run(*options, "--resume")
    assert result.status == 0, result.err
    assert "fusion: attention-3-samples\nrows: 6 generated" in result.out
    table = pyarrow.feather.read_table(small[-1])
    assert table.slice(0, 3).equals(first)
    assert table["sample"].to_pylist() == [0, 1, 2] * 3
    assert len(set(table["uuid"].to_pylist())) == 3
    rows, questions = 9, 3
    evaluated = run_command("eval", small[-1])
    assert re.search(rf"out\.feather +{rows} +0 +{questions} ", evaluated.out), evaluated
    more = error_of(*options, "--samples", 4, "--resume")
    assert "made by a different run (fusion.samples: 3 → 4)" in more
    dry = run(*options, "--dry-run", "--limit", 1)
    assert dry.out.count("== ") == 1


def test_what_is_asked_for_of_tokens_is_in_columns_that_are_resumed_and_shown(small, error_of):
    asked = ["--segment-attention", "--top-logprobs", 2]
    assert "but fusion 'mean' fuses the logits of several" in error_of(
        *small, *asked, "--fusion", "mean"
    )
    assert run(*small, *asked, "--limit", 1).status == 0
    more = error_of(*small, "--resume")
    assert "made by a different run (" in more
    assert "segment_attention: True → not set" in more
    assert "top_logprobs: 2 → not set" in more
    assert run(*small, *asked, "--resume").status == 0
    rows = pyarrow.feather.read_table(small[-1]).to_pylist()
    for row in rows:
        count = row["generated_tokens"]
        assert len(row["segment_attention"]) == len(row["token_ids"]) == count
        for shares in row["segment_attention"]:
            assert len(shares) == len(row["paraphrases"]) + 2
            assert sum(shares) == pytest.approx(1)
        # Greedy decoding takes the most likely token.
        best = [(top[0]["token_id"], top[0]["logprob"]) for top in row["top_logprobs"]]
        assert best == list(zip(row["token_ids"], row["logprobs"], strict=True))
        assert "".join(top[0]["text"] for top in row["top_logprobs"]).startswith(row["generation"])
        assert all(len(top) == 2 for top in row["top_logprobs"])
    shown = run_command("show", small[-1], "--row", 1).out
    assert re.search(r"\nattention   P 0\.0%  S1 \d+\.\d%  .*  T \d+\.\d%\n", shown), shown
    assert re.search(r"\nlogprob     \S+ in \d+ tokens, \S+ the least likely\n", shown), shown
    lines = run(*small[:-2], "--output", "-", "--limit", 1, *asked).out
    found, want = json.loads(lines), rows[0]
    assert [pytest.approx(shares, abs=1e-5) for shares in want["segment_attention"]] == found[
        "segment_attention"
    ]
    assert found["logprobs"] == pytest.approx(want["logprobs"], abs=1e-5)


def test_each_prompt_alone_gives_a_row_where_the_fusion_says_so(
    small, tmp_path, monkeypatch, error_of
):
    monkeypatch.chdir(tmp_path)
    options = [*small[:-2], "--fusion", "each", "--num-segments", 2, "--stop", "\\n", "-v"]
    result = run(*options)
    assert result.status == 0, result.err
    assert "fusion: each, every prompt alone" in result.err
    assert "fusion: each\nrows: 6 generated" in result.out
    assert re.search("accuracy: .* of 6 exact, each question counted once", result.out)
    path = tmp_path / "outputs/demo/demo/ensemble_isolation-each-2.feather"
    rows = pyarrow.feather.read_table(path)
    assert rows["segment"].to_pylist() == [1, 2] * 3
    assert len(set(rows["uuid"].to_pylist())) == 3
    assert read_run_config(path).run["fusion"] == {"name": "each", "weights": None}
    other = ["--output", path, "--resume", "--fusion", "none", *options[-3:]]
    assert "fusion.name: 'each' → 'none'" in error_of(*small[:-2], "--num-segments", 2, *other)


@pytest.fixture
def other_model(tmp_path):
    """Copies the bundled model with another generation config or other weights."""

    def make(generation_config=(), change=lambda weights: None):
        folder = tmp_path / "other"
        shutil.copytree(model_path(), folder)
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(generation_config)))
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_verbose_tells_what_the_generation_config_of_the_model_does(small, other_model, error_of):
    folder = other_model(
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.3}
    )
    result = run(*small, "--limit", 1, "--model", folder, "-v")
    assert result.status == 0, result.err
    assert "generation config ends rows with: 1, 201\n" in result.err
    assert "generation config applies: RepetitionPenaltyLogitsProcessor\n" in result.err
    assert re.search(r"floor: \d+% of .* s of prefill, \d+% of .* s of decode", result.err)
    would = "generation config would sample (temperature=0.6, top_p=0.9); this run does as --temp"
    assert would in result.err
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 3}))
    message = error_of(*small, "--overwrite", "--model", folder)
    assert "the model's generation config asks for beam search (num_beams=3)" in message


def test_rows_with_invalid_logits_are_skipped_or_named(small, tmp_path, other_model, error_of):
    tokenizer = load_tokenizer(str(model_path()))
    names = ("Mirel", "Zanzibar", "Tasko")
    texts = [f"Q: Where is {name}?" for name in names]
    rows = [{"uuid": name, "segments": [text]} for name, text in zip(names, texts, strict=True)]
    of_each = [set(tokenizer.encode(text)) for text in texts]
    spoilt = min(of_each[1] - of_each[0] - of_each[2])

    def spoil(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.embed_tokens.weight"][spoilt] = float("nan")

    folder = other_model(change=spoil)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    options = [*small, "--input", write_rows(tmp_path / "rows.jsonl", rows), "--model", folder]
    message = error_of(*options, "--quiet")
    assert "rows.jsonl:2 (request 'Zanzibar'): token 1: the model's logits hold NaN" in message
    result = run(*options, "--overwrite", "--on-error", "skip")
    assert result.status == 0, result.err
    table = pyarrow.feather.read_table(small[-1])
    assert table["uuid"].to_pylist() == list(names)
    assert [error is None for error in table["error"].to_pylist()] == [True, False, True]


def test_a_segment_without_shared_ending_warns_in_one_line(small, tmp_path):
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"segments": ["Q: one two", "Q: three four?"]}] * 1
    )
    result = run(*small, "--input", rows)
    assert result.status == 0, result.err
    assert result.err.count("warning: the segments share no ending") == 1


GOOD = {"uuid": "a", "segments": ["Q: one", "Q: two"], "suffix": "\nA:"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"uuid": "b", "segments": []}], "rows.jsonl:2: segments"),
        ([GOOD, {"uuid": "b"}], "rows.jsonl:2: "),
        ([{**GOOD, "segments": ["Q: one", " "]}], "rows.jsonl:1: segment 2 is empty"),
        ([GOOD, GOOD], "rows.jsonl:2: uuid 'a'"),
        ([GOOD, "text"], "rows.jsonl:2: "),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(small, tmp_path, rows, message, error_of):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert message in error_of(*small, "--input", path)
    assert not small[-1].exists()


def test_unreadable_json_is_named_by_line(small, tmp_path, error_of):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{broken\n")
    assert f"{path}:2: not JSON" in error_of(*small, "--input", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "ensemble"], "unknown strategy 'ensemble'; known: "),
        (["--param", "window=3"], "has no parameter 'window'; it takes: positions"),
        (["--param", "positions=up"], "positions must be restart|sequential, got 'up'"),
        (["--param", "positions"], "--param takes KEY=VALUE, got 'positions'"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--model", "./nowhere"], "model folder './nowhere' does not exist"),
        (["--batch-size", "many"], "--batch-size must be a positive number or auto, got 'many'"),
        (["--dtype", "float8"], "dtype must be auto, float32, bfloat16, float16, got 'float8'"),
        (["--device", "gpu"], "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "mps"], "device must be auto, cpu, cuda or cuda:N, got 'mps'"),
        (["--temperature", "-1"], "temperature must not be negative, got -1.0"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--max-new-tokens", "5000"], "questions.jsonl:1: needs positions up to"),
        (["--num-segments", "9"], "questions.jsonl:1: 9 segments asked for, got 5"),
        (["--chat-template"], "this tokenizer has no chat template"),
        (
            ["--fusion", "avg"],
            "fusion must be one of attention, none, each, mean, mean_prob, max, weighted_",
        ),
        (["--fusion", "weighted_max"], "fusion 'weighted_max' needs weights: column (one number"),
        (["--fusion-weights", "column"], "fusion 'attention' takes no weights; weighted_mean and"),
        (["--column", "weights=w"], "--column weights=… is read with --fusion-weights column"),
        (["--fusion", "mean"], "questions.jsonl:1: its 5 prompts run together, which takes a ba"),
        (
            ["--fusion", "weighted_mean", "--fusion-weights", "column"],
            "questions.jsonl:1: fusion 'weighted_mean' by column needs weights, a number for each",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(small, arguments, message, error_of):
    assert message in error_of(*small, *arguments)
    assert not small[-1].exists()


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_an_error(small, error_of):
    assert "torch sees no CUDA GPU" in error_of(*small, "--device", "cuda")


def test_a_folder_without_weights_is_an_error(small, tmp_path, error_of):
    shutil.copytree(model_path(), tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    assert "has no weights in safetensors" in error_of(*small, "--model", tmp_path / "bare")


def test_an_unwritable_output_is_found_before_the_model_loads(small, tmp_path, error_of):
    (tmp_path / "file").write_text("")
    line = error_of(*small[:-1], tmp_path / "file" / "out.feather", "--model", "no-such/model")
    assert str(tmp_path / "file") in line


def test_an_error_ends_with_status_one_and_one_line_on_stderr(small):
    result = run_as_process(*small, "--strategy", "nothing")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: unknown strategy 'nothing'")
    assert result.stderr.count("\n") == 1


def test_an_interrupt_keeps_the_finished_rows_and_says_so(small, tmp_path):
    output = tmp_path / "long.feather"
    command = [*COMMAND, "--batch-size", "2", "--max-new-tokens", "6", "--output", output]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        journal = tmp_path / "long.feather.partial"
        while process.poll() is None and not (journal.exists() and read_rows(journal)):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == b""
    assert b"rows are kept, --resume does the rest" in stderr
    assert read_rows(journal) >= 2
    assert not output.exists()


def read_rows(journal):
    try:
        return read_finished_rows(journal).num_rows
    except OutputError:  # opened, and nothing in it yet
        return 0
