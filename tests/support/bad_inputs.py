"""Lists unusual and bad inputs: what a layer is given, and the error or answer that it must give.

A row describes a normalization layer with NumPy arrays, so that other libraries can run it too: x, the options, and the
variables loaded into the layer. It must give an error that says what is wrong, or the float64 answer of
bad_input_answers.py. test_bad_inputs.py runs every row through functional, linen and nnx, eagerly and traced;
fixtures/make_bad_inputs_peers.py runs it through other libraries, for docs/background/bad_input.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table; `x()` returns the input of the layer."""

    name: str
    x: Callable[[], Any]
    train: bool = True
    axis: Any = -1
    epsilon: Any = 1e-5
    momentum: Any = 0.9
    mask: Any = None
    dtype: Any = None  # of the output
    channels: tuple[int, ...] = (3,)  # the shape of the variables
    affine: bool = False
    loaded: dict[str, Any] = dataclasses.field(default_factory=dict)  # replace default mean, var, scale, bias
    x64: bool = False
    error: type[Exception] | None = None
    message: str = ""  # of the error, a pattern
    as_data: str = ""  # "mask" or "var": an error as NumPy array; NaN as jax.Array, whose values a trace cannot see
    nan: tuple[int, ...] = ()  # channels where NaN is right, besides those where the float64 answer is NaN
    warns: bool = False  # of one row

    def __str__(self):
        return self.name

    @property
    def variables(self):
        """Returns mean, var and, in an affine layer, scale and bias: all different, so that a mix-up is seen."""
        n = int(np.prod(self.channels))
        start = {"mean": np.linspace(-1, 1, n), "var": np.linspace(0.5, 2, n)}
        if self.affine:
            start |= {"scale": np.linspace(0.5, 1.5, n), "bias": np.linspace(-1, 1, n)}
        usual = {k: v.reshape(self.channels).astype(np.float64 if self.x64 else np.float32) for k, v in start.items()}
        return usual | self.loaded


def normal(*shape, dtype=np.float32, loc=0.5, scale=1.0):
    """Returns a function that draws normal values of a shape, (6, 3) by default."""

    def draw():
        values = np.random.default_rng(0).normal(loc, scale, shape or (6, 3))
        return (values + 1j * values[::-1] if np.dtype(dtype).kind == "c" else values).astype(dtype)

    return draw


def integers(low, high, dtype, shape=(6, 3)):
    return lambda: np.random.default_rng(0).integers(low, high, shape).astype(dtype)


def constant(value, dtype=np.float32, shape=(6, 3)):
    return lambda: np.full(shape, value, dtype)


def holding(value, *at, train=None):
    """Returns a function that draws normal values with `value` at some positions (row, channel)."""

    def draw():
        x = normal()()
        for position in at:
            x[position] = value
        return x

    return draw


def given(value):
    return lambda: value


F8, F8_5, F4, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn, ml_dtypes.bfloat16
NO_NUMBERS = dict(error=TypeError, message="x must be an array of numbers")
NO_AXIS = dict(error=TypeError, message="axis must be an integer")
CHANNELS = dict(
    error=ValueError, message="must have (the shape of the feature|shape|one feature shape)|num_features must"
)
EPSILON = dict(error=ValueError, message=r"epsilon must be finite and in")
MOMENTUM = dict(error=ValueError, message=r"momentum must be finite and in \[0, 1\]; .* weight of the OLD")
MASK = dict(error=ValueError, message=r"mask must be broadcastable to x; got mask \(.*\) for x \(")
WEIGHTS = dict(error=ValueError, message="mask holds weights, which must be finite and not negative", as_data="mask")
VARIANCE = dict(train=False, error=ValueError, message="var holds variances, which must be finite", as_data="var")
ROW, ONES = (6, 1), np.ones(3, np.float32)


def _row(*weights, dtype=np.float32):
    return np.array(weights, dtype)[:, None]


CASES = [
    # dtypes of x
    Case("uint8 image", integers(0, 256, np.uint8, (2, 4, 4, 3))),
    Case("uint8 image, evaluation", integers(0, 256, np.uint8, (2, 4, 4, 3)), train=False),
    Case("int8", integers(-128, 128, np.int8)),
    Case("int32", integers(-9, 9, np.int32)),
    Case("int32 over 2^24, read as float32", integers(2**25, 2**26, np.int32)),
    Case("int64 without x64", integers(-9, 9, np.int64)),
    Case("int64 with x64", integers(-9, 9, np.int64), x64=True),
    Case("uint32", integers(0, 99, np.uint32)),
    Case("bool", lambda: integers(0, 2, bool)()),
    Case("int4", integers(-8, 8, ml_dtypes.int4)),
    Case("uint4", integers(0, 16, ml_dtypes.uint4)),
    Case("float8_e4m3fn", normal(dtype=F8)),
    Case("float8_e5m2", normal(dtype=F8_5)),
    Case("float8 with scale and bias", normal(dtype=F8), affine=True),
    Case("float8, evaluation", normal(dtype=F8), train=False),
    Case("float4_e2m1fn", normal(dtype=F4)),
    Case("float16", normal(dtype=np.float16)),
    Case("bfloat16", normal(dtype=BF16)),
    Case("bfloat16 at mean/std 100", normal(64, 3, dtype=BF16, loc=100)),
    Case("float64 without x64", normal(dtype=np.float64)),
    Case("float64 with x64", normal(dtype=np.float64), x64=True),
    Case("float64 with x64 at mean/std 1e6", normal(dtype=np.float64, loc=1e6), x64=True),
    Case("complex64", normal(dtype=np.complex64)),
    Case("complex64, evaluation", normal(dtype=np.complex64), train=False),
    Case("complex64 with a mask", normal(dtype=np.complex64), mask=_row(1, 0, 1, 1, 0, 1, dtype=bool)),
    Case("complex128 with x64", normal(dtype=np.complex128), x64=True),
    Case(
        "complex x for a real output", normal(dtype=np.complex64), dtype="float32", error=TypeError, message="complex"
    ),
    # what holds no numbers
    Case("None", given(None), **NO_NUMBERS),
    Case("text", given("abc"), **NO_NUMBERS),
    Case("array of text", given(np.array([["a", "b", "c"]])), **NO_NUMBERS),
    Case("array of objects", given(np.array([[None, 1, 2]], object)), **NO_NUMBERS),
    Case("dates", given(np.array([["2020-01-01"] * 3], "datetime64[D]")), **NO_NUMBERS),
    Case("ragged list", given([[1.0, 2.0, 3.0], [4.0]]), **NO_NUMBERS),
    Case("dict", given({"x": 1.0}), **NO_NUMBERS),
    Case("record array", given(np.zeros((6, 3), [("a", "f4"), ("b", "f4")])), **NO_NUMBERS),
    Case("NumPy masked array", lambda: np.ma.masked_less(normal()(), 0), **NO_NUMBERS),
    # containers and memory
    Case("list", lambda: normal()().tolist()),
    Case("list of integers", lambda: integers(0, 9, np.int32)().tolist()),
    Case("tuple of arrays", lambda: tuple(normal()())),
    Case("NumPy matrix", lambda: np.asarray(normal()()).view(np.matrix)),
    Case("Fortran order", lambda: np.asfortranarray(normal()())),
    Case("strided", lambda: normal(12, 6)()[::2, ::2]),
    Case("reversed", lambda: normal()()[::-1, ::-1]),
    Case("transposed", lambda: normal(3, 6)().T),
    Case("broadcast, stride 0", lambda: np.broadcast_to(normal(6, 1)(), (6, 3))),
    Case("big-endian", normal(dtype=">f4")),
    Case("read-only", lambda: np.frombuffer(normal()().tobytes(), np.float32).reshape(6, 3)),
    # ranks
    Case("rank 0", given(np.float32(2)), error=ValueError, message="axis must name axes of x"),
    Case("rank 0, evaluation", given(np.float32(2)), train=False, error=ValueError, message="axis must name axes of x"),
    Case("Python scalar", given(2.0), error=ValueError, message="axis must name axes of x"),
    Case("rank 1, training", normal(3), warns=True),
    Case("rank 1, evaluation", normal(3), train=False),
    Case("rank 3", normal(4, 5, 3)),
    Case("rank 4, channels first", normal(2, 3, 4, 5), axis=1),
    Case("rank 5", normal(2, 2, 3, 2, 3)),
    Case("rank 6", normal(2, 2, 2, 1, 2, 3)),
    Case("rank 6, axis 2, evaluation", normal(2, 2, 3, 1, 2, 2), axis=2, train=False),
    # axes
    Case("axis too large", normal(), axis=2, error=ValueError, message=r"axis=2 for x of shape \(6, 3\)"),
    Case("axis too small", normal(), axis=-3, error=ValueError, message=r"axis=-3 for x of shape \(6, 3\)"),
    Case("axis twice", normal(), axis=(1, -1), error=ValueError, message="must not repeat an axis"),
    Case("no axis", normal(), axis=(), error=ValueError, message="must not be empty"),
    Case("axis None", normal(), axis=None, **NO_AXIS),
    Case("axis 1.0", normal(), axis=1.0, **NO_AXIS),
    Case("axis True", normal(), axis=True, **NO_AXIS),
    Case("axis of text", normal(), axis="C", **NO_AXIS),
    Case("axis of the rows", normal(6, 3), axis=0, **CHANNELS),
    Case("two axes", normal(5, 3, 4), axis=(1, 2), channels=(3, 4)),
    Case("two axes in reverse order", normal(5, 3, 4), axis=(2, 1), channels=(3, 4)),
    Case("every axis a feature axis", normal(3, 4), axis=(0, 1), channels=(3, 4), warns=True),
    # empty batches
    Case("no rows", normal(0, 3)),
    Case("no rows, evaluation", normal(0, 3), train=False),
    Case("no rows, float16", normal(0, 3, dtype=np.float16)),
    Case("image without height", normal(2, 0, 4, 3)),
    Case("no channels", normal(6, 0), channels=(0,)),
    Case("no channels, evaluation", normal(6, 0), channels=(0,), train=False),
    Case("no channels, affine", normal(6, 0), channels=(0,), affine=True),
    Case("no rows and no channels", normal(0, 0), channels=(0,)),
    # few rows
    Case("one row", normal(1, 3), warns=True),
    Case("one row, affine", normal(1, 3), affine=True, warns=True),
    Case("one row of an image", normal(1, 1, 1, 3), warns=True),
    Case("one row, evaluation", normal(1, 3), train=False),
    Case("one image of four positions", normal(1, 2, 2, 3)),
    Case("two rows", normal(2, 3)),
    Case("two equal rows", constant(3.0, shape=(2, 3))),
    Case("one row that a mask leaves", normal(), mask=_row(0, 0, 1, 0, 0, 0, dtype=bool)),
    # wrong channel counts
    Case("four channels for three", normal(6, 4), **CHANNELS),
    Case("four channels for three, affine", normal(6, 4), affine=True, **CHANNELS),
    Case("four channels for three, evaluation", normal(6, 4), train=False, **CHANNELS),
    Case("one channel for three", normal(6, 1), **CHANNELS),
    Case("one channel for three, affine", normal(6, 1), affine=True, **CHANNELS),
    Case("one channel for three, evaluation", normal(6, 1), train=False, **CHANNELS),
    Case("three channels for one", normal(), channels=(1,), **CHANNELS),
    Case("three channels for one, affine", normal(), channels=(1,), affine=True, **CHANNELS),
    Case("three channels for one, evaluation", normal(), channels=(1,), train=False, **CHANNELS),
    Case("channels first, axis forgotten", normal(2, 3, 4, 5), **CHANNELS),
    Case("no channels for three", normal(6, 0), **CHANNELS),
    # wrong variables, as from the checkpoint of another model
    Case("scale of four", normal(), affine=True, loaded={"scale": np.ones(4, np.float32)}, **CHANNELS),
    Case("scale of one", normal(), affine=True, loaded={"scale": np.ones(1, np.float32)}, **CHANNELS),
    Case("scale a number", normal(), affine=True, loaded={"scale": np.float32(2)}, **CHANNELS),
    Case("scale a row", normal(), affine=True, loaded={"scale": np.ones((1, 3), np.float32)}, **CHANNELS),
    Case("scale of one for rank 1", normal(3), affine=True, train=False, loaded={"scale": ONES[:1]}, **CHANNELS),
    Case("bias of four", normal(), affine=True, loaded={"bias": np.ones(4, np.float32)}, **CHANNELS),
    Case("bias of one, evaluation", normal(), affine=True, train=False, loaded={"bias": ONES[:1]}, **CHANNELS),
    Case("bias a column", normal(3, 3), affine=True, loaded={"bias": np.ones((3, 1), np.float32)}, **CHANNELS),
    Case("mean of four", normal(), loaded={"mean": np.ones(4, np.float32)}, **CHANNELS),
    Case("mean of one, evaluation", normal(), train=False, loaded={"mean": ONES[:1]}, **CHANNELS),
    Case("var of one, evaluation", normal(), train=False, loaded={"var": ONES[:1]}, **CHANNELS),
    Case("var of one", normal(), loaded={"var": ONES[:1]}, **CHANNELS),
    Case("var a number, evaluation", normal(), train=False, loaded={"var": np.float32(1)}, **CHANNELS),
    Case("mean a column, evaluation", normal(3, 3), train=False, loaded={"mean": ONES[:, None]}, **CHANNELS),
    Case("NaN in the scale", normal(), affine=True, loaded={"scale": np.array([1, np.nan, 1], np.float32)}),
    Case("scale zero", normal(), affine=True, loaded={"scale": np.zeros(3, np.float32)}),
    Case("float16 scale and bias", normal(), affine=True, loaded={"scale": ONES.astype(np.float16)}),
    # running variances that are not valid, or are extreme
    Case("running variance -1", normal(), loaded={"var": np.array([1, -1, 1], np.float32)}, nan=(1,), **VARIANCE),
    Case("running variance -5e-6", normal(), loaded={"var": np.array([1, -5e-6, 1], np.float32)}, nan=(1,), **VARIANCE),
    Case("running variance NaN", normal(), loaded={"var": np.array([1, np.nan, 1], np.float32)}, nan=(1,), **VARIANCE),
    Case("running variance Inf", normal(), loaded={"var": np.array([1, np.inf, 1], np.float32)}, nan=(1,), **VARIANCE),
    Case("running variance 0", normal(), train=False, loaded={"var": np.zeros(3, np.float32)}),
    Case("running variance -0.0", normal(), train=False, loaded={"var": -np.zeros(3, np.float32)}),
    Case("running variance 1e-40", normal(), train=False, loaded={"var": np.full(3, 1e-40, np.float32)}),
    Case("running variance 1e38", normal(), train=False, loaded={"var": np.full(3, 1e38, np.float32)}),
    Case("running mean NaN", normal(), train=False, loaded={"mean": np.array([0, np.nan, 0], np.float32)}),
    Case("running mean 1e30", normal(), train=False, loaded={"mean": np.full(3, 1e30, np.float32)}),
    # epsilon
    Case("epsilon 0", normal(), epsilon=0.0, **EPSILON),
    Case("epsilon 0, evaluation", normal(), train=False, epsilon=0, **EPSILON),
    Case("epsilon 0, constant channel", constant(1.0), epsilon=0.0, **EPSILON),
    Case("epsilon -1e-5", normal(), epsilon=-1e-5, **EPSILON),
    Case("epsilon -1, evaluation", normal(), train=False, epsilon=-1.0, **EPSILON),
    Case("epsilon NaN", normal(), epsilon=float("nan"), **EPSILON),
    Case("epsilon Inf", normal(), epsilon=float("inf"), **EPSILON),
    Case("epsilon 1e-50, 0 in float32", constant(1.0), epsilon=1e-50, **EPSILON),
    Case("epsilon 1e-30, whose derivative overflows", constant(1.0), epsilon=1e-30, **EPSILON),
    Case("epsilon 1e-50 with x64", normal(dtype=np.float64), epsilon=1e-50, x64=True),
    Case("epsilon 1e-20, constant channel", constant(1.0), epsilon=1e-20),
    Case("epsilon 1e-12, float16", normal(dtype=np.float16), epsilon=1e-12),
    Case("epsilon 1e10", normal(), epsilon=1e10),
    Case("epsilon None", normal(), epsilon=None, error=TypeError, message="epsilon must be one real number"),
    Case("epsilon of text", normal(), epsilon="1e-5", error=TypeError, message="epsilon must be one real number"),
    Case("epsilon per channel", normal(), epsilon=ONES, error=TypeError, message="epsilon must be one real number"),
    # momentum
    Case("momentum 1.5", normal(), momentum=1.5, **MOMENTUM),
    Case("momentum -0.1", normal(), momentum=-0.1, **MOMENTUM),
    Case("momentum NaN", normal(), momentum=float("nan"), **MOMENTUM),
    Case("momentum of text", normal(), momentum="0.9", error=TypeError, message="momentum must be one real number"),
    Case("momentum per channel", normal(), momentum=ONES, error=TypeError, message="momentum must be one real number"),
    Case("momentum 0", normal(), momentum=0),
    Case("momentum 1", normal(), momentum=1),
    # masks
    Case("mask of another length", normal(), mask=np.ones((4, 1)), **MASK),
    Case("mask without an axis for the channels", normal(6, 5, 3), mask=np.ones((6, 5)), **MASK),
    Case("mask per row of rank 1", normal(), mask=np.ones(6), **MASK),
    Case("mask of higher rank", normal(), mask=np.ones((1, 6, 3)), **MASK),
    Case("mask larger than x", normal(1, 3), mask=np.ones((6, 1)), **MASK),
    Case("mask transposed", normal(), mask=np.ones((3, 6)), **MASK),
    Case("complex mask", normal(), mask=np.ones(ROW, complex), error=TypeError, message="mask must be bool"),
    Case("mask of text", normal(), mask="all", error=TypeError, message="mask must be an array of numbers"),
    Case("negative weight", normal(), mask=_row(1, -1, 1, 1, 1, 1), nan=(0, 1, 2), **WEIGHTS),
    Case("negative integer weight", normal(), mask=_row(1, -1, 1, 1, 1, 1, dtype=int), nan=(0, 1, 2), **WEIGHTS),
    Case("NaN weight", normal(), mask=_row(1, np.nan, 1, 1, 1, 1), nan=(0, 1, 2), **WEIGHTS),
    Case("Inf weight", normal(), mask=_row(1, np.inf, 1, 1, 1, 1), nan=(0, 1, 2), **WEIGHTS),
    Case("mask of zeros", normal(), mask=np.zeros(ROW, bool)),
    Case("mask True", normal(), mask=np.True_),
    Case("mask as a list", normal(), mask=[[True], [False], [True], [True], [False], [True]]),
    Case("uint8 weights", normal(), mask=_row(255, 0, 255, 255, 1, 255, dtype=np.uint8)),
    Case("int8 weights, sum over 127", normal(40, 3), mask=np.full((40, 1), 100, np.int8)),
    Case("float16 weights, sum over 65504", normal(40, 3), mask=np.full((40, 1), 6e4, np.float16)),
    Case("float8 weights", normal(), mask=_row(1, 0, 2, 1, 0.5, 1, dtype=F8)),
    Case("one channel masked whole", normal(), mask=np.array([[True, False, True]])),
    Case("weights 1e30", normal(), mask=np.full(ROW, 1e30, np.float32)),
    Case("weights 1e-20", normal(), mask=np.full(ROW, 1e-20, np.float32)),
    Case("weights 1e38, whose sum overflows", normal(), mask=np.full(ROW, 1e38, np.float32), nan=(0, 1, 2)),
    Case("weights 1e-36, which underflow", normal(), mask=np.full(ROW, 1e-36, np.float32), nan=(0, 1, 2)),
    Case("weights from 1e-9 to 1e9", normal(), mask=_row(1e-9, 1, 1e9, 1e9, 1e-3, 1e9)),
    Case("NaN at weight zero", holding(np.nan, (1, 0), (1, 2)), mask=_row(1, 0, 1, 1, 1, 1, dtype=bool)),
    Case("Inf at weight zero", holding(np.inf, (1, 0), (4, 2)), mask=_row(1, 0, 1, 1, 0, 1, dtype=bool)),
    # values
    Case("1e30", normal(scale=1e30)),
    Case("1e30 beside 1", lambda: normal()() * np.array([1e30, 1, 1e-3], np.float32)),
    Case("1e19, whose square is at the edge", normal(scale=1e19)),
    Case("1e30, evaluation", normal(scale=1e30), train=False),
    Case("3e38, at the end of float32", given(np.array([[3e38] * 3, [-3e38] * 3], np.float32)), nan=(0, 1, 2)),
    Case("one outlier of 1e20", holding(1e20, (0, 0))),
    Case("subnormal", normal(scale=1e-40, loc=0)),
    Case("variance subnormal", normal(scale=1e-20, loc=0)),
    Case("variance subnormal, epsilon 1e-20", normal(scale=1e-10, loc=0), epsilon=1e-20),
    Case("mean/std 1e3", normal(64, 3, loc=1e3)),
    Case("mean/std 1e4", normal(64, 3, loc=1e4)),
    Case("mean/std 1e5", normal(64, 3, loc=1e5)),
    Case("float16, sum over 65504", normal(4096, 3, dtype=np.float16, loc=50)),
    Case("float16 at 60000", normal(64, 3, dtype=np.float16, loc=6e4, scale=1e3)),
    Case("bfloat16, 4096 rows", normal(4096, 3, dtype=BF16)),
    Case("constant 0", constant(0.0)),
    Case("constant 1e-30", constant(1e-30)),
    Case("constant 1/3", constant(1 / 3)),
    Case("constant 1/3, 1000 rows", constant(1 / 3, shape=(1000, 3))),
    Case("constant 1234.5678", constant(1234.5678, shape=(77, 3))),
    Case("constant 99840, bfloat16", constant(99840, BF16, (100, 3))),
    Case("constant 65504, float16", constant(65504, np.float16, (100, 3))),
    Case("constant 3e7", constant(3e7, shape=(77, 3))),
    Case("constant 1e10", constant(1e10, shape=(77, 3))),
    Case("constant 1e30", constant(1e30, shape=(77, 3))),
    Case("constant 1e30, affine", constant(1e30, shape=(77, 3)), affine=True),
    Case("constant -1e18, bfloat16", constant(-1e18, BF16, (77, 3))),
    Case("NaN in one channel", holding(np.nan, (2, 1))),
    Case("Inf in one channel", holding(np.inf, (2, 1))),
    Case("-Inf in one channel", holding(-np.inf, (2, 1))),
    Case("Inf and -Inf in one channel", lambda: np.where(np.eye(6, 3) > 0, [np.inf, 1, 1], normal()()).astype("f4")),
    Case("NaN in one channel, affine", holding(np.nan, (2, 1)), affine=True),
    Case("NaN everywhere", constant(np.nan)),
    Case("NaN at one position, evaluation", holding(np.nan, (2, 1)), train=False),
    Case("Inf at one position, evaluation", holding(np.inf, (2, 1)), train=False),
    # dtype of the output
    Case(
        "output int32", normal(), dtype="int32", error=TypeError, message="dtype is that of the output and must be fl"
    ),
    Case("output bool", normal(), dtype="bool", error=TypeError, message="dtype is that of the output and must be fl"),
    Case("output complex64", normal(), dtype="complex64", error=TypeError, message="must be floating"),
    Case("output of a dtype that does not exist", normal(), dtype="float31", error=TypeError, message="must name one"),
    Case("output float16", normal(), dtype="float16"),
    Case("output bfloat16", normal(), dtype="bfloat16", train=False),
    Case("output float8", normal(), dtype=F8),
    Case("output float64 without x64", normal(), dtype="float64"),
]
