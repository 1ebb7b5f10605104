"""`Predictor` on batches of arrays and tables: the engine's generations, errors in a column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flexmask.engine import Engine
from flexmask.errors import OptionError
from flexmask.ray_data import NEW_COLUMNS, Predictor
from flexmask.request import Request
from flexmask.sampling import Sampling

ROWS: list[dict[str, Any]] = [
    {"uuid": "a", "asked": ["t5 t6", "t7"], "suffix": " t8", "answers": ["t3"]},
    {"uuid": "b", "asked": [], "suffix": None, "answers": None},
    {"uuid": "a", "asked": ["t9 t10"], "suffix": " t8", "answers": None},
    {"uuid": "c", "asked": ["t9 " * 5000], "suffix": " t8", "answers": None},
]
OPTIONS: dict[str, Any] = {
    "strategy": "causal",
    "columns": {"segments": "asked"},
    "max_new_tokens": 4,
    "batch_size": 2,
}


@pytest.fixture
def predictor(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    monkeypatch.setattr(Predictor, "load_engine", lambda *_, **__: engine)
    return Predictor(**OPTIONS)


def test_a_batch_gets_the_engines_generations_and_errors_in_columns(
    predictor: Predictor, engine: Engine
) -> None:
    table = pa.Table.from_pylist(ROWS)
    arrays: dict[str, Any] = {
        name: np.array([np.array(row[name], object) if isinstance(row[name], list) else row[name]
                        for row in ROWS], object)
        for name in ROWS[0]
    }  # fmt: skip
    found = predictor(table)
    assert isinstance(found, pa.Table)
    assert found.column_names == [*ROWS[0], *NEW_COLUMNS]
    rows = found.to_pylist()
    assert [row["error"] for row in rows[:3]] == [
        None,
        "segments must hold at least one text, got none",
        None,
    ]
    assert "the model's context is" in rows[3]["error"]
    good = [Request(tuple(ROWS[n]["asked"]), suffix=" t8", uuid="a") for n in (0, 2)]
    expected = list(engine.generate(good, "causal", max_new_tokens=4, batch_size=2))
    assert [rows[n]["generation"] for n in (0, 2)] == [one.text for one in expected]
    assert [rows[n]["prompt_tokens"] for n in (0, 2)] == [one.prompt_tokens for one in expected]
    assert [row["correct"] for row in rows] == [rows[0]["prediction"] == "t3", None, None, None]
    again = predictor(arrays)
    assert isinstance(again, dict)
    for name in NEW_COLUMNS:
        assert list(again[name]) == found[name].to_pylist()


def test_a_sampled_row_needs_a_uuid(engine: Engine, predictor: Predictor) -> None:
    sampled = Predictor(**{**OPTIONS, "columns": {}}, sampling=Sampling(temperature=1.0))
    found = sampled(pa.table({"segments": [["t5 t6"]]}))
    assert isinstance(found, pa.Table)
    assert "needs a uuid" in found["error"][0].as_py()


def test_options_that_a_predictor_cannot_follow_are_refused() -> None:
    for options, message in (
        ({"fusion": "each"}, "gives a row several generations"),
        ({"on_refused": print}, "on_refused is not an option"),
        ({"columns": {"question": "asked"}}, "no column 'question'"),
    ):
        with pytest.raises(OptionError, match=message):
            Predictor(**options)  # type: ignore[arg-type]
