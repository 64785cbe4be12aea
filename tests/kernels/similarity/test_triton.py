"""The Triton kernels in Triton's interpreter, through the public losses, against the dense reference in
float64.
"""

import pytest
from interpreter import printed_by

RTOL = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1.5e-2}
CASES = {
    "info_nce[D=64-ragged]": {"loss": "info_nce", "M": 33, "N": 50, "D": 64},
    "info_nce[D=96-excluded]": {"loss": "info_nce", "M": 33, "N": 65, "D": 96, "exclude": 1},
    "info_nce[D=300-chunked]": {"loss": "info_nce", "M": 20, "N": 33, "D": 300, "exclude": 2},
    "info_nce[cold]": {"loss": "info_nce", "M": 33, "N": 65, "D": 128, "temperature": 0.01},
    "info_nce[one-row]": {"loss": "info_nce", "M": 1, "N": 3, "D": 64},
    "info_nce[empty-rows]": {"loss": "info_nce", "M": 5, "N": 1, "D": 16, "empty": True},
    "info_nce[bfloat16]": {"loss": "info_nce", "M": 33, "N": 50, "D": 128, "dtype": "bfloat16", "exclude": 1},
    "info_nce[bfloat16-cold]": {
        "loss": "info_nce",
        "M": 33,
        "N": 50,
        "D": 64,
        "dtype": "bfloat16",
        "temperature": 0.01,
    },
    "info_nce[float16]": {
        "loss": "info_nce",
        "M": 33,
        "N": 50,
        "D": 64,
        "dtype": "float16",
        "temperature": 0.5,
    },
    "info_nce[float16-cold]": {
        "loss": "info_nce",
        "M": 33,
        "N": 50,
        "D": 64,
        "dtype": "float16",
        "temperature": 0.01,
    },
    "info_nce[float16-small-weights]": {
        "loss": "info_nce",
        "M": 33,
        "N": 50,
        "D": 64,
        "dtype": "float16",
        "temperature": 0.01,
        "weight": 3e-4,
    },
    "info_nce[ring-float16]": {
        "loss": "info_nce",
        "M": 33,
        "N": 50,
        "D": 64,
        "dtype": "float16",
        "temperature": 0.5,
        "ring": True,
    },
    "nt_xent[queries-are-keys]": {"loss": "nt_xent", "M": 20, "N": 20, "D": 64},
    "nt_xent[queries-are-keys-float16]": {"loss": "nt_xent", "M": 20, "N": 20, "D": 96, "dtype": "float16"},
    "clip[both-directions]": {"loss": "clip", "M": 100, "N": 100, "D": 96},
    "clip[both-directions-bfloat16-chunked]": {
        "loss": "clip",
        "M": 20,
        "N": 20,
        "D": 200,
        "dtype": "bfloat16",
    },
    "logsumexp[bias]": {"loss": "logsumexp", "M": 40, "N": 33, "D": 64, "exclude": 1},
    "cross_entropy[teacher-wider]": {
        "loss": "cross_entropy",
        "M": 33,
        "N": 40,
        "D": 64,
        "E": 200,
        "bias": True,
    },
    "gessl[everything]": {"loss": "gessl", "M": 33, "N": 50, "D": 96, "E": 40, "exclude": 2, "bias": True},
    "gessl[D=256]": {"loss": "gessl", "M": 17, "N": 33, "D": 256},
    "gessl[cold]": {"loss": "gessl", "M": 17, "N": 33, "D": 64, "temperature": 0.01},
    "clip[cold]": {"loss": "clip", "M": 20, "N": 20, "D": 64, "temperature": 0.01},
    "gessl[bfloat16]": {
        "loss": "gessl",
        "M": 33,
        "N": 50,
        "D": 64,
        "exclude": 1,
        "bias": True,
        "dtype": "bfloat16",
    },
    "gessl[float16]": {"loss": "gessl", "M": 33, "N": 50, "D": 64, "exclude": 1, "dtype": "float16"},
}
for case in CASES.values():
    case.setdefault("dtype", "float32")
    case.setdefault("temperature", 0.1)


@pytest.fixture(scope="module")
def errors():
    return dict(zip(CASES, printed_by("losses_in_the_interpreter.py", list(CASES.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_losses_first_and_second_derivatives_equal_dense_float64(name, errors):
    case = CASES[name]
    tolerance = 5e-5 if case["dtype"] == "float32" and case["temperature"] == 0.01 else RTOL[case["dtype"]]
    expected = {"d_query", "d_key", "d_temperature", "dd_query", "dd_key", "dd_temperature", "dd_weight0"}
    if case["loss"] in ("gessl", "cross_entropy"):
        expected |= {"d_teacher_query", "d_teacher_key", "dd_teacher_query", "dd_teacher_key"}
    assert expected <= errors[name].keys()
    assert {part: error for part, error in errors[name].items() if not error <= tolerance} == {}
