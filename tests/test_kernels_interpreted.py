"""The decode step's kernels on a CPU, in Triton's interpreter: results, and what they touch.

On a GPU a read past the end of a tensor mostly goes unseen; here each access is checked. Launches
are those of a GPU, but that no program starts early (that part is assembly), and in float32 and
float16 (the interpreter multiplies no bfloat16).
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest
import torch

from interpreted_kernels import check_decode_attention, check_projection, run, start, stray

if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

SMALL_GPU = {"tile_bytes": 42_000}


@pytest.fixture(scope="module")
def interpreted():
    """Runs a check in a process of its own, where kernels are interpreted."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawned, initializer=start) as process:
        yield lambda check, **case: process.submit(run, check, **case).result()


@pytest.mark.parametrize("access", ["load of", "store to", "atomic_rmw on", "atomic_cas on"])
def test_an_access_between_the_rows_of_a_view_is_found(interpreted, access):
    with pytest.raises(IndexError, match=f"{access} x_ptr: 2 of 4 lanes .* the first is at 2 of"):
        interpreted(stray, access=access)


@pytest.mark.parametrize("dim", [16, 48, 64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize(
    ("softcap", "is_rotated"), [(0.0, True), (5.0, False)], ids=["rotary", "softcap"]
)
def test_decode_attention_stays_inside_its_tensors(interpreted, softcap, is_rotated, group, dim):
    chosen = interpreted(
        check_decode_attention,
        slots=[0, 127],
        capacity=128,
        heads=(2 * group, 2),
        dims=(dim, dim),
        softcap=softcap,
        is_rotated=is_rotated,
    )
    assert chosen["SPLITS"] == 2


ONE_SHARE = {"slots": [0, 63], "capacity": 64, "heads": (3, 1), "dims": (16, 16)}
TWO_SHARES = {"slots": [90, 5], "capacity": 128, "heads": (6, 2), "dims": (16, 16)}
EIGHT_SHARES = {"slots": [0, 65, 511], "capacity": 512, "heads": (3, 1), "dims": (16, 16)}
COPIES = {"slots": [90, 5, 70], "sharing": [(2, 13, 4), (0, 0, 0), (2, 13, 1)]}
MANY_ROWS = {"slots": range(60, 256, 3), "capacity": 256, "heads": (1, 1), "dims": (16, 16)}


@pytest.mark.parametrize(
    ("case", "choice"),
    [
        pytest.param(ONE_SHARE, {"SPLITS": 1, "BLOCK_N": 64}, id="one share"),
        pytest.param(EIGHT_SHARES, {"SPLITS": 8, "BLOCK_N": 64}, id="eight shares"),
        pytest.param(MANY_ROWS, {"SPLITS": 1, "BLOCK_N": 128}, id="many rows"),
        pytest.param(TWO_SHARES | {"heads": (20, 1)}, {"BLOCK_G": 32}, id="groups of 20"),
        pytest.param(TWO_SHARES | {"dims": (48, 16)}, {"BLOCK_V": 16}, id="narrow values"),
        pytest.param(TWO_SHARES | {"dims": (16, 48)}, {"BLOCK_V": 64}, id="wide values"),
        pytest.param(TWO_SHARES | {"is_transposed": True}, {}, id="heads with gaps"),
        pytest.param(TWO_SHARES | {"dtype": torch.float16}, {}, id="float16"),
        pytest.param(TWO_SHARES | COPIES, {"HAS_TABLE": True, "SPLITS": 2}, id="copies"),
        pytest.param(
            TWO_SHARES | COPIES | {"softcap": 5.0, "dims": (48, 48)}, {}, id="copies, softcap"
        ),
        pytest.param(
            ONE_SHARE | {"sharing": [(0, 0, 0), (0, 0, 0)]}, {"SPLITS": 1}, id="no copies"
        ),
        pytest.param(
            MANY_ROWS | {"sharing": [(3, 11, 1 + row % 5) for row in range(66)]},
            {"AHEAD": 0},
            id="copies in many rows",
        ),
        pytest.param(
            MANY_ROWS | {"heads": (20, 1), "sharing": [(3, 11, 2), (0, 0, 0)] * 33},
            {"BLOCK_G": 32},
            id="copies in some rows",
        ),
        pytest.param(
            TWO_SHARES | {"dims": (128, 128)} | SMALL_GPU, {"BLOCK_N": 16}, id="small GPU"
        ),
    ],
)
def test_decode_attention_stays_inside_its_tensors_in_tiles_for(interpreted, case, choice):
    chosen = interpreted(check_decode_attention, **case)
    assert choice.items() <= chosen.items()


@pytest.mark.parametrize("has_more", [False, True], ids=["bare", "bias-norm-residual"])
@pytest.mark.parametrize("width", [200, 384])
@pytest.mark.parametrize("rows", [1, 3, 16, 20])
@pytest.mark.parametrize(
    ("sizes", "activation"),
    [((70,), ""), ((20, 12), ""), ((20, 6, 6), ""), ((20, 20), "silu"), ((21, 21), "gelu_tanh")],
    ids=str,
)
def test_projections_stay_inside_their_tensors(
    interpreted, sizes, activation, rows, width, has_more
):
    interpreted(
        check_projection,
        rows=rows,
        width=width,
        sizes=sizes,
        activation=activation,
        has_bias=has_more,
        has_norm=has_more,
        has_residual=has_more,
    )


@pytest.mark.parametrize("weight_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(
    ("sizes", "activation"), [((70,), ""), ((20, 6, 6), ""), ((20, 20), "silu")], ids=str
)
def test_projections_by_weights_of_8_bits_are_scaled_once_for_each_output(
    interpreted, sizes, activation, rows, weight_dtype
):
    interpreted(
        check_projection,
        rows=rows,
        width=384,
        sizes=sizes,
        activation=activation,
        has_bias=rows > 1,
        has_norm=True,
        weight_dtype=weight_dtype,
    )


ONE_ROW = {"rows": 1, "width": 2304, "sizes": (10,)}
FEW_ROWS = {"rows": 3, "width": 1100, "sizes": (40, 30), "has_bias": True}
MORE_ROWS = {"rows": 20, "width": 384, "sizes": (70, 70), "activation": "gelu_tanh"}


@pytest.mark.parametrize(
    ("case", "choice"),
    [
        pytest.param(ONE_ROW, {"BLOCK_K": 256, "AHEAD": 6}, id="six tiles ahead"),
        pytest.param(ONE_ROW | {"width": 200}, {"BLOCK_K": 256, "AHEAD": 1}, id="one tile"),
        pytest.param(ONE_ROW | {"width": 4608}, {"BLOCK_K": 512, "AHEAD": 1}, id="one tile ahead"),
        pytest.param(FEW_ROWS, {"BLOCK_M": 16, "SPLITS": 3}, id="three shares"),
        pytest.param(FEW_ROWS | {"width": 1792}, {"BLOCK_K": 256, "SPLITS": 4}, id="four shares"),
        pytest.param(FEW_ROWS | {"rows": 33}, {"BLOCK_K": 64, "SPLITS": 4}, id="33 rows"),
        pytest.param(MORE_ROWS | SMALL_GPU, {"BLOCK_K": 32, "STAGES": 2}, id="small GPU"),
        pytest.param(MORE_ROWS | {"dtype": torch.float16}, {"BLOCK_K": 128}, id="float16"),
        pytest.param(
            FEW_ROWS | {"weight_dtype": torch.float8_e4m3fn},
            {"BLOCK_M": 64, "SPLITS": 3},
            id="float8",
        ),
        pytest.param(
            FEW_ROWS | {"weight_dtype": torch.int8},
            {"BLOCK_M": 4, "SPLITS": 3, "HAS_DIGITS": True},
            id="int8",
        ),
    ],
)
def test_projections_stay_inside_their_tensors_in_tiles_for(interpreted, case, choice):
    chosen = interpreted(check_projection, **case)
    assert choice.items() <= chosen.items()
